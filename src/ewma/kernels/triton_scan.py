"""The scan along time for CUDA, written in Triton: read once, written once, with float64 arithmetic in between.

y[t] = y[t-1] + (u[t] - lost[t] * y[t-1])
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ewma.columns import settled
from ewma.kernels.triton_numbers import DTYPES, halves, interpreted, number, run
from ewma.kernels.triton_tiles import WARPS, at, known, last, plan, read_tile, then, write_tile

BITS = tl.constexpr(40)
"""Of the largest number of steps."""
LEAST = 2.0**-100
"""Nothing lost: in float64 that makes no difference, and it is no 0 to divide by."""


class Shares(NamedTuple):
    """What a value is of all so far: `1 / (held + (1 - (1 - lost) ** steps) * (1 / lost - held))`.

    Args:
        held: what was there before the first step weighs, in steps.
        debias: otherwise it is `lost`, at every step.
        before: whether they multiply what comes into a scan, or what it gives.
    """

    held: float
    debias: bool
    before: bool


@triton.jit
def _lost_after(steps, lost, BITS: tl.constexpr):
    """1 - (1 - lost) ** steps, right to the last bits however small `lost` is."""
    gone = 0.0 * steps.to(tl.float64)
    for _ in tl.static_range(BITS):
        gone = tl.where(steps % 2 == 1, gone + lost * (1.0 - gone), gone)
        lost *= 2.0 - lost
        steps //= 2
    return gone


@triton.jit
def _weighed(x, steps, shares, WITHIN: tl.constexpr):
    """x times the share that a value has after so many steps."""
    first = tl.min(steps, 0)
    if first < shares[4] >> 1:
        lost, held, rest = (
            number(shares[0][0], shares[0][1]),
            number(shares[1][0], shares[1][1]),
            number(shares[2][0], shares[2][1]),
        )
        before = _lost_after(first, lost, BITS)
        within = _lost_after(steps - first, lost, WITHIN)
        x /= (held + (before + within * (1.0 - before)) * rest)[:, None]
    else:
        x *= number(shares[3][0], shares[3][1])
    return x


@triton.jit
def _steps(lost, kept, lane, inner, t, inside, lost_strides, kept_strides):
    """What is lost and kept at these steps; outside nothing is lost."""
    if kept is None:
        if lost_strides is None:
            gone = number(lost[0], lost[1]) + 0.0 * inside.to(tl.float64)
        else:
            gone = tl.load(at(lost, lane, inner, t, lost_strides), mask=inside, other=0.0)
        left = 1.0 - gone
    else:
        gone = tl.load(at(lost, lane, inner, t, lost_strides), mask=inside, other=0.0)
        left = tl.load(at(kept, lane, inner, t, kept_strides), mask=inside, other=1.0)
    return tl.where(inside, gone, 0.0), tl.where(inside, left, 1.0)


@triton.jit(do_not_specialize=["n", "lanes", "segments"])
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
    shares,
    U: tl.constexpr,
    OUT: tl.constexpr,
    ONLY_ENDS: tl.constexpr,
    REVERSE: tl.constexpr,
    BEFORE: tl.constexpr,
    TIME: tl.constexpr,
    LANES: tl.constexpr,
    WITHIN: tl.constexpr,
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
        steps = tl.maximum(n - t, 1) if REVERSE else t + 1
        inside = (t < end)[:, None] & there[None, :]
        whole = (start + TIME <= end) & (tl.max(lane, 0) < lanes)
        given = read_tile(at(u, lane, inner, t, u_strides), inside, whole, U)
        if shares is not None and BEFORE:
            given = _weighed(given, steps, shares, WITHIN)
        gone, left = _steps(lost, kept, lane, inner, t, inside, lost_strides, kept_strides)
        gone, left, gained = tl.associative_scan((gone, left, given), 0, then)
        if ONLY_ENDS:
            gone, left, gained = last(gone, TIME), last(left, TIME), last(gained, TIME)
            all_lost, all_kept, y = then(all_lost, all_kept, y, gone, left, gained)
        else:
            little = y[None, :] + (gained - gone * y[None, :])
            made = tl.where(gone <= 0.5, little, left * y[None, :] + gained)
            y = last(made, TIME)
            if shares is not None and not BEFORE:
                made = _weighed(made, steps, shares, WITHIN)
            write_tile(at(out, lane, inner, t, out_strides), inside, whole, made, OUT)
    if ONLY_ENDS:
        places = at(out, lane, inner, segment + tl.zeros((1,), tl.int64), out_strides)
        size = lanes.to(tl.int64) * segments
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
    u: Tensor,
    lost: float | Tensor,
    initial: Tensor,
    out: Tensor,
    kept: Tensor | None = None,
    reverse: bool = False,
    shares: Shares | None = None,
) -> None:
    """`ewma.kernels.scan`; u and out may be of any floating dtype, and are of any layout.

    Args:
        reverse: from the end to the start, which is what goes backwards through a scan.
        shares: what goes in or comes out is multiplied by, where lost is a float above 0.
    """
    if not u.numel():
        return
    if not out.is_inference():
        increment_version(out)
    (outer, n, inner), lanes = u.shape, u.shape[0] * u.shape[2]
    time, width, abreast, segments, length = plan(u)
    initial = initial.expand(outer, 1, inner)

    def steps(carries: Tensor, out: Tensor, segments: int, only_ends: bool) -> None:
        (u_at, u_strides), (out_at, out_strides) = known(u, reverse), known(out, reverse and not only_ends)
        lost_at: Any
        if isinstance(lost, float):
            lost_at, lost_strides = halves(lost, u.device), None
        else:
            lost_at, lost_strides = known(lost.expand(u.shape), reverse)
        kept_at, kept_strides = (None, None) if kept is None else known(kept.expand(u.shape), reverse)
        _, carry_strides = known(carries)
        shape = (n, lanes, inner, segments, length)
        strides = (u_strides, lost_strides, kept_strides, carry_strides, out_strides)
        constants = {
            "U": DTYPES[u.dtype],
            "OUT": DTYPES[out.dtype],
            "ONLY_ENDS": only_ends,
            "REVERSE": reverse,
            "BEFORE": shares is not None and shares.before,
            "TIME": time,
            "LANES": width,
            "WITHIN": time.bit_length(),
            "num_warps": WARPS,
        }
        given = (u_at, lost_at, kept_at, carries, out_at)
        weighing = None if shares is None else _coded(shares, lost, u.device)
        run(_scan, (abreast * segments,), u.device, *given, *shape, *strides, weighing, **constants)

    if segments > 1:
        ends = u.new_empty((3, outer, segments - 1, inner), dtype=torch.float64)
        steps(initial, ends[0], segments - 1, True)
        carries = ends.new_empty((outer, segments, inner))
        carries[:, :1] = initial
        scan(ends[2], ends[0], initial, carries[:, 1:], ends[1])
        initial = carries
    steps(initial, out, segments, False)


def _coded(shares: Shares, lost: float | Tensor, device: torch.device) -> tuple[Any, ...]:
    assert isinstance(lost, float)
    assert lost > 0.0
    rest, changing = 1.0 / lost - shares.held, int(min(settled(lost), 1 << 39)) if shares.debias else 0
    return *(halves(each, device) for each in (lost, shares.held, rest, lost)), changing << 1 | 1
