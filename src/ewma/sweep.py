"""One pass over whole series, in pieces that fit the processor's cache, whatever the kernel.

Nothing is ever as large as the series but the result; with autograd, which has to remember all of it, one piece is all.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy

from ewma import kernels, whole
from ewma.arrays import Array, empty, is_tensor, may_ask, module_of, needs_gradient, wide
from ewma.averaging import Pair
from ewma.columns import Vector
from ewma.moments import Chunk, Moments
from ewma.ratios import root
from ewma.rules import numbers
from ewma.values import Series
from ewma.weighting import Rule

PIECE = 1 << 18
COMPILED = 1 << 16
ON_DEVICE = 1 << 21
"""How many elements are in work at a time, by whole-array operations, by the compiled kernel, and where the start of an
operation costs as much as its work on many."""
SHORTEST = 64
MOST = 1 << 16
LARGE = 1 << 20
"""How many steps a piece has at least, where there are more; how many series it has at most; and from how many elements
on threads are worth their start."""

Statistic: TypeAlias = Callable[[Chunk, Moments, tuple[Array, ...]], tuple[Array, ...]]
"""Of a chunk, of the moments before it and of its values: the arrays that are asked for."""


def sweep(
    rule: Rule,
    start: Array | None,
    series: Sequence[Series],
    elapsed: Vector | None,
    needed: int,
    statistic: Statistic,
    wanted: tuple[Pair, ...] = (),
    *,
    results: int = 1,
    out: Any = None,
) -> list[Any]:
    """Take in whole series and give what `statistic` makes of them, packed as the first one came.

    Args:
        rule: how the steps weigh.
        start: the mean before the first, of shape (outer, 1, inner), for each series alike; None where there is none.
        elapsed: what passed before each step; None for one unit each.
        needed: how many values must have been observed, for there to be a result.
        wanted: the second moments that `statistic` needs.
        results: how many arrays `statistic` gives.
        out: where to write the only result, if not to a new array.
    """
    first = series[0]
    outer, n, inner = first.shape
    arrays = [one.array.reshape(outer, n, inner) for one in series]
    if rule.missing == "raise":
        for array in arrays:
            raise_for_missing(array)
    if is_tensor(first.array) and needs_gradient(*arrays, rule.alpha, start):
        _refuse(out)
        quick = statistic is mean_of and elapsed is None and needed <= 1 and first.array.numel()
        if quick and not needs_gradient(rule.alpha, start):
            with numpy.errstate(all="ignore"):
                made = whole.remembering(rule, start, arrays[0])
            if made is not None:
                return [first.pack(made.reshape(first.array.shape))]
        given: Sequence[Array] = arrays * results
        if first.array.numel():
            given = _advance(_begun(rule, wanted, start, len(series)), arrays, elapsed, 0, needed, statistic)
        return [first.pack(result.reshape(first.array.shape).to(first.floating)) for result in given]
    made = [empty(first.array, first.floating) if out is None else _check_out(first, out) for _ in range(results)]
    views = [array.reshape(outer, n, inner) for array in made]
    if (
        elapsed is None
        and made[0] is not first.array
        and _at_once(rule, start, arrays[0], statistic, views, made[0] is not out, needed)
    ):
        for view in views if needed > 1 else ():
            view[:, : needed - 1] = math.nan
        return [_give(first, array, out) for array in made]
    moments = _begun(rule, wanted, start, len(series))

    def group(lanes: tuple[slice, slice]) -> None:
        rows, columns = lanes
        part = moments.of(rows, columns)
        with quietly(first.array):
            inputs, outputs = ([array[rows, :, columns] for array in several] for several in (arrays, views))
            follow(part, inputs, elapsed, needed, statistic, outputs)

    threads = _threads(first.array, inner)
    if threads == 1:
        for lanes in _lanes(outer, inner, 1):
            group(lanes)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(group, _lanes(outer, inner, threads)))
    return [_give(first, array, out) for array in made]


@dataclass(frozen=True)
class Spread:
    """The statistic that is a running variance, a deviation, or the bands of k deviations around the mean."""

    kind: Literal["variance", "deviation", "bands"]
    unbiased: bool
    k: float = 0.0

    def __call__(self, chunk: Chunk, prior: Moments, xs: tuple[Array, ...]) -> tuple[Array, ...]:
        variance = chunk.second((0, 0), self.unbiased)
        if self.kind == "variance":
            return (variance,)
        deviation = root(variance)
        if self.kind == "deviation":
            return (deviation,)
        mean, width = chunk.means[0], self.k * deviation
        return mean - width, mean, mean + width


KINDS = ("variance", "deviation", "bands")


def _at_once(
    rule: Rule,
    start: Array | None,
    x: Array,
    statistic: Statistic,
    outs: Sequence[Array],
    untouched: bool,
    needed: int,
) -> bool:
    """Write a mean or a spread of whole series in one compiled pass, where that can be."""
    if statistic is mean_of:
        return whole.mean(rule, start, x, outs[0], untouched, needed)
    return isinstance(statistic, Spread) and whole.spread(
        rule, start, x, outs, KINDS.index(statistic.kind), statistic.k, statistic.unbiased
    )


def _begun(rule: Rule, wanted: tuple[Pair, ...], start: Array | None, several: int) -> Moments:
    """The moments of so many series before their first step."""
    moments = Moments(rule, wanted)
    if start is not None:
        moments.begin_at((start,) * several)
    return moments


def mean_of(chunk: Chunk, prior: Moments, xs: tuple[Array, ...]) -> tuple[Array, ...]:
    """The statistic that is the mean."""
    return chunk.means[:1]


def follow(
    moments: Moments,
    arrays: Sequence[Array],
    elapsed: Vector | None,
    needed: int,
    statistic: Statistic,
    outputs: Sequence[Array],
) -> None:
    """Move the moments on through arrays of shape (outer, n, inner), and write what `statistic` makes of them."""
    outer, n, inner = arrays[0].shape
    size = ON_DEVICE if not may_ask(arrays[0]) else COMPILED if kernels.compiled() else PIECE
    step = max(size // max(outer * inner, 1), SHORTEST)
    moments.rooms = {}
    for begin in range(0, n, step):
        piece = [array[:, begin : begin + step] for array in arrays]
        passed = None if elapsed is None else elapsed[begin : begin + step]
        results = _advance(moments, piece, passed, begin, needed, statistic)
        for output, result in zip(outputs, results, strict=True):
            output[:, begin : begin + step] = result
    moments.rooms = None


def both_sides(rule: Rule, series: Series, elapsed: Vector | None, needed: int, out: Any) -> Any:
    """The mean of the values on both sides of each, weighted by their distance, the value itself counted once.

    (before * weight before + after * weight after - x) / (weight before + weight after - 1)
    """
    outer, n, inner = series.shape
    x = wide(series.array.reshape(outer, n, inner))
    learns = needs_gradient(x, rule.alpha)
    if learns:
        _refuse(out)
    if rule.missing == "raise":
        raise_for_missing(x)
    target = empty(series.array, series.floating) if out is None else _check_out(series, out)
    if not math.prod(x.shape):
        return series.pack(series.array.to(series.floating) if learns else target)
    module = module_of(x)
    rule = replace(rule, weigh="value")
    back = None if elapsed is None else numpy.concatenate(([1.0], elapsed[:0:-1]))
    with contextlib.nullcontext() if learns else quietly(x):
        ahead = Moments(rule).advance((x,), elapsed)
        behind = Moments(rule.reversed()).advance((module.flip(x, (1,)),), back)
        mean, weight, count = (module.flip(part, (1,)) for part in (behind.means[0], behind.total, behind.count))
        finite = module.isfinite(x)
        own, start = wide(finite), module.where(ahead.count > 0, ahead.means[0], mean)
        # Written as a change of what lies before, a constant stays exactly what it is.
        change = (mean - start) * weight - own * (module.where(finite, x, 0.0) - start)
        total = ahead.total + weight - own
        result = start + change / module.where(total > 0.0, total, 1.0)
        result = module.where(ahead.count + count - own >= needed, result, math.nan)
        if learns:
            return series.pack(result.reshape(series.array.shape).to(series.floating))
        target.reshape(outer, n, inner)[...] = result
        return _give(series, target, out)


def _advance(
    moments: Moments,
    piece: Sequence[Array],
    elapsed: Vector | None,
    begin: int,
    needed: int,
    statistic: Statistic,
) -> tuple[Array, ...]:
    """One piece; NaN where too few values were observed."""
    prior = copy.copy(moments)
    xs = tuple(piece)
    chunk = moments.advance(xs, elapsed, begin)
    made = statistic(chunk, prior, xs)
    # It only grows, or from some step on is NaN.
    if may_ask(chunk.count) and all(bool((chunk.count[:, step] >= needed).all()) for step in (0, -1)):
        return made
    module, enough = module_of(xs[0]), chunk.count >= needed
    return tuple(module.where(enough, array, float("nan")) for array in made)


def raise_for_missing(x: Array) -> None:
    """Before anything is computed, so that nothing is written in vain."""
    step = max((PIECE if may_ask(x) else ON_DEVICE) // max(x.shape[0] * x.shape[2], 1), 1)
    for begin in range(0, x.shape[1], step):
        finite = module_of(x).isfinite(x[:, begin : begin + step])
        if not bool(finite.all()):
            place = begin + int((~finite).any(2).any(0).nonzero()[0].ravel()[0])
            raise ValueError(
                f'expected finite values only, by nan="raise"; got one that is not at step {place}. nan="skip" leaves '
                f"such values out."
            )


def _lanes(outer: int, inner: int, threads: int) -> Iterator[tuple[slice, slice]]:
    """The series in groups: no more of them than can be in work at a time, and one group at least for each thread."""
    wide = max(min(inner, MOST), 1)
    high = max(MOST // wide, 1)
    if outer >= threads:
        high = min(high, -(-outer // threads))
    else:
        wide = min(wide, -(-inner // threads))
    for row in range(0, outer, high):
        for column in range(0, inner, wide):
            yield slice(row, row + high), slice(column, column + wide)


def _threads(x: Array, inner: int) -> int:
    """How many threads share many series side by side: NumPy's alone, since torch has its own."""
    if is_tensor(x) or x.size < LARGE or inner == 1:
        return 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0))


