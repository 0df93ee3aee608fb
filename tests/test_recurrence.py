"""The recurrence: the article's formula made right, both starts, both weighings, tensors, merging, and moments."""

from __future__ import annotations

import itertools
import json
import math
import statistics

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mpf

from ewma.profiles import (
    Exponential,
    Power,
    Profile,
    Uniform,
    after,
    cosine,
    fraction,
    from_lr_decay,
    inverse_gamma,
    linear,
    mean_teacher,
    ramp,
    tensorflow,
)
from ewma.recurrence import Moments, Recurrence, check_elapsed, toward, weighing

approx = pytest.approx
mpmath.mp.dps = 50

VALUES = [3.0, -1.5, 4.25, 0.1, 9.75, -2.0, 6.5, 5.0]
ELAPSED = [1.0, 0.5, 3.0, 1.0, 0.125, 7.0, 2.0, 1.0]
MERGEABLE = [
    (Exponential(half_life=4), "time"),
    (Exponential(half_life=4), "value"),
    (Uniform(), "time"),
    (Uniform(), "value"),
]
EVERY = [
    *MERGEABLE,
    (Exponential(half_life=4, debias=False), "time"),
    (Exponential(half_life=4, debias=False), "value"),
    (Power(sigma_rel=0.1), "time"),
    (inverse_gamma(gamma=2, decay=0.9), "time"),
    (tensorflow(decay=0.5), "time"),
    (cosine(steps=10), "time"),
    (ramp(tau=5, debias=False), "time"),
    (mean_teacher(decay=0.9), "time"),
    (linear(first=0.5, last=0.99, steps=9), "time"),
    (fraction(share=0.5), "time"),
    (after(start=2.5, profile=Uniform()), "time"),
    (after(start=2.5, profile=Exponential(half_life=4, debias=False)), "time"),
    (from_lr_decay(shape="linear", steps=12), "time"),
    (from_lr_decay(shape="cosine", steps=12), "time"),
    (from_lr_decay(shape="sqrt", steps=12), "time"),
    (tensorflow(decay=0.9).scaled(2), "time"),
]
every_profile = pytest.mark.parametrize(("profile", "weigh"), EVERY, ids=str)


def averaged(recurrence: Recurrence, values=VALUES, elapsed=ELAPSED) -> float:
    mean = 0.0
    for x, passed in zip(values, elapsed, strict=False):
        mean = toward(mean, x, recurrence.advance(passed))
    return mean


def shares(coefficients: list[float]) -> list[float]:
    """The weight of each value in a mean that was moved by these coefficients."""
    left, newest_first = 1.0, []
    for coefficient in reversed(coefficients):
        newest_first.append(left * coefficient)
        left *= 1.0 - coefficient
    return newest_first[::-1]


# ---- the article, and the two starts


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.9])
def test_the_articles_division_is_right_for_one_half_only(alpha: float):
    recurrence, mean, average = Recurrence(Exponential(alpha=alpha)), 0.0, 0.0
    for count, x in enumerate([5.0, 5.0, 7.0], 1):
        average = alpha * x + (1 - alpha) * average
        mean = toward(mean, x, recurrence.advance())
        article, right = average / (1 - alpha**count), average / (1 - (1 - alpha) ** count)
        assert mean == approx(right, rel=1e-14)
        assert (mean == approx(article, rel=1e-3)) is (alpha == 0.5)


@pytest.mark.parametrize("alpha", [1e-6, 0.125, 0.5, 1.0])
def test_the_debiased_start_takes_the_first_value_and_weighs_what_was_seen(alpha: float):
    recurrence = Recurrence(Exponential(alpha=alpha))
    for count in range(1, 6):
        seen = float(-mpmath.expm1(count * mpmath.log1p(-mpf(alpha)))) if alpha < 1 else 1.0
        assert recurrence.advance() == approx(alpha / seen, rel=1e-15, abs=0)
        assert recurrence.weight == approx(seen, rel=1e-15, abs=0)


