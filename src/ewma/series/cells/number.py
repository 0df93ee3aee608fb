"""The running mean and variance of plain floats, which need no array library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ewma import recurrence
from ewma.arrays import Array, like
from ewma.series.cells.arrays import VARIANCE, Arrays
from ewma.series.cells.terms import Terms, raise_for_missing

if TYPE_CHECKING:
    from ewma.series.values import Series


class Number:
    """The running mean and variance of plain floats."""

    kind = "number"

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.missing = terms.rule.missing
        assert terms.rule.profile is not None
        self.moments = recurrence.Moments(terms.rule.profile, terms.rule.weigh, terms.rule.debias)
        self.skipped = 0
        if terms.initial is not None:
            self.moments.mean, self.moments.weight = float(terms.start("EMA", ())), 1.0

    def check(self, where: str, x: Any) -> None:
        try:
            number = float(x)
        except OverflowError as error:
            raise ValueError(f"{where}: expected a number that a float can hold; got one too large") from error
        if self.missing == "raise" and not math.isfinite(number):
            raise ValueError(f'{where}: expected finite values only, by nan="raise"; got {number}')

    def check_chunk(self, where: str, series: Series) -> None:
        if self.missing == "raise":
            raise_for_missing(where, series.array)

    def update(self, x: Any, elapsed: float, timed: bool) -> None:
        x, self.moments.timed = float(x), timed
        if -math.inf < x < math.inf:
            self.moments.update(x, elapsed)
        else:
            self.skipped += 1
            self.moments.miss(elapsed, decay=self.missing == "decay")
            if self.missing == "propagate":
                self.moments.count = math.nan  # never enough

    def extend(self, series: Series, elapsed: Any, timed: bool) -> Array:
        """Take in a chunk; its running mean."""
        if not series.shape[1]:
            return series.array.astype(series.floating)
        whole = Arrays(self.terms, "numpy", VARIANCE)
        whole.begin(series.array[:1], ())
        moments, mine = whole.moments, self.moments
        if mine.count or mine.weight or mine.mean:
            moments.means, moments.spreads = ((like(series.array, [[[mine.mean]]])),), {}
            moments.spreads[0, 0] = like(series.array, [[[mine.biased]]])
        if not mine.debias:  # else a residue is part of the weight, which arrays do without
            moments.residue = mine.residue
        for name in ("time", "weight", "pairs", "count", "seen"):
            setattr(moments, name, getattr(mine, name))
        result = whole.extend(series, elapsed, timed)
        for name in ("time", "weight", "pairs", "count", "seen"):
            setattr(mine, name, float(getattr(moments, name)))
        mine.mean, mine.biased = (float(x.reshape(())) for x in (moments.means[0], moments.spreads[0, 0]))
        mine.residue = float(moments.residue)
        self.skipped += int(whole.skipped)
        return result

    @property
    def shown(self) -> bool:
        return bool(self.moments.count >= self.terms.needed)

    def get(self) -> float:
        return self.moments.mean if self.shown else math.nan

    def second(self, unbiased: bool) -> float:
        return self.moments.variance(unbiased) if self.shown else math.nan

    def deviation(self, unbiased: bool) -> float:
        return math.sqrt(self.second(unbiased))

    def score(self, x: Any, unbiased: bool) -> float:
        moments = self.moments
        if not (math.isfinite(x) and moments.pairs > 0.0 and moments.count + 1.0 >= self.terms.needed):
            return math.nan
        distance, deviation = float(x) - moments.mean, math.sqrt(moments.variance(unbiased))
        if deviation:
            return distance / deviation
        return math.copysign(math.inf, distance) if distance else math.nan

    def merge(self, later: Any) -> None:
        self.moments.merge(later.moments)
        self.skipped += later.skipped

    def state(self) -> dict[str, Any]:
        numbers = {name: getattr(self.moments, name) for name in self.moments.NUMBERS}
        return {"kind": self.kind, "skipped": self.skipped, **numbers}

    def load(self, state: Mapping[str, Any]) -> None:
        self.skipped = state["skipped"]
        for name in self.moments.NUMBERS:
            setattr(self.moments, name, state[name])
