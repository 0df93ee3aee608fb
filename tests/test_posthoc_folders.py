"""Ordinary checkpoints of every format, averaged as a whole model would be, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.conftest import same
from tests.test_readers import save_distributed, save_pickled, save_safetensors, save_sharded
from torch import Tensor

import ewma
from ewma import posthoc, profiles
from ewma.posthoc import Checkpoints, FarFromTarget

FORMATS = {"safetensors": save_safetensors, "pt": save_pickled, "shards": save_sharded, "dcp": save_distributed}
STEPS = [100, 200, 300, 400]


def states() -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    return [
        {
            "layer.weight": torch.randn(5, 3),
            "layer.bias": torch.randn(3).bfloat16(),
            "long": torch.randn(70_000),
            "double": torch.randn(2, dtype=torch.float64),
            "count": torch.tensor(step),
            "mask": torch.tensor([True, step > 200]),
            "none": torch.zeros(0, 2),
            "never": torch.tensor([0.0, -torch.inf]),
        }
        for step in STEPS
    ]


@pytest.fixture(params=FORMATS)
def saved(request, tmp_path: Path) -> Path:
    for step, state in zip(STEPS, states(), strict=True):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        written = FORMATS[request.param](state, folder)
        if request.param == "dcp":
            written.rename(tmp_path / "moved")
            folder.rmdir()
            (tmp_path / "moved").rename(folder)
    return tmp_path


def mixed(coefficients: list[float], name: str) -> Tensor:
    return sum(c * state[name].double() for c, state in zip(coefficients, states()[-len(coefficients) :], strict=True))


def test_the_last_k(saved: Path) -> None:
    found = Checkpoints(saved).average(last=3)
    assert found.coefficients == pytest.approx([1 / 3] * 3)
    assert [path.name for path in found.paths] == ["checkpoint-200", "checkpoint-300", "checkpoint-400"]
    for name in ("layer.weight", "layer.bias", "long", "double"):
        torch.testing.assert_close(found.weights[name].double(), mixed([1 / 3] * 3, name), rtol=0, atol=1e-6)
    newest = states()[-1]
    for name in ("count", "mask", "never", "none"):
        assert torch.equal(found.weights[name], newest[name])
    assert found.weights["layer.bias"].dtype == torch.float32
    assert found.weights["double"].dtype == torch.float64
    assert found.weights.keys() == newest.keys()


@pytest.mark.parametrize(
    "profile",
    [ewma.Exponential(half_life=150), ewma.Power(sigma_rel=0.1), ewma.Uniform(), profiles.triangular(steps=400)],
    ids=repr,
)
def test_every_profile_weighs_the_checkpoints_as_updates(tmp_path: Path, profile) -> None:
    for step, state in zip(STEPS, states(), strict=True):
        torch.save(state, tmp_path / f"step_{step}.pt")
    found = Checkpoints(tmp_path).average(profile)
    ema = ewma.EMA(profile=profile, weigh="time")
    for state in states():
        ema.update(state["double"], elapsed=100)
    torch.testing.assert_close(found.weights["double"], ema.get(), rtol=1e-12, atol=1e-12)
    assert sum(found.coefficients) == pytest.approx(1.0)


def test_a_file_is_what_average_gives(saved: Path, tmp_path: Path) -> None:
    checkpoints = Checkpoints(saved)
    shares = checkpoints.average_to(tmp_path / "out.safetensors", ewma.Exponential(half_life=200))
    found = checkpoints.average(ewma.Exponential(half_life=200))
    assert shares == found.coefficients
    from safetensors.torch import load_file

    assert same(load_file(tmp_path / "out.safetensors"), found.weights)
    assert checkpoints.elements() == sum(tensor.numel() for tensor in found.weights.values())


def test_the_last_number_in_the_names_is_their_order(tmp_path: Path) -> None:
    for epoch, step in ((1, 1000), (2, 200), (10, 30_000)):
        torch.save({"w": torch.tensor([float(step)])}, tmp_path / f"epoch={epoch}-step={step}.ckpt")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps == [200, 1000, 30_000]
    assert checkpoints.average(last=1).weights["w"].item() == 30_000
    assert Checkpoints(sorted(tmp_path.iterdir(), reverse=True)).steps == [200, 1000, 30_000]


def test_names_that_tell_no_order(tmp_path: Path) -> None:
    for name in ("best", "last"):
        torch.save({"w": torch.zeros(1)}, tmp_path / f"{name}.pt")
    with pytest.raises(ValueError, match=r"not told by a number in their names: best.pt, last.pt. Pass them in order"):
        Checkpoints(tmp_path)
    ordered = Checkpoints([tmp_path / "last.pt", tmp_path / "best.pt"], steps=[1, 2])
    assert [path.name for path in ordered.paths] == ["last.pt", "best.pt"]
    with pytest.raises(ValueError, match="steps must be 2 rising numbers, one a checkpoint; got"):
        Checkpoints([tmp_path / "last.pt", tmp_path / "best.pt"], steps=[2, 1])


@pytest.mark.parametrize("save", [save_pickled, save_distributed])
def test_the_model_is_found_in_a_nested_state(tmp_path: Path, save) -> None:
    paths = []
    for step in (1, 2):
        (tmp_path / f"{step}").mkdir()
        state = {"model": {"w": torch.tensor([float(step)])}, "optimizer": {"m": torch.zeros(3)}, "step": step}
        paths.append(save({**state, "ema": {"w": torch.tensor([10.0 * step])}}, tmp_path / f"{step}"))
    assert Checkpoints(paths, steps=[1, 2]).average().weights["w"].tolist() == [1.5]
    assert Checkpoints(paths, steps=[1, 2], part="ema").average().weights["w"].tolist() == [15.0]
    with pytest.raises(ValueError, match=r"part='weights' holds no tensors; there are .*model.*"):
        Checkpoints(paths, steps=[1, 2], part="weights").average()


def test_a_state_whose_own_names_begin_with_model_is_flat(tmp_path: Path) -> None:
    for step in (1, 2):
        state = {"model.layer.weight": torch.tensor([float(step)]), "lm_head.weight": torch.ones(1)}
        torch.save(state, tmp_path / f"{step}.pt")
    assert Checkpoints(tmp_path).average().weights.keys() == {"model.layer.weight", "lm_head.weight"}


def test_parts_of_which_none_is_known(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save({"generator": {"w": torch.ones(1)}, "critic": {"w": torch.ones(1)}}, tmp_path / f"{step}.pt")
    with pytest.raises(
        ValueError, match=r"which of its parts is the model\? There are generator, critic; pass part='g"
    ):
        Checkpoints(tmp_path).average()


def test_a_compiled_model_among_plain_ones(tmp_path: Path) -> None:
    torch.save({"_orig_mod.w": torch.zeros(1)}, tmp_path / "1.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "2.pt")
    assert Checkpoints(tmp_path).average().weights["w"].tolist() == [0.5]


def test_mismatches_are_named(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}, tmp_path / "1.pt")
    torch.save({"a": torch.zeros(3), "b": torch.zeros(1), "d": torch.zeros(1)}, tmp_path / "2.pt")
    told = (
        r"1.pt is not of the same model as .*2.pt: missing: d; not known here: c; of another shape: a \[2\] for \[3\]"
    )
    with pytest.raises(ValueError, match=told):
        Checkpoints(tmp_path).average()


def test_nan_is_named(saved: Path) -> None:
    bad = states()[1]
    bad["long"][5] = torch.inf
    torch.save(bad, saved / "checkpoint-250.pt")
    with pytest.raises(ValueError, match=r"checkpoint-250.pt: long holds NaN or infinity in 1 of 70000 elements"):
        Checkpoints(saved).average()


def test_numbers_whose_sum_is_too_large_are_finite_all_the_same(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save({"w": torch.full((150_000,), 1e38 * step)}, tmp_path / f"{step}.pt")
    found = Checkpoints(tmp_path).average().weights["w"]
    torch.testing.assert_close(found, torch.full((150_000,), 1.5e38))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "1.pt")
    with pytest.raises(ValueError, match="which load without running any of the file's code"):
        Checkpoints(tmp_path).average()


def test_folders_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoints there"):
        Checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Checkpoints(tmp_path / "nowhere")


@pytest.mark.parametrize("last", [0, 5])
def test_more_than_there_are(saved: Path, last: int) -> None:
    with pytest.raises(ValueError, match=f"last must be between 1 and 4, the checkpoints there are; got {last}"):
        Checkpoints(saved).average(last=last)


def test_raw_checkpoints_alone_reach_less_and_say_so(tmp_path: Path) -> None:
    """The mean of a straight line's last 100 steps, out of one step in 20."""
    slope = torch.randn(50)
    for step in range(0, 401, 20):
        torch.save({"w": slope * step}, tmp_path / f"{step}.pt")
    checkpoints = Checkpoints(tmp_path)
    with pytest.warns(FarFromTarget, match="residual 0.0"):
        found = checkpoints.reconstruct(ewma.Uniform(), last=100)
    torch.testing.assert_close(found.weights["w"], slope * 350.5, rtol=1e-2, atol=0)
    tracked = posthoc.plan(400, range(20, 401, 20), target=ewma.Uniform(), last=100)
    assert tracked.residual < found.residual / 4
    with pytest.raises(ValueError, match="expected whole numbers of steps"):
        Checkpoints(checkpoints.paths[:2], steps=[0.5, 1]).reconstruct(ewma.Uniform())


def test_memory_is_that_of_one_tensor(tmp_path: Path, python) -> None:
    """Of eight models of 32 MB, in eight tensors each, less than one is in memory at any time."""
    program = f"""
import torch
from safetensors.torch import save_file
from benchmarks.memory import peak_extra
from ewma.posthoc import Checkpoints
for step in range(1, 9):
    save_file({{str(n): torch.full((10**6,), float(step)) for n in range(8)}}, f"{tmp_path}/{{step}}.safetensors")
checkpoints = Checkpoints("{tmp_path}")
checkpoints.average(last=1)
print(peak_extra(lambda: checkpoints.average_to("{tmp_path}/out.safetensors")) // 10**6)
"""
    assert int(python(program)) < 32
