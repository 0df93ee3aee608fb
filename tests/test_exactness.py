"""The series beside other tools, beside published formulas, and beside the definition in 200 digits.

Where a tool is wrong, the definition decides: what every value weighs, in sums that nothing is lost from.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import mpmath
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.signal
import torch
from mpmath import mpf

import ewma
from ewma import kernels, profiles
from ewma.profiles import Exponential, Power, Profile, Uniform

NAN, INF = math.nan, math.inf
SMALLEST = 2.0**-1000
DIGITS, NEGLIGIBLE = 200, mpf(10) ** -160
"""A weight of .01 ** 60 still counts beside 1; what is below the other is rounding, where a difference is 0."""


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def joined(*parts: Any) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=float) for part in parts])


def with_holes(x: np.ndarray, *values: float, share: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(7)
    return np.where(rng.random(len(x)) < share, rng.choice(values, size=len(x)), x)


HARD = {
    "empty": joined([]),
    "one": joined([3.25]),
    "two": joined([3.25, -1.5]),
    "noise": noise(100),
    "missing at first": joined([NAN] * 7, noise(40)),
    "missing within": joined(noise(20), [NAN] * 5, noise(20, 1), [NAN], noise(20, 2)),
    "missing at last": joined(noise(30), [NAN] * 9),
    "all missing": joined([NAN] * 9),
    "scattered": with_holes(noise(90), NAN),
    "a gap of 60": joined(noise(30), [NAN] * 60, noise(30, 1)),
    "a gap after the first": joined([1.5], [NAN] * 60, noise(20)),
    "infinities": with_holes(noise(80), NAN, INF, -INF),
    "only infinities": joined([INF, -INF, INF]),
    "constant": joined([0.1] * 20, [NAN] * 3, [0.1] * 20),
    "the widest": np.random.default_rng(3).choice([-1.7e308, 1e308, 0.3e308], size=60),
    "denormal": 1e-310 * noise(60),
    "offset 1e8": 1e8 + noise(70),
    "offset 1e15": 1e15 + np.round(8 * noise(70)),
    "from far": joined([1e8], noise(70)),
    "to far": joined([0.5, -0.5], 1e8 + noise(60)),
    "a spike": joined(noise(40), [-1e12], noise(60, 1)),
    "falling": 1e6 * 0.5 ** np.arange(60.0) + 1e-3 * noise(60),
}
GAPS = {"missing within", "missing at last", "scattered", "a gap of 60", "a gap after the first", "infinities"}
ALPHAS = (1.0, 0.99, 0.5, 0.1, 1e-3)
RULES = list(itertools.product((True, False), ("skip", "decay")))

each_hard = pytest.mark.parametrize("name", HARD)
each_rule = pytest.mark.parametrize(("debias", "nan"), RULES)
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def partner(x: np.ndarray) -> np.ndarray:
    """A second series, related to x and as wide, with some values of its own missing."""
    seen = x[np.isfinite(x)]
    width = np.median(np.abs(seen - np.median(seen))) if len(seen) else 0.0
    y = 0.5 * x + width * noise(len(x), 5)
    return np.where(np.random.default_rng(6).random(len(x)) < 0.1, NAN, y)


# ---- the definition


class Defined:
    """Every statistic of a series as weighted sums in many digits; NaN before the first value, then over every gap.

    Args:
        keep: what is left of the past after so much elapsed.
        gain: what a value weighs, after so much elapsed; not debiased, that is 1 - keep.
        elapsed: what passed before each step, where the series has times.
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray | None = None,
        *,
        keep: Callable[[Any], mpf],
        gain: Callable[[Any], mpf] = lambda elapsed: mpf(1),
        debias: bool = True,
        nan: str = "skip",
        elapsed: Any = None,
    ) -> None:
        several = [x] if y is None else [x, y]
        seen = np.logical_and.reduce([np.isfinite(each) for each in several])
        self.count = np.cumsum(seen)
        names = ["mean", "var", "factor"] if y is None else ["mean", "other mean", "var", "cov", "other var", "factor"]
        rows, sums_of_x = [[NAN] * len(names)], []
        with mpmath.workdps(DIGITS):
            one, weight, squares, step = mpf(1), mpf(0), mpf(0), keep(mpf(1))
            # Everything relative to the first value: a constant's variance is 0 then.
            origin = [mpf(float(each[seen][0])) if seen.any() else mpf(0) for each in several]
            pairs = [(i, j) for i in range(len(several)) for j in range(i, len(several))]
            sums, products = [mpf(0) for _ in several], [mpf(0) for _ in pairs]
            for t, observed in enumerate(seen):
                passed = one if elapsed is None else mpf(elapsed[t])
                if observed or nan == "decay":
                    kept = step if elapsed is None else keep(passed)
                    weight, squares = kept * weight, kept * kept * squares
                    sums, products = [kept * each for each in sums], [kept * each for each in products]
                if observed:
                    at = [mpf(float(each[t])) - first for each, first in zip(several, origin, strict=True)]
                    g = gain(passed) if debias else one
                    if len(rows) > 1 and not debias:
                        g = one - (step if elapsed is None else weight)
                    weight, squares = weight + g, squares + g * g
                    sums = [old + g * a for old, a in zip(sums, at, strict=True)]
                    products = [old + g * at[i] * at[j] for old, (i, j) in zip(products, pairs, strict=True)]
                    share = one / weight
                    means, squares_of_share = [share * each for each in sums], squares * share * share
                    moments = []
                    for product, (i, j) in zip(products, pairs, strict=True):
                        moment = share * product - means[i] * means[j]
                        moments.append(moment if abs(moment) > NEGLIGIBLE * abs(share * product) else mpf(0))
                    factor = one / (one - squares_of_share) if one - squares_of_share > NEGLIGIBLE else NAN
                    means = [first + mean for first, mean in zip(origin, means, strict=True)]
                    rows.append([float(each) for each in (*means, *moments, factor)])
                    if not debias:  # what is begun weighs 1
                        weight, squares = one, squares_of_share
                        sums, products = ([share * each for each in many] for many in (sums, products))
                sums_of_x.append(float(sums[0] + weight * origin[0]) if len(rows) > 1 else NAN)
        self.told = dict(zip(names, np.array(rows).T[:, self.count], strict=True)) | {"sum": np.array(sums_of_x)}

    def __getitem__(self, name: str) -> np.ndarray:
        """By one of SECOND's names, "sum" or "mean"."""
        if name not in self.told:
            with np.errstate(all="ignore"):
                if name == "corr":
                    self.told[name] = self["cov"] / np.sqrt(self["var"]) / np.sqrt(self["other var"])
                elif "std" in name:
                    self.told[name] = np.sqrt(self[name.replace("std", "var")])
                else:
                    self.told[name] = self["factor"] * self[name.removeprefix("unbiased ")]
        return self.told[name]

    def from_count(self, name: str, needed: int) -> np.ndarray:
        return np.where(self.count >= needed, self[name], NAN)

    @functools.cached_property
    def apart(self) -> np.ndarray:
        """Where no mean hides its spread: |mean| <= 1e4 std."""
        apart = np.ones(len(self.count), dtype=bool)
        for prefix in ("", "other ") if "cov" in self.told else ("",):
            var = self[f"{prefix}var"]
            apart &= np.abs(self[f"{prefix}mean"]) <= 1e4 * np.sqrt(np.fmax(var, self["factor"] * var))
        return apart

    def scale(self, name: str) -> np.ndarray:
        """What an error is measured by: a covariance's by both standard deviations."""
        if "cov" in name:
            with np.errstate(all="ignore"):
                scale = np.sqrt(self["var"]) * np.sqrt(self["other var"])
                return np.nan_to_num(scale * self["factor"] if "unbiased" in name else scale)
        return np.ones(len(self.count)) if name == "corr" else np.nan_to_num(self[name])


