"""How the steps of a chunk weigh: from profile, elapsed time and missing values to coefficients.

    weight' = keep * weight + gain          c = gain / weight'          mean' = mean + c * (x - mean)

A value that is missing brings nothing: gain = 0. By "skip" its step does not count at all (keep = 1); by "decay" the
past goes on being forgotten. What does not begin debiased starts at its first value, and has weight 1 after each value.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

from ewma.arrays import Array, before, full, is_tensor, like, module_of
from ewma.profiles import Exponential, Profile, Uniform
from ewma.recurrence import Weigh

Missing = Literal["skip", "decay", "propagate", "raise"]
MISSING: tuple[Missing, ...] = ("skip", "decay", "propagate", "raise")

LEAST_KEPT = 2.0**-6
"""What steps keep at least for it to be told as 1 less what they lose: of less, second moments would lack digits."""


def check_missing(missing: Any) -> Missing:
    if missing not in MISSING:
        raise ValueError(f"nan must be one of {', '.join(map(repr, MISSING))}; got {missing!r}")
    return cast(Missing, missing)


def check_min_periods(min_periods: Any) -> int:
    if isinstance(min_periods, bool) or not hasattr(min_periods, "__index__") or min_periods < 0:
        raise ValueError(f"min_periods must be an integer of at least 0; got {min_periods!r}")
    return int(min_periods)


Scan = Any  # (u, lost, initial, kept) -> y, see `ewma.kernels.scan`


def part_of(array: Array, rows: slice, columns: slice) -> Array:
    """Some of the series, of an array that has 1 where all are alike."""
    return array[rows if array.shape[0] > 1 else slice(None), :, columns if array.shape[2] > 1 else slice(None)]


class Terms(NamedTuple):
    """What one step keeps and loses of the past, and brings of the new: floats where all steps are alike."""

    keep: float | Array
    lost: float | Array
    gain: float | Array

    @property
    def constant(self) -> bool:
        return isinstance(self.lost, float)


class Weights(NamedTuple):
    """How the steps of a chunk weigh.

    `share` is c, `kept` is 1 - c to full precision, `weight` is what the running weight is after each step.
    `pairs_lost` and `pairs_gain` are the coefficients of D = (sum of w) ** 2 - sum of w ** 2, which unbiased moments
    need, and `total` the sum of w that goes with it. `residue` is what rounding has left out of a weight below 1, from
    which what a gap has taken is told.
    """

    share: float | Array
    kept: float | Array
    weight: float | Array
    total: float | Array
    pairs_lost: float | Array
    pairs_kept: Array | None
    pairs_gain: Array
    residue: float | Array = 0.0


@dataclass(frozen=True)
class Rule:
    """How a series is weighted.

    Args:
        profile: how the past is weighted; None where `rate` says so.
        rate: instead, -log(decay) as an array of three dimensions that broadcasts to (outer, n, inner): a memory of its
            own for each channel or step.
        alpha: with it, 1 - decay, straight from what was given.
        debias, weigh: see `ewma.smooth`.
        missing: what a missing value does to the past.
        timed: whether the steps have times, so that a gap is as long as it was.
    """

    profile: Profile | None
    debias: bool
    weigh: Weigh
    missing: Missing = "skip"
    timed: bool = False
    alpha: Array = None

    def of(self, rows: slice, columns: slice) -> Rule:
        """The rule of some of the series."""
        return self if self.alpha is None else replace(self, alpha=part_of(self.alpha, rows, columns))

    def begun(self) -> Rule:
        """The rule for a series that begins at a given mean: as if that had always been there."""
        if isinstance(self.profile, Uniform):
            raise ValueError("initial= needs a profile that forgets, for it to be forgotten; Uniform() does not")
        return replace(self, debias=False)

    def with_times(self) -> Rule:
        """The rule from where times are known on."""
        return self if self.timed else replace(self, timed=True)

    @functools.cached_property
    def unit(self) -> Terms | None:
        """The terms of every step of one unit, where they are all alike."""
        if not isinstance(self.profile, Exponential | Uniform):
            return None
        keep, lost, gain = self.profile.change(1.0, 1.0)
        return Terms(keep, lost, 1.0 if self.weigh == "value" and self.debias else gain)

    def reversed(self) -> Rule:
        """The rule of the series read backwards."""
        if self.alpha is None or self.alpha.shape[1] == 1:
            return self
        module = module_of(self.alpha)  # what is kept between two values is the same both ways
        return replace(self, alpha=module.flip(module.concatenate((self.alpha[:, 1:], self.alpha[:, :1]), 1), (1,)))

    def terms(self, like_this: Array, time: float, elapsed: Any, begin: int, end: int) -> Terms:
        """The terms of the steps `begin` to `end`.

        Args:
            like_this: an array on the device where the terms are needed.
            time: what had passed before the first of them.
            elapsed: NumPy vector of what passed before each of them; None for one unit each.
        """
        by_value = self.weigh == "value" and self.debias
        if self.profile is None:
            lost = self.alpha if self.alpha.shape[1] == 1 else self.alpha[:, begin:end]
            if elapsed is not None:
                module, passed = module_of(lost), like(like_this, elapsed[None, :, None])
                forgetting = -module.log1p(-lost) * passed
                some = passed > 0.0  # where no time passes, an infinite rate would say NaN
                lost = module.where(some, -module.expm1(-forgetting), 0.0 * lost)
                keep = module.where(some, module.exp(-forgetting), 0.0 * lost + 1.0)
                return Terms(keep, lost, 0.0 * lost + 1.0 if by_value else lost)
            return Terms(1.0 - lost, lost, 0.0 * lost + 1.0 if by_value else lost)
        if elapsed is None and self.unit is not None:
            return self.unit
        from ewma import columns  # and NumPy with it, which floats do without

        elapsed = columns.ones(end - begin) if elapsed is None else elapsed
        vectors = columns.change(self.profile, time, elapsed)
        keep, lost, gain = (like(like_this, vector[None, :, None]) for vector in vectors)
        return Terms(keep, lost, 0.0 * gain + 1.0 if by_value else gain)

    def weights(
        self, terms: Terms, observed: Array, weight: Array, scan: Scan, residue: float | Array = 0.0
    ) -> Weights:
        """The weights of any chunk.

        Args:
            terms: of its steps.
            observed: 1.0 or 0.0 for every element of (outer, n, inner); or of (1, n, 1), where it is the same for all.
            weight: what the running weight was, broadcasting to (outer, 1, inner).
            scan: the recurrence along time.
            residue: of the weight, as it came before.
        """
        keep, lost, gain = terms
        if self.missing != "decay":  # a step that does not count keeps everything
            keep, lost = keep * observed + (1.0 - observed), lost * observed
        zero = 0.0 * (observed + weight + lost)
        if self.debias:
            gain, lost, keep = gain * observed + zero, lost + zero, keep + zero
            after = scan(gain, lost, weight, keep)
            past = keep * before(after, weight)
            share = gain / (after + (after == 0.0))
            # Nothing at all has weight yet: the newest is all there is.
            share = module_of(after).where((after == 0.0) & (observed > 0.0), 1.0 + zero, share)
            kept = past / (after + (after == 0.0))
            return Weights(share, kept, after, after, lost * (2.0 - lost), keep * keep, 2.0 * past * gain)
        missing = 1.0 - observed
        after = scan(observed + zero, observed + missing * lost, weight, missing * keep + zero)
        ahead = before(after, weight)
        past = keep * ahead
        left_out: float | Array = 0.0
        if self.timed:
            # What a gap has taken, never as 1 - what it left, of which a long memory would leave no digits.
            taken = (1.0 - weight) - residue
            gone = scan(missing * lost + zero, observed + missing * lost, taken, missing * keep + zero)
            share, kept, left_out = before(gone, taken) + lost * ahead, past, (1.0 - after) - gone
        else:
            weight = (ahead - lost * ahead) + gain
            share, kept = gain / weight, past / weight
        share, kept = share * observed, kept * observed + missing
        return Weights(share, kept, after, 1.0, share * (2.0 - share), kept * kept, 2.0 * kept * share, left_out)

    def shares(self, terms: Terms, n: int, weight: float, x: Array) -> tuple[float | Array, float]:
        """What each of n values is of all so far, where all steps are alike and observed; and the weight after them."""
        if self.debias and weight == 0.0 and not is_tensor(x):
            from ewma import columns

            share = columns.shares(terms.lost, n)
            return share, float(terms.gain / share[0, -1, 0])
        weights = self.constant_weights(terms, n, weight, x, second=False)
        after = weights.weight
        return weights.share, after if isinstance(after, float) else float(after[0, -1, 0])

    def constant_weights(self, terms: Terms, n: int, weight: float, x: Array, second: bool) -> Weights:
        """The weights of n steps that are alike and all observed, in closed form: of shape (1, n, 1), or floats.

        Args:
            weight: what the running weight was; not debiased, 1 or, at the very start, 0.
            x: an array on the device where they are needed.
            second: whether second moments are wanted, and with them more than share and weight.
        """
        keep, lost, gain = terms
        after: float | Array
        if not self.debias:
            after = 1.0
        elif abs(gain - lost * weight) <= 2.0**-53 * gain:  # no step makes a difference any more
            after = weight
        else:
            from ewma import columns

            ramp, decayed = columns.ramp(lost, n)
            after = like(x, ramp * gain + decayed * weight if weight else ramp * gain)
        share = gain / after
        if not second:
            return Weights(share, share, after, after, lost, None, share)
        past = after - gain if self.debias else keep
        pairs = full(x, (1, n, 1), 2.0) * (past * gain)
        if not self.debias and weight == 0.0:
            pairs[:, 0] = 0.0
        return Weights(share, past / after, after, after, lost * (2.0 - lost), None, pairs)
