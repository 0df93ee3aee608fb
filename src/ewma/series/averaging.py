"""What a chunk makes of the running moments before it, by whichever of three ways can.

    mean[t]     = mean[t-1] + c[t] * (x[t] - mean[t-1])
    variance[t] = variance[t-1] + c[t] * ((1 - c[t]) * (x[t] - mean[t-1]) ** 2 - variance[t-1])

Both are the same recurrence, and so are the weights that c comes from: `scan` does all of them. It is carried relative
to one of the values, which keeps constants constant and loses nothing to an offset.
The moments are read here, not moved.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ewma import columns, kernels
from ewma.arrays import Array, before, full, like, may_ask, module_of, needs_gradient, wide
from ewma.series import passes
from ewma.series.bases import base_of, fixed, matters, unit
from ewma.series.residues import hides, left_out
from ewma.series.weighting import LEAST_KEPT, Terms, Weights

if TYPE_CHECKING:
    from ewma.series.moments import Moments

Pair: TypeAlias = tuple[int, int]
Operation: TypeAlias = Callable[[Any, Any], Any]


class Averaged(NamedTuple):
    """After each step, of shape (outer, n, inner), or (1, n, 1) where it is the same for all series.

    `seen` is what has passed after all. Without `pairs` they follow from the weights.
    """

    means: tuple[Array, ...]
    spreads: dict[Pair, Array]
    weights: Weights
    count: Array
    seen: Any
    pairs: Array | None = None


def scan(
    u: Array, lost: float | Array, initial: Array | float, kept: Array | None = None, out: Array | None = None
) -> Array:
    """`y[t] = y[t-1] + (u[t] - lost[t] * y[t-1])`, in `out` if given; differentiable where a gradient is needed."""
    shape = (u.shape[0], 1, u.shape[2])
    initial = module_of(u).broadcast_to(initial, shape) if hasattr(initial, "shape") else full(u, shape, initial)
    if needs_gradient(u, lost, initial):
        from ewma.kernels import differentiable

        return differentiable.scan(u, lost, initial, kept)
    out = module_of(u).empty_like(u) if out is None else out
    kernels.scan(u, lost, initial, out, kept)
    return out


def alike(moments: Moments, xs: tuple[Array, ...], terms: Terms) -> Averaged | None:
    """All steps alike and every value finite: sums under one constant coefficient, divided by their weights.

    None where a value turns out to be missing, or a sum to overflow.
    """
    rule, weight = moments.rule, moments.weight
    if not rule.debias and weight not in (0.0, 1.0):
        return None
    if moments.wanted and terms.keep < LEAST_KEPT:
        return None
    n, in_place = xs[0].shape[1], not moments.learns(xs)
    weights = rule.constant_weights(terms, n, weight, xs[0], bool(moments.wanted))
    times: Operation = operator.imul if in_place else operator.mul
    plus: Operation = operator.iadd if in_place else operator.add
    held = moments.held(terms)
    starts = moments.means if weight else tuple(wide(x[:, :1]) for x in xs)
    counted = moments.count + like(xs[0], columns.steps(n)), moments.seen + float(n)
    if in_place and moments.wanted:
        averages = _averages(moments, xs, starts, weights)
        if averages is not None:
            means, spreads, missed = averages
            return None if missed else Averaged(means, spreads, weights, *counted)
    bases = tuple(map(base_of, xs))
    kernel = kernels.compiled()
    if in_place and not moments.wanted and kernel is not None:
        rooms = tuple(module_of(x).empty_like(x, dtype=module_of(x).float64) for x in xs)
        before_all = moments.means if weight else (None,) * len(xs)
        done = [
            kernel.mean(x, room, start, held, terms.lost, rule.debias, untouched=True)
            for x, room, start in zip(xs, rooms, before_all, strict=True)
        ]
        if any(finite is False for finite in done):
            return None
        if None not in done:
            return Averaged(rooms, {}, weights, *counted)
    rises, spreads = [], {}
    for number, (x, base, start) in enumerate(zip(xs, bases, starts, strict=True)):
        offset = _less(moments, x, base) if in_place else x - base
        room = moments.room(number, x, tuple(x.shape)) if in_place else None
        rises.append(times(scan(offset, terms.lost, held * (start - base), out=room), weights.share))
    offsets = [x - base for x, base in zip(xs, bases, strict=True)] if moments.wanted else rises
    before_each = [start - base for start, base in zip(starts, bases, strict=True)]
    distances = _distances(offsets, rises, before_each, weights.share, in_place) if moments.wanted else []
    for pair in moments.wanted:
        product = math.prod(distances[k] for k in pair)
        spread = scan(times(product, weights.kept), terms.lost, held * moments.spreads.get(pair, 0.0))
        spreads[pair] = times(spread, weights.share)
    if not all(math.isfinite(fixed(x).sum()) for x in (*rises, *spreads.values())):
        return None
    means = tuple(plus(r, base) if matters(base) else r for base, r in zip(bases, rises, strict=True))
    return Averaged(means, spreads, weights, *counted)


def in_passes(moments: Moments, xs: tuple[Array, ...], terms: Terms, elapsed: Any) -> Averaged | None:
    """Any steps, any missing values, in two compiled passes; None where these cannot be, or a sum overflows."""
    lent = passes.lend(xs)
    if lent is None:
        return None
    whole = tuple(xs[0].shape)
    before = tuple(getattr(moments, name) for name in moments.NUMBERS)
    sizes = [term.shape for term in (*terms, *before) if hasattr(term, "shape")]
    common = not moments.gaps and all(size[0] == size[2] == 1 for size in sizes)
    values, shape = ((), (1, whole[1], 1)) if common else (lent, whole)
    weighed = passes.weigh(moments.rule, terms, values, shape, elapsed, before, _space(moments, xs[0]))
    if weighed is None:
        return None
    weights, pairs, count, seen = weighed
    averages = _averages(moments, xs, moments.means or (0.0,) * len(xs), weights)
    return None if averages is None else Averaged(*averages[:2], weights, count, last(seen), pairs)


def differing(moments: Moments, xs: tuple[Array, ...], terms: Terms, elapsed: Any) -> Averaged:
    """Any steps, any missing values: an average whose coefficient differs from step to step."""
    module, learns = module_of(xs[0]), moments.learns(xs)
    finite = functools.reduce(lambda one, other: one & other, map(module.isfinite, xs))
    clean = tuple(module.where(finite, wide(x), 0.0) for x in xs)
    if all(map(may_ask, xs)) and not learns:
        scale = unit([*clean, *moments.means], squared=bool(moments.wanted))
        if scale != 1.0:
            return _scaled(moments, xs, terms, elapsed, scale)
    observed = wide(finite)
    if may_ask(finite) and bool(finite.all()):
        observed = full(xs[0], (1, xs[0].shape[1], 1), 1.0)
    weight = moments.weight if hasattr(moments.weight, "shape") else full(xs[0], (1, 1, 1), moments.weight)
    weights = moments.rule.weights(terms, observed, weight, scan, moments.residue)
    starts = _starts(moments, clean, finite)
    bases = tuple(base_of(module.where(finite, x, start)) for x, start in zip(clean, starts, strict=True))
    rises, spreads = [], {}
    offsets = [module.where(finite, x - base, 0.0) for x, base in zip(clean, bases, strict=True)]
    for offset, base, start in zip(offsets, bases, starts, strict=True):
        rises.append(scan(weights.share * offset, weights.share, start - base))
    before_each = [start - base for start, base in zip(starts, bases, strict=True)]
    distances = _distances(offsets, rises, before_each, weights.share, not learns) if moments.wanted else []
    for pair in moments.wanted:
        product = math.prod(distances[k] for k in pair)
        new = weights.share * weights.kept * product
        spreads[pair] = scan(new, weights.share, moments.spreads.get(pair, 0.0), weights.kept)
    means = tuple(base + rise for base, rise in zip(bases, rises, strict=True))
    count = moments.count + observed.cumsum(1)
    if moments.rule.missing == "propagate":  # a count that is not known is never enough
        count = module.where((~finite).cumsum(1) > 0, math.nan, count + 0.0 * means[0])
    counted = observed if moments.rule.missing != "decay" else 0.0 * observed + 1.0
    passed = counted if elapsed is None else counted * like(observed, elapsed[None, :, None])
    return Averaged(means, spreads, weights, count, moments.seen + last(passed.cumsum(1)))


def _scaled(moments: Moments, xs: tuple[Array, ...], terms: Terms, elapsed: Any, scale: float) -> Averaged:
    """Numbers so large that their differences or squares overflow: the same with all of them made smaller."""
    means = tuple(mean * scale for mean in moments.means)
    spreads = {pair: spread * scale * scale for pair, spread in moments.spreads.items()}
    smaller = replace(moments, means=means, spreads=spreads)
    made = differing(smaller, tuple(wide(x) * scale for x in xs), terms, elapsed)
    return made._replace(
        means=tuple(mean / scale for mean in made.means),
        spreads={pair: spread / scale / scale for pair, spread in made.spreads.items()},
    )


def _averages(
    moments: Moments, xs: tuple[Array, ...], starts: tuple[Any, ...], weights: Weights
) -> tuple[tuple[Array, ...], dict[Pair, Array], bool] | None:
    """Means and spreads in a compiled pass, and whether a value was missing; None where this cannot be."""
    before_each = [moments.spreads.get(pair, 0.0) for pair in moments.wanted]
    made = passes.average(xs, starts, moments.wanted, before_each, weights, _space(moments, xs[0]))
    return None if made is None else (tuple(made[0]), dict(zip(moments.wanted, made[1], strict=True)), made[2])


def _space(moments: Moments, x: Array) -> passes.Room:
    return lambda key, shape: moments.room(key, x, shape)


def _less(moments: Moments, x: Array, base: Array) -> Array:
    """x - base, in memory that may be used up."""
    room = moments.room("offset", x, tuple(x.shape))
    if matters(base):
        return module_of(x).subtract(x, base, out=room)
    room[...] = x
    return room


def _distances(
    offsets: list[Array], rises: list[Array], starts: list[Array], share: float | Array, exact: bool
) -> list[Array]:
    """How far each value lies from the mean before it; `exact` in more digits, where a large mean hides that."""
    distances: list[Array] = []
    for offset, rise, start in zip(offsets, rises, starts, strict=True):
        distance = offset - before(rise, start)
        if exact and hides(distance, rise):
            distance = distance - before(left_out(offset, rise, start, share, scan), 0.0)
        distances.append(distance)
    return distances


def _starts(moments: Moments, clean: tuple[Array, ...], finite: Array) -> tuple[Array, ...]:
    """Where each average is carried from: the mean so far, or the first value where there is none yet."""
    module = module_of(finite)
    first = finite & (finite.cumsum(1) == 1)
    values = tuple(module.where(first, x, 0.0).sum(1)[:, None] for x in clean)
    if not moments.means:
        return values
    if moments.begun:
        return moments.means
    unseen = (wide(finite[:, :1]) * 0.0 + moments.count) == 0.0
    return tuple(module.where(unseen, value, mean) for value, mean in zip(values, moments.means, strict=True))


def end(x: Array) -> Array:
    """What holds after the last step, in memory of its own: not all that came before is to be kept for it."""
    return x if x.shape[1] == 1 else module_of(x).concatenate((x[:, -1:],), 1)


def last(x: Any) -> Any:
    """What holds after the last step, as a float where it is one number on the host."""
    if isinstance(x, float):
        return x
    x = end(x)
    alone = tuple(x.shape) == (1, 1, 1) and may_ask(x) and not needs_gradient(x)
    return float(x[0, 0, 0]) if alone else x
