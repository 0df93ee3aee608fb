"""The running mean in Triton beside the definition in more digits: what is rounded, what is missing, how it lies in
memory; its gradients; and that `smooth` comes here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from tests.conftest import TRITON_MISSING
from tests.lent import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ewma

if TRITON_MISSING:
    pytest.skip(TRITON_MISSING, allow_module_level=True)

from ewma.kernels import triton_mean, triton_scan, triton_tiles

bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [f32, f64, bf16, f16]
NAN, INF = math.nan, math.inf
ROUNDING = {f32: 2.0**-24, f64: 1e-14, bf16: 2.0**-8, f16: 2.0**-11}
SHAPES = [(1, 1, 1), (1, 2, 1), (1, 63, 1), (2, 20, 3)]
AS_THEY_ARE = {name: getattr(triton_tiles, name) for name in ("TILE", "LANES", "PROGRAMS", "SEGMENT")}
TILES = {"TILE": 16, "LANES": 4, "PROGRAMS": 8, "SEGMENT": 1}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many tiles and segments in short series: Triton's interpreter takes half a millisecond a step."""
    for name, value in TILES.items():
        monkeypatch.setattr(triton_tiles, name, value)
    monkeypatch.setenv("EWMA_KERNEL", "triton")
    with numpy.errstate(all="ignore"):
        yield


def normal(*shape: int, offset: float = 0.0, seed: int = 0, dtype: torch.dtype = f64) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)
    return (drawn + offset).to(DEVICE, dtype)


def gappy(*shape: int, dtype: torch.dtype = f64, first: bool = True) -> Tensor:
    """A third of it missing, in every way; one series altogether where there are several, and a first value."""
    x = normal(*shape, offset=3.0, dtype=dtype)
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for k, bad in enumerate((NAN, INF, -INF)):
        x[(drawn > 0.1 * k) & (drawn < 0.1 * (k + 1))] = bad
    x[:, 0] = NAN if first else 1.0
    if shape[2] > 1:
        x[0, :, 0] = NAN
    return x


def truth(x: Tensor, start: Tensor | None, held: float, lost: float, debias: bool) -> Any:
    """mean[t] = mean[t-1] + (x[t] - mean[t-1]) / weight[t], in more digits than float64 has."""
    values = x.double().cpu().numpy().astype(numpy.longdouble)
    mean = values[:, 0] if start is None else start[:, 0].cpu().numpy().astype(numpy.longdouble)
    weight, lost, made = numpy.longdouble(held), numpy.longdouble(lost), []
    for t in range(x.shape[1]):
        weight = weight + (1 - lost * weight) if debias else 1 / lost
        mean = mean + (values[:, t] - mean) / weight
        made.append(mean)
    return numpy.stack(made, 1)


def smoothed(x: Tensor, *given: Any, dtype: torch.dtype | None = None, **more: Any) -> Tensor:
    out = torch.full(x.shape, NAN, dtype=dtype or x.dtype, device=DEVICE)
    triton_mean.mean(x, out, *given, **more)
    return out


def error(got: Tensor, right: Any) -> float:
    """In units of the largest value."""
    assert got.isfinite().all()
    return float(abs(got.double().cpu().numpy() - right).max() / abs(right).max())


def by_torch(monkeypatch: pytest.MonkeyPatch, x: Tensor, **how: Any) -> Tensor:
    """The same, the general way."""
    with monkeypatch.context() as patch:
        patch.setenv("EWMA_KERNEL", "foreach")
        result: Tensor = ewma.smooth(x.cpu(), dim=1, **how).to(DEVICE)
    return result


@each_dtype
@pytest.mark.parametrize("lost", [0.0, 1e-9, 0.3, 1.0])
@each_shape
def test_debiased_means_are_rounded_once(shape: tuple[int, int, int], lost: float, dtype: torch.dtype) -> None:
    x = normal(*shape, offset=1.0, dtype=dtype)
    assert error(smoothed(x, None, 0.0, lost, True), truth(x, None, 0.0, lost, True)) <= 1.01 * ROUNDING[dtype]


@each_dtype
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("lost", [1e-9, 0.3])
def test_from_a_mean_that_is_there(lost: float, debias: bool, dtype: torch.dtype) -> None:
    x, start, held = normal(2, 20, 1, dtype=dtype), normal(2, 1, 1, seed=1), (0.3 if debias else 1.0) / lost
    right = truth(x, start, held, lost, debias)
    assert error(smoothed(x, start, held, lost, debias), right) <= 1.01 * ROUNDING[dtype]


