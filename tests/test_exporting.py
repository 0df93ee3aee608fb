"""Averages as the model's own files: what loads them, what they cost, and what sharded ranks do together."""

from __future__ import annotations

import subprocess
import sys
import unittest.mock
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.conftest import Small, same, train
from tests.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ewma
from ewma import checkpoints
from ewma.checkpoints.exporting import _in_bytes


@pytest.fixture
def ema(small: Small, sgd: torch.optim.Optimizer) -> ewma.ModelEMA:
    ema = ewma.ModelEMA(small, half_life=3).attach(sgd)
    train(small, sgd, steps=4)
    return ema


def test_the_model_loads_it(ema: ewma.ModelEMA, tmp_path: Path) -> None:
    (path,) = checkpoints.export(ema, tmp_path)
    assert path == tmp_path / "model.safetensors"
    other = Small()
    other.load_state_dict(load_file(path))
    with ema.swapped():
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in ema.model.state_dict().items())


def test_parts_and_their_index(ema: ewma.ModelEMA, tmp_path: Path) -> None:
    *parts, index = checkpoints.export(ema, tmp_path / "ema.safetensors", max_shard_size=200)
    assert index.name == "ema.safetensors.index.json"
    assert len(parts) > 1
    together = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    Small().load_state_dict(together)
    assert torch.equal(together["tied.weight"], together["last.weight"])


