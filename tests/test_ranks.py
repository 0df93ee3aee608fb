"""Ranks have the same settings and read the same buffers, or learn at once that they do not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.conftest import Small, same
from tests.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ewma
from ewma.weights import ranks

STATISTICS = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def copies_of(ema, name: str) -> Tensor:
    (track,) = ema.tracks.values()
    return {**track.averages, **ema.copies}[name].clone()


def statistics(kind: str, options: dict) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Averaged or copied buffers as this rank had them, as they are read, and as they are read one update later."""
    model = Small()
    inner = model
    if kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))
    elif kind == "fsdp2":
        fully_shard(model)
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        nn.parallel.DistributedDataParallel(model)
        options = {**options, "group": dist.group.WORLD}
    ema = ewma.ModelEMA(model, half_life=1, **options)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(3):
        with torch.no_grad():
            inner.norm.running_mean.normal_(generator=generator)
            inner.norm.running_var.uniform_(generator=generator)
            inner.norm.num_batches_tracked.add_(1 + step * dist.get_rank())
            inner.mask.fill_(dist.get_rank() == 0)
        ema.update()
    names = (*STATISTICS, "mask")
    own = {name: copies_of(ema, name) for name in names}
    raw = {name: dict(inner.named_buffers())[name].clone() for name in names}
    read = {name: tensor.clone() for name, tensor in ema.tensors().items() if name in names}
    with ema.swapped():
        assert same({name: dict(inner.named_buffers())[name] for name in names}, read)
    assert same({name: dict(inner.named_buffers())[name] for name in names}, raw)
    assert same({name: tensor for name, tensor in ema.tensors().items() if name in names}, read)
    ema.update()
    later = ema.tensors()
    return own, read, {name: later[name].clone() for name in names}


@pytest.mark.parametrize(
    ("kind", "size", "buffers"),
    [("ddp", 2, "copy"), ("ddp", 2, "average"), ("inner", 2, "copy"), ("fsdp2", 2, "average"), ("hsdp", 4, "copy")],
)
def test_buffers_are_what_the_first_rank_has(kind: str, size: int, buffers: str) -> None:
    answers = on_ranks(statistics, size, kind, {"buffers": buffers})
    first = answers[0][0]
    assert not same(answers[1][0], first)
    for _, read, later in answers:
        assert same(read, first)
        assert same(later, answers[0][2])


@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("hsdp", 4)])
def test_buffers_are_averaged_over_ranks(kind: str, size: int) -> None:
    answers = on_ranks(statistics, size, kind, {"buffers": "average", "ranks": "average"})
    own = [answer[0] for answer in answers]
    for _, read, _ in answers:
        for name in STATISTICS[:2]:
            torch.testing.assert_close(read[name], torch.stack([each[name] for each in own]).mean(0))
        for name in (STATISTICS[2], "mask"):
            assert torch.equal(read[name], own[0][name])


def test_a_rank_that_is_alone_asks_nobody() -> None:
    on_ranks(keeps_its_own, 2)


def keeps_its_own() -> None:
    if dist.get_rank() == 0:
        model = Small()
        ema = ewma.ModelEMA(model, half_life=1, ranks="alone", group=dist.group.WORLD)
        ema.attach(torch.optim.SGD(model.parameters(), lr=0.1)).update()
        ema.tensors()


def differing(kind: str) -> str:
    model = fully_shard(nn.Linear(2, 2)) if kind == "fsdp2" else nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    ema = ewma.ModelEMA(model, half_life=10 * (1 + (dist.get_rank() == 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="different settings") as error:
        ema.attach(optimizer)
    with pytest.raises(ValueError, match="ModelEMA.load_state_dict: ranks 1 and 0"):
        ema.load_state_dict({})
    return str(error.value)


@pytest.mark.parametrize(("kind", "size"), [("ddp", 2), ("fsdp2", 2)])
def test_different_profiles_are_an_error_on_every_rank(kind: str, size: int) -> None:
    for told in on_ranks(differing, size, kind):
        assert told == (
            "ema.attach: ranks 1 and 0 made their ModelEMA with different settings, so that one checkpoint could not "
            "hold both. profile 'average': Exponential(half_life=20) and Exponential(half_life=10). Make it alike "
            "on every rank."
        )


def only_some(folder: str) -> str:
    ranks.PATIENCE = 2.0
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    told = "did not come"
    if dist.get_rank() != 1:
        with pytest.raises(RuntimeError, match="it takes every rank") as error:
            ewma.ModelEMA(model, half_life=10).attach(torch.optim.SGD(model.parameters(), lr=0.1))
        told = str(error.value)
    Path(folder, str(dist.get_rank())).touch()
    while len(list(Path(folder).iterdir())) < dist.get_world_size():
        time.sleep(0.01)
    return told


def test_a_missing_rank_is_told(tmp_path: Path) -> None:
    first, second, third = on_ranks(only_some, 3, str(tmp_path))
    assert "after 2 s rank 1 is missing. Call it on all ranks, not under `if rank == 0`; or" in first
    assert second == "did not come"
    assert "after 2 s the others' error tells which is missing." in third


def read_on_one() -> str:
    model = nn.parallel.DistributedDataParallel(nn.BatchNorm1d(2))
    ema = ewma.ModelEMA(model, half_life=10).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    ranks.PATIENCE = 1.0
    if dist.get_rank() == 1:
        return "did not read"
    with pytest.raises(RuntimeError, match="reading averages: it takes every rank, and after 1 s rank 1 is missing"):
        ema.state_dict()
    return "was told"


def test_reading_buffers_on_one_rank_is_told() -> None:
    assert on_ranks(read_on_one, 2) == ["was told", "did not read"]


def without_buffers() -> int:
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    ema = ewma.ModelEMA(model, half_life=10).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    ema.update()
    return len(ema.state_dict()["averages"]["average"]) if dist.get_rank() == 0 else 0


def test_without_buffers_one_rank_may_read_alone() -> None:
    assert on_ranks(without_buffers, 2) == [2, 0]
