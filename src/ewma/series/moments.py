"""The state of running means and second moments of many series, moved on by a chunk of time at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ewma.arrays import Array, before, full, may_ask, module_of, needs_gradient
from ewma.series import averaging
from ewma.series.averaging import Averaged, Pair, end, last, scan
from ewma.series.ratios import debiased, standardized
from ewma.series.weighting import Rule, Terms, part_of


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
        begun = alike and (self.rule.debias or self.weight == 1.0 or not self.learns(xs))
        passes_serve = all(map(may_ask, xs)) and not self.learns(xs)
        if passes_serve and self.gaps:  # where some were missing, others will be
            begun = begun and _all_finite(xs)
        made = averaging.alike(self, xs, terms) if begun else None
        if made is None and passes_serve:
            self.gaps = not _all_finite(xs)
            made = averaging.in_passes(self, xs, terms, elapsed)
        if made is None:
            made = averaging.differing(self, xs, terms, elapsed)
        self.time += xs[0].shape[1] if elapsed is None else float(elapsed.sum())
        return self._keep(made)

    def _keep(self, made: Averaged) -> Chunk:
        means, spreads, weights, count, seen, pairs = made
        if pairs is None:
            pairs = count  # whatever, where none are wanted
            if self.wanted:
                pairs = scan(weights.pairs_gain, weights.pairs_lost, self.pairs, weights.pairs_kept)
        self.means = tuple(map(end, means))
        self.spreads = {pair: end(spread) for pair, spread in spreads.items()}
        self.weight, self.residue, self.pairs, self.count = map(last, (weights.weight, weights.residue, pairs, count))
        self.seen = seen
        return Chunk(means, spreads, weights.total, pairs, count)

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

    def learns(self, xs: tuple[Array, ...]) -> bool:
        """Whether autograd has to see what happens."""
        return needs_gradient(*xs, *self.means, self.weight, self.rule.alpha)

    def held(self, terms: Terms) -> Any:
        """What a mean that is there already weighs, in steps."""
        return self.total / terms.gain

    def room(self, key: Any, x: Array, shape: tuple[int, ...]) -> Array:
        """Memory for a float64 array of x's kind."""
        if self.rooms is None:
            return module_of(x).empty_like(x, dtype=module_of(x).float64) if shape == x.shape else full(x, shape, 0.0)
        room = self.rooms.get((key, shape))
        if room is None:
            self.rooms[key, shape] = room = full(x, shape, 0.0)
        return room


def _all_finite(xs: Sequence[Array]) -> bool:
    return all(bool(module_of(x).isfinite(x).all()) for x in xs)