def decays(alpha: float) -> Callable[[Any], mpf]:
    return lambda elapsed: (1 - mpf(alpha)) ** elapsed


def halves(half_life: float) -> Callable[[Any], mpf]:
    return lambda elapsed: mpf(2) ** (-elapsed / mpf(half_life))


@functools.cache
def defined(name: str, alpha: float, debias: bool, nan: str, alone: bool = True) -> Defined:
    x = HARD[name]
    return Defined(x, None if alone else partner(x), keep=decays(alpha), debias=debias, nan=nan)


def largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x)))


def same(ours: Any, expected: Any, tolerance: Any, said: Any = "") -> None:
    """NaN in the same places, infinities too, and nowhere further apart than the tolerance."""
    ours, expected = (np.asarray(each, dtype=float) for each in (ours, expected))
    assert ours.shape == expected.shape, said
    missing = np.isnan(ours) != np.isnan(expected)
    assert not missing.any(), f"{said}: {ours[missing][0]}, not {expected[missing][0]}, at {missing.argmax()}"
    with np.errstate(invalid="ignore"):
        apart = np.where((ours == expected) | np.isnan(ours), 0.0, np.abs(ours - expected))
        far = apart > tolerance
    if far.any():
        place, allowed = far.argmax(), np.broadcast_to(tolerance, apart.shape)
        worst = f"{apart.flat[place]:.3g} at {place}, where {allowed.flat[place]:.3g} is allowed"
        raise AssertionError(f"{said}: {ours.flat[place]}, not {expected.flat[place]}: off by {worst}")


# ---- pandas: means and sums


def pandas_of(x: np.ndarray, alpha: float, debias: bool, nan: str, needed: int = 1) -> Any:
    return pd.Series(x).ewm(alpha=alpha, adjust=debias, ignore_na=nan == "skip", min_periods=needed)


def wrong_mean(name: str, alpha: float, debias: bool, nan: str) -> bool:
    """Where pandas 3 is: alpha = .5 has a short cut that forgets the gap; and weight times value overflows."""
    return (alpha == 0.5 and not debias and nan == "decay" and name in GAPS) or (name == "the widest" and alpha < 0.9)


PERIODS = [(1.0, 1), (0.99, 1), (0.5, 1), (0.1, 3), (1e-3, 0), (0.5, 50)]


@each_hard
@each_rule
def test_the_mean_is_the_definition_s_and_pandas(name: str, debias: bool, nan: str) -> None:
    x = HARD[name]
    for alpha, needed in PERIODS:
        ours = ewma.smooth(x, alpha=alpha, debias=debias, nan=nan, min_periods=needed)
        truth = defined(name, alpha, debias, nan)
        said = f"alpha={alpha}, min_periods={needed}"
        same(ours, truth.from_count("mean", needed), 1e-12 * largest(x), f"definition, {said}")
        if not wrong_mean(name, alpha, debias, nan):
            same(ours, pandas_of(x, alpha, debias, nan, needed).mean(), 1e-12 * largest(x), f"pandas, {said}")


@each_hard
@pytest.mark.parametrize("nan", ["skip", "decay"])
def test_the_sum_is_the_definition_s_and_pandas(name: str, nan: str) -> None:
    if name == "the widest":
        pytest.skip("their sums are beyond the widest float")
    x = HARD[name]
    for alpha, needed in PERIODS:
        ours = ewma.ewm(x, alpha=alpha, nan=nan, min_periods=needed).sum()
        truth = defined(name, alpha, True, nan)
        tolerance = 1e-12 * largest(x) * min(1 / alpha, len(x) + 1)
        same(ours, truth.from_count("sum", needed), tolerance, f"definition, alpha={alpha}")
        same(ours, pandas_of(x, alpha, True, nan, needed).sum(), tolerance, f"pandas, alpha={alpha}")


def test_pandas_short_cut_for_one_half_forgets_the_gap() -> None:
    """What is left after two steps is 1/4 and the new value brings 1/2: (1/4 + 3/2) / (3/4)."""
    x = [1.0, NAN, 3.0]
    assert ewma.smooth(x, alpha=0.5, debias=False, nan="decay")[2] == pytest.approx(7 / 3, rel=1e-15)
    assert pd.Series(x).ewm(alpha=0.5, adjust=False).mean()[2] == 2.5
    for alpha in (0.499999, 0.500001):
        assert pd.Series(x).ewm(alpha=alpha, adjust=False).mean()[2] == pytest.approx(7 / 3, rel=1e-5)


@pytest.mark.parametrize("outlier", [1e8, -1e16, 1e300])
@pytest.mark.parametrize("place", [0, 1, 31, 127, 130, 1999])
def test_an_outlier_that_is_forgotten_leaves_nothing_behind(outlier: float, place: int) -> None:
    x = 1 + noise(4000) / 8
    x[place] = outlier
    for alpha, debias in itertools.product((0.99, 0.5), (True, False)):
        ours, theirs = ewma.ewm(x, alpha=alpha, debias=debias), pandas_of(x, alpha, debias, "skip")
        late = slice(place + 2000, None)  # where .5 ** 2000 of it is left
        same(ours.mean()[late], theirs.mean()[late], 1e-14, f"mean, alpha={alpha}")
        if outlier < 1e300:
            expected = theirs.std()[late].to_numpy()
            same(ours.std()[late], expected, 1e-9 * expected, f"std, alpha={alpha}")


# ---- pandas: second moments


HIDDEN = {"offset 1e8", "offset 1e15"}
SECOND = ("var", "unbiased var", "std", "unbiased std", "cov", "unbiased cov", "corr")


