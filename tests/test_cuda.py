"""The three jobs on CUDA, end to end: what they give, in graphs, on streams, on several devices, and what they cost.

What does not need CUDA itself also runs on the CPU, so that it is known to hold. The tests of kernels choose the GPU by
themselves, where there is one: tests/lent.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.conftest import Small, Truth
from tests.ranks import on_ranks
from torch import Tensor, nn

import ewma
from ewma import GradientEMA, ModelEMA, kernels

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
on_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
with_triton = pytest.mark.skipif(kernels.choose("cuda")[0] != "triton", reason="Triton does not serve CUDA here")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])

bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
STEP = {f32: 1e-6, f64: 1e-12, bf16: 2.0**-8, f16: 2.0**-10}
N = 3000


def series(*shape: int, dtype: torch.dtype = f64, missing: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = (5.0 + torch.randn(shape, generator=generator, dtype=f64)).to(dtype)
    if missing:
        x[torch.rand(shape, generator=generator) < 0.1] = math.nan
    return x


def batches(device: str, steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(8, 4, generator=generator).to(device)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(2).mean()


# Series


@each_device
@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"debias": False},
        {"initial": 4.0},
        {"min_periods": 5},
        {"nan": "decay"},
        {"nan": "propagate"},
        {"times": torch.arange(N).double().numpy() ** 1.1},
        {"two_sided": True},
    ],
    ids=lambda how: " ".join(how) or "plain",
)
def test_smooth(device: str, dtype: torch.dtype, how: dict[str, Any]) -> None:
    x = series(2, N, dtype=dtype, missing=True)
    right = ewma.smooth(x.double(), half_life=30, **how)
    out = torch.empty_like(x, device=device)
    for made in (
        ewma.smooth(x.to(device), half_life=30, **how),
        ewma.smooth(x.to(device), half_life=30, out=out, **how),
    ):
        assert (made.dtype, made.device.type) == (dtype, device)
        torch.testing.assert_close(made.cpu().double(), right, rtol=STEP[dtype], atol=0.0, equal_nan=True)


@each_device
@pytest.mark.parametrize("axis", [0, 1])
def test_in_place(device: str, axis: int) -> None:
    x = series(300, 700, dtype=f32, missing=True)
    right, mine = ewma.smooth(x, half_life=30, axis=axis), x.to(device, copy=True)
    assert ewma.smooth(mine, half_life=30, axis=axis, out=mine) is mine
    torch.testing.assert_close(mine.cpu(), right, rtol=1e-6, atol=0.0, equal_nan=True)


@each_device
@pytest.mark.parametrize("missing", [False, True])
def test_its_gradient(device: str, missing: bool) -> None:
    made = []
    for x in (series(3, N, missing=missing), series(3, N, dtype=f32, missing=missing).to(device)):
        x.requires_grad_()
        smoothed = ewma.smooth(x, half_life=30)
        made.append(*torch.autograd.grad(smoothed.nan_to_num().mul(torch.arange(N, device=x.device)).mean(), x))
    torch.testing.assert_close(made[1].cpu().double(), made[0], rtol=1e-4, atol=1e-6)


@each_device
@pytest.mark.parametrize("statistic", ["var", "std", "zscore", "sum", "bands", "cov", "corr"])
def test_other_statistics(device: str, statistic: str) -> None:
    x, y = series(2, 400, missing=True), series(2, 400).flip(1)
    given = (y,) if statistic in ("cov", "corr") else ()
    right = getattr(ewma.ewm(x, half_life=30), statistic)(*given)
    made = getattr(ewma.ewm(x.to(device), half_life=30), statistic)(*(each.to(device) for each in given))
    for one, other in zip(made, right, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-9, atol=1e-12, equal_nan=True)


@each_device
def test_streaming(device: str) -> None:
    x = series(60, 5, missing=True)
    one, other = ewma.EMA(half_life=7), ewma.EMA(half_life=7)
    for row in x:
        one.update(row)
    other.extend(x[:20].to(device), axis=0)
    for row in x[20:]:
        other.update(row.to(device))
    for read in (ewma.EMA.get, ewma.EMA.var):
        torch.testing.assert_close(read(other).cpu(), read(one), rtol=1e-12, atol=0.0)


# Weights


@each_device
@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, 1e-6),
        ({"capturable": True}, 1e-6),
        ({"decay": 0.9999}, 1e-6),
        ({"dtype": f64}, 1e-12),
        ({"dtype": bf16}, 0.02),
        ({"device": "cpu"}, 1e-6),
    ],
    ids=str,
)
def test_a_model(device: str, options: dict[str, Any], step: float) -> None:
    options = {"decay": 0.7} | options
    model = Small().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema = ModelEMA(model, **options).attach(optimizer)
    truth = {name: Truth(options["decay"]) for name, _ in model.named_parameters()}
    for batch in batches(device, 6):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            truth[name].update(parameter)
    ema.settle()
    for name, average in ema.named_parameters():
        torch.testing.assert_close(average.double().to(device), truth[name].mean, rtol=step, atol=step)
    before = copy.deepcopy(model.state_dict())
    with ema.swapped():
        assert torch.equal(model.first.weight, dict(ema.named_parameters())["first.weight"].to(device, f32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert ema.count == 6


@each_device
def test_a_state_moves_between_devices(device: str) -> None:
    model, other = Small().to(device), Small()
    ema, resumed = ModelEMA(model, decay=0.9), ModelEMA(other, decay=0.9)
    ema.update()
    resumed.load_state_dict(ema.state_dict())
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        with torch.no_grad():
            each.first.weight += 1.0
    for each in (ema, resumed):
        each.update()
    for (_, one), (_, two) in zip(ema.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(one.cpu(), two, rtol=1e-6, atol=1e-7)


@each_device
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_leaves_out_counts_nowhere(device: str, fused: bool) -> None:
    model = Small().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler(device, init_scale=8.0)
    ema, gradients = ModelEMA(model, decay=0.7).attach(optimizer), GradientEMA(optimizer, decay=0.7, raw=1.0, slow=1.0)
    for number, batch in enumerate(batches(device, 5)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch) * (math.inf if number == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert ema.count == gradients.count == 4
    assert all(bool(average.isfinite().all()) for _, average in ema.named_parameters())


# Gradients


@each_device
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"squares": True}, {"nonfinite": "propagate"}], ids=str)
def test_gradients(device: str, options: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.zeros(N, device=device))
    optimizer, truth = torch.optim.SGD([weight], lr=1.0), Truth(0.7)
    ema = GradientEMA(optimizer, decay=0.7, raw=1.0, slow=2.0, **options)
    for gradient in series(5, N, dtype=f32):
        weight.grad = gradient.clone().to(device)
        truth.update(gradient)
        optimizer.step()
        torch.testing.assert_close(
            weight.grad.cpu().double(), gradient.double() + 2.0 * truth.mean, rtol=1e-6, atol=0.0
        )
    assert ema.count == 5


# CUDA graphs


@contextmanager
def captured(step: Callable[[], object]) -> Iterator[torch.cuda.CUDAGraph]:
    """The graph of a step that was made three times on a stream of its own, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    yield graph