@pytest.mark.parametrize("weigh", ["time", "value"])
def test_the_classic_start_takes_the_first_value_and_alpha_afterwards(weigh: str):
    recurrence = Recurrence(Exponential(alpha=0.3, debias=False), weigh)
    assert [recurrence.advance() for _ in range(4)] == approx([1.0, 0.3, 0.3, 0.3], rel=1e-15)
    assert recurrence.advance(2.0) == approx(1 - 0.7**2, rel=1e-15)
    shares = [0.7**5, 0.3 * 0.7**4, 0.3 * 0.7**3, 0.3 * 0.7**2, 1 - 0.7**2]
    concentration = approx(sum(share**2 for share in shares), rel=1e-14)
    numbers = {"time": 6.0, "weight": 1.0, "residue": 0.0, "count": 5.0, "concentration": concentration}
    assert recurrence.numbers() == numbers


def test_by_value_is_the_adjusted_mean_of_pandas():
    times, decay = list(itertools.accumulate(ELAPSED)), 0.8
    recurrence, mean = Recurrence(Exponential(decay=decay), "value"), 0.0
    for seen, (x, passed) in enumerate(zip(VALUES, ELAPSED, strict=True), 1):
        mean = toward(mean, x, recurrence.advance(passed))
        weights = [decay ** (times[seen - 1] - time) for time in times[:seen]]
        assert mean == approx(math.fsum(map(float.__mul__, weights, VALUES)) / math.fsum(weights), rel=1e-13)
        assert recurrence.weight == approx(math.fsum(weights), rel=1e-14)


@pytest.mark.parametrize(
    "profile", [Uniform(), Exponential(half_life=5), Exponential(half_life=5, debias=False)], ids=str
)
def test_the_concentration_is_the_sum_of_squared_shares(profile):
    whole, parts = Recurrence(profile), [Recurrence(profile) for _ in range(2)]
    for _ in range(20):
        whole.advance()
    assert whole.concentration == approx(sum(share**2 for share in profile.weights(20)), rel=1e-13)
    if profile.debias:
        for part, steps in zip(parts, (12, 8), strict=True):
            for _ in range(steps):
                part.advance()
        parts[0].merge(parts[1])
        assert parts[0].concentration == approx(whole.concentration, rel=1e-13)


def test_with_equal_steps_both_weighings_are_one_mean():
    by_time, by_value = (Recurrence(Exponential(half_life=5), weigh) for weigh in ("time", "value"))
    assert [by_time.advance() for _ in range(50)] == approx([by_value.advance() for _ in range(50)], rel=1e-14)


