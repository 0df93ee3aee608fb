"""The scan in Triton beside the loop in float64: lengths, layouts, coefficients, segments, both ways, and gradients."""

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
from torch.autograd import gradcheck, gradgradcheck

if TRITON_MISSING:
    pytest.skip(TRITON_MISSING, allow_module_level=True)

from ewma import kernels
from ewma.kernels import differentiable, reference, triton_scan, triton_tiles

bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN = math.nan
SHAPES = [(1, 1, 1), (1, 2, 1), (1, 63, 1), (3, 40, 1), (2, 33, 3), (1, 20, 9), (12, 2, 3), (2, 0, 3), (0, 5, 1)]
LOST = ["0", "1e-8", ".3", "1", "each step", "each series", "each", "kept"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many tiles and segments in short series: Triton's interpreter takes half a millisecond a step."""
    for name, value in {"TILE": 32, "LANES": 4, "PROGRAMS": 12, "SEGMENT": 1}.items():
        monkeypatch.setattr(triton_tiles, name, value)
    with numpy.errstate(all="ignore"):
        yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = f64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=f64).to(DEVICE, dtype)


def coefficients(kind: str, shape: tuple[int, int, int]) -> tuple[Any, Tensor | None]:
    if kind[0] in "01.":
        return float(kind), None
    outer, n, inner = shape
    size = {"each step": (1, n, 1), "each series": (outer, 1, inner)}.get(kind, shape)
    generator = torch.Generator().manual_seed(1)
    forgetting = 10.0 ** (14.5 * torch.rand(size, generator=generator, dtype=f64) - 12.0)  # -log(kept)
    lost, kept = -torch.expm1(-forgetting).to(DEVICE), torch.exp(-forgetting).to(DEVICE)
    return lost, kept if kind == "kept" else None


def scanned(kernel: Any, u: Tensor, lost: Any, initial: Tensor, kept: Any = None, dtype: torch.dtype = f64) -> Tensor:
    out = torch.full(u.shape, NAN, dtype=dtype, device=DEVICE)
    kernel.scan(u.clone(), lost, initial, out, kept)
    return out