@on_cuda
@with_triton
@pytest.mark.filterwarnings("ignore:The AccumulateGrad")
@pytest.mark.parametrize("options", [{}, {"dtype": bf16}, {"decay": 0.9999}], ids=str)
def test_a_training_step_in_a_graph(options: dict[str, Any]) -> None:
    options = {"decay": 0.9} | options
    made = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 6).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, capturable=True)
        gradients = GradientEMA(optimizer, decay=0.9, raw=1.0, slow=1.0, capturable=True)
        ema = ModelEMA(model, capturable=True, **options).attach(optimizer)
        batch = torch.ones(8, 4, device="cuda")

        def step(model: nn.Module = model, optimizer: Any = optimizer, batch: Tensor = batch) -> None:
            optimizer.zero_grad(set_to_none=False)
            loss_of(model, batch).backward()
            optimizer.step()

        if graphed:
            with captured(step) as graph:
                for _ in range(5):
                    graph.replay()
        else:
            for _ in range(8):
                step()
        assert ema.count == gradients.count == 8
        made.append([average.clone() for _, average in ema.named_parameters()])
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-6)


@on_cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("which", ["ModelEMA", "GradientEMA"])
def test_a_graph_of_the_hosts_clock_is_refused(which: str) -> None:
    weight = nn.Parameter(torch.ones(5, device="cuda"))
    weight.grad = torch.ones_like(weight)
    model, optimizer = nn.ParameterList([weight]), torch.optim.SGD([weight], lr=0.1)
    if which == "ModelEMA":
        step = ModelEMA(model, decay=0.9).update
    else:
        step = GradientEMA(optimizer, decay=0.9, hook=False).apply
    with pytest.raises(RuntimeError, match=rf"Write {which}\(\.\.\., capturable=True\)"), captured(step):
        pass


@on_cuda
@with_triton
@pytest.mark.parametrize("how", [{}, {"debias": False}, {"min_periods": 3}, {"nan": "decay"}], ids=str)
def test_smooth_in_a_graph(how: dict[str, Any]) -> None:
    x = series(2, N, dtype=f32).cuda()
    out = torch.empty_like(x)
    with captured(lambda: ewma.smooth(x, half_life=30, out=out, **how)) as graph:
        x.copy_(series(2, N, dtype=f32, missing=True))
        graph.replay()
    right = ewma.smooth(x.cpu(), half_life=30, **how)
    torch.testing.assert_close(out.cpu(), right, rtol=1e-6, atol=0.0, equal_nan=True)


