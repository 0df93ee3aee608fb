"""Job 1, whole series at once: smooth and ewm."""

from __future__ import annotations

import datetime
from numbers import Real
from typing import Any, NamedTuple

from ewma.arrays import is_tensor
from ewma.profiles import Profile, bare_number
from ewma.recurrence import Weigh
from ewma.series import rules, stamps
from ewma.series.moments import standardized_before
from ewma.series.ratios import correlated
from ewma.series.sides import both_sides
from ewma.series.sweep import Course, Spread, Statistic, mean_of, starting, sweep
from ewma.series.values import Series, unpack
from ewma.series.weighting import Missing, check_min_periods

VARIANCE, COVARIANCE, OTHER = (0, 0), (0, 1), (1, 1)

Number = float | datetime.timedelta | Any  # or an array of them, one for each channel or step


class Bands(NamedTuple):
    """The running mean, and as many standard deviations below and above it as were asked for."""

    lower: Any
    mean: Any
    upper: Any


def smooth(
    x: Any,
    profile: Profile | None = None,
    *,
    half_life: Number | None = None,
    decay: Number | None = None,
    alpha: Number | None = None,
    span: Number | None = None,
    com: Number | None = None,
    axis: int | None = None,
    dim: int | None = None,
    times: Any = None,
    debias: bool = True,
    nan: Missing = "skip",
    weigh: Weigh | None = None,
    min_periods: int = 1,
    initial: Any = None,
    two_sided: bool = False,
    out: Any = None,
) -> Any:
    """The smoothed series: at every step the running mean of all values so far, of x's type, shape and dtype.

        mean[t] = mean[t-1] + c[t] * (x[t] - mean[t-1])     c = gain / weight, from 1 at the first value down to alpha

    Args:
        x: list, NumPy array, torch tensor (any device, with gradients in x, in the knob and in `initial`), pandas or
            polars series or frame. Integers give float64. All arithmetic is in float64.
        profile: how the past is weighted, where it is not exponential: `Power(sigma_rel=.1)`, `Uniform()`.
        half_life, decay, alpha, span, com: instead, exactly one by keyword, see `Exponential`; also as an array that
            broadcasts to x, for a memory of its own for each channel or step. With datetimes as times, a half-life is
            in seconds or a timedelta.
        axis, dim: of time (two words for one thing): the last by default; of frames always the rows.
        times: when each value was observed: numbers, datetimes or timedeltas that never decrease. Equal ones weigh
            alike. Without them one unit passes from value to value.
        debias: True is the true weighted mean of what was seen (pandas' adjust=True), False starts at the first value.
        nan: what a missing value does, and infinities are missing too: "skip", its step does not count (pandas'
            ignore_na=True, and what training logs want); "decay", the past goes on being forgotten (ignore_na=False);
            "propagate", all is NaN from there on; "raise". Over a gap the mean stays; before the first value it is NaN.
        weigh: "value", each value counts once (pandas); "time", for what elapsed before it. By default by value, where
            the profile has it and the knob does not differ from step to step.
        min_periods: NaN until so many values were observed.
        initial: the mean before the first value, as if it had always been there; broadcasts to x without its axis.
            There is nothing to debias then.
        two_sided: also look ahead: the mean of the values on both sides, weighted by their distance, this one counted
            once. No lag, for finished curves only.
        out: where to write the result: an array or tensor of x's shape and kind, of any floating dtype; x itself, too.

    Errors: ValueError for times that decrease, lengths that do not fit, knobs outside their range; TypeError for text,
    complex numbers, or a bare positional number. An empty series gives an empty one.

    Beside it: `ewma.EMA` is the same one value (or chunk) at a time; `ewm` has variance, covariance and more.
    TensorBoard's smoothing s is `smooth(x, decay=s)`.

    >>> smooth([4.0, 1.0, 6.0], alpha=0.5)
    [4.0, 2.0, 4.285714285714286]
    """
    if profile is not None and isinstance(profile, Real):
        raise TypeError(bare_number("smooth(x, ", profile))
    knobs = {"half_life": half_life, "decay": decay, "alpha": alpha, "span": span, "com": com}
    series, course = _asked(x, profile, knobs, axis, dim, times, debias, nan, weigh, min_periods, initial)
    return both_sides(course, series, out) if two_sided else sweep(course, (series,), mean_of, out=out)[0]


