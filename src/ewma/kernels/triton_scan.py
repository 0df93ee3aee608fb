"""The scan along time for CUDA, written in Triton: read once, written once, with float64 arithmetic in between.

    y[t] = y[t-1] + (u[t] - lost[t] * y[t-1])

A program goes through its series a tile at a time: a parallel scan within, a carry from one tile to the next. What
steps do to y is put together as (lost, kept, gained), so that nothing is lost where next to nothing is lost or kept.
Where there are few series, time is cut into segments: once for what each does, then for what comes into each from those
before it, which is the same scan over the segments, and then for all that is written.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ewma.kernels.triton_numbers import DTYPES, halves, interpreted, number, read, run, write

TILE = 2048
LANES = 32
PROGRAMS = 1024
SEGMENT = 4
"""Steps times series in a tile; the most series side by side in it; how many programs keep a GPU busy; and how many
tiles a segment has at least."""


@triton.jit
def _then(lost, kept, gained, more_lost, more_kept, more_gained):
    """What the one does and then the other."""
    little = gained + (more_gained - more_lost * gained)
    most = more_kept * gained + more_gained
    return lost + more_lost * kept, kept * more_kept, tl.where(more_lost <= 0.5, little, most)


@triton.jit
def _at(start, lane, inner, t, strides):
    """Where the elements of these series at these times are."""
    series = (lane // inner) * strides[0] + (lane % inner) * strides[2]
    return start + (series[None, :] + (t * strides[1])[:, None])


@triton.jit
def _last(x, TIME: tl.constexpr):
    """The last row of a tile."""
    return tl.sum(tl.where((tl.arange(0, TIME) == TIME - 1)[:, None], x, 0.0), 0)


@triton.jit
def _steps(lost, kept, lane, inner, t, inside, lost_strides, kept_strides):
    """What is lost and kept at these steps; outside nothing is lost."""
    if kept is None:
        if lost_strides is None:
            gone = number(lost[0], lost[1]) + 0.0 * inside.to(tl.float64)
        else:
            gone = tl.load(_at(lost, lane, inner, t, lost_strides), mask=inside, other=0.0)
        left = 1.0 - gone
    else:
        gone = tl.load(_at(lost, lane, inner, t, lost_strides), mask=inside, other=0.0)
        left = tl.load(_at(kept, lane, inner, t, kept_strides), mask=inside, other=1.0)
    return tl.where(inside, gone, 0.0), tl.where(inside, left, 1.0)


@triton.jit
def _scan(
    u,
    lost,
    kept,
    carries,
    out,
    n,
    lanes,
    inner,
    segments,
    length,
    u_strides,
    lost_strides,
    kept_strides,
    carry_strides,
    out_strides,
    U: tl.constexpr,
    OUT: tl.constexpr,
    ONLY_ENDS: tl.constexpr,
    TIME: tl.constexpr,
    LANES: tl.constexpr,
):
    segment = (tl.program_id(0) % segments).to(tl.int64)
    lane = (tl.program_id(0) // segments).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = lane < lanes
    begin = segment * length
    end = tl.minimum(begin + length, n)
    if ONLY_ENDS:
        all_lost = tl.zeros((LANES,), tl.float64)
        all_kept = all_lost + 1.0
        y = all_lost
    else:
        series = (lane // inner) * carry_strides[0] + (lane % inner) * carry_strides[2]
        y = tl.load(carries + (series + segment * carry_strides[1]), mask=there, other=0.0)
    for start in range(begin, end, TIME):
        t = start + tl.arange(0, TIME)
        inside = (t < end)[:, None] & there[None, :]
        given = read(_at(u, lane, inner, t, u_strides), 0, inside, U, False).to(tl.float64)
        gone, left = _steps(lost, kept, lane, inner, t, inside, lost_strides, kept_strides)
        gone, left, gained = tl.associative_scan((gone, left, given), 0, _then)
        if ONLY_ENDS:
            gone, left, gained = _last(gone, TIME), _last(left, TIME), _last(gained, TIME)
            all_lost, all_kept, y = _then(all_lost, all_kept, y, gone, left, gained)
        else:
            little = y[None, :] + (gained - gone * y[None, :])
            made = tl.where(gone <= 0.5, little, left * y[None, :] + gained)
            write(_at(out, lane, inner, t, out_strides), 0, inside, made, OUT, False)
            y = _last(made, TIME)
    if ONLY_ENDS:
        places = _at(out, lane, inner, segment + tl.zeros((1,), tl.int64), out_strides)
        size = lanes * segments
        tl.store(places, all_lost[None, :], mask=there[None, :])
        tl.store(places + size, all_kept[None, :], mask=there[None, :])
        tl.store(places + 2 * size, y[None, :], mask=there[None, :])


def serves(*arrays: Any) -> bool:
    """Whether these are all tensors, on one device that Triton runs on, with memory of their own."""
    return (
        all(isinstance(x, Tensor) and x.layout == torch.strided and x.dtype in DTYPES for x in arrays)
        and {x.device.type for x in arrays} == {"cpu" if interpreted() else "cuda"}
        and len({x.device for x in arrays}) == 1
        and all(type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ and not x.is_neg() for x in arrays)
        and not (torch.compiler.is_compiling() or any(map(torch._C._functorch.is_functorch_wrapped_tensor, arrays)))
    )


def scan(
    u: Tensor, lost: float | Tensor, initial: Tensor, out: Tensor, kept: Tensor | None = None, reverse: bool = False
) -> None:
    """`ewma.kernels.scan`; u and out may be of any floating dtype, and are of any layout.

    Args:
        reverse: from the end to the start, which is what goes backwards through a scan.
    """
    if not u.numel():
        return
    if not out.is_inference():
        increment_version(out)
    (outer, n, inner), lanes = u.shape, u.shape[0] * u.shape[2]
    width = triton.next_power_of_2(lanes)
    if u.stride(1) == 1 or lanes == 1:
        time = min(TILE, triton.next_power_of_2(n))
        width = min(width, TILE // time)
    else:
        width = min(width, LANES)
        time = min(TILE // width, triton.next_power_of_2(n))
    abreast = triton.cdiv(lanes, width)
    segments = max(min(PROGRAMS // abreast, n // (SEGMENT * time)), 1)
    length = triton.cdiv(triton.cdiv(n, segments), time) * time
    segments = triton.cdiv(n, length)
    initial = initial.expand(outer, 1, inner)

    def steps(carries: Tensor, out: Tensor, segments: int, only_ends: bool) -> None:
        (u_at, u_strides), (out_at, out_strides) = _from(u, reverse), _from(out, reverse and not only_ends)
        lost_at: Any
        if isinstance(lost, float):
            lost_at, lost_strides = halves(lost, u.device), None
        else:
            lost_at, lost_strides = _from(lost.expand(u.shape), reverse)
        kept_at, kept_strides = (None, None) if kept is None else _from(kept.expand(u.shape), reverse)
        carry_strides = (carries.stride(0), carries.stride(1) if carries.shape[1] > 1 else 0, carries.stride(2))
        shape = (n, lanes, inner, segments, length)
        strides = (u_strides, lost_strides, kept_strides, carry_strides, out_strides)
        constants = {
            "U": DTYPES[u.dtype],
            "OUT": DTYPES[out.dtype],
            "ONLY_ENDS": only_ends,
            "TIME": time,
            "LANES": width,
        }
        given = (u_at, lost_at, kept_at, carries, out_at)
        run(_scan, (abreast * segments,), u.device, *given, *shape, *strides, **constants)

    if segments > 1:
        ends = u.new_empty((3, outer, segments - 1, inner), dtype=torch.float64)
        steps(initial, ends[0], segments - 1, True)
        carries = ends.new_empty((outer, segments, inner))
        carries[:, :1] = initial
        scan(ends[2], ends[0], initial, carries[:, 1:], ends[1])
        initial = carries
    steps(initial, out, segments, False)


def _from(x: Tensor, reverse: bool) -> tuple[Tensor, tuple[int, ...]]:
    """Where to begin, and how far to go to the next of each dimension. bfloat16 is known by its bits."""
    bits = x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
    outer, step, inner = x.stride()
    return (bits[:, -1:], (outer, -step, inner)) if reverse else (bits, (outer, step, inner))