@pytest.mark.parametrize(("x_dtype", "dtype"), [(f32, f64), (f64, f32), (bf16, f32), (f32, f16)], ids=str)
def test_results_of_another_dtype(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    x = normal(1, 63, 1, dtype=x_dtype)
    right = truth(x, None, 0.0, 0.1, True)
    assert error(smoothed(x, None, 0.0, 0.1, True, dtype=dtype), right) <= 1.01 * ROUNDING[dtype]


@pytest.mark.parametrize("lost", [1e-6, 0.02, 0.7])
def test_float32_rounds_once_whatever_the_offset(lost: float) -> None:
    """As right as the nearest float32: what is carried is relative to one of the values."""
    x = normal(1, 200, 1, offset=1000.0, dtype=f32)
    right = truth(x, None, 0.0, lost, True)
    got = smoothed(x, None, 0.0, lost, True).cpu().numpy()
    assert (abs(got - right) <= 0.5001 * numpy.spacing(got)).all()


@pytest.mark.parametrize(("value", "dtype"), [(0.1, f32), (-3e-42, f64), (3e38, bf16), (0.0, f64)], ids=str)
@pytest.mark.parametrize("debias", [True, False])
def test_a_constant_stays_what_it_is(debias: bool, value: float, dtype: torch.dtype) -> None:
    x = torch.full((2, 40, 2), value, dtype=dtype, device=DEVICE)
    for start, held in ((None, 0.0 if debias else 1e3), (x[:, :1].double(), 1e3)):
        assert torch.equal(smoothed(x, start, held, 1e-3, debias), x)
    x[1, ::3] = NAN
    assert torch.equal(smoothed(x, None, 0.0 if debias else 1e3, 1e-3, debias)[1, 1:], x[0, 1:])


def test_a_spike_leaves_nothing_where_it_is_forgotten() -> None:
    x = normal(1, 200, 1)
    x[:, 3] = 1e30
    right = truth(x, None, 0.0, 0.9, True)
    got = smoothed(x, None, 0.0, 0.9, True)
    assert error(got[:, 150:], right[:, 150:]) < 1e-14


@pytest.mark.parametrize("lost", [0.0, 1e-9, 0.5])
def test_sums_beyond_the_widest_float(lost: float) -> None:
    x = 1e308 * torch.where(torch.arange(60) % 3 == 0, -1.0, 1.0).to(DEVICE, f64)[None, :, None]
    assert error(smoothed(x, None, 0.0, lost, True), truth(x, None, 0.0, lost, True)) < 1e-14


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"debias": False},
        {"nan": "propagate"},
        {"initial": 7.0},
        {"initial": 7.0, "min_periods": 0},
        {"min_periods": 7},
        {"min_periods": 3, "debias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("alpha", [1e-9, 0.3, 1.0])
def test_what_is_missing_is_left_out(
    monkeypatch: pytest.MonkeyPatch, alpha: float, rule: dict[str, Any], dtype: torch.dtype
) -> None:
    x = gappy(1, 33, 2, dtype=dtype, first="initial" not in rule)
    got, right = ewma.smooth(x, alpha=alpha, dim=1, **rule), by_torch(monkeypatch, x.double(), alpha=alpha, **rule)
    step = ROUNDING[dtype] * 1.01
    torch.testing.assert_close(got.double(), right, rtol=step, atol=4 * step, equal_nan=True)


@pytest.mark.parametrize("debias", [True, False])
def test_where_segments_begin_with_nothing(monkeypatch: pytest.MonkeyPatch, debias: bool) -> None:
    """Whole segments, also the first ones, have no value."""
    x = normal(1, 200, 1, offset=2.0)
    x[0, :75] = x[0, 96:162] = NAN
    got, right = (
        smoothed(x, None, 0.0 if debias else 10.0, 0.1, debias),
        by_torch(monkeypatch, x, alpha=0.1, debias=debias),
    )
    torch.testing.assert_close(got, right, rtol=1e-13, atol=0.0, equal_nan=True)


VIEWS: dict[str, Any] = {
    "time first": lambda x: x.permute(1, 0, 2).contiguous().permute(1, 0, 2),
    "series first": lambda x: x.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    "every second": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2],
}