@every_profile
def test_the_coefficients_are_the_weights_that_the_profile_states(profile: Profile, weigh: str):
    recurrence = Recurrence(profile, weigh)
    assert shares([recurrence.advance() for _ in range(20)]) == approx(profile.weights(20), rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("half_life", [1e5, 1e9])
def test_a_million_updates_leave_the_weight_right_to_its_last_bits(half_life: float):
    recurrence = Recurrence(Exponential(half_life=half_life))
    for _ in range(10**6):
        recurrence.advance()
    assert recurrence.weight == approx(-math.expm1(-recurrence.profile.rate * 1e6), rel=1e-15, abs=0)


def test_a_long_gap_by_value_leaves_the_weight_right_to_its_last_bits():
    recurrence = Recurrence(Exponential(half_life=10), "value")
    recurrence.load({"time": 1e9, "weight": 1e9, "residue": 0.0, "count": 1e9, "concentration": 0.0})
    assert recurrence.advance(10 * 40.0) == approx(1 / (1 + 1e9 * 2**-40), rel=1e-15)
    assert recurrence.weight == approx(1 + 1e9 * 2**-40, rel=1e-15)


# ---- the power profile, and averages that begin late


@pytest.mark.parametrize("every", [1, 10, 100])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2, 0.28])
def test_the_power_profiles_position_and_width_at_any_update_interval(sigma_rel: float, every: int):
    profile, run = Power(sigma_rel=sigma_rel), 10_000
    recurrence, step, gamma = Recurrence(profile), every / run, profile.gamma
    weights = shares([recurrence.advance(float(every)) for _ in range(run // every)])
    positions = [step * (1 + update) for update in range(len(weights))]
    mean = math.fsum(map(float.__mul__, weights, positions))
    variance = math.fsum(weight * (position - mean) ** 2 for weight, position in zip(weights, positions, strict=True))
    # Euler and Maclaurin: each update stands for the step before it, so the sum exceeds the integral by step / 2, less
    # step^2 (gamma + 1) / 12; the variance lacks step^2 / 12 of gamma / (gamma + 2). The next terms go by step^3.
    assert mean == approx((gamma + 1) / (gamma + 2) + step / 2, abs=step**2 * (gamma + 1) / 12 * 1.01 + 1e-12)
    assert variance == approx(sigma_rel**2, abs=step**2 / 12 + 1e-12)


def test_the_power_profiles_first_update_keeps_nothing():
    profile, recurrence = Power(sigma_rel=0.1), Recurrence(Power(sigma_rel=0.1))
    assert profile.step(time=7.0, elapsed=7.0) == (0.0, 1.0)
    assert [recurrence.advance(7.0), recurrence.weight] == [1.0, 1.0]


def test_the_power_profile_attached_late_weighs_what_it_saw():
    recurrence = Recurrence(Power(sigma_rel=0.1), time=1000)
    assert recurrence.weight == 0.0
    assert recurrence.advance() == 1.0
    for _ in range(499):
        recurrence.advance(2.0)
    right = 1 - (1000 / mpf(1999)) ** (mpf(recurrence.profile.gamma) + 1)
    assert recurrence.weight == approx(float(right), rel=1e-14)
    assert recurrence.numbers()["time"] == 1999.0


@pytest.mark.parametrize("half_life", [20.0, 1e9, 1e17])
def test_after_its_start_a_profile_goes_as_if_all_before_had_not_been(half_life: float):
    inner = Exponential(half_life=half_life)
    late, fresh = Recurrence(after(start=5, profile=inner)), Recurrence(inner)
    assert [late.advance() for _ in range(5)] == [1.0] * 5
    assert [late.advance() for _ in range(5)] == approx([fresh.advance() for _ in range(5)], rel=1e-14)
    assert late.weight == approx(fresh.weight, rel=1e-14)


# ---- time, weight and count as tensors, for where only the device knows


def tensor(elapsed: float) -> torch.Tensor:
    return torch.tensor(elapsed, dtype=torch.float64)


@every_profile
def test_elapsed_as_a_tensor_gives_what_floats_give(profile: Profile, weigh: str):
    host, device = Recurrence(profile, weigh), Recurrence(profile, weigh)
    for elapsed in ELAPSED:
        coefficient = device.advance(tensor(elapsed))
        assert (coefficient.dtype, coefficient.shape) == (torch.float64, ())
        assert coefficient.item() == approx(host.advance(elapsed), rel=1e-14, abs=1e-16)
        assert device.numbers() == approx(host.numbers(), rel=1e-14, abs=1e-16)


@every_profile
def test_a_step_not_taken_changes_nothing_and_moves_nothing(profile: Profile, weigh: str):
    recurrence, straight = Recurrence(profile, weigh), Recurrence(profile, weigh)
    for elapsed in (0.0, 1.0, 0.0, 0.0, 2.0, 4.0, 0.0):
        before, coefficient = recurrence.numbers(), recurrence.advance(tensor(elapsed)).item()
        assert coefficient == (straight.advance(tensor(elapsed)).item() if elapsed else 0.0)
        assert elapsed or recurrence.numbers() == before
    assert recurrence.numbers() == straight.numbers()


@every_profile
def test_a_captured_graph_finds_the_numbers_where_they_were(profile: Profile, weigh: str):
    host, device = Recurrence(profile, weigh), Recurrence(profile, weigh)
    device.on_device(torch.zeros(2, dtype=torch.bfloat16))
    places = [getattr(device, name).data_ptr() for name in device.NUMBERS]
    for elapsed in ELAPSED:
        assert float(device.advance(elapsed)) == approx(host.advance(elapsed), rel=1e-14, abs=1e-16)
        assert device.numbers() == approx(host.numbers(), rel=1e-14, abs=1e-16)
    assert [getattr(device, name).data_ptr() for name in device.NUMBERS] == places
    assert {getattr(device, name).dtype for name in device.NUMBERS} == {torch.float64}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_the_numbers_are_float64_whatever_counts_the_elapsed(dtype: torch.dtype):
    host, device = Recurrence(Exponential(half_life=1e6)), Recurrence(Exponential(half_life=1e6))
    for elapsed in (1.0, 0.0, 1.0):
        coefficient = device.advance(torch.tensor(elapsed).to(dtype)).item()
        assert coefficient == approx(host.advance(elapsed) if elapsed else 0.0, rel=1e-15)
    assert device.numbers() == approx(host.numbers(), rel=1e-15)


# ---- saving, copying, merging


@pytest.mark.parametrize("elapsed", [1.0, tensor(1.0)], ids=["host", "device"])
@every_profile
def test_a_resumed_recurrence_goes_on_bit_for_bit(profile: Profile, weigh: str, elapsed):
    straight, resumed = Recurrence(profile, weigh), Recurrence(profile, weigh, time=3)
    for _ in range(30):
        straight.advance(elapsed)
    resumed.load(json.loads(json.dumps(straight.numbers())))
    assert [float(resumed.advance(elapsed)) for _ in range(20)] == [float(straight.advance(elapsed)) for _ in range(20)]
    assert resumed.numbers() == straight.numbers()


@pytest.mark.parametrize("elapsed", [1.0, tensor(1.0)], ids=["host", "device"])
def test_a_copy_goes_its_own_way(elapsed):
    recurrence = Recurrence(Exponential(half_life=3), "value", time=5)
    recurrence.advance(elapsed)
    twin, before = recurrence.copy(), recurrence.numbers()
    assert (twin.profile, twin.weigh, twin.numbers()) == (recurrence.profile, "value", before)
    twin.advance(elapsed)
    assert recurrence.numbers() == before
    recurrence.advance(elapsed)
    assert recurrence.numbers() == twin.numbers()


@pytest.mark.parametrize("elapsed", [2.0, tensor(2.0)], ids=["host", "device"])
def test_beginning_now_is_beginning_at_this_time(elapsed):
    recurrence, right = Recurrence(Power(sigma_rel=0.1)), Recurrence(Power(sigma_rel=0.1), time=4)
    for _ in range(2):
        recurrence.advance(elapsed)
    before, late = recurrence.numbers(), recurrence.begin_now()
    assert late.numbers() == right.numbers()
    assert [float(late.advance(elapsed)) for _ in range(3)] == approx([right.advance(2.0) for _ in range(3)], rel=1e-14)
    assert recurrence.numbers() == before


@pytest.mark.parametrize("cut", range(len(VALUES) + 1))
@pytest.mark.parametrize(("profile", "weigh"), MERGEABLE, ids=str)
def test_two_halves_merged_are_the_whole(profile: Profile, weigh: str, cut: int):
    first, second, whole = (Recurrence(profile, weigh) for _ in range(3))
    mean, later = averaged(first, VALUES[:cut], ELAPSED[:cut]), averaged(second, VALUES[cut:], ELAPSED[cut:])
    assert toward(mean, later, first.merge(second)) == approx(averaged(whole), rel=1e-13)
    assert (first.time, first.count) == (whole.time, whole.count)
    assert first.weight == approx(whole.weight, rel=1e-14)
    assert first.advance() == approx(whole.advance(), rel=1e-14)


def test_merging_two_that_saw_nothing_is_nothing():
    recurrence = Recurrence(Uniform())
    assert recurrence.merge(Recurrence(Uniform())) == 0.0
    assert recurrence.numbers() == Recurrence(Uniform()).numbers()


@pytest.mark.parametrize(
    "profile", [Power(sigma_rel=0.1), Exponential(half_life=4, debias=False), tensorflow(decay=0.9)], ids=repr
)
def test_merging_is_refused_where_it_has_no_meaning(profile: Profile):
    first, second = Recurrence(profile), Recurrence(profile)
    first.advance()
    before = first.numbers()
    with pytest.raises(
        ValueError, match=r"cannot merge averages with \w+\(.*\): .* Update one average with all values"
    ):
        first.merge(second)
    assert first.numbers() == before


@pytest.mark.parametrize(
    ("later", "named"),
    [
        (
            Recurrence(Exponential(half_life=5)),
            r"Exponential\(half_life=4\) by time and Exponential\(half_life=5\) by time",
        ),
        (Recurrence(Exponential(half_life=4), "value"), r"by time and Exponential\(half_life=4\) by value"),
        (Recurrence(Uniform()), r"and Uniform\(\) by time"),
    ],
    ids=["rate", "weigh", "kind"],
)
def test_merging_different_kinds_names_both(later: Recurrence, named: str):
    with pytest.raises(ValueError, match=f"different kinds: .*{named}. Make both with the same profile"):
        Recurrence(Exponential(half_life=4)).merge(later)


# ---- moments


@mpmath.workdps(200)
def exact_moments(profile: Profile, weigh: str, values: list[float], elapsed: list[float]) -> tuple[float, ...]:
    """Mean, variance and unbiased variance from the weights themselves, with 200 digits: after a gap most cancel."""
    weights: list[mpf] = []
    for passed in map(mpf, elapsed):
        keep = mpmath.exp(-mpf(profile.rate) * passed) if isinstance(profile, Exponential) else mpf(1)
        gain = 1 if weigh == "value" else (1 - keep if isinstance(profile, Exponential) else passed)
        first = not weights and not profile.debias
        weights = [*(keep * weight for weight in weights), mpf(1) if first else gain]
    total, squares = mpmath.fsum(weights), mpmath.fsum(weights, squared=True)
    mean = mpmath.fdot(weights, values) / total
    biased = mpmath.fsum(weight * (x - mean) ** 2 for weight, x in zip(weights, values, strict=True)) / total
    return float(mean), float(biased), float(biased * total**2 / (total**2 - squares))


def moments_of(profile: Profile, weigh: str | None, values: list[float], elapsed: list[float]) -> Moments:
    moments = Moments(profile, weigh)
    for x, passed in zip(values, elapsed, strict=True):
        moments.update(x, passed)
    return moments


def assert_moments(moments: Moments, right: tuple[float, ...]) -> None:
    found = (moments.mean, moments.variance(unbiased=False), moments.variance())
    assert found == approx(right, rel=1e-12, abs=0)


@pytest.mark.parametrize(("profile", "weigh"), [*MERGEABLE, (Exponential(half_life=4, debias=False), "time")], ids=str)
def test_moments_are_the_weighted_mean_and_variances(profile: Profile, weigh: str):
    moments = Moments(profile, weigh)
    for seen, (x, passed) in enumerate(zip(VALUES, ELAPSED, strict=True), 1):
        moments.update(x, passed)
        if seen > 1:
            assert_moments(moments, exact_moments(profile, weigh, VALUES[:seen], ELAPSED[:seen]))


def test_uniform_moments_are_those_of_statistics():
    moments = moments_of(Uniform(), None, VALUES, [1.0] * len(VALUES))
    assert moments.mean == approx(statistics.fmean(VALUES), rel=1e-14)
    assert moments.variance(unbiased=False) == approx(statistics.pvariance(VALUES), rel=1e-14)
    assert moments.variance() == approx(statistics.variance(VALUES), rel=1e-14)


@pytest.mark.parametrize("half_lives", [10, 30, 49, 60, 300])
@pytest.mark.parametrize("weigh", ["time", "value"])
def test_a_long_gap_leaves_mean_and_variances_right(weigh: str, half_lives: int):
    profile, values, elapsed = Exponential(half_life=2), [1.0, 2.0, 4.0, 3.0], [1.0, 1.0, 1.0, 2.0 * half_lives]
    assert_moments(moments_of(profile, weigh, values, elapsed), exact_moments(profile, weigh, values, elapsed))
    values, elapsed = [*values, 7.0], [*elapsed, 1.0]
    assert_moments(moments_of(profile, weigh, values, elapsed), exact_moments(profile, weigh, values, elapsed))


@pytest.mark.parametrize("x", [0.1, -7e100, 3e-310, 0.0])
@pytest.mark.parametrize("profile", [Exponential(half_life=3), Power(sigma_rel=0.1), Uniform()], ids=repr)
def test_a_constant_stays_exactly_constant_with_variance_0(profile: Profile, x: float):
    moments = moments_of(profile, None, [x] * len(ELAPSED), ELAPSED)
    assert [moments.mean, moments.variance(unbiased=False), moments.variance()] == [x, 0.0, 0.0]


def test_variances_before_there_is_enough_to_vary():
    moments = Moments(Uniform())
    assert [math.isnan(moments.variance(unbiased)) for unbiased in (True, False)] == [True, True]
    moments.update(3.0)
    assert math.isnan(moments.variance())
    assert moments.variance(unbiased=False) == 0.0


@pytest.mark.parametrize(("coefficient", "right"), [(0.0, 1e308), (0.25, 5e307), (0.5, 0.0), (1.0, -1e308)])
def test_a_difference_too_large_for_a_float_is_no_obstacle(coefficient: float, right: float):
    assert toward(1e308, -1e308, coefficient) == approx(right, rel=1e-15)


@pytest.mark.parametrize("values", [[1e200], [1e308], [1e308, -1e308], [1.5e308, -1.5e308, 1.5e308]], ids=str)
def test_the_mean_of_huge_values_does_not_overflow(values: list[float]):
    moments = moments_of(Uniform(), None, values, [1.0] * len(values))
    assert moments.mean == approx(statistics.mean(values), rel=4e-15)
    assert moments.variance(unbiased=False) >= 0.0


# ---- errors


@pytest.mark.parametrize(
    ("profile", "asked", "used"),
    [
        (Exponential(half_life=3), None, "value"),
        (Uniform(), None, "value"),
        (Power(sigma_rel=0.1), None, "time"),
        (tensorflow(), None, "time"),
        (Exponential(half_life=3), "time", "time"),
        (Power(sigma_rel=0.1), "time", "time"),
    ],
)
def test_weighing_is_by_value_where_the_profile_has_such_a_rule(profile: Profile, asked: str | None, used: str):
    assert weighing(profile, asked) == used


def test_weighing_errors():
    with pytest.raises(ValueError, match='weigh must be "time" or "value"; got \'sample\''):
        weighing(Uniform(), "sample")
    with pytest.raises(ValueError, match=r"Exponential and Uniform only; got Power\(sigma_rel=0.1\). Leave it out"):
        weighing(Power(sigma_rel=0.1), "value")
    with pytest.raises(ValueError, match="Exponential and Uniform only; got tensorflow"):
        Moments(tensorflow(), "value")


@pytest.mark.parametrize("elapsed", [0, -1.0, math.nan, math.inf])
def test_elapsed_is_finite_and_above_0(elapsed: float):
    moments = Moments(Uniform())
    with pytest.raises(ValueError, match=f"elapsed must be a finite number above 0: .* got {elapsed}"):
        moments.update(5.0, elapsed)
    assert {getattr(moments, name) for name in Moments.NUMBERS} == {0.0}


@pytest.mark.parametrize("elapsed", [4, 4.0, np.int64(4), np.float32(4), np.float64(4)], ids=type)
def test_elapsed_may_be_any_kind_of_number(elapsed):
    checked = check_elapsed(elapsed)
    assert (checked, isinstance(checked, float)) == (4.0, True)


@pytest.mark.parametrize("elapsed", ["2", None, [1.0]])
def test_elapsed_that_is_no_number(elapsed):
    with pytest.raises(TypeError, match="elapsed must be a number: steps, samples or seconds"):
        check_elapsed(elapsed)