def second(source: Any, y: Any, ours: bool, names: tuple[str, ...] = SECOND) -> dict[str, np.ndarray]:
    """Second moments of a source, ours or pandas'; the covariances with y."""
    results = {}
    for name in names:
        unbiased, statistic = name.startswith("unbiased"), name.removeprefix("unbiased ")
        option = {"unbiased": unbiased} if ours else {"bias": not unbiased}
        arguments = (y,) if statistic in ("cov", "corr") else ()
        results[name] = np.asarray(getattr(source, statistic)(*arguments, **({} if statistic == "corr" else option)))
    return results


def check_second(
    results: Mapping[str, np.ndarray], alone: Defined, joint: Defined, needed: int, said: str, no_worse: Any = None
) -> None:
    """To 1e-9 where the mean does not hide the spread; elsewhere no worse than `no_worse`."""
    for name, result in results.items():
        truth = joint if "cov" in name or name == "corr" else alone
        expected, scale, factor = truth.from_count(name, needed), truth.scale(name), 1e-9
        if no_worse is None:
            factor = np.where(truth.apart, factor, INF)
        elif not truth.apart.all():
            with np.errstate(all="ignore"):
                off = (np.abs(no_worse[name] - expected) / scale)[~truth.apart]
            worst = np.max(off, initial=0.0, where=np.isfinite(off))
            factor = np.where(truth.apart, factor, max(worst * (1.0 + 1e-9), factor))
        with np.errstate(invalid="ignore"):
            allowed = np.where(scale > 0.0, factor * np.maximum(scale, SMALLEST), 0.0)
        same(result, expected, allowed, f"{name}, {said}")


def wrong_second(name: str, alpha: float, nan: str) -> bool:
    """Where pandas 3 and polars are: unbiased, after gaps that little is left after, by subtracting."""
    return nan == "decay" and name in GAPS and (alpha >= 0.5 or name == "a gap after the first")


@each_hard
@each_rule
def test_second_moments_are_the_definition_s_and_pandas(name: str, debias: bool, nan: str) -> None:
    if name == "the widest":
        pytest.skip("their squares are beyond the widest float")
    x, y = HARD[name], partner(HARD[name])
    for alpha, needed in PERIODS[:5]:
        joint = alpha in (0.99, 0.1)  # for these also the covariances
        names = SECOND if joint else ("var", "unbiased std")
        truths = defined(name, alpha, debias, nan), defined(name, alpha, debias, nan, alone=not joint)
        said = f"alpha={alpha}, min_periods={needed}"
        theirs = second(pandas_of(x, alpha, debias, nan, needed), pd.Series(y), False, names)
        ours = second(ewma.ewm(x, alpha=alpha, debias=debias, nan=nan, min_periods=needed), y, True, names)
        check_second(ours, *truths, needed, said, no_worse=theirs)
        if joint and name not in HIDDEN:
            wrong = wrong_second(name, alpha, nan)
            right = {key: value for key, value in theirs.items() if not ("unbiased" in key and wrong)}
            check_second(right, *truths, needed, f"pandas, {said}", no_worse=theirs)


@pytest.mark.parametrize("gap", [20, 34, 60, 150])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("alpha", [0.5, 0.9, 0.99])
def test_the_unbiased_variance_after_a_long_gap(gap: int, debias: bool, alpha: float) -> None:
    """Two values, of weights v and w: their unbiased variance is half of their squared distance, whatever v and w are.

    pandas subtracts two sums that have become equal: NaN.
    """
    x = joined([1.0], [NAN] * gap, [4.0])
    keep = float((1 - mpf(alpha)) ** (gap + 1))
    if keep**2 < 1e-300:
        pytest.skip("beyond the smallest float")
    ours = ewma.ewm(x, alpha=alpha, debias=debias, nan="decay").var()[-1]
    assert ours == pytest.approx(4.5, rel=1e-12)
    if keep < 1e-17:
        assert math.isnan(pandas_of(x, alpha, debias, "decay").var().iloc[-1])


@pytest.mark.parametrize("half_life", [1e-3, 0.5, 7.25, 1e6, 1e12, 1e16])
def test_a_half_life_becomes_alpha_without_loss(half_life: float) -> None:
    """The second of [0, 1], not debiased, is alpha. `1 - exp` is 60 % off at 1e16."""
    alpha = float(-mpmath.expm1(-mpmath.log(2) / mpf(half_life)))
    for knob in (half_life, np.array([half_life])):
        assert ewma.smooth(np.array([0.0, 1.0]), half_life=knob, debias=False)[1] == pytest.approx(alpha, rel=1e-15)
    assert Exponential(half_life=half_life).alpha == pytest.approx(alpha, rel=1e-15)
    if half_life == 1e16:
        theirs = pd.Series([0.0, 1.0]).ewm(halflife=half_life, adjust=False).mean()[1]
        assert abs(theirs / alpha - 1) > 0.5


# ---- times


HALF_LIFE = 7200.0


def seconds(n: int, repeated: bool = True) -> np.ndarray:
    """Stamps at uneven distances, some of them equal."""
    steps = [1, 60, 2500, 3600, 40_000] + [0] * repeated
    return np.cumsum(np.random.default_rng(9).choice(steps, size=n)).astype(float)


def elapsed_of(times: np.ndarray) -> np.ndarray:
    return np.diff(times, prepend=times[:1] - 1.0)


@each_hard
@each_rule
def test_the_mean_by_times_is_pandas_and_the_definition_s(name: str, debias: bool, nan: str) -> None:
    x = HARD[name]
    times = seconds(len(x))
    stamps = pd.Timestamp("2024-02-29").as_unit("s") + pd.to_timedelta(times, unit="s").as_unit("s")
    half_life = datetime.timedelta(hours=2)
    truth = Defined(x, keep=halves(HALF_LIFE), debias=debias, nan=nan, elapsed=elapsed_of(times))
    for needed in (1, 3):
        ours = ewma.smooth(x, half_life=half_life, times=stamps, debias=debias, nan=nan, min_periods=needed)
        same(ours, truth.from_count("mean", needed), 1e-12 * largest(x), "definition")
        if name != "the widest" and len(x):
            stamped = {"halflife": half_life, "times": stamps, "adjust": debias, "ignore_na": nan == "skip"}
            theirs = pd.Series(x).ewm(**stamped, min_periods=needed).mean()
            same(ours, theirs, 1e-12 * largest(x), "pandas")