def _refuse(out: Any) -> None:
    if out is not None:
        raise ValueError("out= cannot be written where autograd has to remember: leave it out, or use no_grad()")


def _check_out(series: Series, out: Any) -> Array:
    """Where to write: `out` itself, or room of its own where out is not one stretch of memory or shares some of x's."""
    x = series.array
    if is_tensor(out) != is_tensor(x) or not (is_tensor(out) or isinstance(out, module_of(x).ndarray)):
        raise TypeError(f"expected out to be an array or a tensor, as x is; got {type(out).__name__}")
    if tuple(out.shape) != tuple(x.shape):
        raise ValueError(f"expected out of x's shape, {list(x.shape)}; got {list(out.shape)}")
    if is_tensor(out):
        if not out.is_floating_point() or out.device != x.device:
            raise TypeError(f"expected out of a floating dtype on {x.device}; got {out.dtype} on {out.device}")
        if out.requires_grad:
            raise ValueError("out needs a gradient, and cannot be written in place: give out.detach()")
        simple = (
            out.is_contiguous()
            and not out._is_view()
            and (out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() or out is x)
        )
    else:
        if out.dtype.kind != "f":
            raise TypeError(f"expected out of a floating dtype; got {out.dtype}")
        if not out.flags.writeable:
            raise ValueError("expected out to be writeable; got a read-only array")
        simple = out.flags.c_contiguous and (out is x or not module_of(x).may_share_memory(out, x))
    return out if simple else empty(series.array, series.floating)


def _give(series: Series, made: Array, out: Any) -> Any:
    """The result as the series came, or in `out`."""
    if out is None:
        return series.pack(made)
    if made is not out:
        out[...] = made
    return out


@contextlib.contextmanager
def quietly(x: Array) -> Iterator[None]:
    """Without autograd and without NumPy's warnings: what overflows on the way is computed otherwise."""
    grads = module_of(x).no_grad() if is_tensor(x) else contextlib.nullcontext()
    with numpy.errstate(all="ignore"), grads:
        yield


def starting(initial: Any, series: Series) -> Array:
    """The mean to start from, of shape (outer, 1, inner)."""
    x = series.array
    outer, _, inner = series.shape
    value = numbers("initial", initial, x)
    sizes = list(x.shape)
    del sizes[series.axis]
    try:
        value = module_of(x).broadcast_to(value, tuple(sizes))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected initial of a shape that broadcasts to x's without its axis, {sizes}; got {list(value.shape)}"
        ) from error
    if may_ask(value) and not bool(module_of(x).isfinite(value).all()):
        raise ValueError(f"expected initial to be finite; got {initial}")
    return value.reshape(outer, 1, inner)