@pytest.mark.parametrize("lay", VIEWS)
@pytest.mark.parametrize("shape", [(3, 40, 1), (2, 20, 3)], ids=str)
def test_the_layout_in_memory_does_not_matter(shape: tuple[int, int, int], lay: str) -> None:
    x, room = normal(*shape, dtype=f32), VIEWS[lay](torch.full(shape, NAN, device=DEVICE))
    triton_mean.mean(VIEWS[lay](x), room, None, 0.0, 0.1, True)
    assert error(room, truth(x, None, 0.0, 0.1, True)) <= 1.01 * ROUNDING[f32]


@each_shape
def test_in_place(shape: tuple[int, int, int]) -> None:
    x = normal(*shape, offset=1.0, dtype=f32)
    right = smoothed(x, None, 0.0, 0.1, True)
    triton_mean.mean(x, x, None, 0.0, 0.1, True)
    assert torch.equal(x, right)


def test_what_lies_between_is_not_written() -> None:
    room = torch.full((2, 80, 4), NAN, device=DEVICE)
    triton_mean.mean(normal(2, 40, 2, dtype=f32), room[:, ::2, ::2], None, 0.0, 0.1, True)
    assert room[:, ::2, ::2].isfinite().all()
    assert room[:, 1::2].isnan().all()
    assert room[:, :, 1::2].isnan().all()


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU, and the interpreter would take minutes")
@pytest.mark.parametrize(
    "shape", [(1, 1000, 1), (100, 16323, 1), (1, 1000, 4097), (1, 10**6 + 1, 1), (5, 10**5, 33)], ids=str
)
@each_dtype
def test_large_series_in_tiles_as_they_are(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for name, value in AS_THEY_ARE.items():
        monkeypatch.setattr(triton_tiles, name, value)
    x = gappy(*shape, dtype=dtype)
    right, step = by_torch(monkeypatch, x.double(), alpha=1e-3), 1.01 * max(ROUNDING[dtype], 1e-13)
    got = ewma.smooth(x, alpha=1e-3, dim=1)
    torch.testing.assert_close(got.double(), right, rtol=step, atol=4 * step, equal_nan=True)


# How smooth comes here


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    mean = triton_mean.mean
    monkeypatch.setattr(triton_mean, "mean", lambda *given, **more: made.append(given) or mean(*given, **more))
    return made


@pytest.mark.parametrize("how", [{}, {"debias": False}, {"initial": 2.0}, {"weigh": "time"}, {"nan": "raise"}], ids=str)
def test_smooth_comes_here(monkeypatch: pytest.MonkeyPatch, calls: list[Any], how: dict[str, Any]) -> None:
    x = normal(3, 20, dtype=f32)
    made = ewma.smooth(x, alpha=0.1, dim=1, **how)
    assert len(calls) == 1
    torch.testing.assert_close(made, by_torch(monkeypatch, x, alpha=0.1, **how), rtol=1e-6, atol=1e-6)
    out = torch.full_like(x, NAN, dtype=f64)
    assert ewma.smooth(x, alpha=0.1, dim=1, out=out, **how) is out
    torch.testing.assert_close(out.float(), made)


@pytest.mark.parametrize("how", [{"alpha": 0.9, "min_periods": 15}, {"nan": "decay"}, {"times": range(20)}], ids=str)
def test_what_is_not_for_it_goes_another_way(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any], how: dict[str, Any]
) -> None:
    x, how = normal(3, 20, dtype=f32), {"alpha": 0.1} | how
    made = ewma.smooth(x, dim=1, **how)
    assert not calls
    right = by_torch(monkeypatch, x, **how)
    torch.testing.assert_close(made, right, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_integers_and_empty_series(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(20, device=DEVICE).reshape(1, 20)
    torch.testing.assert_close(ewma.smooth(x, alpha=0.1), by_torch(monkeypatch, x, alpha=0.1))
    for shape in ((0,), (3, 0), (0, 3)):
        assert ewma.smooth(torch.empty(shape, device=DEVICE), alpha=0.1).shape == shape


def test_how_many_values_can_be_told_from_what_is_seen() -> None:
    for lost, most in ((0.0, 10**15), (1e-9, 10**8), (0.3, 50), (0.9, 9), (1.0, 1)):
        assert triton_mean.tells(0, lost)
        assert triton_mean.tells(most, lost)
    for lost, more in ((1e-6, 3 * 10**7), (0.3, 90), (0.9, 12), (1.0, 2)):
        assert not triton_mean.tells(more, lost)


class Sizes(TorchDispatchMode):
    """Notes the float64 tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), more: Any = None) -> Any:
        made = function(*given, **(more or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor) and tensor.dtype == f64:
                self.largest = max(self.largest, tensor.numel())
        return made


def test_nothing_is_as_large_as_the_series_in_float64() -> None:
    x = normal(200, dtype=bf16).requires_grad_()
    with Sizes() as sizes:
        ewma.smooth(x, alpha=0.1).sum().backward()
    assert 0 < sizes.largest <= 3 * triton_tiles.PROGRAMS


def test_how_often_something_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each is relative to, and the means; of few long series also their segments' ends, and what follows."""
    launches: list[str] = []
    for module in (triton_mean, triton_scan):
        run = module.run
        monkeypatch.setattr(
            module,
            "run",
            lambda kernel, *given, run=run, **more: launches.append(kernel.__name__) or run(kernel, *given, **more),
        )
    ewma.smooth(normal(9, dtype=f32), alpha=0.1)
    assert launches == ["_begin", "_mean"]
    launches.clear()
    ewma.smooth(normal(100, dtype=f32), alpha=0.1)
    assert launches == ["_begin", "_mean", "_scan", "_scan", "_mean"]


# Gradients


@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@pytest.mark.parametrize("rule", [{}, {"initial": 1.0}, {"debias": False}, {"nan": "decay"}], ids=str)
@pytest.mark.parametrize(("shape", "alpha"), [((1, 70, 1), 1e-3), ((1, 70, 1), 0.3), ((2, 9, 3), 1.0)], ids=str)
def test_gradients_are_those_of_the_general_way(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], alpha: float, rule: Any, dtype: torch.dtype
) -> None:
    made = []
    for kernel in ("triton", "foreach"):
        monkeypatch.setenv("EWMA_KERNEL", kernel)
        x = normal(*shape, dtype=dtype).requires_grad_()
        smoothed = ewma.smooth(x, alpha=alpha, dim=1, **rule)
        dy = torch.linspace(-1.0, 1.0, x.numel(), dtype=dtype, device=DEVICE).reshape(shape)
        made.append((smoothed.detach(), *torch.autograd.grad(smoothed, x, dy)))
    for got, right in zip(*made, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5 if dtype == f32 else 1e-11, atol=1e-6)


def test_gradients_of_gradients_and_of_a_sum(calls: list[Any]) -> None:
    x = normal(2, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ewma.smooth(x, alpha=0.3), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: ewma.smooth(x, alpha=0.3) ** 2, x, fast_mode=True)
    ewma.smooth(x, alpha=0.3).sum().backward()  # a gradient of no strides
    assert x.grad is not None
    assert float(x.grad.sum()) == pytest.approx(14.0)
    assert calls


def test_with_gradients_what_is_missing_goes_the_general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for kernel in ("triton", "foreach"):
        monkeypatch.setenv("EWMA_KERNEL", kernel)
        x = gappy(1, 20, 1).requires_grad_()
        smoothed = ewma.smooth(x, alpha=0.3, dim=1)
        made.append((smoothed.detach(), *torch.autograd.grad(smoothed[:, 5:].sum(), x)))
    for got, right in zip(*made, strict=True):
        torch.testing.assert_close(got, right, equal_nan=True)


COMPILED = """
from tests import ahead
import torch
from ewma.kernels import triton_mean
ahead.compile_for(90)
f32, f64 = torch.float32, torch.float64

def mean(shape, dtype, debias=True, lost=.3, start=None, linear=None):
    x = torch.empty(shape, dtype=dtype)
    if linear is None:
        triton_mean.mean(x, torch.empty_like(x), start, 0. if debias else 1. / lost, lost, debias)
    else:
        triton_mean.linear(0., lost, debias, x, linear)
    return ahead.made[-1]

for n in (10**5, 10**5 + 1):
    mean((1, n, 1), f32)
    assert ahead.count("ld.global[^;]*[.]v[24]"), "not 16 bytes at a time"
    assert ahead.count("st.global[^;]*[.]v[24]")
    assert not ahead.count("[.]local"), "registers do not suffice"
    assert ahead.count("0d3CD0000000000000"), "where weights are settled is no float64"
assert mean((1, 10**5 + 1, 1), f32) is mean((1, 10**5 + 3, 1), f32, lost=1e-6), "two for one"
mean((3, 300, 48), torch.bfloat16, False)
mean((1, 300, 1), f64, start=torch.zeros(1, 1, 1, dtype=f64))
mean((1, 300, 1), torch.float16, linear=False)
mean((1, 300, 1), f32, linear=True)
"""


def test_it_compiles_for_cuda(python: Any) -> None:
    python(COMPILED)
