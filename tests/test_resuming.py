"""Another tool's average goes on here as the tool itself would have gone on; or nothing is changed, and it says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Small, same, train
from tests.ranks import on_ranks
from tests.test_reading import each
from tests.tools import TOOLS, EmaPytorch, Nemo, Timm, Tool, TorchEMA, TorchEma, TorchSWA, run
from torch import nn
from torch.distributed.fsdp import fully_shard

import ewma
from ewma import checkpoints


@pytest.fixture
def model() -> Small:
    return Small().double()


def close(ema: ewma.ModelEMA, averages: dict[str, torch.Tensor]) -> bool:
    mine = dict(ema.named_parameters())
    return all(torch.allclose(mine[name], average, rtol=0, atol=1e-13) for name, average in averages.items())


@pytest.mark.parametrize("before", [1, 2, 3, 7])
@each(*TOOLS)
def test_it_goes_on_as_the_tool_does(model: Small, tmp_path: Path, tool: type[Tool], before: int) -> None:
    at_work = tool(model)
    run(at_work, before)
    ema = ewma.ModelEMA(model, tool.goes_on)
    count = None if tool.counts else before
    came = checkpoints.resume(ema, at_work.save(tmp_path / "last.ckpt"), count=count)
    assert (ema.count, came.source) == (before, tool.source)
    assert same(dict(ema.named_parameters()), at_work.averages())
    for _ in range(5):
        run(at_work, 1, also=ema.update)
        assert close(ema, at_work.averages())
    assert ema.count == before + 5


def test_it_does_not_start_anew(model: Small) -> None:
    """The test above would pass for short runs with anything that forgets quickly."""
    tool = TorchEMA(model)
    run(tool, 4)
    ema = ewma.ModelEMA(model, decay=0.75)
    run(tool, 5, also=ema.update)
    assert not close(ema, tool.averages())


@pytest.mark.parametrize(
    "profile", [ewma.Power(sigma_rel=0.1), ewma.profiles.cosine(steps=10, debias=False), ewma.Uniform()]
)
def test_any_profile_goes_on_from_where_it_would_be(model: Small, profile: ewma.profiles.Profile) -> None:
    tool = TorchSWA(model)
    run(tool, 6)
    ema = ewma.ModelEMA(model, profile)
    checkpoints.resume(ema, tool.content())
    weights = profile.weights(7)
    before = dict(tool.averages())["first.weight"].clone()
    run(tool, 1, also=ema.update)
    expected = (1.0 - weights[-1]) * before + weights[-1] * model.first.weight
    assert torch.allclose(dict(ema.named_parameters())["first.weight"], expected, rtol=0, atol=1e-13)


def test_the_saved_profile_on_demand_only(model: Small) -> None:
    tool = Nemo(model)
    run(tool, 3)
    ema = ewma.ModelEMA(model, half_life=100)
    with pytest.raises(
        ValueError, match=r"saved with .*, but this ModelEMA has Exponential\(half_life=100\).* Nothing"
    ):
        checkpoints.resume(ema, tool.content())
    assert ema.count == 0
    checkpoints.resume(ema, tool.content(), profile="saved")
    assert ema.profile == tool.profile
    ema = ewma.ModelEMA(model, half_life=100)
    checkpoints.resume(ema, tool.content(), profile="mine")
    assert ema.profile == ewma.Exponential(half_life=100)
    before = tool.averages()["first.weight"].clone()
    run(tool, 1, also=ema.update)
    alpha = ema.profile.alpha
    expected = (1.0 - alpha) * before + alpha * model.first.weight
    assert torch.allclose(dict(ema.named_parameters())["first.weight"], expected, rtol=0, atol=1e-13)


def test_mine_does_not_take_over_the_tools_offset(model: Small) -> None:
    kept = {"shadow_params": [p.detach() for p in model.parameters()], "num_updates": 4, "decay": 0.9}
    ema = ewma.ModelEMA(model, ewma.Uniform())
    checkpoints.resume(ema, kept, profile="mine")
    assert ema.tracks["average"].clock.weight == 4.0


def test_a_count_that_is_not_told_is_asked_for(model: Small) -> None:
    tool = Timm(model)
    run(tool, 3)
    ema = ewma.ModelEMA(model, decay=0.75)
    with pytest.raises(
        ValueError, match=r"timm, state_dict_ema: .*does not tell how many updates .* resume\(..., count=10_000\)"
    ):
        checkpoints.resume(ema, tool.content())
    assert ema.count == 0
    checkpoints.resume(ema, tool.content(), count=10_000)
    assert ema.count == 10_000


def test_what_has_averaged_nothing(model: Small) -> None:
    ema = ewma.ModelEMA(model, decay=0.75)
    with pytest.raises(ValueError, match=r"torch AveragedModel, ema: it has averaged nothing yet \(count=0\)"):
        checkpoints.resume(ema, TorchEMA(model).content())


def test_a_wrong_checkpoint_changes_nothing(model: Small, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(model, decay=0.75)
    ema.update()
    before = {name: tensor.clone() for name, tensor in ema.named_parameters()}
    other = Small().double()
    other.last = nn.Linear(6, 3).double()
    tool = TorchEMA(other)
    tool.module.update_parameters(other)
    with pytest.raises(ValueError, match=r"of another shape: last.weight \[3, 6\] for \[6, 6\]"):
        checkpoints.resume(ema, tool.content())
    (tmp_path / "last.pt").write_bytes(TorchEMA(model).save(tmp_path / "last.pt").read_bytes()[:-400])
    with pytest.raises(ValueError, match="truncated or damaged"):
        checkpoints.resume(ema, tmp_path / "last.pt")
    assert same(before, dict(ema.named_parameters()))
    assert ema.count == 1


def test_buffers_go_by_the_policy(model: Small) -> None:
    tool = TorchEMA(model)
    run(tool, 3)
    averaged = ewma.ModelEMA(model, decay=0.75, buffers="average")
    checkpoints.resume(averaged, tool.content())
    copied = ewma.ModelEMA(model, decay=0.75)
    content = tool.content()
    content["ema"]["module.norm.running_mean"] = torch.full((6,), 3.0).double()
    checkpoints.resume(copied, content)
    left = ewma.ModelEMA(model, decay=0.75, buffers="leave")
    checkpoints.resume(left, content)
    assert torch.equal(averaged.tensors()["norm.running_mean"], model.norm.running_mean)
    with copied.swapped():
        assert torch.equal(model.norm.running_mean, content["ema"]["module.norm.running_mean"])
    with left.swapped():
        assert not torch.equal(model.norm.running_mean, content["ema"]["module.norm.running_mean"])


def test_a_part_alone_is_averaged(model: Small) -> None:
    tool = TorchEMA(model)
    run(tool, 3)
    ema = ewma.ModelEMA(model, decay=0.75, only="first.*")
    checkpoints.resume(ema, tool.content())
    assert dict(ema.named_parameters()).keys() == {"first.weight", "first.bias"}
    assert torch.equal(ema.tensors()["last.weight"], model.last.weight)


def test_averages_are_at_least_as_precise_as_asked_for() -> None:
    model = nn.Linear(3, 2).bfloat16()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    ema = ewma.ModelEMA(model, decay=0.999)
    checkpoints.resume(ema, averaged)
    assert {average.dtype for _, average in ema.named_parameters()} == {torch.float32}
    half = {name: tensor.half() for name, tensor in averaged.state_dict().items() if name != "n_averaged"}
    checkpoints.resume(ema, half | {"n_averaged": torch.tensor(3)})
    assert {average.dtype for _, average in ema.named_parameters()} == {torch.float32}


def test_a_view_of_one_profile(model: Small) -> None:
    tool = TorchEMA(model)
    run(tool, 3)
    ema = ewma.ModelEMA(model, {"a": ewma.Exponential(decay=0.5), "b": ewma.Exponential(decay=0.75)})
    ema.update()
    checkpoints.resume(ema["b"], tool.content())
    assert (ema["a"].count, ema["b"].count) == (1, 3)
    run(tool, 2, also=ema.update)
    mine = dict(ema["b"].named_parameters())
    assert all(torch.allclose(mine[name], t, rtol=0, atol=1e-13) for name, t in tool.averages().items())


def test_training_goes_on_from_ema_attached(small: Small, sgd: torch.optim.Optimizer) -> None:
    tool = TorchEMA(small)
    run(tool, 2)
    ema = ewma.ModelEMA(small, decay=0.75).attach(sgd)
    checkpoints.resume(ema, tool.content())
    train(small, sgd, steps=3)
    assert ema.count == 5
    with ema.swapped(), pytest.raises(RuntimeError, match="Leave the with block first"):
        checkpoints.resume(ema, tool.content())


def test_our_own_resume_bit_for_bit(small: Small, sgd: torch.optim.Optimizer, tmp_path: Path) -> None:
    profiles = {"a": ewma.Exponential(half_life=3), "b": ewma.Power(sigma_rel=0.1)}
    ema = ewma.ModelEMA(small, profiles, seed=5).attach(sgd)
    train(small, sgd, steps=3)
    torch.save({"model": small.state_dict(), "trainer": {"ema": ema.state_dict()}}, tmp_path / "last.pt")
    ema["b"].save(tmp_path / "b.safetensors")
    again, alone = ewma.ModelEMA(small, profiles), ewma.ModelEMA(small, ewma.Power(sigma_rel=0.1))
    assert checkpoints.resume(again, tmp_path / "last.pt").source == "ModelEMA"
    checkpoints.resume(alone, tmp_path / "b.safetensors")
    assert again.seed == alone.seed == 5
    other = ewma.ModelEMA(small, ewma.Power(sigma_rel=0.1))
    checkpoints.resume(other, tmp_path / "last.pt", at="trainer/ema/b")
    for each_ema in (ema.detach() or ema, again, alone, other):
        each_ema.update()
    for name in profiles:
        assert same(dict(ema[name].named_parameters()), dict(again[name].named_parameters()))
    assert same(dict(ema["b"].named_parameters()), dict(alone.named_parameters()))
    assert same(dict(ema["b"].named_parameters()), dict(other.named_parameters()))


def test_only_a_modelema_resumes(model: Small) -> None:
    with pytest.raises(TypeError, match="resume goes on with a ModelEMA, or a view of one; got Small"):
        checkpoints.resume(model, TorchEMA(model).content())


@each(EmaPytorch, TorchEma)
def test_the_plain_file_of_another_tools_averages(model: Small, tmp_path: Path, tool: type[Tool]) -> None:
    at_work = tool(model)
    run(at_work, 2)
    (path,) = checkpoints.read(at_work.save(tmp_path / "last.pt"), model).save(tmp_path / "averages.safetensors")
    other = Small().double()
    other.load_state_dict(load_file(path))
    assert torch.equal(other.first.weight, at_work.averages()["first.weight"])


class Layers(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))


def go_on_sharded(path: Path, steps: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = fully_shard(Layers())
    ema = ewma.ModelEMA(model, decay=0.75)
    checkpoints.resume(ema, path)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0)
        ema.update()
    return {name: average.full_tensor() for name, average in ema.named_parameters()}


def test_a_sharded_model_goes_on_from_a_whole_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Layers()
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75))
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "last.pt")
    for answer in on_ranks(go_on_sharded, 2, tmp_path / "last.pt", 0):
        assert same(answer, dict(averaged.module.state_dict()))
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2.0)
        averaged.update_parameters(model)
    for answer in on_ranks(go_on_sharded, 2, tmp_path / "last.pt", 3):
        assert all(torch.allclose(answer[name], t, atol=1e-6) for name, t in averaged.module.state_dict().items())
