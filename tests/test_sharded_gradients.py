"""GradientEMA and SpikeGuard on several ranks: each filters its own part, and all decide alike."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.ranks import on_ranks
from tests.test_sharded import Net, batch, close, mesh_of, mine, net, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import ewma
from ewma.gradients import SpikeGuard

STEPS = 3


def told(model: nn.Module, data, kind: str) -> dict[str, Tensor]:
    """Filter the gradients of a few steps; gives averages, filtered gradients, and what can be told of them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ewma.GradientEMA(optimizer, model, half_life=2, raw=1.0, slow=2.0, squares=True, hook=False)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(data(step)).pow(2).mean().backward()
        places = [parameter.grad.data_ptr() for parameter in model.parameters() if not isinstance(parameter, DTensor)]
        with CommDebugMode() as communicated:
            ema.apply()
        assert communicated.get_total_counts() == 0
        optimizer.step()
        assert places == [p.grad.data_ptr() for p in model.parameters() if not isinstance(p, DTensor)]
    if kind == "resumed":
        resumed = ewma.GradientEMA(optimizer, model, half_life=2, squares=True, hook=False)
        resumed.load_state_dict(ema.state_dict())
        ema = resumed
    return {
        **{f"average of {name}": whole(average) for name, average in ema.named_gradients()},
        **{f"gradient of {n.removeprefix('module.')}": whole(p.grad) for n, p in model.named_parameters()},
        "norm": ema.norm(),
        "cosine": ema.cosine(),
        "noise": ema.noise_scale(8),
    }


def of_ranks(kind: str) -> dict[str, Tensor]:
    model = net()
    if kind == "ddp":
        return told(nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True), mine, kind)
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh_of(kind))
    model.scale = nn.Parameter(torch.ones(1))
    return told(fully_shard(model, mesh=mesh_of(kind)), mine, kind)


@pytest.mark.parametrize(("kind", "ranks"), [("ddp", 2), ("fsdp2", 2), ("resumed", 2), ("hsdp", 4)])
def test_filtered_gradients(kind: str, ranks: int) -> None:
    model = net()
    if kind != "ddp":
        model.scale = nn.Parameter(torch.ones(1))
    expected = told(model, batch, kind)
    for answer in on_ranks(of_ranks, ranks, kind):
        close(answer, expected)


def factors(model: Net, rank: int = 0, **options) -> tuple[list[float], int, dict[str, Tensor]]:
    """What a guard makes of gradients of which the last is a spike, that of another rank's part."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    guard = SpikeGuard(warmup=2, **options).attach(optimizer)
    for size in (1.0, 1.1, 0.9, 100.0):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, size * (1 + number))
        optimizer.step()
    return guard.clipped, guard.mean, {name: whole(p.grad) for name, p in model.named_parameters()}


def guarded() -> tuple[list[float], int, dict[str, Tensor]]:
    model = net()
    model.scale = nn.Parameter(torch.ones(1))
    return factors(fully_shard(model, mesh=mesh_of("one")))


def test_a_guard_goes_by_the_norm_over_all_shards() -> None:
    model = net()
    model.scale = nn.Parameter(torch.ones(1))
    clipped, mean, gradients = factors(model)
    assert clipped == 1
    for answer in on_ranks(guarded, 4):
        assert answer[0] == 1
        assert answer[1] == pytest.approx(mean, rel=1e-6)
        close(answer[2], gradients)


def together() -> list[float]:
    guard = SpikeGuard(warmup=2, all_reduce=True)
    values = [torch.tensor(value + dist.get_rank()) for value in (1.0, 1.1, 0.9, 50.0)]
    return [float(guard.update(value)) for value in values]


def test_ranks_that_reduce_decide_alike() -> None:
    first, second = on_ranks(together, 2)
    alone = SpikeGuard(warmup=2)
    assert first == second == pytest.approx([alone.update(value + 0.5) for value in (1.0, 1.1, 0.9, 50.0)])
    assert first[-1] < 1.0
