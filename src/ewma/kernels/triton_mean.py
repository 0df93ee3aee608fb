"""The running mean of whole series for CUDA, written in Triton: read once, written once, whatever is missing.

    S[t] = S[t-1] + (x[t] - base - lost * S[t-1])       out[t] = base + S[t] / (held + seen[t] * (1 / lost - held))

`seen` is `1 - (1 - lost) ** values`, the share of the whole weight that the values so far have. A missing value leaves
everything as it is, so nothing needs to be known beforehand, and nothing waits for the device. Of float64, which might
overflow, sums are made smaller by a power of two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ewma.kernels import triton_scan
from ewma.kernels.triton_numbers import DTYPES, capturing, count, finite, halves, number, run
from ewma.kernels.triton_scan import LEAST, Shares, serves
from ewma.kernels.triton_tiles import TILE, WARPS, at, known, last, plan, read_tile, roughly_then, then, write_tile

__all__ = ["linear", "mean", "remembering", "serves", "tells"]

FEW = tl.constexpr(16)
"""Of how many values the size of a series is told."""
UNSEEN = tl.constexpr(2.0**-50)
"""Of a weight so little may still be missing for it to be settled. (1 - UNSEEN would be a float32 to Triton, and 1.)"""


@triton.jit
def _first(x, lane, inner, n, there, strides, X: tl.constexpr, TIME: tl.constexpr, LANES: tl.constexpr):
    """The first finite value of each series; 0 where there is none."""
    first = tl.zeros((LANES,), tl.float64)
    waiting = there
    begin = tl.zeros((), tl.int64)
    while (begin < n) & (tl.sum(waiting.to(tl.int32), 0) > 0):
        t = begin + tl.arange(0, TIME)
        inside = (t < n)[:, None] & there[None, :]
        given = read_tile(at(x, lane, inner, t, strides), inside, False, X)
        usable = inside & finite(given)
        place = tl.min(tl.where(usable, t[:, None], n), 0)
        found = tl.sum(tl.where(usable & (t[:, None] == place[None, :]), given, 0.0), 0)
        first = tl.where(waiting & (place < n), found, first)
        waiting = waiting & (place >= n)
        begin += TIME
    return first


@triton.jit(do_not_specialize=["n", "lanes", "apart"])
def _begin(
    x,
    starts,
    base,
    sums,
    n,
    lanes,
    inner,
    apart,
    held,
    x_strides,
    X: tl.constexpr,
    FROM_FIRST: tl.constexpr,
    TIME: tl.constexpr,
    LANES: tl.constexpr,
):
    """What each series is carried relative to, 0 or one of its values as in bases.py; and its sum before the start."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = lane < lanes
    few = tl.arange(0, FEW).to(tl.int64)
    t = few * apart + few * few % apart  # of no one beat, which what is missing might have too
    inside = (t < n)[:, None] & there[None, :]
    given = read_tile(at(x, lane, inner, t, x_strides), inside, False, X)
    usable = inside & finite(given)
    low, high = tl.min(tl.where(usable, given, float("inf")), 0), tl.max(tl.where(usable, given, -float("inf")), 0)
    alike = ((low > 0.0) & (high <= 2.0 * low)) | ((high < 0.0) & (2.0 * high <= low))
    origin = tl.where(alike & (low <= high), low, 0.0)
    total = tl.zeros((LANES,), tl.float64)
    if starts is not None:
        total = number(held[0], held[1]) * (tl.load(starts + lane, mask=there, other=0.0) - origin)
    elif FROM_FIRST:
        total = number(held[0], held[1]) * (_first(x, lane, inner, n, there, x_strides, X, TIME, LANES) - origin)
    tl.store(base + lane, origin, mask=there)
    tl.store(sums + lane, total, mask=there)


