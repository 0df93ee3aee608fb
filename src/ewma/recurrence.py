"""(weight, time, count) and the one update: where every average's next coefficient comes from.

    weight' = keep * weight + gain
    mean'   = mean + (gain / weight') * (x - mean)

`Recurrence` keeps the weight and answers with the coefficient `gain / weight'`; who holds the mean applies it.
`Moments` is the whole of it for plain floats: running mean and variance.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from ewma.profiles import Exponential, Profile, Scalar, Uniform, choose

Weigh = Literal["time", "value"]

NEAR = 0.9
"""A value of a larger share is where the new mean is taken from, so that what is forgotten leaves nothing."""


def weighing(profile: Profile, weigh: Weigh | None) -> Weigh:
    """The rule asked for; by default by value (pandas') where the profile has one, else by time."""
    by_value = isinstance(profile, Exponential | Uniform)
    if weigh is None:
        return "value" if by_value else "time"
    if weigh not in ("time", "value"):
        raise ValueError(f'weigh must be "time" or "value"; got {weigh!r}')
    if weigh == "value" and not by_value:
        raise ValueError(
            f'weigh="value" has a meaning for Exponential and Uniform only; got {profile!r}. Leave it out.'
        )
    return weigh


def check_elapsed(elapsed: Any) -> float:
    """`elapsed` as a float above 0."""
    if isinstance(elapsed, str) or not hasattr(elapsed, "__float__"):
        came = repr(elapsed) if isinstance(elapsed, str) else type(elapsed).__name__
        raise TypeError(f"elapsed must be a number: steps, samples or seconds since the last update; got {came}")
    try:
        number = float(elapsed)
    except OverflowError:
        number = math.inf
    if not 0.0 < number < math.inf:
        raise ValueError(
            f"elapsed must be a finite number above 0: steps, samples or seconds since the last update; got {elapsed}"
        )
    return number


class Recurrence:
    """Time, weight and count of one running mean, and from them the coefficient of the next update.

    The weight is the share of the profile's mass that has been seen: `1 - decay ** time` for an exponential by time.
    It is kept in two floats, weight + residue, so that a million updates leave it right to the last bits. The
    concentration is the sum of all values' squared shares of the mean: 1 for a single one, 1 / n for n equal ones.

    Args:
        profile: how the past is weighted.
        weigh: "time": a value counts for the time it stands for, gain = 1 - keep; "value": every value counts once,
            gain = 1 (pandas).
        time: what had passed before the first update. More than 0 where an average begins late in a run.

    All numbers are floats. `on_device` turns them into 0-dim float64 tensors, for where only the device knows
    whether a step was taken: the same arithmetic then runs there, and nothing waits for it.

    >>> recurrence = Recurrence(Exponential(alpha=0.5), weigh="time")
    >>> [round(recurrence.advance(), 4) for _ in range(3)], recurrence.weight
    ([1.0, 0.6667, 0.5714], 0.875)
    """

    __slots__ = ("concentration", "count", "profile", "residue", "time", "weigh", "weight")
    NUMBERS = ("time", "weight", "residue", "count", "concentration")

    def __init__(self, profile: Profile, weigh: Weigh = "time", time: float = 0.0) -> None:
        self.profile = profile
        self.weigh = weigh
        self.time: Scalar = float(time)
        self.weight: Scalar = 0.0
        self.residue: Scalar = 0.0
        self.count: Scalar = 0.0
        self.concentration: Scalar = 0.0

    def terms(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """`(keep, 1 - keep, gain)` of the update that ends at `time`, by the rule in force."""
        keep, lost, gain = self.profile.change(time, elapsed)
        return keep, lost, 1.0 if self.weigh == "value" and self.profile.debias else gain

    def advance(self, elapsed: Scalar = 1.0) -> Scalar:
        """Move on by `elapsed`, and give the coefficient c of `mean += c * (x - mean)`: 1 at the first value.

        An `elapsed` of 0, which only a tensor may be, is a step that was not taken: nothing changes, and c is 0.
        """
        if isinstance(elapsed, int):
            elapsed = float(elapsed)
        elif not isinstance(elapsed, float):
            self.on_device(elapsed)
        taken = elapsed > 0.0
        # A step not taken is computed all the same, from a harmless elapsed, and thrown away: 0 / 0 would be NaN.
        elapsed = choose(taken, elapsed, 1.0)
        time = self.time + elapsed
        keep, lost, gain = self.terms(time, elapsed)
        if not self.profile.debias:
            gain = choose(self.weight == 0.0, 1.0, gain)
        weight, residue = _add(self.weight, self.residue, (gain - lost * self.weight) - lost * self.residue)
        # Where most is lost, what is left is too small a difference of what was: see `carry`, which this extends.
        weight = choose(lost > 0.5, keep * self.weight + gain, weight)
        residue = choose(lost > 0.5, 0.0 * weight, residue)
        coefficient = choose(weight == 0.0, 1.0, gain / choose(weight == 0.0, 1.0, weight))
        kept = 1.0 - coefficient
        concentration = kept * kept * self.concentration + coefficient * coefficient
        self._become(taken, (time, weight, residue, self.count + 1.0, concentration))
        return choose(taken, coefficient, 0.0)

    def miss(self, elapsed: float) -> None:
        """Leave out a value, as if its step had not been; but where the profile goes by the time, that goes on."""
        if not isinstance(self.profile, Exponential | Uniform):
            self.time += elapsed

    def _become(self, taken: Any, numbers: tuple[Scalar, ...]) -> None:
        if isinstance(self.weight, float):
            self.time, self.weight, self.residue, self.count, self.concentration = numbers
            return
        for name, new in zip(self.NUMBERS, numbers, strict=True):
            old = getattr(self, name)
            old.copy_(choose(taken, new, old))

    def on_device(self, like: Any) -> None:
        """Keep the numbers as float64 tensors from now on, beside the tensor `like`."""
        for name in self.NUMBERS:
            if isinstance(getattr(self, name), float):
                setattr(self, name, like.double().new_full((), getattr(self, name)))

    def numbers(self) -> dict[str, float]:
        """All as floats: what there is to save. Waits for the device, where they are on one."""
        return {name: float(getattr(self, name)) for name in self.NUMBERS}

    def load(self, numbers: dict[str, float]) -> None:
        """Take over what `numbers` gave."""
        for name in self.NUMBERS:
            setattr(self, name, float(numbers[name]))

    def copy(self) -> Recurrence:
        """An equal recurrence that goes its own way from here on."""
        twin = Recurrence(self.profile, self.weigh)
        for name in self.NUMBERS:
            setattr(twin, name, getattr(self, name) + 0.0)
        return twin

    def begin_now(self) -> Recurrence:
        """A recurrence that has seen nothing, at the time it is here: for an average that begins late in a run."""
        late = self.copy()
        for name in ("weight", "residue", "count", "concentration"):
            setattr(late, name, getattr(late, name) * 0.0)
        return late

    def kept(self) -> float:
        """K, the share of an earlier average that survives all that was seen here: what merging needs."""
        if isinstance(self.profile, Uniform):
            return 1.0
        if isinstance(self.profile, Exponential) and self.profile.debias:
            if self.weigh == "time":
                return float((1.0 - self.weight) - self.residue)
            return math.exp(-self.profile.rate * self.time) if self.time else 1.0
        raise ValueError(
            f"cannot merge averages with {self.profile!r}: what the second one does to the first is known only for a "
            f"debiased Exponential and for Uniform. Update one average with all values instead."
        )

    def merge(self, later: Recurrence) -> float:
        """Take in an average of values that came later; the coefficient of its mean: `mean += c * (later - mean)`."""
        if (later.profile, later.weigh) != (self.profile, self.weigh):
            raise ValueError(
                f"cannot merge averages of different kinds: {self.profile!r} by {self.weigh} and {later.profile!r} by "
                f"{later.weigh}. Make both with the same profile."
            )
        kept = later.kept()
        self.weight, self.residue = _add(kept * self.weight, kept * self.residue + later.residue, later.weight)
        self.time += later.time
        self.count += later.count
        share = later.weight / self.weight if self.weight else 0.0
        self.concentration = (1.0 - share) ** 2 * self.concentration + share**2 * later.concentration
        return share


def _add(total: Scalar, residue: Scalar, change: Scalar) -> tuple[Scalar, Scalar]:
    """`total + residue + change` as a rounded sum and what the rounding left out (Knuth's two-sum)."""
    rounded = total + change
    back = rounded - total
    residue = residue + ((total - (rounded - back)) + (change - back))
    summed = rounded + residue
    return summed, residue - (summed - rounded)


def toward(mean: float, x: float, coefficient: float) -> float:
    """`mean + coefficient * (x - mean)`, right even where the difference is too large for a float."""
    difference = x - mean
    if math.isfinite(difference):
        return mean + coefficient * difference
    return (1.0 - coefficient) * mean + coefficient * x


class Moments:
    """Running mean and variance of plain floats, by the same recurrence: quick, since it is called for every value.

        mean'     = mean + c * (x - mean)                       c = gain / weight'
        variance' = (1 - c) * (variance + c * (x - mean) ** 2)
        D'        = keep ** 2 * D + 2 * keep * weight * gain    D = (sum of w) ** 2 - sum of w ** 2

    The unbiased variance is `variance * weight ** 2 / D`; D is carried rather than subtracted, since after a long gap
    nothing would be left of the difference. What does not begin debiased has weight 1 after every value, and less only
    where time passed without one.

    >>> moments = Moments(Uniform())
    >>> for x in (1.0, 2.0, 3.0, 4.0): moments.update(x)
    >>> moments.mean, moments.variance(), moments.variance(unbiased=False)
    (2.5, 1.6666666666666667, 1.25)
    """

    NUMBERS = ("time", "weight", "residue", "count", "seen", "mean", "biased", "pairs")
    __slots__ = (*NUMBERS, "debias", "elapsed", "profile", "steady", "terms", "timed", "weigh")

    def __init__(self, profile: Profile, weigh: Weigh | None = None, debias: bool = True) -> None:
        self.profile = profile
        self.weigh = weighing(profile, weigh)
        self.debias = debias and profile.debias
        self.timed = False  # whether the values have times, so that a gap is as long as it was
        self.steady = isinstance(profile, Exponential | Uniform)
        self.elapsed = math.nan  # for which the terms are known
        self.terms = (1.0, 0.0, 0.0)
        self.time = self.weight = self.residue = self.count = self.seen = 0.0
        self.mean = self.biased = self.pairs = 0.0

    def update(self, x: float, elapsed: float = 1.0) -> None:
        """Take in one finite value that comes `elapsed` after the last."""
        share, past = self.step(elapsed)
        difference = x - self.mean
        self.biased = past * (self.biased + share * (difference * difference)) if past else 0.0
        if -math.inf < difference < math.inf:
            self.mean = x - past * difference if share > NEAR else self.mean + share * difference
        else:
            self.mean = (1.0 - share) * self.mean + share * x

    def step(self, elapsed: float) -> tuple[float, float]:
        """Move on by one value, to be taken in by the caller: what it weighs in the mean, and what the past does."""
        if elapsed != self.elapsed or not self.steady:
            self._look_up(elapsed)
        keep, lost, gain = self.terms
        weight = self.weight
        kept = keep * weight
        if not self.debias:
            if self.timed:
                gain, total = ((1.0 - weight) - self.residue) + lost * weight, 1.0
            else:
                total = (weight - lost * weight) + gain
            self.weight, self.residue = 1.0, 0.0
        elif lost > 0.5:
            self.weight = total = kept + gain
            self.residue = 0.0
        else:
            change = gain - lost * (weight + self.residue)
            residue = self.residue + change
            self.weight = total = weight + residue
            self.residue = residue - (total - weight)
        share, past = (gain / total, kept / total) if total else (1.0, 0.0)
        if self.debias:
            self.pairs = keep * keep * self.pairs + 2.0 * kept * gain
        else:
            self.pairs = past * past * self.pairs + 2.0 * past * share
        self.time += elapsed
        self.seen += elapsed
        self.count += 1.0
        return share, past

    def miss(self, elapsed: float, decay: bool) -> None:
        """Leave out a value: as if its step had not been, or, by `decay`, with the past forgotten further."""
        self.time += elapsed
        if decay:
            self._look_up(elapsed, self.time)
            keep, lost, _ = self.terms
            self.seen += elapsed
            if self.debias or lost > 0.5:
                self.weight *= keep
                self.residue *= keep
            else:  # what a gap has taken is told from the residue: of 1 - weight alone no digits might be left
                taken = (1.0 - self.weight) - self.residue + lost * self.weight
                self.weight = 1.0 - taken
                self.residue = (1.0 - self.weight) - taken
            if self.debias:
                self.pairs *= keep * keep

    def merge(self, later: Moments) -> None:
        """Take in the moments of values that came after these: debiased, of a profile that merges."""
        rate = self.profile.rate if isinstance(self.profile, Exponential) else 0.0
        kept = math.exp(-rate * later.seen) if later.seen else 1.0
        mine = kept * self.weight
        total = mine + later.weight
        share = later.weight / total if total else 1.0 if later.count else 0.0
        step = later.mean - self.mean
        self.biased += share * ((later.biased - self.biased) + (1.0 - share) * (step * step))
        self.mean = toward(self.mean, later.mean, share)
        self.pairs = kept * kept * self.pairs + later.pairs + 2.0 * mine * later.weight
        self.weight, self.residue = total, kept * self.residue + later.residue
        for name in ("time", "count", "seen"):
            setattr(self, name, getattr(self, name) + getattr(later, name))

    @property
    def total(self) -> float:
        """The sum of all weights."""
        return self.weight if self.debias else 1.0

    def variance(self, unbiased: bool = True) -> float:
        """The weighted variance; unbiased needs two values, and is NaN before."""
        if not unbiased:
            return self.biased if self.count or self.weight else math.nan
        return self.biased * self.total**2 / self.pairs if self.pairs > 0.0 else math.nan

    def _look_up(self, elapsed: float, time: float | None = None) -> None:
        elapsed = check_elapsed(elapsed)
        keep, lost, gain = self.profile.change(self.time + elapsed if time is None else time, elapsed)
        by_value = self.weigh == "value" and self.debias
        self.elapsed, self.terms = elapsed, (keep, lost, 1.0 if by_value else gain)