# Streams and waiting


@on_cuda
@with_triton
def test_nothing_waits_for_the_device() -> None:
    model = Small().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, gradients = ModelEMA(model, decay=0.9).attach(optimizer), GradientEMA(optimizer, decay=0.9)
    x = series(2, N, dtype=f32, missing=True).cuda()
    for number, batch in enumerate(batches("cuda", 4)):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if number == 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
            ewma.smooth(x, half_life=30)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert ema.count == gradients.count == 4


@on_cuda
def test_on_another_stream_than_it_was_made_on() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(100_000, device="cuda")) for _ in range(3)])
    ema, truth = ModelEMA(model, decay=0.5), Truth(0.5)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for number in range(9):
        stream = streams[number % 3]
        stream.wait_stream(streams[(number - 1) % 3])
        with torch.cuda.stream(stream), torch.no_grad():
            model[0].mul_(1.01)
            truth.update(model[0].clone())
            ema.update()
            if number % 3 == 2:  # all is prepared anew, and memory that was used here is free
                model[1].data = torch.randn(100_000, device="cuda")
                torch.full((4096,), 7, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.testing.assert_close(next(iter(ema.named_parameters()))[1].double(), truth.mean, rtol=1e-5, atol=1e-6)


# What it costs


@on_cuda
@with_triton
def test_two_thousand_tensors_are_one_launch() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(50, device="cuda")) for _ in range(2000)])
    ema = ModelEMA(model, decay=0.9)
    ema.update()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ema.update()
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in launched if "Memcpy" not in name and "Memset" not in name] == ["_lerp"]


@on_cuda
@with_triton
def test_no_memory_of_the_size_of_what_is_averaged() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(10_000_000, device="cuda"))])
    ema, x = ModelEMA(model, decay=0.9), torch.randn(20_000_000, device="cuda", dtype=bf16)
    out = torch.empty_like(x)
    for call in (ema.update, lambda: ewma.smooth(x, half_life=30, out=out)):
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        assert torch.cuda.max_memory_allocated() - before < 1_000_000


@on_cuda
@with_triton
def test_a_compiled_model() -> None:
    model = torch.compile(nn.Linear(4, 6).cuda())
    optimizer, truth = torch.optim.SGD(model.parameters(), lr=0.1), Truth(0.7)
    ema = ModelEMA(model, decay=0.7).attach(optimizer)
    for batch in batches("cuda", 3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        truth.update(model.weight)
    torch.testing.assert_close(dict(ema.named_parameters())["weight"].double(), truth.mean, rtol=1e-6, atol=1e-6)


# Several devices


@on_two
def test_a_device_that_is_not_the_current_one() -> None:
    x, model = series(2, N, dtype=f32), Small().to("cuda:1")
    torch.testing.assert_close(ewma.smooth(x.to("cuda:1"), half_life=30).cpu(), ewma.smooth(x, half_life=30))
    ema = ModelEMA(model, decay=0.5)
    ema.update()
    with torch.no_grad():
        model.first.weight += 1.0
    ema.update()
    assert ema.count == 2
    assert torch.cuda.current_device() == 0


@on_two
def test_a_model_on_two_devices() -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(9, device=f"cuda:{number}")) for number in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = ModelEMA(model, decay=0.5, debias=False).attach(optimizer)
    gradients = GradientEMA(optimizer, decay=0.5)
    for _ in range(3):
        for parameter in model:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    one, two = (average.cpu() for _, average in ema.named_parameters())
    assert torch.equal(one, two)
    assert gradients.count == 3


def sharded() -> dict[str, Tensor]:
    """The averages of a model that FSDP2 spreads over the ranks, whole."""
    from torch.distributed.fsdp import fully_shard

    torch.cuda.set_device(dist.get_rank())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 5)).cuda()
    for part in (*model, model):
        fully_shard(part)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEMA(model, decay=0.7).attach(optimizer)
    for batch in batches("cuda", 4):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return {name: average.full_tensor().cpu() for name, average in ema.named_parameters()}


@on_two
def test_shards_over_nccl() -> None:
    one, two = on_ranks(sharded, 2, backend="nccl")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEMA(model, decay=0.7).attach(optimizer)
    for batch in batches("cpu", 4):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    for name, average in ema.named_parameters():
        torch.testing.assert_close(one[name], average, rtol=1e-4, atol=1e-5)
        assert torch.equal(one[name], two[name])