@each_alpha
@pytest.mark.parametrize("nan", ["skip", "decay"])
def test_alpha_by_times_counts_in_pandas_half_lives(alpha: float, nan: str) -> None:
    x, times = HARD["scattered"], seconds(len(HARD["scattered"]))
    stamps = np.datetime64("2024-02-29", "s") + times.astype("timedelta64[s]")
    theirs = pd.Series(x).ewm(alpha=alpha, halflife="2h", times=stamps, ignore_na=nan == "skip").mean()
    same(ewma.smooth(x, alpha=alpha, times=times / HALF_LIFE, nan=nan), theirs, 1e-12 * largest(x))


@pytest.mark.parametrize("name", ["missing within", "scattered", "a gap of 60", "offset 1e8", "constant", "two"])
@pytest.mark.parametrize("weigh", ["value", "time"])
@each_rule
def test_second_moments_by_times_are_the_definition_s(name: str, weigh: str, debias: bool, nan: str) -> None:
    """No library has them."""
    x, y = HARD[name], partner(HARD[name])
    times = seconds(len(x), repeated=weigh == "value")
    keep = halves(HALF_LIFE)
    rule: dict[str, Any] = {"keep": keep, "debias": debias, "nan": nan, "elapsed": elapsed_of(times)}
    if weigh == "time":
        rule["gain"] = lambda passed: 1 - keep(passed)
    alone, joint = Defined(x, **rule), Defined(x, y, **rule)
    for needed in (1, 3):
        source = ewma.ewm(x, half_life=HALF_LIFE, times=times, weigh=weigh, debias=debias, nan=nan, min_periods=needed)
        check_second(second(source, y, True), alone, joint, needed, f"min_periods={needed}")
        same(source.mean(), alone.from_count("mean", needed), 1e-12 * largest(x), "mean")
        if debias:
            same(source.sum(), alone.from_count("sum", needed), 1e-12 * largest(x) * len(x), "sum")


@pytest.mark.parametrize("debias", [True, False])
def test_equal_stamps_weigh_alike_also_where_nothing_is_kept(debias: bool) -> None:
    """With alpha = 1 all that is older weighs nothing, but what is of one time is no older."""
    times, x = [0, 0, 1, 1, 1, 2], np.array([1.0, 3.0, 5.0, NAN, 9.0, 4.0])
    expected = [1.0, 2.0, 5.0, 5.0, 7.0, 4.0] if debias else [1.0, 1.0, 5.0, 5.0, 5.0, 4.0]
    for alpha in (1, np.array([1.0]), np.ones(6)):
        same(ewma.smooth(x, alpha=alpha, times=times, debias=debias, weigh="value"), expected, 1e-15, f"alpha={alpha}")


@pytest.mark.parametrize("weigh", ["value", "time"])
@each_rule
def test_by_times_a_knob_that_is_an_array_is_as_exact_as_a_number(weigh: str, debias: bool, nan: str) -> None:
    x, times = HARD["scattered"], np.cumsum(np.random.default_rng(2).choice([0.25, 1.0, 15.0], size=90))
    for alpha in (0.5, 0.99, 1e-6):
        keep = decays(alpha)
        rule: dict[str, Any] = {"keep": keep, "debias": debias, "nan": nan, "elapsed": elapsed_of(times)}
        truth = Defined(x, **rule, **({"gain": lambda passed, keep=keep: 1 - keep(passed)} if weigh == "time" else {}))
        for knob in (alpha, np.float64(alpha), np.array([alpha]), np.full(len(x), alpha)):
            source = ewma.ewm(x, alpha=knob, times=times, debias=debias, nan=nan, weigh=weigh)
            results = {"var": source.var(unbiased=False), "unbiased var": source.var()}
            check_second(results, truth, truth, 1, f"{type(knob)}, {np.shape(knob)}, of {alpha}")


@pytest.mark.parametrize("half_life", [1e2, 1e6, 1e10])
def test_a_long_memory_that_began_at_the_first_value_is_exact_over_a_gap(half_life: float) -> None:
    x, times = joined([0.0], [NAN], [3.0, -1.0]), [0, 1, 3, 4]
    truth = Defined(x, keep=halves(half_life), debias=False, nan="decay", elapsed=[1, 1, 2, 1])
    source = ewma.ewm(x, half_life=half_life, times=times, debias=False, nan="decay")
    same(source.mean(), truth["mean"], 1e-12 * largest(x), "mean")
    same(source.var(unbiased=False), truth["var"], 1e-9 * truth["var"], "var")


@pytest.mark.parametrize("n", [2, 3, 5, 16, 17, 40, 1100])
def test_sums_of_large_values_may_overflow_at_any_step(n: int) -> None:
    """Also where those of the last steps do not: windows of steps are summed side by side."""
    for place in {0, 1, 2, 6, 13, 14, 15, n - 2} & set(range(n - 1)):
        x = np.zeros(n)
        x[place : place + 2] = 1.5e308
        truth = Defined(x, keep=halves(200.0))
        same(ewma.smooth(x, half_life=200.0), truth["mean"], 1e-14 * 1.5e308, "mean")
        x[place : place + 2] = 1e154
        truth = Defined(x, keep=halves(200.0))
        same(ewma.ewm(x, half_life=200.0).var(), truth["unbiased var"], 1e-12 * 1e308, "var")


@pytest.mark.parametrize("kept", [0.1, 1e-2, 1e-6, 1e-12, 1e-30, 1e-100])
@pytest.mark.parametrize("debias", [True, False])
def test_variances_are_exact_however_little_a_step_keeps(kept: float, debias: bool) -> None:
    x = noise(40)
    half_life = -math.log(2.0) / math.log(kept)
    truth = Defined(x, keep=halves(half_life), debias=debias)
    for values in (x, np.stack([x, x]), torch.tensor(x), torch.tensor(x, requires_grad=True)):
        source = ewma.ewm(values, half_life=half_life, debias=debias)
        for unbiased, name in ((True, "unbiased var"), (False, "var")):
            var = source.var(unbiased=unbiased)
            var = np.asarray(var.detach() if isinstance(var, torch.Tensor) else var)[None].reshape(-1, 40)[-1]
            same(var, truth[name], 1e-11 * truth[name], name)


def test_until_time_passes_the_newest_is_all_there_is_by_time() -> None:
    x, times = [NAN, 2.0, 4.0, 6.0, 9.0], [0, 0, 0, 1, 2]
    expected = [NAN, 2.0, 4.0, 6.0, 8.0]  # 6 and 9 weigh 1/4 and 1/2
    same(ewma.smooth(x, half_life=1, times=times, weigh="time"), expected, 1e-14)


# ---- polars


