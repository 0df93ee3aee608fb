"""ModelEMA and GradientEMA where the parameters lie on several ranks: the same averages, and no communication."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tests.conftest import Truth, same
from tests.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ewma

STEPS = 4
ROWS = 8


class Net(nn.Module):
    """Widths that no number of ranks divides, a layer of one row, and something plain beside what is sharded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 6)
        self.one = nn.Linear(6, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.second(self.first(x).tanh()).tanh()) * self.scale.to(x.dtype)


def net(width: int = 7) -> Net:
    torch.manual_seed(1)
    return Net(width)


def batch(step: int) -> Tensor:
    """The batch of all ranks together."""
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(step))


def mine(step: int, parts: int | None = None, part: int | None = None) -> Tensor:
    """This rank's part of a batch."""
    parts, part = parts or dist.get_world_size(), dist.get_rank() if part is None else part
    return batch(step).chunk(parts)[part]


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def wholes(ema) -> dict[str, Tensor]:
    return {name: whole(average) for name, average in ema.named_parameters()}


def steps(model: nn.Module, optimizer, parts: int | None = None, part: int | None = None, first: int = 0, count=STEPS):
    for step in range(first, first + count):
        optimizer.zero_grad()
        model(mine(step, parts, part)).pow(2).mean().backward()
        optimizer.step()


def alone(model: nn.Module | None = None) -> dict[str, Tensor]:
    """What one process, with the whole batch, comes to."""
    model = model or net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ewma.ModelEMA(model, half_life=2).attach(optimizer)
    steps(model, optimizer, 1, 0)
    return wholes(ema)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def shard(model: Net, mesh, **options) -> Net:
    """FSDP2 with `scale`, of no dimension, left plain."""
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, ignored_params={model.scale}, **options)


def mesh_of(kind: str):
    world = dist.get_world_size()
    if kind == "hsdp":
        return init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
    return init_device_mesh("cpu", (world,))


