"""Chunks of running moments in two compiled passes: what each step weighs, and the averages.

For arrays and tensors on the CPU without gradients, where there is the compiled kernel (weigh.c and average.c have the
loops); what cannot be done here, the caller does by whole-array operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy

from ewma import kernels
from ewma.arrays import Array, like, wide
from ewma.series.weighting import Rule, Terms, Weights

Shape: TypeAlias = tuple[int, int, int]
Room: TypeAlias = Callable[[Any, Shape], Array]
"""Memory for a float64 array of the values' kind, by a name and a shape."""

FEW = 16
HIDDEN = 0.25
"""Of how many values the size of a series is told; how many of the values a mean may hide, for its float to do."""


def lend(arrays: Sequence[Array]) -> tuple[Any, ...] | None:
    """The arrays as C can read them; None where one cannot be, or where the compiled kernel does not serve."""
    kernel = kernels.compiled()
    lent = None if kernel is None else tuple(map(kernel.lend, arrays))
    return None if lent is None or any(array is None for array in lent) else lent


def weigh(
    rule: Rule, terms: Terms, xs: Sequence[Any], shape: Shape, elapsed: Any, before: Sequence[Any], room: Room
) -> tuple[Weights, Array, Array, Array] | None:
    """What each step of a chunk weighs; after each, the weight of all pairs and the count; what has passed after all.

    Args:
        terms: of its steps.
        xs: lent arrays of the given shape, whose values may be missing; or none, where all are observed.
        shape: (outer, n, inner); (1, n, 1) where the steps weigh the same in all series.
        before: (weight, residue, pairs, count, seen) before the first step, floats or arrays.
    """
    outer, _, inner = shape
    state = numpy.empty((5, outer, 1, inner))
    lent = lend([part for part in (*terms, *before) if not isinstance(part, float)])
    if lent is None:
        return None
    several = iter(lent)
    keep, lost, gain, weight, residue, pairs, count, seen = (
        part if isinstance(part, float) else next(several) for part in (*terms, *before)
    )
    state[0], state[1], state[2], state[3], state[4] = weight, (1.0 - weight) - residue, pairs, count, seen
    passed = 1.0 if elapsed is None else elapsed[None, :, None]
    rows = tuple(numpy.broadcast_to(numpy.asarray(term, "d"), shape) for term in (keep, lost, gain, passed))
    made = [room(name, shape) for name in ("share", "kept", "weight", "pairs", "count")]
    results = lend(made)
    assert results is not None
    flags = rule.debias, rule.missing == "decay", rule.missing == "propagate", rule.timed
    kernels.compiled().weigh(tuple(xs), rows, results, state, *flags)
    share, kept, after, pairs, count = made
    left_out = like(share, (1.0 - state[0]) - state[1]) if rule.timed and not rule.debias else 0.0
    total = after if rule.debias else 1.0
    return Weights(share, kept, after, total, 0.0, None, 0.0, left_out), pairs, count, like(share, state[4])


def average(
    xs: Sequence[Array],
    starts: Sequence[Array],
    pairs: Sequence[tuple[int, int]],
    spreads: Sequence[Any],
    weights: Weights,
    room: Room,
) -> tuple[list[Array], list[Array], bool] | None:
    """The means and spreads after each step; and whether a value was missing.

    Args:
        xs: one or two arrays of one shape.
        starts: their means before the first step, floats or arrays.
        pairs: of which spreads are wanted.
        spreads: these before the first step.

    None where one of the results is not finite, or the compiled kernel does not serve.
    """
    lent = lend([*xs, *(part for part in (*starts, *spreads, weights.share, weights.kept) if hasattr(part, "shape"))])
    if lent is None:
        return None
    values, several = lent[: len(xs)], iter(lent[len(xs) :])
    starts, spreads, shares = (
        [next(several) if hasattr(part, "shape") else part for part in parts]
        for parts in (starts, spreads, (weights.share, weights.kept))
    )
    shape = outer, _, inner = values[0].shape
    by_step = tuple(numpy.broadcast_to(numpy.asarray(part, "d"), shape) for part in shares)
    means = [room(("mean", k), shape) for k in range(len(xs))]
    made = [room(("spread", pair), shape) for pair in pairs]
    which = bytes(place for pair in pairs for place in pair)
    for exact in (False, True):
        state = numpy.zeros((4 * len(xs) + len(pairs), outer, 1, inner))
        for k, (x, start) in enumerate(zip(xs, starts, strict=True)):
            state[4 * k] = base = _base(x)
            state[4 * k + 1] = start - base
        for k, spread in enumerate(spreads, 4 * len(xs)):
            state[k] = spread
        finite, missed, hidden = kernels.compiled().average(
            values, by_step, lend(means), lend(made), which, state, exact
        )
        if not finite:
            return None
        if not pairs or hidden <= HIDDEN:
            break
    return means, made, missed


def _base(x: Array) -> Any:
    """What each series is carried relative to: one of its values, where all are of one size; see `moments`."""
    if x.shape[1] == 1:
        return 0.0
    few = kernels.compiled().lend(wide(x[:, :: max(x.shape[1] // FEW, 1)]))
    finite = numpy.isfinite(few)
    low = numpy.where(finite, few, numpy.inf).min(1, keepdims=True)
    high = numpy.where(finite, few, -numpy.inf).max(1, keepdims=True)
    alike = ((low > 0.0) & (high <= 2.0 * low)) | ((high < 0.0) & (2.0 * high <= low))
    return numpy.where(alike & (low <= high), low, 0.0)
