"""swapped() where the parameters lie on several ranks: right after a forward, and bit for bit back."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from tests.conftest import same
from tests.ranks import on_ranks
from tests.test_sharded import alone, batch, close, mesh_of, net, shard, split, steps, whole, wholes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.func import functional_call

import ewma


class Oops(Exception):
    pass


def trained(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, ewma.ModelEMA]:
    model = net(8)
    if kind == "fsdp1":
        model.scale = nn.Parameter(torch.ones(1))
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "tp":
        split(model, mesh_of(kind))
    elif kind == "both":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        split(model, mesh["tensor"])
        for layer in (model.first, model.second):
            fully_shard(layer, mesh=mesh["data"])
    else:
        shard(model, mesh_of(kind))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ewma.ModelEMA(model, half_life=2).attach(optimizer)
    steps(model, optimizer, 1, 0)
    return model, optimizer, ema


def parts(model: nn.Module) -> dict[str, Tensor]:
    """This rank's parts, as they are kept: a state dict reshards."""
    return {n: (t.to_local() if hasattr(t, "to_local") else t).clone() for n, t in model.state_dict().items()}


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return whole(model(batch(99)))


def with_averages(kind: str) -> None:
    model, optimizer, ema = trained(kind)
    raw = parts(model) if kind != "fsdp1" else {}
    before = output(model)
    expected = functional_call(net(8), alone(net(8)), batch(99))
    if kind != "fsdp1":
        close(wholes(ema), alone(net(8)))  # after a forward without a backward
    for stash in (None, "cpu"):
        output(model)
        with ema.swapped(stash):
            averaged = output(model)
            assert not torch.equal(averaged, before)
            torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-6)
            with ema.swapped():
                assert torch.equal(output(model), averaged)
            assert torch.equal(output(model), averaged)
            with pytest.raises(RuntimeError, match=r"inside swapped\(\)"):
                ema.update()
            output(model)  # and with what this leaves registered, out
        assert torch.equal(output(model), before)
        assert kind == "fsdp1" or same(parts(model), raw)
    steps(model, optimizer, 1, 0, count=1)
    assert ema.count == 5
    assert kind == "fsdp1" or not same(parts(model), raw)


@pytest.mark.parametrize(
    ("kind", "ranks"), [("fsdp2", 2), ("hsdp", 4), ("tp", 2), ("both", 4), ("ddp", 2), ("fsdp1", 2)]
)
def test_the_averages_are_in_the_model_and_the_weights_come_back(kind: str, ranks: int) -> None:
    on_ranks(with_averages, ranks, kind)


def one_fails(where: str) -> dict[str, Tensor]:
    model, optimizer, ema = trained("fsdp2")
    raw, before = parts(model), output(model)
    forward, model.second.forward = model.second.forward, model.second.forward

    def failing(x: Tensor) -> Tensor:
        raise Oops

    with contextlib.suppress(Oops), ema.swapped():
        output(model)
        if where == "one rank" and dist.get_rank() == 1:
            raise Oops
        if where == "forward":
            model.second.forward = failing
            output(model)
    model.second.forward = forward
    assert same(parts(model), raw)
    assert torch.equal(output(model), before)
    steps(model, optimizer, 1, 0, count=1)
    return wholes(ema)


def test_an_exception_inside_leaves_every_rank_able_to_go_on() -> None:
    calm = on_ranks(one_fails, 2, "nowhere")
    for where in ("one rank", "forward"):
        for answer, expected in zip(on_ranks(one_fails, 2, where), calm, strict=True):
            assert same(answer, expected)


def copied() -> None:
    model, _, ema = trained("fsdp2")
    output(model)
    with pytest.raises(NotImplementedError, match=r"Build the teacher .* ema.copy_to\(teacher\)"):
        ema.module()
    averages, teacher, plain = wholes(ema), shard(net(8), mesh_of("one")), net(8)
    ema.copy_to(teacher)
    ema.copy_to(plain)  # gathers
    for other in (teacher, plain):
        close({name: whole(parameter) for name, parameter in other.named_parameters()}, averages)
    output(model)
    ema.copy_to()
    assert torch.equal(output(model), output(teacher))


def test_copies() -> None:
    on_ranks(copied, 2)


def part_of_what_is_sharded() -> None:
    model = net(8)
    model.scale = nn.Parameter(torch.ones(1))
    fully = fully_shard(nn.Sequential(model), mesh=mesh_of("one"))
    ema = ewma.ModelEMA(fully[0], half_life=2)
    ema.update()
    output(fully)
    with pytest.raises(RuntimeError, match=r"scale was sharded .* call reshard\(\) on the module that was"):
        ema.update()
    fully.reshard()
    ema.update()
    assert ema.count == 2


def test_a_part_that_was_left_unsharded_is_told() -> None:
    on_ranks(part_of_what_is_sharded, 2)
