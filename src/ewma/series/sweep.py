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
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy

from ewma import kernels
from ewma.arrays import Array, empty, is_tensor, may_ask, module_of, needs_gradient
from ewma.columns import Vector
from ewma.series import outs, whole
from ewma.series.averaging import Pair
from ewma.series.moments import Chunk, Moments
from ewma.series.ratios import root
from ewma.series.rules import numbers
from ewma.series.values import Series
from ewma.series.weighting import Rule

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


class Course(NamedTuple):
    """How whole series are averaged, each alike.

    Args:
        rule: how the steps weigh.
        start: the mean before the first, of shape (outer, 1, inner); None where there is none.
        elapsed: what passed before each step; None for one unit each.
        needed: how many values must have been observed, for there to be a result.
    """

    rule: Rule
    start: Array | None
    elapsed: Vector | None
    needed: int

    def moments(self, wanted: tuple[Pair, ...], several: int) -> Moments:
        """Those of so many series before their first step."""
        moments = Moments(self.rule, wanted)
        if self.start is not None:
            moments.begin_at((self.start,) * several)
        return moments


def sweep(
    course: Course,
    series: Sequence[Series],
    statistic: Statistic,
    wanted: tuple[Pair, ...] = (),
    *,
    results: int = 1,
    out: Any = None,
) -> list[Any]:
    """Take in whole series and give what `statistic` makes of them, packed as the first one came.

    Args:
        wanted: the second moments that `statistic` needs.
        results: how many arrays `statistic` gives.
        out: where to write the only result, if not to a new array.
    """
    first = series[0]
    shape = first.shape
    arrays = [one.array.reshape(shape) for one in series]
    if course.rule.missing == "raise":
        for array in arrays:
            raise_for_missing(array)
    if is_tensor(first.array) and needs_gradient(*arrays, course.rule.alpha, course.start):
        outs.refuse(out)
        given = _remembering(course, arrays, statistic, wanted, results)
        return [first.pack(result.reshape(first.array.shape).to(first.floating)) for result in given]
    made = [empty(first.array, first.floating) if out is None else outs.check(first, out) for _ in range(results)]
    views = [array.reshape(shape) for array in made]
    over = made[0] is first.array and may_ask(first.array)  # on a device each value is read before it is written over
    if over or not _at_once(course, arrays[0], statistic, views, made[0] is not out):
        _in_pieces(course, arrays, statistic, wanted, views)
    elif course.needed > 1:
        for view in views:
            view[:, : course.needed - 1] = math.nan
    return [outs.give(first, array, out) for array in made]


def _remembering(
    course: Course, arrays: Sequence[Array], statistic: Statistic, wanted: tuple[Pair, ...], results: int
) -> Sequence[Array]:
    """What `statistic` makes of whole series, as autograd can go back through it."""
    rule, start, elapsed, needed = course
    if not arrays[0].numel():
        return list(arrays) * results
    if statistic is mean_of and elapsed is None and needed <= 1 and not needs_gradient(rule.alpha, start):
        with numpy.errstate(all="ignore"):
            made = whole.remembering(rule, start, arrays[0])
        if made is not None:
            return [made]
    return _advance(course.moments(wanted, len(arrays)), arrays, elapsed, 0, needed, statistic)


def _in_pieces(
    course: Course,
    arrays: Sequence[Array],
    statistic: Statistic,
    wanted: tuple[Pair, ...],
    outputs: Sequence[Array],
) -> None:
    """`follow` of some of the series at a time, on as many threads as are worth their start."""
    outer, _, inner = arrays[0].shape
    moments = course.moments(wanted, len(arrays))

    def group(lanes: tuple[slice, slice]) -> None:
        rows, columns = lanes
        with quietly(arrays[0]):
            inputs, targets = ([array[rows, :, columns] for array in several] for several in (arrays, outputs))
            follow(moments.of(rows, columns), inputs, course.elapsed, course.needed, statistic, targets)

    threads = _threads(arrays[0], inner)
    if threads == 1:
        for lanes in _lanes(outer, inner, 1):
            group(lanes)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(group, _lanes(outer, inner, threads)))


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


def _at_once(course: Course, x: Array, statistic: Statistic, outs: Sequence[Array], untouched: bool) -> bool:
    """Write a mean or a spread of whole series in one compiled pass, where that can be."""
    rule, start, elapsed, needed = course
    if elapsed is not None:
        return False
    if statistic is mean_of:
        return whole.mean(rule, start, x, outs[0], untouched, needed)
    return isinstance(statistic, Spread) and whole.spread(
        rule, start, x, outs, KINDS.index(statistic.kind), statistic.k, statistic.unbiased
    )


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