def close(got: Tensor, right: Tensor) -> None:
    """To 1e-13 of the largest in each series."""
    if right.numel():
        scale = right.abs().amax(1, keepdim=True).clamp(min=1.0)
        torch.testing.assert_close(got / scale, right / scale, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_and_segments_are_the_steps(shape: tuple[int, int, int], lost: str) -> None:
    u, initial = normal(*shape), 10.0 * normal(shape[0], 1, shape[2], seed=2)
    given, kept = coefficients(lost, shape)
    close(scanned(triton_scan, u, given, initial, kept), scanned(reference, u, given, initial, kept))


def test_long_series() -> None:
    u, initial = normal(1, 500, 1), normal(1, 1, 1, seed=2)
    close(scanned(triton_scan, u, 0.01, initial), scanned(reference, u, 0.01, initial))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU, and the interpreter would take minutes")
@pytest.mark.parametrize(
    "shape", [(1, 16323, 1), (100, 16323, 1), (1, 1000, 4097), (1, 10**6, 1), (5, 10**5, 33)], ids=str
)
def test_large_series_in_tiles_as_they_are(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    monkeypatch.undo()
    u, initial = normal(*shape), normal(shape[0], 1, shape[2], seed=2)
    right = scanned(reference, u.cpu(), 0.01, initial.cpu())
    close(scanned(triton_scan, u, 0.01, initial).cpu(), right)


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("lost", [1e-6, 0.02, 0.7])
@pytest.mark.parametrize("shape", [(1, 100, 1), (1, 12, 6)], ids=str)
def test_narrow_numbers_are_rounded_once(shape: tuple[int, int, int], lost: float, dtype: torch.dtype) -> None:
    """Whatever the offset: a carry in the narrow dtype would lose the steps."""
    u, initial = (100.0 + normal(*shape)).to(dtype), 100.0 + normal(shape[0], 1, shape[2], seed=2)
    right = scanned(reference, u.double(), lost, initial)
    got = scanned(triton_scan, u, lost, initial, dtype=dtype)
    torch.testing.assert_close(got.double(), right, rtol=0.51 * torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("lost", [".3", "each step", "kept"])
@pytest.mark.parametrize("shape", [(2, 40, 1), (2, 12, 3)], ids=str)
def test_from_the_end_to_the_start(shape: tuple[int, int, int], lost: str) -> None:
    u, initial = normal(*shape), normal(shape[0], 1, shape[2], seed=2)
    given, kept = coefficients(lost, shape)
    out = torch.full(shape, NAN, dtype=f64, device=DEVICE)
    triton_scan.scan(u, given, initial, out, kept, reverse=True)
    turned = [x.flip(1) if isinstance(x, Tensor) else x for x in (u, given, kept)]
    close(out.flip(1), scanned(reference, turned[0], turned[1], initial, turned[2]))


VIEWS: dict[str, Any] = {
    "time first": lambda x: x.permute(1, 0, 2).contiguous().permute(1, 0, 2),
    "series first": lambda x: x.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    "every second": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2],
}


@pytest.mark.parametrize("lay", VIEWS)
@pytest.mark.parametrize("shape", [(3, 40, 1), (2, 20, 3)], ids=str)
def test_the_layout_in_memory_does_not_matter(shape: tuple[int, int, int], lay: str) -> None:
    u, initial = normal(*shape), normal(shape[0], 1, shape[2], seed=2)
    lost, kept = coefficients("kept", shape)
    right = scanned(reference, u, lost, initial, kept)
    room = VIEWS[lay](torch.full(shape, NAN, dtype=f64, device=DEVICE))
    triton_scan.scan(VIEWS[lay](u), VIEWS[lay](lost), initial, room, VIEWS[lay](kept))
    close(room, right)


def test_what_lies_between_is_not_written() -> None:
    room = torch.full((2, 80, 4), NAN, device=DEVICE)
    triton_scan.scan(normal(2, 40, 2, dtype=f32), 0.5, normal(2, 1, 2), room[:, ::2, ::2])
    assert room[:, ::2, ::2].isfinite().all()
    assert room[:, 1::2].isnan().all()
    assert room[:, :, 1::2].isnan().all()


def test_next_to_nothing_still_counts() -> None:
    n, zeros = 70, torch.zeros(1, 70, 1, dtype=f64, device=DEVICE)
    y = scanned(triton_scan, zeros, 1e-17, zeros[:, :1] + 1.0)
    assert 1.0 - scanned(triton_scan, zeros, 1e-14, zeros[:, :1] + 1.0)[0, -1, 0].item() == pytest.approx(
        n * 1e-14, rel=0.02
    )
    assert y[0, -1, 0] == pytest.approx(1.0, abs=1e-14)
    ones = zeros + 1.0
    big = torch.full((1, 1, 1), 1e25, dtype=f64, device=DEVICE)
    got = scanned(triton_scan, zeros, ones, big, 1e-20 * ones)
    assert got[0, 0, 0].item() == pytest.approx(1e5, rel=1e-14)
    assert got[0, 1, 0].item() == pytest.approx(1e-15, rel=1e-14)


def test_a_nan_reaches_all_that_follows_and_no_other_series() -> None:
    u = normal(3, 100, 1)
    u[1, 40] = NAN
    got = scanned(triton_scan, u, 0.5, torch.zeros(3, 1, 1, dtype=f64, device=DEVICE))
    assert got[1, 40:].isnan().all()
    assert got[1, :40].isfinite().all()
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("n", "inner"), [(1, 1), (12, 1), (3, 2)])
def test_gradients_are_the_loops(monkeypatch: pytest.MonkeyPatch, n: int, inner: int) -> None:
    monkeypatch.setenv("EWMA_KERNEL", "triton")
    calls = []
    scan = triton_scan.scan
    monkeypatch.setattr(triton_scan, "scan", lambda *given: calls.append(1) or scan(*given))
    u, initial = (normal(2, size, inner, seed=size).requires_grad_() for size in (n, 1))
    lost = (0.1 + 0.8 * torch.rand(1, n, 1, dtype=f64, device=DEVICE)).requires_grad_()
    assert gradcheck(differentiable.scan, (u, lost, initial), fast_mode=True)
    assert gradgradcheck(differentiable.scan, (u, lost, initial), fast_mode=True)
    assert gradcheck(lambda *given: differentiable.scan(given[0], 0.3, given[1]), (u, initial), fast_mode=True)
    assert calls


def test_autograd_is_told_of_what_was_overwritten() -> None:
    out, weight = normal(1, 8, 1), torch.ones(1, 8, 1, dtype=f64, device=DEVICE, requires_grad=True)
    product = weight * out
    triton_scan.scan(normal(1, 8, 1), 0.5, normal(1, 1, 1), out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        u = normal(1, 8, 1)
        close(scanned(triton_scan, u, 0.5, u[:, :1]), scanned(reference, u, 0.5, u[:, :1]))


def test_what_is_not_for_triton_goes_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EWMA_KERNEL", "triton")
    u = numpy.random.default_rng(0).normal(size=(1, 9, 1))
    out = numpy.empty_like(u)
    kernels.scan(u.copy(), 0.5, u[:, :1], out)
    close(
        torch.from_numpy(out).to(DEVICE),
        scanned(triton_scan, torch.from_numpy(u).to(DEVICE), 0.5, torch.from_numpy(u[:, :1]).to(DEVICE)),
    )
    meta = torch.empty(1, 9, 1, dtype=f64, device="meta")
    assert not triton_scan.serves(meta, meta)
    assert not triton_scan.serves(normal(1, 9, 1), numpy.ones(3))
    assert not triton_scan.serves(normal(1, 9, 1).long())


COMPILED = """
from tests import ahead
import torch
from ewma.kernels import triton_scan
ahead.compile_for(90)
f32, f64 = torch.float32, torch.float64

def scan(shape, dtype, lost, kept=None, reverse=False):
    start = torch.zeros(shape[0], 1, shape[2], dtype=f64)
    triton_scan.scan(torch.empty(shape, dtype=dtype), lost, start, torch.empty(shape, dtype=dtype), kept, reverse)

scan((1, 10**5, 1), f32, .3)
assert len(ahead.made) == 3
assert ahead.count("ld.global[^;]*[.]v[24]"), "not 16 bytes at a time"
scan((1, 10**5, 1), f32, .7)
assert ahead.made[:3] == ahead.made[3:], "two for one"
each = torch.rand(1, 3000, 1, dtype=f64)
scan((1, 300, 48), torch.bfloat16, each[:, :300], 1 - each[:, :300], True)
"""


def test_it_compiles_for_cuda(python: Any) -> None:
    python(COMPILED)