def follow(model: nn.Module, ema, data: tuple[int, int] | None = None, rate: float = 0.1) -> dict[str, Tensor]:
    """Train, with the updates' communication counted; gives the whole averages, which lie as the parameters do."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    ema.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(mine(step, *(data or ()))).pow(2).mean().backward()
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor) and data is None:
                dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)  # FSDP2 leaves alone what is plain
                parameter.grad /= dist.get_world_size()
        with CommDebugMode() as communicated:
            optimizer.step()
        assert communicated.get_total_counts() == 0
    assert ema.count == STEPS
    for (name, average), (other, parameter) in zip(ema.named_parameters(), model.named_parameters(), strict=True):
        assert name == other.replace("_orig_mod.", "")
        assert isinstance(average, DTensor) == isinstance(parameter, DTensor)
        if isinstance(average, DTensor):
            assert (average.device_mesh, average.placements) == (parameter.device_mesh, parameter.placements)
    return wholes(ema)


def under_fsdp2(kind: str) -> dict[str, Tensor]:
    model = net()
    early = ewma.ModelEMA(model, half_life=2) if kind == "before" else None
    shard(model, mesh_of(kind))
    assert [p for p in model.parameters() if not isinstance(p, DTensor)] == [model.scale]
    if kind == "compiled":
        model.compile(backend="eager")
    return follow(model, early or ewma.ModelEMA(model, half_life=2))


@pytest.mark.parametrize(("kind", "ranks"), [("after", 2), ("after", 4), ("before", 2), ("hsdp", 4), ("compiled", 2)])
def test_fsdp2(kind: str, ranks: int) -> None:
    for answer in on_ranks(under_fsdp2, ranks, kind):
        close(answer, alone())


def moved_twice() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Averages of a plain model, then of its shards on one mesh, then on another."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = net(8)
    model.scale = nn.Parameter(torch.ones(1))
    ema = ewma.ModelEMA(model, half_life=2)
    ema.update()
    plain = {name: average.clone() for name, average in ema.named_parameters()}
    split(model, mesh["tensor"])
    ema.bind()
    assert isinstance(dict(ema.named_parameters())["first.weight"], DTensor)
    fully_shard(model, mesh=mesh["data"])
    assert dict(ema.named_parameters())["first.weight"].device_mesh.ndim == 2
    assert ema.count == 1
    return plain, wholes(ema)


def test_averages_follow_a_model_that_is_sharded_later() -> None:
    for plain, sharded in on_ranks(moved_twice, 4):
        assert same(sharded, plain)


def with_little_precision() -> None:
    model = shard(net(), mesh_of("one"), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    averages = follow(model, ewma.ModelEMA(model, decay=1e-9))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == averages[name].dtype == torch.float32
        torch.testing.assert_close(averages[name], whole(parameter))


def test_fsdp2_with_mixed_precision_averages_the_precise_weights() -> None:
    on_ranks(with_little_precision, 2)


def split(model: Net, mesh) -> Net:
    """Tensor parallelism of two layers; the rest stays plain."""
    return parallelize_module(model, mesh, {"first": ColwiseParallel(), "second": RowwiseParallel()})


def under_tensor_parallelism() -> dict[str, Tensor]:
    model = split(net(8), mesh_of("one"))  # tensor parallelism itself wants an even width
    assert {isinstance(p, DTensor) for p in model.parameters()} == {True, False}
    return follow(model, ewma.ModelEMA(model, half_life=2), (1, 0))


def frozen(model: Net) -> Net:
    """With the last layer left as it is: its gradients would have to be averaged by hand."""
    for parameter in (model.scale, *model.one.parameters()):
        parameter.requires_grad_(False)
    return model


def under_both() -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = split(frozen(net(8)), mesh["tensor"])
    ema = ewma.ModelEMA(model, half_life=2)
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"], ignored_params={model.scale, *model.one.parameters()})
    return follow(model, ema, (2, mesh["data"].get_local_rank()))


def test_tensor_parallelism() -> None:
    for answer in on_ranks(under_tensor_parallelism, 2):
        close(answer, alone(net(8)))


def test_tensor_parallelism_within_fsdp2() -> None:
    for answer in on_ranks(under_both, 4):
        close(answer, alone(frozen(net(8))))


def under_ddp(kind: str) -> dict[str, Tensor]:
    model = net()
    early = ewma.ModelEMA(model, half_life=2) if kind == "before" else None
    wrapped = nn.parallel.DistributedDataParallel(model)
    if kind == "zero":
        optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.SGD, lr=0.1)
    else:
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    ema = (early or ewma.ModelEMA(wrapped, half_life=2)).attach(optimizer)
    steps(wrapped, optimizer)
    assert ema.count == STEPS
    return wholes(ema)


@pytest.mark.parametrize("kind", ["after", "before", "zero"])
def test_ddp(kind: str) -> None:
    for answer in on_ranks(under_ddp, 2, kind):
        close(answer, alone())


def under_fsdp1() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = net()
    model.scale = nn.Parameter(torch.ones(1))
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    ema = ewma.ModelEMA(wrapped, half_life=2).attach(optimizer)
    truths = {}
    for step in range(STEPS):
        steps(wrapped, optimizer, first=step, count=1)
        for name, parameter in wrapped.named_parameters():
            truths.setdefault(name.replace("_fsdp_wrapped_module.", ""), Truth(2**-0.5)).update(parameter)
    close({n: a.double() for n, a in wholes(ema).items()}, {n: truth.mean for n, truth in truths.items()})
    with pytest.raises(NotImplementedError, match=r"Shard with torch.distributed.fsdp.fully_shard \(FSDP2\)"):
        ema.state_dict()
    assert sum(average.numel() for average in wholes(ema).values()) < sum(p.numel() for p in net().parameters())


def test_fsdp1_with_the_original_parameters() -> None:
    on_ranks(under_fsdp1, 2)


def in_a_pipeline() -> dict[str, Tensor]:
    layers = net()
    stage = nn.ModuleDict({"first": layers.first} if dist.get_rank() == 0 else {"second": layers.second})
    ema = ewma.ModelEMA(stage, half_life=2)
    for _ in range(STEPS):
        ema.update()
    return wholes(ema)


def test_a_rank_may_hold_some_of_the_names() -> None:
    first, second = on_ranks(in_a_pipeline, 2)
    assert list(first) == ["first.weight", "first.bias"]
    assert list(second) == ["second.weight", "second.bias"]


def rounded_by_chance(dtype: torch.dtype) -> dict[str, Tensor]:
    model = shard(net(), mesh_of("one"))
    ema = ewma.ModelEMA(model, half_life=1e5, dtype=dtype)
    return crept(model, ema)


def crept(model: nn.Module, ema) -> dict[str, Tensor]:
    for step in range(STEPS):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0 + step)
        ema.update()
    return wholes(ema)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_stochastic_rounding_does_not_depend_on_the_number_of_ranks(dtype: torch.dtype) -> None:
    model = net()
    expected = crept(model, ewma.ModelEMA(model, half_life=1e5, dtype=dtype))
    for answer in on_ranks(rounded_by_chance, 4, dtype):
        assert same(answer, expected)
