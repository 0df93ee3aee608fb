"""Running means and second moments of many series at once, a chunk of time at a time.

    mean[t]     = mean[t-1] + c[t] * (x[t] - mean[t-1])
    variance[t] = variance[t-1] + c[t] * ((1 - c[t]) * (x[t] - mean[t-1]) ** 2 - variance[t-1])

Both are the same recurrence, and so are the weights that c comes from: `scan` does all of them. It is carried relative
to one of the values, which keeps constants constant and loses nothing to an offset.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import numpy

from ewma import columns, kernels, passes
from ewma.arrays import Array, before, empty, full, like, may_ask, module_of, needs_gradient, wide
from ewma.bases import base_of, fixed, matters, unit
from ewma.profiles import Exponential
from ewma.ratios import debiased, standardized
from ewma.residues import hides, left_out
from ewma.weighting import Rule, Terms, Weights, part_of

Pair: TypeAlias = tuple[int, int]

LEAST = 1 << 12
MOST = 1 << 17
"""How many steps at a time at least and at most, while the weights still change from step to step."""

Operation: TypeAlias = Callable[[Any, Any], Any]


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


class Stretch(NamedTuple):
    """Steps that lose the same; and what each value is of all so far, if it differs as a NumPy array."""

    part: slice
    lost: float
    share: Any


class Chunk(NamedTuple):
    """What a chunk gave: arrays of shape (outer, n, inner), or (1, n, 1) where it is the same for all series."""

    means: tuple[Array, ...]
    spreads: dict[Pair, Array]
    total: float | Array
    pairs: Array
    count: Array
    """How many values were observed so far; NaN where a missing one has made all unknown."""

    def second(self, pair: Pair, unbiased: bool) -> Array:
        """The variance or covariance; NaN where there is none yet."""
        biased = self.spreads[pair]
        return debiased(biased, self.total, self.pairs) if unbiased else biased


def standardized_before(x: Array, chunk: Chunk, prior: Moments, unbiased: bool) -> Array:
    """How far each value lies from the mean before it, in the standard deviations before it."""
    variance = before(chunk.second((0, 0), unbiased), prior.second((0, 0), unbiased) if prior.means else math.nan)
    mean = before(chunk.means[0], prior.means[0] if prior.means else math.nan)
    return standardized(x, mean, variance, before(chunk.pairs, prior.pairs))


@dataclass
class Moments:
    """The state of running moments: numbers while all series have them in common, else arrays.

    Args:
        rule: how the steps weigh.
        wanted: which second moments to keep, as pairs of the series' positions: (0, 0) is the first one's variance.
    """

    rule: Rule
    wanted: tuple[Pair, ...] = ()
    time: float = 0.0
    weight: Any = 0.0
    means: tuple[Any, ...] = ()
    spreads: dict[Pair, Any] = field(default_factory=dict)
    pairs: Any = 0.0
    count: Any = 0.0
    seen: Any = 0.0
    residue: Any = 0.0
    begun: bool = False
    gaps: bool = field(default=False, compare=False)
    rooms: dict[Any, Array] | None = field(default=None, compare=False)
    """Memory that is used again for every chunk, where what a chunk gave is used up before the next: fresh memory costs
    more than the arithmetic. None where every chunk gets its own."""

    NUMBERS = ("weight", "residue", "pairs", "count", "seen")

    def advance(self, xs: tuple[Array, ...], elapsed: Any = None, begin: int = 0) -> Chunk:
        """Take in a chunk of one or two series.

        Args:
            xs: arrays of shape (outer, n, inner), of real numbers, time in the middle; n at least 1. Where one of them
                is not finite the values of all are missing.
            elapsed: NumPy vector of what passed before each step; None for one unit each.
            begin: the position of the chunk in the series that a rule of many rates was made for.
        """
        terms = self.rule.terms(xs[0], self.time, elapsed, begin, begin + xs[0].shape[1])
        alike = terms.constant and isinstance(self.weight, float) and all(map(may_ask, xs))
        # Not debiased, the first value weighs more than its step says: autograd has to see that.
        begun = alike and (self.rule.debias or self.weight == 1.0 or not self._learns(xs))
        passes_serve = all(map(may_ask, xs)) and not self._learns(xs)
        if passes_serve and self.gaps:  # where some were missing, others will be
            begun = begun and _all_finite(xs)
        chunk = self._alike(xs, terms) if begun else None
        if chunk is None and passes_serve:
            self.gaps = not _all_finite(xs)
            chunk = self._in_passes(xs, terms, elapsed)
        if chunk is None:
            chunk = self._any(xs, terms, elapsed)
        self.time += xs[0].shape[1] if elapsed is None else float(elapsed.sum())
        return chunk

    def smooth(self, x: Array, out: Array) -> bool:
        """Write the running mean of whole series, every step alike and every value finite, in one compiled pass.

        The state stays as it is. Where this cannot be, False, and what was written has no meaning.

        Args:
            x: of shape (outer, n, inner), of real numbers, time in the middle.
            out: of the same shape, sharing no memory with x.
        """
        terms = self._equal_terms(x)
        return terms is not None and bool(self._mean_of(x, out, self.means[0] if self.means else None, terms))

    def _mean_of(self, x: Array, out: Array, start: Array | None, terms: Terms) -> bool | None:
        """Write the running mean in one compiled pass; False where it is not finite, None where none can be."""
        kernel = kernels.compiled()
        if kernel is None:
            return None
        if start is not None:
            if (start := kernel.lend(start)) is None:
                return None
            start = numpy.ascontiguousarray(numpy.broadcast_to(start, (x.shape[0], 1, x.shape[2])))
        made: bool | None = kernel.mean(x, out, start, self._held(terms), terms.lost, self.rule.debias)
        return made

    def spread(self, x: Array, outs: Sequence[Array], kind: int, k: float, unbiased: bool) -> bool:
        """Write the running variances, deviations or bands of whole series, as `smooth` does the mean.

        Args:
            kind, k: see `ewma.kernels.compiled_scan.spread`.
        """
        kernel, terms = kernels.compiled(), self._equal_terms(x)
        fresh = self.weight == 0.0 or not self.rule.debias
        if kernel is None or terms is None or not (fresh and terms.keep > 0.0):
            return False
        start = kernel.lend(self.means[0]) if self.means else None
        start = None if start is None else numpy.ascontiguousarray(start)
        return bool(kernel.spread(x, outs, start, self._held(terms), terms, self.rule.debias, kind, k, unbiased))

    def smooth_remembering(self, x: Any) -> Any:
        """`smooth` as a new tensor that autograd can go back through to x; None where this cannot be."""
        if kernels.compiled() is None or (terms := self._equal_terms(x)) is None:
            return None
        if not self.rule.debias and self.weight == 0.0:  # the first value weighs more than its step says
            return None
        out = empty(x, x.dtype)
        if not self.smooth(x, out):
            return None
        from ewma.kernels import differentiable

        return differentiable.remembering(x, out, list(self._cut(terms, x.shape[1])))

    def _equal_terms(self, x: Array) -> Terms | None:
        """The terms of whole series whose steps are alike; else None."""
        if not (x.shape[1] and isinstance(self.weight, float) and (self.rule.debias or self.weight in (0.0, 1.0))):
            return None
        terms = self.rule.terms(x, self.time, None, 0, x.shape[1])
        return terms if terms.constant else None

    def _cut(self, terms: Terms, n: int) -> Iterator[Stretch]:
        """Whole series, cut where what a value is of all so far no longer changes."""
        weight, begin, settled = self.weight, 0, max(columns.settled(terms.lost), LEAST)
        while begin < n:
            steps = int(min(n - begin, MOST, settled - begin)) if begin < settled else n - begin
            share, weight = self.rule.shares(terms, steps, weight, numpy.zeros(1))
            yield Stretch(slice(begin, begin + steps), terms.lost, share)
            begin += steps

    def reshape(self, outer: int, inner: int) -> None:
        """Look at the same series as outer times inner of them."""
        shape = (outer, 1, inner)

        def shaped(x: Any) -> Any:
            return x.reshape(shape) if getattr(x, "shape", (1, 1, 1)) != (1, 1, 1) else x

        self.means = tuple(map(shaped, self.means))
        self.spreads = {pair: shaped(spread) for pair, spread in self.spreads.items()}
        for name in self.NUMBERS:
            setattr(self, name, shaped(getattr(self, name)))

    def of(self, rows: slice, columns: slice) -> Moments:
        """The state of some of the series, before the first step."""
        means = tuple(part_of(mean, rows, columns) for mean in self.means)
        spreads = {pair: part_of(spread, rows, columns) for pair, spread in self.spreads.items()}
        return replace(self, rule=self.rule.of(rows, columns), means=means, spreads=spreads)

    def merge(self, later: Moments) -> None:
        """Take in the moments of values that came after these, by the same rule: debiased, of a profile that merges."""
        profile, module = self.rule.profile, None
        for mean in later.means:
            module = module_of(mean)
        if module is None:
            return
        kept: Any = 1.0
        if isinstance(profile, Exponential):
            rate = profile.rate
            seen = later.seen + 0.0 * later.count + full(later.means[0], (1, 1, 1), 0.0)
            nothing = wide(seen == 0.0)
            # An infinite rate keeps nothing; but of nothing that came later, all.
            kept = nothing + (1.0 - nothing) * module.exp(-rate * (seen + nothing))
        if not self.means:
            self.means = tuple(0.0 * mean for mean in later.means)
            self.spreads = {pair: 0.0 * spread for pair, spread in later.spreads.items()}
        mine = kept * self.weight
        total = mine + later.weight
        nothing = total == 0.0  # of neither is anything left: the newest is all there is
        share = later.weight / (total + nothing) + nothing * (later.count > 0.0)
        steps = [theirs - ours for ours, theirs in zip(self.means, later.means, strict=True)]
        for pair in self.wanted:
            rise = later.spreads[pair] - self.spreads[pair]
            between = math.prod(steps[k] for k in pair)
            self.spreads[pair] = self.spreads[pair] + share * (rise + (1.0 - share) * between)
        self.means = tuple(
            module.where(module.isfinite(step), ours + share * step, (1.0 - share) * ours + share * theirs)
            for ours, step, theirs in zip(self.means, steps, later.means, strict=True)
        )
        self.pairs = kept * kept * self.pairs + later.pairs + 2.0 * mine * later.weight
        self.weight, self.count, self.seen = total, self.count + later.count, self.seen + later.seen
        self.time += later.time

    def begin_at(self, means: tuple[Array, ...]) -> None:
        """Start from means that have the weight of the whole past; of shape (outer, 1, inner)."""
        self.means, self.weight, self.begun = means, 1.0, True
        self.spreads = dict.fromkeys(self.wanted, 0.0 * means[0])

    @property
    def total(self) -> float | Array:
        """The sum of all weights."""
        return self.weight if self.rule.debias else 1.0

    def second(self, pair: Pair, unbiased: bool) -> Array:
        """The variance or covariance of all that was taken in."""
        return debiased(self.spreads[pair], self.total, self.pairs) if unbiased else self.spreads[pair]

    def _learns(self, xs: tuple[Array, ...]) -> bool:
        """Whether autograd has to see what happens."""
        return needs_gradient(*xs, *self.means, self.weight, self.rule.alpha)

    def _held(self, terms: Terms) -> Any:
        """What a mean that is there already weighs, in steps."""
        return (self.weight if self.rule.debias else 1.0) / terms.gain

    def _alike(self, xs: tuple[Array, ...], terms: Terms) -> Chunk | None:
        """All steps alike and every value finite: sums under one constant coefficient, divided by their weights.

        None where a value turns out to be missing, or a sum to overflow.
        """
        if not self.rule.debias and self.weight not in (0.0, 1.0):
            return None
        n, in_place = xs[0].shape[1], not self._learns(xs)
        weights = self.rule.constant_weights(terms, n, self.weight, xs[0], bool(self.wanted))
        times: Operation = operator.imul if in_place else operator.mul
        plus: Operation = operator.iadd if in_place else operator.add
        held = self._held(terms)
        starts = self.means if self.weight else tuple(wide(x[:, :1]) for x in xs)
        if in_place and self.wanted:
            averages = self._averages(xs, starts, weights)
            if averages is not None:
                means, spreads, missed = averages
                return None if missed else self._keep(means, spreads, weights, *self._counted(xs[0]))
        bases = tuple(map(base_of, xs))
        if in_place and not self.wanted:
            rooms = tuple(module_of(x).empty_like(x, dtype=module_of(x).float64) for x in xs)
            before_all = self.means if self.weight else (None,) * len(xs)
            done = [self._mean_of(x, room, start, terms) for x, room, start in zip(xs, rooms, before_all, strict=True)]
            if any(finite is False for finite in done):
                return None
            if None not in done:
                return self._keep(rooms, {}, weights, *self._counted(xs[0]))
        rises, spreads = [], {}
        for number, (x, base, start) in enumerate(zip(xs, bases, starts, strict=True)):
            offset = self._less(x, base, in_place)
            room = self._room(number, x, tuple(x.shape)) if in_place else None
            rises.append(times(scan(offset, terms.lost, held * (start - base), out=room), weights.share))
        offsets = [x - base for x, base in zip(xs, bases, strict=True)] if self.wanted else rises
        before_each = [start - base for start, base in zip(starts, bases, strict=True)]
        distances = self._distances(offsets, rises, before_each, weights.share, in_place)
        for pair in self.wanted:
            product = math.prod(distances[k] for k in pair)
            spread = scan(times(product, weights.kept), terms.lost, held * self.spreads.get(pair, 0.0))
            spreads[pair] = times(spread, weights.share)
        if not all(math.isfinite(fixed(x).sum()) for x in (*rises, *spreads.values())):
            return None
        means = tuple(plus(r, base) if matters(base) else r for base, r in zip(bases, rises, strict=True))
        return self._keep(means, spreads, weights, *self._counted(xs[0]))

    def _counted(self, x: Array) -> tuple[Array, Any]:
        """The count after each step, and what has passed after all, where every value is observed."""
        n = x.shape[1]
        return self.count + like(x, columns.steps(n)), self.seen + float(n)

    def _in_passes(self, xs: tuple[Array, ...], terms: Terms, elapsed: Any) -> Chunk | None:
        """Any steps, any missing values, in two compiled passes; None where these cannot be, or a sum overflows."""
        lent = passes.lend(xs)
        if lent is None:
            return None
        whole = tuple(xs[0].shape)
        before = tuple(getattr(self, name) for name in self.NUMBERS)
        sizes = [term.shape for term in (*terms, *before) if hasattr(term, "shape")]
        common = not self.gaps and all(size[0] == size[2] == 1 for size in sizes)
        values, shape = ((), (1, whole[1], 1)) if common else (lent, whole)
        weighed = passes.weigh(self.rule, terms, values, shape, elapsed, before, self._space(xs[0]))
        if weighed is None:
            return None
        weights, pairs, count, seen = weighed
        averages = self._averages(xs, self.means or (0.0,) * len(xs), weights)
        return None if averages is None else self._keep(*averages[:2], weights, count, _last(seen), pairs)

    def _averages(
        self, xs: tuple[Array, ...], starts: tuple[Any, ...], weights: Weights
    ) -> tuple[tuple[Array, ...], dict[Pair, Array], bool] | None:
        before_each = [self.spreads.get(pair, 0.0) for pair in self.wanted]
        made = passes.average(xs, starts, self.wanted, before_each, weights, self._space(xs[0]))
        return None if made is None else (tuple(made[0]), dict(zip(self.wanted, made[1], strict=True)), made[2])

    def _room(self, key: Any, x: Array, shape: tuple[int, ...]) -> Array:
        """Memory for a float64 array of x's kind."""
        if self.rooms is None:
            return module_of(x).empty_like(x, dtype=module_of(x).float64) if shape == x.shape else full(x, shape, 0.0)
        room = self.rooms.get((key, shape))
        if room is None:
            self.rooms[key, shape] = room = full(x, shape, 0.0)
        return room

    def _space(self, x: Array) -> passes.Room:
        return lambda key, shape: self._room(key, x, shape)

    def _less(self, x: Array, base: Array, in_place: bool) -> Array:
        """x - base."""
        if not in_place:
            return x - base
        room = self._room("offset", x, tuple(x.shape))
        if matters(base):
            return module_of(x).subtract(x, base, out=room)
        room[...] = x
        return room

    def _any(self, xs: tuple[Array, ...], terms: Terms, elapsed: Any) -> Chunk:
        """Any steps, any missing values: an average whose coefficient differs from step to step."""
        module = module_of(xs[0])
        finite = functools.reduce(lambda one, other: one & other, map(module.isfinite, xs))
        clean = tuple(module.where(finite, wide(x), 0.0) for x in xs)
        if all(map(may_ask, xs)) and not self._learns(xs):
            scale = unit([*clean, *self.means], squared=bool(self.wanted))
            if scale != 1.0:
                return self._scaled(xs, terms, elapsed, scale)
        observed = wide(finite)
        if may_ask(finite) and bool(finite.all()):
            observed = full(xs[0], (1, xs[0].shape[1], 1), 1.0)
        weight = self.weight if hasattr(self.weight, "shape") else full(xs[0], (1, 1, 1), self.weight)
        weights = self.rule.weights(terms, observed, weight, scan, self.residue)
        starts = self._starts(clean, finite)
        bases = tuple(base_of(module.where(finite, x, start)) for x, start in zip(clean, starts, strict=True))
        rises, spreads = [], {}
        offsets = [module.where(finite, x - base, 0.0) for x, base in zip(clean, bases, strict=True)]
        for offset, base, start in zip(offsets, bases, starts, strict=True):
            rises.append(scan(weights.share * offset, weights.share, start - base))
        before_each = [start - base for start, base in zip(starts, bases, strict=True)]
        distances = self._distances(offsets, rises, before_each, weights.share, not self._learns(xs))
        for pair in self.wanted:
            product = math.prod(distances[k] for k in pair)
            new = weights.share * weights.kept * product
            spreads[pair] = scan(new, weights.share, self.spreads.get(pair, 0.0), weights.kept)
        means = tuple(base + rise for base, rise in zip(bases, rises, strict=True))
        count = self.count + observed.cumsum(1)
        if self.rule.missing == "propagate":  # a count that is not known is never enough
            count = module.where((~finite).cumsum(1) > 0, math.nan, count + 0.0 * means[0])
        counted = observed if self.rule.missing != "decay" else 0.0 * observed + 1.0
        passed = counted if elapsed is None else counted * like(observed, elapsed[None, :, None])
        return self._keep(means, spreads, weights, count, self.seen + _last(passed.cumsum(1)))

    def _distances(
        self, offsets: list[Array], rises: list[Array], starts: list[Array], share: float | Array, exact: bool
    ) -> list[Array]:
        """How far each value lies from the mean before it; `exact` in more digits, where a large mean hides that."""
        distances: list[Array] = []
        if not self.wanted:
            return distances
        for offset, rise, start in zip(offsets, rises, starts, strict=True):
            distance = offset - before(rise, start)
            if exact and hides(distance, rise):
                distance = distance - before(left_out(offset, rise, start, share, scan), 0.0)
            distances.append(distance)
        return distances

    def _starts(self, clean: tuple[Array, ...], finite: Array) -> tuple[Array, ...]:
        """Where each average is carried from: the mean so far, or the first value where there is none yet."""
        module = module_of(finite)
        first = finite & (finite.cumsum(1) == 1)
        values = tuple(module.where(first, x, 0.0).sum(1)[:, None] for x in clean)
        if not self.means:
            return values
        if self.begun:
            return self.means
        unseen = (wide(finite[:, :1]) * 0.0 + self.count) == 0.0
        return tuple(module.where(unseen, value, mean) for value, mean in zip(values, self.means, strict=True))

    def _scaled(self, xs: tuple[Array, ...], terms: Terms, elapsed: Any, scale: float) -> Chunk:
        """Numbers so large that their differences or squares overflow: the same with all of them made smaller."""
        self.means = tuple(mean * scale for mean in self.means)
        self.spreads = {pair: spread * scale * scale for pair, spread in self.spreads.items()}
        chunk = self._any(tuple(wide(x) * scale for x in xs), terms, elapsed)
        self.means = tuple(mean / scale for mean in self.means)
        self.spreads = {pair: spread / scale / scale for pair, spread in self.spreads.items()}
        means = tuple(mean / scale for mean in chunk.means)
        return chunk._replace(means=means, spreads={pair: x / scale / scale for pair, x in chunk.spreads.items()})

    def _keep(
        self,
        means: tuple[Array, ...],
        spreads: dict[Pair, Array],
        weights: Weights,
        count: Array,
        seen: Any,
        pairs: Array | None = None,
    ) -> Chunk:
        if pairs is None:
            pairs = count  # whatever, where none are wanted
            if self.wanted:
                pairs = scan(weights.pairs_gain, weights.pairs_lost, self.pairs, weights.pairs_kept)
        self.means = tuple(map(_end, means))
        self.spreads = {pair: _end(spread) for pair, spread in spreads.items()}
        self.weight, self.residue, self.pairs, self.count = map(_last, (weights.weight, weights.residue, pairs, count))
        self.seen = seen
        return Chunk(means, spreads, weights.total, pairs, count)


def _all_finite(xs: tuple[Array, ...]) -> bool:
    return all(bool(module_of(x).isfinite(x).all()) for x in xs)


def _end(x: Array) -> Array:
    """What holds after the last step, in memory of its own: not all that came before is to be kept for it."""
    return x if x.shape[1] == 1 else module_of(x).concatenate((x[:, -1:],), 1)


def _last(x: Any) -> Any:
    """What holds after the last step, as a float where it is one number on the host."""
    if isinstance(x, float):
        return x
    x = _end(x)
    alone = tuple(x.shape) == (1, 1, 1) and may_ask(x) and not needs_gradient(x)
    return float(x[0, 0, 0]) if alone else x