def test_a_view_and_a_dict_are_written_alike(small: Small, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(small, {"fast": ewma.Exponential(half_life=1), "slow": ewma.Exponential(half_life=50)})
    ema.update()
    with torch.no_grad():
        small.first.weight.add_(1.0)
    ema.update()
    (path,) = checkpoints.export(ema["slow"], tmp_path / "slow.safetensors")
    slow = load_file(path)
    assert torch.equal(slow["first.weight"], dict(ema["slow"].named_parameters())["first.weight"])
    (path,) = checkpoints.export(slow, tmp_path / "again.safetensors")
    assert all(torch.equal(tensor, slow[name]) for name, tensor in load_file(path).items())


def test_floating_tensors_are_converted_on_the_way(ema: ewma.ModelEMA, tmp_path: Path) -> None:
    (path,) = checkpoints.export(ema, tmp_path, dtype=torch.bfloat16)
    came = load_file(path)
    assert came["first.weight"].dtype == torch.bfloat16
    assert came["norm.num_batches_tracked"].dtype == torch.int64
    assert came["mask"].dtype == torch.bool
    assert torch.equal(came["first.weight"], dict(ema.named_parameters())["first.weight"].bfloat16())


def test_the_head_tells_people_where_it_comes_from(ema: ewma.ModelEMA, tmp_path: Path) -> None:
    (path,) = checkpoints.export(ema, tmp_path)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt", "profile": "Exponential(half_life=3)", "count": "4"}


def test_a_folder_is_made_and_a_missing_parent_is_named(ema: ewma.ModelEMA, tmp_path: Path) -> None:
    assert checkpoints.export(ema, tmp_path / "new")[0].parent == tmp_path / "new"
    with pytest.raises(FileNotFoundError, match="the folder .*no.*where does not exist; make it first"):
        checkpoints.export(ema, tmp_path / "no" / "where")
    with pytest.raises(FileNotFoundError, match="the folder .*no does not exist; make it first"):
        checkpoints.export(ema, tmp_path / "no" / "ema.safetensors")


def test_wrong_arguments(ema: ewma.ModelEMA, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'expected a folder, or a file that ends in ".safetensors"; got ".pt"'):
        checkpoints.export(ema, tmp_path / "model.pt")
    with pytest.raises(TypeError, match="export writes a ModelEMA, .* or a dict of tensors; got Small"):
        checkpoints.export(Small(), tmp_path)
    with pytest.raises(TypeError, match="epoch: expected a tensor; got int"):
        checkpoints.export({"weight": torch.ones(1), "epoch": 3}, tmp_path)
    with pytest.raises(ValueError, match=r'max_shard_size must be a number of bytes or text such as "5GB", .*; got 0'):
        checkpoints.export(ema, tmp_path, max_shard_size=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5KiB", 1536), (7, 7)])
def test_sizes(text: str | int, size: int) -> None:
    assert _in_bytes(text) == size


@pytest.mark.parametrize("text", ["5", "5TB", "GB", "-1MB", True, 1.5])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="max_shard_size must be"):
        _in_bytes(text)


PEAK = """
import resource, sys, torch
from ewma import checkpoints
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
warm = {"x": torch.ones(8)}
checkpoints.export(warm, sys.argv[1], dtype=torch.bfloat16)
tensors = {str(n): torch.ones(2**21) for n in range(16)}  # 16 x 8 MiB
before = peak()
checkpoints.export(tensors, sys.argv[1], dtype=torch.float64, max_shard_size="100MB")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is the kernel's")
def test_the_memory_is_less_than_that_of_one_tensor(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 16  # MiB: one tensor, of the 16 written


WHOLE = {
    "uneven": torch.arange(15.0).reshape(5, 3),
    "one": torch.arange(4.0).reshape(1, 4),
    "columns": torch.arange(12.0).reshape(3, 4),
    "plain": torch.ones(2),
}
PLACED = {"uneven": [Shard(0)], "one": [Shard(0)], "columns": [Shard(1)]}


def sharded() -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    return {name: distribute_tensor(t, mesh, PLACED[name]) if name in PLACED else t for name, t in WHOLE.items()}


def write_in_one_and_in_parts(folder: Path) -> list[str]:
    single = checkpoints.export(sharded(), folder / "single.safetensors")
    parts = checkpoints.export(sharded(), folder / "parts", max_shard_size=60, dtype=torch.float64)
    return [path.name for path in single + parts]


def test_two_ranks_write_the_whole_tensors_once(tmp_path: Path) -> None:
    first, second = on_ranks(write_in_one_and_in_parts, 2, tmp_path)
    assert first == second
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(first)
    together = {n: t for path in (tmp_path / "parts").glob("*.safetensors") for n, t in load_file(path).items()}
    assert together["one"].dtype == torch.float64
    assert same({name: tensor.float() for name, tensor in together.items()}, WHOLE)
    assert same(load_file(tmp_path / "single.safetensors"), WHOLE)


def wholes_alive_at_once(folder: Path) -> int:
    tensors = sharded()
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    gather = DTensor.full_tensor

    def counted(tensor: DTensor) -> Tensor:
        nonlocal most
        whole = gather(tensor)
        alive.append(weakref.ref(whole))
        most = max(most, sum(each() is not None for each in alive))
        return whole

    with unittest.mock.patch.object(DTensor, "full_tensor", counted):
        checkpoints.export(tensors, folder, max_shard_size=60)
    assert len(alive) == len(PLACED)
    return most


def test_one_whole_tensor_at_a_time(tmp_path: Path) -> None:
    assert on_ranks(wholes_alive_at_once, 2, tmp_path) == [1, 1]


def fail_to_write(folder: Path) -> str:
    try:
        checkpoints.export(sharded(), folder / "no" / "where")
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "written"


def test_a_failure_on_rank_0_is_told_on_every_rank(tmp_path: Path) -> None:
    first, second = on_ranks(fail_to_write, 2, tmp_path)
    assert first.startswith("FileNotFoundError: ")
    assert second.startswith("RuntimeError: export failed on rank 0, which writes: FileNotFoundError: ")
    assert "make it first" in second


def train_and_export(folder: Path) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = fully_shard(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ewma.ModelEMA(model, half_life=2).attach(optimizer)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    checkpoints.export(ema, folder)
    return {name: average.full_tensor() for name, average in ema.named_parameters()}


def test_averages_of_an_fsdp2_model_load_into_a_plain_one(tmp_path: Path) -> None:
    averages, _ = on_ranks(train_and_export, 2, tmp_path)
    came = load_file(tmp_path / "model.safetensors")
    assert same(came, averages)
    nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).load_state_dict(came)