@pytest.mark.parametrize("name", [name for name in HARD if name not in ("infinities", "only infinities", "the widest")])
@each_rule
def test_polars_where_it_has_values(name: str, debias: bool, nan: str) -> None:
    """polars does not carry the mean over a gap, and subtracts as pandas does."""
    x = pl.Series("x", HARD[name]).fill_nan(None)
    there = x.is_not_null()
    for alpha, needed in PERIODS[1:5]:
        options = {"alpha": alpha, "adjust": debias, "ignore_nulls": nan == "skip", "min_samples": max(needed, 1)}
        source = ewma.ewm(x, alpha=alpha, debias=debias, nan=nan, min_periods=needed)
        ours, theirs = source.mean(), x.ewm_mean(**options)
        assert (type(ours), ours.name, ours.dtype) == (pl.Series, "x", pl.Float64)
        same(ours.filter(there), theirs.filter(there), 1e-12 * largest(HARD[name]), f"alpha={alpha}")
        truth = defined(name, alpha, debias, nan)
        told = (np.abs(truth["mean"]) <= 1e4 * np.sqrt(truth["var"]))[np.isfinite(HARD[name])]
        for bias, statistic in itertools.product((True, False), ("var", "std")):
            if bias or not wrong_second(name, alpha, nan):
                ours = getattr(source, statistic)(unbiased=not bias).filter(there).to_numpy()
                theirs = getattr(x, f"ewm_{statistic}")(**options, bias=bias).filter(there).to_numpy()
                scale = np.nan_to_num(np.abs(theirs))
                same(ours[told], theirs[told], 1e-9 * scale[told], f"{statistic}, alpha={alpha}, bias={bias}")


@pytest.mark.parametrize("name", ["noise", "scattered", "a gap of 60", "missing at first", "offset 1e8"])
def test_polars_mean_by_times(name: str) -> None:
    """`ewm_mean_by` starts at the first value, and time goes on where values are missing."""
    x, times = HARD[name], seconds(len(HARD[name]))
    frame = pl.DataFrame({"x": pl.Series(x).fill_nan(None), "t": times.astype("int64")})
    stamped = frame.with_columns(pl.from_epoch("t", time_unit="s"))
    theirs = stamped.select(pl.col("x").ewm_mean_by("t", half_life="2h"))["x"]
    ours = ewma.smooth(frame["x"], half_life=HALF_LIFE, times=stamped["t"], debias=False, nan="decay")
    there = frame["x"].is_not_null()
    same(ours.filter(there), theirs.filter(there), 1e-12 * largest(x))


# ---- published formulas


def tensorboard(values: np.ndarray, weight: float) -> list[float]:
    """line_chart_v2/data_transformer.ts: what is not finite is drawn as it is, and moves nothing."""
    smoothed, last, count = [], 0.0, 0
    for y in map(float, values):
        if not math.isfinite(y):
            smoothed.append(y)
            continue
        last = weight * last + (1 - weight) * y
        count += 1
        smoothed.append(last / (1 - weight**count))
    return smoothed


def time_weighted(x: np.ndarray, y: np.ndarray, smoothing: float, scale: float) -> list[float]:
    """W&B's time-weighted EMA, after its documentation."""
    weight = min(math.sqrt(smoothing), 0.999)
    smoothed, total, weights = [], 0.0, 0.0
    for t, value in enumerate(map(float, y)):
        change = (x[t] - x[t - 1]) / (x[-1] - x[0]) * scale if t else 0.0
        total, weights = total * weight**change + value, weights * weight**change + 1
        smoothed.append(total / weights)
    return smoothed