class ewm:
    """Exponentially weighted statistics of a whole series: mean, var, std, cov, corr, sum, zscore, bands.

    The arguments are those of `smooth`. Nothing is computed before a method is called. Each gives x's type, shape and
    dtype, and is differentiable where `smooth` is.

        mean[t]     = mean[t-1] + c[t] * (x[t] - mean[t-1])
        variance[t] = (1 - c[t]) * (variance[t-1] + c[t] * (x[t] - mean[t-1]) ** 2)

    With `unbiased=True` variances and covariances are multiplied by `W ** 2 / (W ** 2 - W2)`, W being the sum of the
    weights and W2 that of their squares (pandas' bias=False); they are NaN then until two values were seen.

    Beside it: pandas' `x.ewm(alpha=a, ignore_na=True)` gives the same numbers, without second moments by times, other
    profiles, tensors and gradients; `ewma.EMA` gives them value by value.

    >>> [round(std, 4) for std in ewm([1.0, 2.0, 6.0], alpha=0.5).std()]
    [nan, 0.7071, 2.8661]
    """

    def __init__(
        self,
        x: Any,
        profile: Profile | None = None,
        *,
        half_life: Number | None = None,
        decay: Number | None = None,
        alpha: Number | None = None,
        span: Number | None = None,
        com: Number | None = None,
        axis: int | None = None,
        dim: int | None = None,
        times: Any = None,
        debias: bool = True,
        nan: Missing = "skip",
        weigh: Weigh | None = None,
        min_periods: int = 1,
        initial: Any = None,
    ) -> None:
        knobs = {"half_life": half_life, "decay": decay, "alpha": alpha, "span": span, "com": com}
        self._x, self._course = _asked(x, profile, knobs, axis, dim, times, debias, nan, weigh, min_periods, initial)

    def mean(self, *, out: Any = None) -> Any:
        """The running mean; `out` as in `smooth`."""
        return self._each(mean_of, out=out)[0]

    def var(self, *, unbiased: bool = True) -> Any:
        """The running variance."""
        return self._each(Spread("variance", unbiased), VARIANCE)[0]

    def std(self, *, unbiased: bool = True) -> Any:
        """The running standard deviation, the variance's root."""
        return self._each(Spread("deviation", unbiased), VARIANCE)[0]

    def cov(self, y: Any, *, unbiased: bool = True) -> Any:
        """The running covariance with y, of x's shape and kind. Where one of the two is missing, both are."""
        return self._each(lambda chunk, prior, xs: (chunk.second(COVARIANCE, unbiased),), COVARIANCE, y=y)[0]

    def corr(self, y: Any) -> Any:
        """The running correlation with y, from -1 to 1; NaN where one of the two is constant."""
        return self._each(lambda chunk, prior, xs: (correlated(chunk.spreads),), VARIANCE, COVARIANCE, OTHER, y=y)[0]

    def sum(self) -> Any:
        """The decayed sum, `sum[t] = keep * sum[t-1] + gain * x[t]`: the mean times the weight that was seen."""
        if not self._course.rule.debias:
            raise ValueError("a sum starts at 0, with nothing to debias: leave out debias=False and initial=")
        return self._each(lambda chunk, prior, xs: (chunk.means[0] * chunk.total,))[0]

    def zscore(self, *, unbiased: bool = True) -> Any:
        """How far each value lies from the mean of those before it, in their standard deviations.

        What a value adds itself is left out, so that a spike does not hide in the spread that it makes. NaN until two
        values were seen, and where x is missing.
        """
        return self._each(lambda chunk, prior, xs: (standardized_before(xs[0], chunk, prior, unbiased),), VARIANCE)[0]

    def bands(self, k: float = 2.0, *, unbiased: bool = True) -> Bands:
        """`(lower, mean, upper)`: the running mean, and k standard deviations to both sides of it."""
        return Bands(*self._each(Spread("bands", unbiased, k), VARIANCE, results=3))

    def _each(
        self, statistic: Statistic, *wanted: tuple[int, int], y: Any = None, out: Any = None, results: int = 1
    ) -> list[Any]:
        series = (self._x, self._beside(y)) if COVARIANCE in wanted else (self._x,)
        return sweep(self._course, series, statistic, wanted, results=results, out=out)

    def _beside(self, y: Any) -> Series:
        """A second series, of x's shape and on its device."""
        x, other = self._x, unpack("y", y, None)
        if tuple(other.array.shape) != tuple(x.array.shape):
            raise ValueError(f"expected y of x's shape, {list(x.array.shape)}; got {list(other.array.shape)}")
        if is_tensor(x.array) != is_tensor(other.array):
            kinds = ("a tensor" if is_tensor(array) else "no tensor" for array in (other.array, x.array))
            raise TypeError("y is {}, but x is {}: give both as tensors, or neither".format(*kinds))
        if is_tensor(x.array) and x.array.device != other.array.device:
            raise ValueError(f"expected y on x's device, {x.array.device}; got y on device {other.array.device}")
        return other._replace(axis=x.axis)


def _asked(
    x: Any,
    profile: Profile | None,
    knobs: dict[str, Number | None],
    axis: int | None,
    dim: int | None,
    times: Any,
    debias: bool,
    nan: Missing,
    weigh: Weigh | None,
    min_periods: int,
    initial: Any,
) -> tuple[Series, Course]:
    """The arguments of `smooth` and `ewm`, checked, as the series and how it is averaged."""
    if axis is not None and dim is not None:
        raise TypeError(f"axis= and dim= are two words for one thing; got axis={axis} and dim={dim}. Keep one.")
    series = unpack("x", x, dim if axis is None else axis)
    passed = None if times is None else stamps.stamps(times, series.shape[1])
    rule = rules.rule_of("ewm(x, ", series, profile, knobs, debias, weigh, nan, passed)
    elapsed, needed = None if passed is None else passed.elapsed, check_min_periods(min_periods)
    if initial is None:
        return series, Course(rule, None, elapsed, max(needed, 1))
    return series, Course(rule.begun(), starting(initial, series), elapsed, needed)