@triton.jit(do_not_specialize=["n", "lanes", "segments"])
def _mean(
    x,
    base,
    sums,
    before,
    out,
    missed,
    n,
    lanes,
    inner,
    segments,
    length,
    lost,
    small,
    held,
    rest,
    share,
    least,
    x_strides,
    out_strides,
    X: tl.constexpr,
    OUT: tl.constexpr,
    DEBIAS: tl.constexpr,
    SKIPS: tl.constexpr,
    ONLY_ENDS: tl.constexpr,
    TIME: tl.constexpr,
    LANES: tl.constexpr,
):
    segment = (tl.program_id(0) % segments).to(tl.int64)
    lane = (tl.program_id(0) // segments).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = lane < lanes
    begin = segment * length
    end = tl.minimum(begin + length, n)
    c = number(lost[0], lost[1])
    place = ((lane // inner) * segments + segment) * inner + lane % inner
    origin = tl.load(base + lane, mask=there, other=0.0)
    if ONLY_ENDS:
        y = tl.zeros((LANES,), tl.float64)
        seen = y
    else:
        y, seen = tl.load(sums + place, mask=there, other=0.0), tl.load(before + place, mask=there, other=1.0)
    kept = 1.0 + 0.0 * seen
    for start in range(begin, end, TIME):
        t = start + tl.arange(0, TIME)
        inside = (t < end)[:, None] & there[None, :]
        whole = (start + TIME <= end) & (tl.max(lane, 0) < lanes)
        given = read_tile(at(x, lane, inner, t, x_strides), inside, whole, X)
        usable = inside & finite(given)
        if missed is not None:
            count(missed, tl.ravel(inside & ~usable))
        given = tl.where(usable, given - origin[None, :], 0.0)
        if X == tl.float64:
            given *= number(small[0], small[1])
        if not SKIPS:
            given = tl.where(inside & ~usable, float("nan"), given)
            usable = inside
        gone, left = tl.where(usable, c, 0.0), tl.where(usable, 1.0 - c, 1.0)
        if OUT == tl.float64:
            gone, left, gained = tl.associative_scan((gone, left, given), 0, then)
        else:
            gone, left, gained = tl.associative_scan((gone, left, given), 0, roughly_then)
        if ONLY_ENDS:
            gone, left, gained = last(gone, TIME), last(left, TIME), last(gained, TIME)
            seen, kept, y = then(seen, kept, y, gone, left, gained)
        else:
            little = y[None, :] + (gained - gone * y[None, :])
            made = tl.where(gone <= 0.5, little, left * y[None, :] + gained)
            y = last(made, TIME)
            if 1.0 - tl.min(seen, 0) > UNSEEN:
                by_now = seen[None, :] + gone * (1.0 - seen)[None, :]
                seen = last(by_now, TIME)
                if DEBIAS:
                    made /= number(held[0], held[1]) + by_now * number(rest[0], rest[1])
                else:
                    made *= number(share[0], share[1])
                made = tl.where(by_now > number(least[0], least[1]), made, float("nan"))
            else:
                made *= number(share[0], share[1])
            write_tile(at(out, lane, inner, t, out_strides), inside, whole, made + origin[None, :], OUT)
    if ONLY_ENDS:
        size = lanes.to(tl.int64) * segments
        tl.store(out + place, seen, mask=there)
        tl.store(out + size + place, kept, mask=there)
        tl.store(out + 2 * size + place, y, mask=there)


def tells(needed: int, lost: float) -> bool:
    """Whether so many values can be told from one less by what is seen of their weight."""
    if needed <= 1 or lost in (0.0, 1.0):
        return needed <= 1 or lost == 0.0
    seen = -math.expm1(needed * math.log1p(-lost))
    return lost * (1.0 - seen) > 1e-11 * seen


def mean(
    x: Tensor,
    out: Tensor,
    start: Tensor | None,
    held: float,
    lost: float,
    debias: bool,
    skips: bool = True,
    needed: int = 1,
    missed: Tensor | None = None,
) -> None:
    """Write the running mean of every series, from its first step on.

    Args:
        x, out: of shape (outer, n, inner), of any floating dtype and layout; sharing no memory, or one and the same.
        start: the means before the first step, in float64; or None, for each series' first finite value.
        held: what they weigh, in steps.
        lost: what each step takes from what was.
        debias: whether a mean is divided by the weight so far; otherwise that is 1 / lost throughout.
        skips: whether a value that is not finite leaves all as it is; otherwise all is NaN from there on.
        needed: how many values must have been observed, or the mean is NaN; see `tells`.
        missed: an int64 to which the number of those that are not finite is added.
    """
    if not x.numel():
        return
    if not out.is_inference():
        increment_version(out)
    (outer, n, inner), lanes, (time, width, abreast, segments, length) = x.shape, x.shape[0] * x.shape[2], plan(x)
    lost = max(lost, LEAST)
    small = 2.0 ** -math.ceil(math.log2(held + min(n, 1.0 / lost))) if x.dtype == torch.float64 else 1.0
    # Between what is seen with one value less, and with them all.
    least = needed - 0.5 if lost == 1.0 else -math.expm1((needed - 0.5) * math.log1p(-lost))
    given = (lost, small, held * small, (1.0 / lost - held) * small, lost / small, least)
    numbers = [halves(each, x.device) for each in given]
    (x_at, x_strides), (out_at, out_strides) = known(x), known(out)
    tile = {"X": DTYPES[x.dtype], "TIME": time, "LANES": width, "num_warps": WARPS}
    kind = {"OUT": DTYPES[out.dtype], "DEBIAS": debias, "SKIPS": skips}
    base, sums = x.new_empty((2, outer, 1, inner), dtype=torch.float64)
    before = torch.zeros_like(base)
    starts = None if start is None else start.expand(outer, 1, inner).contiguous()
    shape = (n, lanes, inner, triton.cdiv(n, FEW.value), numbers[2], x_strides)
    few = min(width, max(TILE // FEW.value, 1))
    begin = tile | {"FROM_FIRST": held > 0.0 or not debias, "TIME": TILE // few, "LANES": few}
    run(_begin, (triton.cdiv(lanes, few),), x.device, x_at, starts, base, sums, *shape, **begin)

    def steps(out: Tensor, segments: int, only_ends: bool) -> None:
        shape = (n, lanes, inner, segments, length)
        given = (x_at, base, sums, before, out, None if only_ends else missed)
        constants = tile | kind | {"ONLY_ENDS": only_ends}
        run(_mean, (abreast * segments,), x.device, *given, *shape, *numbers, x_strides, out_strides, **constants)

    if segments > 1:
        ends, carries = base.new_empty((3, outer, segments - 1, inner)), base.new_empty((2, outer, segments, inner))
        steps(ends, segments - 1, True)
        for carry, first, gained in zip(carries, (sums, before), (ends[2], ends[0]), strict=True):
            carry[:, :1] = first
            triton_scan.scan(gained, ends[0], first, carry[:, 1:], ends[1])
        sums, before = carries
    steps(out_at, segments, False)


def remembering(x: Tensor, start: Tensor | None, held: float, lost: float, debias: bool) -> Tensor | None:
    """The mean as a new tensor; None where a value is missing, which the device has to be asked for, or may not be."""
    if capturing():
        return None
    out, missed = torch.empty_like(x), torch.zeros((), dtype=torch.int64, device=x.device)
    mean(x, out, start, held, lost, debias, missed=missed)
    return None if int(missed) else out


def linear(held: float, lost: float, debias: bool, x: Tensor, transposed: bool) -> Tensor:
    """The running mean from 0, where nothing is missing; or what its gradient is: shares and sums change places, and
    time runs backwards."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    initial = x.new_zeros((x.shape[0], 1, x.shape[2]), dtype=torch.float64)
    shares = Shares(held, debias, transposed)
    triton_scan.scan(x, max(lost, LEAST), initial, out, reverse=transposed, shares=shares)
    return out