@pytest.mark.parametrize("weight", [0.0, 0.01, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("name", ["one", "noise", "scattered", "infinities", "missing at first", "offset 1e8"])
def test_tensorboards_smoothing(name: str, weight: float) -> None:
    """Also W&B's "EMA", which is the same."""
    x = HARD[name]
    drawn = np.isfinite(x)
    theirs = np.array(tensorboard(x, weight))
    # At .999 their own sum loses three digits: 1 - .999 ** k is a difference of numbers near 1.
    same(np.array(ewma.smooth(x, decay=weight))[drawn], theirs[drawn], 1e-12 * largest(x))


@pytest.mark.parametrize("smoothing", [0.01, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_the_time_weighted_smoothing_of_weights_and_biases(smoothing: float, scale: float) -> None:
    x, y = seconds(200), noise(200)
    weight = min(math.sqrt(smoothing), 0.999)
    half_life = (x[-1] - x[0]) * math.log(2) / (scale * -math.log(weight))
    same(ewma.smooth(y, half_life=half_life, times=x), time_weighted(x, y, smoothing, scale), 1e-12 * largest(y))


@each_alpha
@pytest.mark.parametrize("n", [1, 2, 31, 33, 1000, 300_001])
def test_scipys_filter_started_at_the_first_value(alpha: float, n: int) -> None:
    x = 3 + noise(n)
    theirs, _ = scipy.signal.lfilter([alpha], [1, alpha - 1], x, zi=[(1 - alpha) * x[0]])
    same(ewma.smooth(x, alpha=alpha, debias=False), theirs, 1e-12 * largest(x))
    theirs, _ = scipy.signal.lfilter([alpha], [1, alpha - 1], x, zi=[(1 - alpha) * -5.5])
    same(ewma.smooth(x, alpha=alpha, initial=-5.5), theirs, 1e-12 * max(largest(x), 5.5))


def test_the_articles_two_lines_agree() -> None:
    data, each = noise(200).tolist(), []
    ema = ewma.EMA(alpha=0.5)
    for value in data:
        ema.update(torch.tensor(value, dtype=torch.float64))
        each.append(ema.get().item())
    same(ewma.smooth(data, alpha=0.5), each, 1e-14 * largest(np.array(data)))


# ---- rounding


KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "list": np.ndarray.tolist,
    "numpy float64": lambda x: x,
    "numpy float32": lambda x: x.astype("float32"),
    "numpy float16": lambda x: np.clip(x, -6e4, 6e4).astype("float16"),
    "torch float64": torch.tensor,
    "torch float32": lambda x: torch.tensor(x).float(),
    "torch bfloat16": lambda x: torch.tensor(x).bfloat16(),
    "torch float16": lambda x: torch.tensor(np.clip(x, -6e4, 6e4)).half(),
    "pandas": pd.Series,
    "polars": pl.Series,
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def double(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        return x.detach().double().numpy()
    return np.asarray(x.to_numpy() if isinstance(x, pl.Series) else x, dtype="float64")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("debias", [True, False])
def test_a_million_float32_are_averaged_to_their_last_bit(kind: Callable[[Any], Any], debias: bool) -> None:
    """Tools that iterate in float32 are off by 9e-3."""
    x = (1000 + noise(1_000_000)).astype("float32")
    alpha = 1e-5
    numerator, _ = scipy.signal.lfilter([alpha], [1, alpha - 1], x - 1000.0, zi=[(1 - alpha) * (float(x[0]) - 1000.0)])
    truth = 1000 + numerator
    if debias:
        numerator = scipy.signal.lfilter([1], [1, alpha - 1], x - 1000.0)
        truth = 1000 + numerator / (-np.expm1(np.arange(1, len(x) + 1) * np.log1p(-alpha)) / alpha)
    ours = ewma.smooth(kind(x), alpha=alpha, debias=debias)
    assert ours.dtype in (np.float32, torch.float32)
    np.testing.assert_array_less(np.abs(double(ours) - truth), np.spacing(np.float32(1000)) * (0.5 + 1e-6))


@each_kind
@pytest.mark.parametrize("name", ["noise", "scattered", "infinities", "offset 1e8", "two", "empty"])
def test_every_kind_is_rounded_once(kind: Callable[[Any], Any], name: str) -> None:
    x = kind(HARD[name])
    rounding = {"torch.float16": 2**-11, "float16": 2**-11, "torch.bfloat16": 2**-8}.get(str(getattr(x, "dtype", "")))
    rounding = rounding or (2**-24 if "float32" in str(getattr(x, "dtype", "")) else 0.0)
    wide = double(x)
    for statistic in ("mean", "std"):
        ours = double(getattr(ewma.ewm(x, alpha=0.1, nan="decay"), statistic)())
        truth = getattr(ewma.ewm(wide, alpha=0.1, nan="decay"), statistic)()
        finest = 2.0**-24 if rounding == 2**-11 else 0.0
        same(ours, truth, 1.0001 * rounding * np.abs(np.nan_to_num(truth)) + 1e-12 * largest(wide) + finest, statistic)


LENGTHS = (1, 2, 31, 32, 33, 127, 128, 129, 1000, 131_073)


@each_kind
def test_a_constant_stays_exactly_constant(kind: Callable[[Any], Any]) -> None:
    rules: list[dict[str, Any]] = [{"alpha": 0.3}, {"half_life": 1e5, "debias": False}, {"alpha": 1e-9, "nan": "decay"}]
    for n, constant, rule in zip(LENGTHS * 3, (0.1, -7.0, 1e-7, 1 / 3) * 8, rules * 10, strict=False):
        x = kind(np.full(n, constant))
        np.testing.assert_array_equal(double(ewma.smooth(x, **rule)), double(x), err_msg=f"{n}, {rule}")
        np.testing.assert_array_equal(double(ewma.ewm(x, **rule).var(unbiased=False)), 0.0, err_msg=f"{n}, {rule}")


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("constant", [0.1, 1 / 3, -1e308, 5e-324, 1e300])
def test_a_constant_stays_constant_by_every_rule(constant: float, n: int) -> None:
    x = np.full(n, constant)
    holes = np.where(np.arange(n) % 7 == 3, NAN, x)
    rules: list[dict[str, Any]] = [
        {"alpha": 0.3, "two_sided": True},
        {"alpha": 0.3, "initial": constant},
        {"alpha": np.linspace(0.01, 1, n)},
        {"half_life": 20, "times": np.arange(n) ** 1.5},
        {"half_life": 20, "times": np.arange(n) ** 1.5, "debias": False},
    ]
    rules += (
        [{"profile": profile} for profile in (Uniform(), Power(sigma_rel=0.1), profiles.tensorflow())]
        if n < 2000
        else []
    )
    for rule in rules:
        np.testing.assert_array_equal(ewma.smooth(x, **rule), x, err_msg=str(rule))
        filled = ewma.smooth(holes, nan="decay", **rule)
        np.testing.assert_array_equal(filled, x, err_msg=f"with holes, {rule}")


# ---- long series, every kernel, every layout


LONG = 2 * (1 << 17) + 17


@pytest.mark.parametrize(("debias", "nan"), [(True, "decay"), (False, "skip")])
@pytest.mark.parametrize("alpha", [0.3, 1e-6])
def test_long_series_are_pandas_across_all_pieces(debias: bool, nan: str, alpha: float) -> None:
    clean = noise(LONG)
    holes = with_holes(clean, NAN, share=0.01)
    holes[(1 << 17) - 40 : (1 << 17) + 40] = NAN
    for x in (clean, holes):
        ours, theirs = ewma.ewm(5 + x, alpha=alpha, debias=debias, nan=nan), pandas_of(x, alpha, debias, nan)
        same(ours.mean(), 5 + theirs.mean(), 1e-12 * largest(x), "mean")  # they round less near 0
        expected = theirs.var(bias=True)
        same(ours.var(unbiased=False), expected, 1e-9 * expected, "var")
    y = clean[::-1].copy()
    ours, theirs = ewma.ewm(5 + clean, alpha=alpha, debias=debias), pandas_of(clean, alpha, debias, nan)
    same(ours.cov(y - 3, unbiased=False), theirs.cov(pd.Series(y), bias=True), 1e-9, "cov")


@pytest.mark.parametrize("shape", [(2, 66_001, 3), (70_000, 3), (1, 9_000, 120)], ids=str)
def test_large_batches_are_each_series_alone(shape: tuple[int, ...]) -> None:
    x = 2 + noise(math.prod(shape)).reshape(shape)
    axis = 1
    numerator = scipy.signal.lfilter([1], [1, -0.9], x, axis)
    weights = scipy.signal.lfilter([1], [1, -0.9], np.ones(shape[1]))
    weights = weights.reshape([-1 if place == axis else 1 for place in range(len(shape))])
    same(ewma.smooth(x, alpha=0.1, axis=axis), numerator / weights, 1e-12 * largest(x))
    same(ewma.smooth(torch.from_numpy(x), alpha=0.1, dim=axis), numerator / weights, 1e-12 * largest(x))


PROBLEMS = {"native": kernels.missing(), "triton": kernels.missing_triton()}
KERNELS = [name for name in kernels.KERNELS if not PROBLEMS.get(name)]


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("name", ["one", "noise", "missing at first", "a gap of 60", "infinities", "from far"])
def test_every_kernel_says_the_same(kind: Callable[[Any], Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = HARD[name]
    several = np.stack([np.roll(x, shift) for shift in (0, 1, 5)])
    results = {}
    for kernel in KERNELS:
        monkeypatch.setenv("EWMA_KERNEL", kernel)
        results[kernel] = [
            double(getattr(ewma.ewm(kind(array), alpha=alpha, debias=debias, nan="decay", axis=axis), statistic)())
            for array, axis in ((x, 0), (several, 1), (several.T.copy(), 0))
            for alpha, debias in ((0.99, True), (0.01, False))
            for statistic in ("mean", "std")
        ]
    for kernel, told in results.items():
        for one, truth in zip(told, results["reference"], strict=True):
            same(one, truth, 1e-12 * largest(x), kernel)


@each_hard
def test_with_autograd_the_numbers_are_the_same(name: str) -> None:
    if name == "the widest":
        pytest.skip("they are made smaller only where autograd does not watch")
    x = torch.from_numpy(HARD[name])
    for debias, alpha in itertools.product((True, False), (0.99, 0.1)):
        truth = defined(name, alpha, debias, "decay")
        for begun in (x, x.clone().requires_grad_()):
            series, said = ewma.ewm(begun, alpha=alpha, debias=debias, nan="decay"), f"debias={debias}, alpha={alpha}"
            same(double(series.mean()), truth["mean"], 1e-12 * largest(HARD[name]), said)
            results = {"std": double(series.std(unbiased=False)), "unbiased std": double(series.std())}
            check_second(results, truth, truth, 1, said)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("shape", [(140,), (3, 40), (2, 20, 3), (2, 3, 2, 11), (2, 0, 5), (0, 4)], ids=str)
def test_any_axis_of_any_batch_is_each_series_alone(kind: Callable[[Any], Any], shape: tuple[int, ...]) -> None:
    x = with_holes(noise(math.prod(shape)), NAN).reshape(shape)
    for axis in (*range(len(shape)), -1):
        for options in (
            {"alpha": 0.2, "nan": "decay"},
            {"half_life": 5, "debias": False},
            {"alpha": 0.2, "two_sided": True},
        ):
            ours = ewma.smooth(kind(x), axis=axis, **options)
            assert tuple(ours.shape) == shape
            alone = np.apply_along_axis(functools.partial(ewma.smooth, **options), axis, x) if x.size else x
            same(double(ours), alone, 1e-13 * largest(x), f"axis={axis}, {options}")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_any_layout_is_read_by_its_elements(kind: Callable[[Any], Any]) -> None:
    x = kind(noise(5 * 80 * 6).reshape(5, 80, 6))
    transposed = x.transpose(2, 0, 1) if isinstance(x, np.ndarray) else x.permute(2, 0, 1)
    layouts = [x[:, ::2], x[1:4, 3:, ::3], transposed, transposed[::2, :, 5::7]]
    layouts += [x[:, ::-1]] if isinstance(x, np.ndarray) else [x[:1].expand(4, 80, 6)]
    for layout, axis in itertools.product(layouts, range(3)):
        simple = np.ascontiguousarray(double(layout))
        for options in ({"alpha": 0.2}, {"alpha": 0.2, "weigh": "time", "times": np.arange(layout.shape[axis]) ** 2}):
            before = double(layout).copy()
            same(double(ewma.smooth(layout, axis=axis, **options)), ewma.smooth(simple, axis=axis, **options), 1e-14)
            np.testing.assert_array_equal(double(layout), before)


# ---- profiles, and knobs that are arrays


def looped(
    x: np.ndarray, steps: Any, *, weigh: str = "time", debias: bool = True, nan: str = "skip", timed: bool = False
):
    """The recurrence as a loop. `steps` gives (keep, gain) of each step."""
    weight, mean, seen, means = 0.0, NAN, False, []
    for value, (keep, gain) in zip(map(float, x), steps, strict=True):
        observed = math.isfinite(value)
        if observed and not seen and not debias:
            weight, mean = 1.0, value
        elif observed:
            past = keep * weight
            gain = 1.0 if weigh == "value" and debias else 1.0 - past if timed and not debias else gain
            weight = past + gain
            share = gain / weight if weight else 1.0
            mean = value if not seen else mean + share * (value - mean)
            weight = weight if debias else 1.0
        elif nan == "decay":
            weight *= keep
        seen = seen or observed
        means.append(mean)
    return means


PROFILES: list[Profile] = [
    Exponential(half_life=3),
    Uniform(),
    Power(sigma_rel=0.1),
    Power(sigma_rel=0.3),
    profiles.inverse_gamma(decay=0.99),
    profiles.tensorflow(decay=0.9),
    profiles.cosine(first=0.5, steps=40),
    profiles.ramp(tau=5, debias=False),
    profiles.mean_teacher(decay=0.7),
    profiles.linear(first=0.2, last=0.9, steps=40),
    profiles.linear(first=1, last=0.5, steps=4),
    profiles.fraction(share=0.5),
    profiles.after(start=12.5, profile=Uniform()),
    profiles.from_lr_decay(shape="cosine", steps=100),
    Power(sigma_rel=0.1).scaled(3),
]


@pytest.mark.parametrize("profile", PROFILES, ids=str)
@pytest.mark.parametrize("nan", ["skip", "decay"])
@pytest.mark.parametrize("timed", [False, True])
def test_every_profile_is_its_steps_in_a_loop(profile: Profile, nan: str, timed: bool) -> None:
    for name in ("noise", "missing at first", "missing within", "a gap of 60", "offset 1e8"):
        x = HARD[name]
        times = np.cumsum(np.random.default_rng(0).choice([0.25, 1.0, 3.5], size=len(x)))
        elapsed = np.diff(times, prepend=times[0] - 1.0) if timed else np.ones(len(x))
        steps = [profile.step(float(time), float(each)) for time, each in zip(np.cumsum(elapsed), elapsed, strict=True)]
        for weigh in ("time", "value") if isinstance(profile, Exponential | Uniform) else ("time",):
            expected = looped(x, steps, weigh=weigh, debias=profile.debias, nan=nan, timed=timed)
            options: dict[str, Any] = {"times": times if timed else None, "nan": nan, "weigh": weigh}
            same(ewma.smooth(x, profile, **options), expected, 1e-13 * largest(x), f"{name}, by {weigh}")
            batch = ewma.smooth(torch.from_numpy(np.stack([x, x[::-1]], 1).copy()), profile, dim=0, **options)
            same(double(batch)[:, 0], expected, 1e-13 * largest(x), f"{name}, by {weigh}, in a batch")


def test_a_long_uniform_mean_is_the_plain_mean() -> None:
    x = 1e6 + noise(LONG)
    expected = 1e6 + np.cumsum((x - 1e6).astype(np.longdouble)) / np.arange(1, LONG + 1)
    same(ewma.smooth(x, Uniform()), expected.astype(float), 1e-14 * largest(x))
    var = np.cumsum((x - 1e6).astype(np.longdouble) ** 2) / np.arange(1, LONG + 1) - (expected - 1e6) ** 2
    same(ewma.ewm(x, Uniform()).var(unbiased=False), np.maximum(var, 0).astype(float), 1e-9 * np.maximum(var, 1e-3))


def by_alpha(alpha: Any, elapsed: Any = None) -> list[tuple[float, float]]:
    elapsed = np.ones(len(alpha)) if elapsed is None else elapsed
    keeps = [(1.0 - a) ** e for a, e in zip(alpha, elapsed, strict=True)]
    return [(keep, 1.0 - keep) for keep in keeps]


each_array = pytest.mark.parametrize("kind", [np.asarray, torch.tensor], ids=["numpy", "torch"])


@each_array
@each_rule
@pytest.mark.parametrize("knob", ["half_life", "decay", "alpha", "span", "com"])
def test_a_knob_for_each_channel_is_each_channel_alone(kind: Any, debias: bool, nan: str, knob: str) -> None:
    values = {
        "half_life": [0.5, 3, 1e5], "decay": [0.0, 0.9, 0.99999], "alpha": [1.0, 0.9, 1e-5], "span": [1, 2, 1e5],
        "com": [0, 0.5, 1e5],
    }[knob]  # fmt: skip
    x = with_holes(3 + noise(3 * 140), NAN).reshape(3, 140)
    knobs = {knob: kind(np.array(values, dtype=float)[:, None])}
    statistics = ("mean", "var", "std", "sum") if debias else ("mean", "var", "std")
    together = ewma.ewm(kind(x), debias=debias, nan=nan, **knobs)
    for statistic in statistics:
        alone = [
            getattr(ewma.ewm(row, debias=debias, nan=nan, **{knob: value}), statistic)()
            for row, value in zip(x, values, strict=True)
        ]
        scale = np.nan_to_num(np.abs(np.stack(alone)))
        same(double(getattr(together, statistic)()), np.stack(alone), 1e-12 * np.maximum(scale, 1.0), statistic)
    turned = ewma.smooth(
        kind(x.T.copy()), axis=0, debias=debias, nan=nan, **{knob: kind(np.array(values, dtype=float))}
    )
    same(double(turned).T, double(together.mean()), 1e-13 * largest(x), "along axis 0")


@each_array
@each_rule
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("weigh", ["time", "value"])
def test_a_knob_for_each_step_is_the_recurrence_in_a_loop(
    kind: Any, debias: bool, nan: str, timed: bool, weigh: str
) -> None:
    n = 140
    x = with_holes(3 + noise(2 * n), NAN).reshape(2, n)
    alpha = np.random.default_rng(1).choice([1e-4, 0.01, 0.3, 0.9, 1.0], size=(2, n), p=[0.2, 0.3, 0.3, 0.15, 0.05])
    times = np.cumsum(np.random.default_rng(0).choice([0.25, 1.0, 3.5], size=n))
    elapsed = np.diff(times, prepend=times[0] - 1.0) if timed else np.ones(n)
    options: dict[str, Any] = {"debias": debias, "nan": nan, "weigh": weigh}
    rows = [looped(row, by_alpha(each, elapsed), timed=timed, **options) for row, each in zip(x, alpha, strict=True)]
    options["times"] = times if timed else None
    same(double(ewma.smooth(kind(x), alpha=kind(alpha), **options)), rows, 1e-13 * largest(x), "each its own")
    same(double(ewma.smooth(kind(x[0]), alpha=kind(alpha[0]), **options)), rows[0], 1e-13 * largest(x), "alone")
    common = [looped(row, by_alpha(alpha[0], elapsed), timed=timed, **options_of(options)) for row in x]
    same(double(ewma.smooth(kind(x), alpha=kind(alpha[:1]), **options)), common, 1e-13 * largest(x), "one for all")
    turned = ewma.smooth(kind(x.T.copy()), alpha=kind(alpha[:1].T.copy()), axis=0, **options)
    same(double(turned).T, common, 1e-13 * largest(x), "along axis 0")


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "times"}


def test_knobs_as_arrays_across_pieces() -> None:
    x, alpha = noise(LONG), np.random.default_rng(1).uniform(1e-4, 0.5, size=LONG)
    same(ewma.smooth(x, alpha=alpha), looped(x, by_alpha(alpha)), 1e-13 * largest(x))


# ---- both sides


def both_sides(x: np.ndarray, decay: float, nan: str, times: np.ndarray | None, needed: int) -> np.ndarray:
    """Kernel d ** |i - j|, every value once. A missing value is no distance by "skip", and one by "decay"."""
    observed = np.isfinite(x)
    counted = observed.astype(float) if nan == "skip" else np.ones(len(x))
    ahead = np.cumsum(counted) if times is None else times
    behind = ahead - counted if times is None else times
    before = np.arange(len(x))[:, None] >= np.arange(len(x))
    distance = np.where(before, ahead[:, None] - ahead, behind - behind[:, None])
    weights = (decay**distance)[:, observed]
    enough = observed.sum() >= max(needed, 1)
    return weights @ x[observed] / weights.sum(1) if enough else np.full(len(x), NAN)


@pytest.mark.parametrize(
    "name",
    ["one", "two", "missing at first", "missing within", "missing at last", "all missing", "scattered", "from far"],
)
@pytest.mark.parametrize("nan", ["skip", "decay"])
@pytest.mark.parametrize("timed", [False, True])
def test_two_sided_is_the_symmetric_kernel_with_the_centre_once(name: str, nan: str, timed: bool) -> None:
    x = HARD[name]
    times = np.cumsum(np.random.default_rng(0).choice([0.0, 0.5, 1.0, 3.5], size=len(x))) if timed else None
    if timed and nan == "skip" and not np.isfinite(x).all():
        pytest.skip("what a missing row's elapsed time is depends on the side it is seen from")
    for decay, needed in itertools.product((0.01, 0.5, 0.99), (1, 3, 40)):
        ours = ewma.smooth(x, decay=decay, two_sided=True, nan=nan, times=times, min_periods=needed)
        same(ours, both_sides(x, decay, nan, times, needed), 1e-12 * largest(x), f"decay={decay}, min_periods={needed}")


def test_two_sided_read_backwards_is_itself_backwards() -> None:
    for name in ("noise", "scattered", "missing at first", "a spike"):
        x = HARD[name]
        same(
            ewma.smooth(x[::-1], half_life=7, two_sided=True),
            ewma.smooth(x, half_life=7, two_sided=True)[::-1],
            1e-13 * largest(x),
        )


@each_array
def test_two_sided_with_a_knob_for_each_step_keeps_alike_both_ways(kind: Any) -> None:
    """What is kept between two values is the product over the steps between them."""
    x, alpha = noise(60), np.random.default_rng(1).uniform(0.01, 0.9, size=60)
    far = -np.cumsum(np.log1p(-alpha))
    weights = np.exp(-np.abs(far[:, None] - far))
    ours = ewma.smooth(kind(x), alpha=kind(alpha), two_sided=True)
    same(double(ours), weights @ x / weights.sum(1), 1e-13 * largest(x))
