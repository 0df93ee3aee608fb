"""What is done with averages: read by name, copied, held by a module, saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.conftest import Small, bits, same, train
from torch import nn

import ewma


@pytest.fixture
def ema(small: Small, sgd) -> ewma.ModelEMA:
    ema = ewma.ModelEMA(small, half_life=2).attach(sgd)
    train(small, sgd, 4)
    return ema


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    training = model.training
    with torch.no_grad():
        result = model.eval()(x)
    model.train(training)
    return result


X = torch.linspace(-1, 1, 12).view(3, 4)


def test_swapped_module_copy_and_file_are_one_model(ema, small: Small, tmp_path: Path) -> None:
    with ema.swapped():
        expected = output(small, X)
    assert not torch.equal(output(small, X), expected)

    copied, loaded = Small(), Small()
    ema.copy_to(copied)
    ema.save(tmp_path / "ema.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    for model in (ema.module(), copied, loaded):
        assert torch.equal(output(model, X), expected)

    ema.copy_to(small)
    assert torch.equal(output(small, X), expected)


def test_a_teacher_moves_with_every_update(ema, small: Small, sgd) -> None:
    teacher = ema.module()
    averages = dict(ema.named_parameters())
    for name, parameter in teacher.named_parameters():
        assert parameter.data_ptr() == averages[name].data_ptr()
        assert not parameter.requires_grad
    assert not teacher.training
    assert teacher.tied.weight is teacher.last.weight
    assert teacher.norm.running_mean.data_ptr() != small.norm.running_mean.data_ptr()
    train(small, sgd, 3)
    with ema.swapped():
        assert same(bits(teacher), bits(small))


def test_a_teacher_made_before_the_first_step(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, half_life=2).attach(sgd)
    teacher = ema.module()
    assert same(bits(teacher), bits(small))
    train(small, sgd, 3)
    with ema.swapped():
        assert same(bits(teacher), bits(small))


def test_a_teacher_in_training_mode_does_not_touch_the_student(ema, small: Small) -> None:
    before = bits(small)
    ema.module().train()(torch.randn(8, 4))
    assert same(bits(small), before)


def test_what_is_not_averaged_is_shared_with_the_model(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, half_life=2, only="last.*", buffers="leave").attach(sgd)
    train(small, sgd, 2)
    teacher = ema.module()
    assert teacher.first.weight.data_ptr() == small.first.weight.data_ptr()
    assert teacher.norm.running_mean.data_ptr() != small.norm.running_mean.data_ptr()
    assert not teacher.first.weight.requires_grad
    assert small.first.weight.requires_grad


def test_a_float16_models_teacher_holds_its_float16_averages() -> None:
    model = nn.Linear(4, 4).half()
    ema = ewma.ModelEMA(model, half_life=2, dtype=torch.float16)
    ema.update()
    teacher = ema.module()
    with torch.no_grad():
        model.weight += 1.0
    ema.update()
    average = dict(ema.named_parameters())["weight"]
    assert teacher.weight.data_ptr() == average.data_ptr()
    with ema.swapped():
        assert torch.equal(model.weight, teacher.weight)
    ema.copy_to(model)
    assert torch.equal(model.weight, average)


def test_a_teacher_of_another_dtype_is_a_copy_to_refresh(sgd) -> None:
    model = nn.Linear(4, 4).to(torch.bfloat16)
    ema = ewma.ModelEMA(model, half_life=2)
    ema.update()
    teacher = ema.module()
    assert teacher.weight.dtype == torch.bfloat16
    with torch.no_grad():
        model.weight += 1.0
    ema.update()
    average = dict(ema.named_parameters())["weight"]
    assert not torch.equal(teacher.weight, average.bfloat16())
    ema.copy_to(teacher)
    assert torch.equal(teacher.weight, average.bfloat16())


def test_teachers_of_wrapped_models_are_bare(small: Small) -> None:
    ema = ewma.ModelEMA(torch.compile(nn.DataParallel(small), backend="eager"), half_life=2)
    ema.update()
    assert type(ema.module()) is type(small)


def test_copying_into_another_model_names_what_differs(ema) -> None:
    other = Small()
    other.first = nn.Linear(4, 7)
    before = bits(other)
    with pytest.raises(
        ValueError, match=r"copy_to\(Small\) does not fit: of another shape: first.weight \[7, 4\] for \[6"
    ):
        ema.copy_to(other)
    assert same(bits(other), before)


def test_what_is_left_out_is_saved_raw(small: Small, sgd, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(small, half_life=2, only="last.*").attach(sgd)
    train(small, sgd, 3)
    ema.save(tmp_path / "ema.safetensors")
    saved = load_file(tmp_path / "ema.safetensors")
    assert saved.keys() == small.state_dict().keys()
    assert torch.equal(saved["first.weight"], small.first.weight)
    assert torch.equal(saved["last.weight"], dict(ema.named_parameters())["last.weight"])
    assert torch.equal(saved["tied.weight"], saved["last.weight"])


def test_each_view_saves_its_own(small: Small, sgd, tmp_path: Path) -> None:
    profiles = {"fast": ewma.Exponential(half_life=1), "wide": ewma.Power(sigma_rel=0.1)}
    ema = ewma.ModelEMA(small, profiles).attach(sgd)
    train(small, sgd, 5)
    for name, profile in profiles.items():
        ema[name].save(tmp_path / name)
        with safe_open(tmp_path / name, framework="pt") as file:
            told = file.metadata()
        assert (told["profile"], told["time"], told["count"]) == (repr(profile), "5.0", "5")
        metadata = json.loads(told["ewma"])
        assert metadata["profile"] == profile.to_json()
        assert metadata["clocks"][0]["count"] == 5.0
        assert metadata["clocks"][0]["time"] == 5.0
    before = {name: average.clone() for name, average in ema["wide"].named_parameters()}
    train(small, sgd, 2)
    ema["wide"].load(tmp_path / "wide")
    assert same(dict(ema["wide"].named_parameters()), before)
    assert (ema["wide"].count, ema["fast"].count) == (5, 7)


@pytest.mark.parametrize("damage", ["truncate", "another model", "foreign"])
def test_a_bad_file_changes_nothing(ema, small: Small, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ema.safetensors"
    if damage == "another model":
        other = ewma.ModelEMA(nn.Linear(2, 2), half_life=2)
        other.update()
        other.save(path)
        text = "the saved averages are not of this model: missing: first.weight"
    elif damage == "truncate":
        ema.save(path)
        path.write_bytes(path.read_bytes()[:100])
        text = "it is truncated or of another format"
    else:
        path.write_text("hello")
        text = "expected a safetensors file written by ModelEMA.save"
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match=text):
        ema.load(path)
    after = ema.state_dict()
    assert same(after["averages"]["average"], before["averages"]["average"])
    assert after["tracks"] == before["tracks"]


def test_batch_norm_statistics_recomputed_for_the_averages(ema, small: Small) -> None:
    loader = [torch.randn(32, 4) for _ in range(4)]
    before = bits(small)
    with ema.swapped():
        torch.optim.swa_utils.update_bn(loader, small)
        hidden = torch.cat([small.first(x) for x in loader])
        torch.testing.assert_close(small.norm.running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert same(bits(small), before)


def test_before_the_first_update_all_of_it_is_the_weights(small: Small, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(small, half_life=2)
    ema.save(tmp_path / "ema.safetensors")
    assert same(load_file(tmp_path / "ema.safetensors"), bits(small))
    copied = Small()
    ema.copy_to(copied)
    assert same(bits(copied), bits(small))


def test_averages_on_another_device_or_dtype_are_cast_back(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, half_life=2, dtype=torch.float64, device="cpu").attach(sgd)
    train(small, sgd, 3)
    with ema.swapped():
        for name, average in ema.named_parameters():
            assert torch.equal(small.get_parameter(name), average.float())
            assert average.dtype == torch.float64


def test_no_gradient_flows_into_averages(ema, small: Small) -> None:
    assert not any(average.requires_grad for _, average in ema.named_parameters())
    with ema.swapped():
        small(X).sum().backward()
        assert small.first.weight.grad is not None
    assert small.first.weight.requires_grad


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))),
        lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
        lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    ],
    ids=["script", "weight_norm", "spectral_norm", "parametrized weight_norm", "parametrized spectral_norm"],
)
def test_a_teacher_of_a_module_that_is_copied_in_a_way_of_its_own(make) -> None:
    model = make()
    ema = ewma.ModelEMA(model, half_life=1)
    for _ in range(3):
        ema.update()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.rand_like(parameter)
        model(X).sum().backward()
    teacher = ema.module()
    before = output(model, X)
    with ema.swapped():
        assert torch.equal(output(teacher, X), output(model, X))
    assert torch.equal(output(model, X), before)
    assert not torch.equal(output(teacher, X), before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
