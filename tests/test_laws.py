"""Laws of every running mean, on inputs that Hypothesis looks for."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ewma.profiles import (
    Exponential,
    Power,
    Profile,
    Uniform,
    after,
    cosine,
    fraction,
    from_json,
    from_lr_decay,
    inverse_gamma,
    linear,
    mean_teacher,
    ramp,
    tensorflow,
)
from ewma.recurrence import Moments, Recurrence, toward

law = settings(deadline=None, max_examples=100)
approx = pytest.approx
EPSILON = 2.0**-52

wide = st.floats(allow_nan=False, allow_infinity=False)
values = st.integers(-(2**40), 2**40).map(lambda count: count / 2**20)  # up to a million, and nothing near underflow
ticks = st.integers(1, 4096).map(lambda count: count / 64)  # elapsed, of which sums and parts are exact
half_lives = st.floats(-2, 9).map(lambda exponent: 10.0**exponent)
exponentials = st.builds(lambda h, debias: Exponential(half_life=h, debias=debias), half_lives, st.booleans())
powers = st.builds(lambda width: Power(sigma_rel=width), st.floats(0.01, 0.3))
unsplittable = exponentials | powers | st.just(Uniform())
decays = st.floats(0, 0.999999)
spans = st.floats(1, 1000)
schedules = st.one_of(
    st.builds(inverse_gamma, gamma=spans, power=st.floats(0.1, 1), decay=decays),
    st.builds(tensorflow, decay=decays),
    st.builds(cosine, first=decays, steps=spans),
    st.builds(ramp, decay=decays, tau=spans),
    st.builds(mean_teacher, decay=decays),
    st.builds(linear, first=decays, last=decays, steps=spans),
    st.builds(fraction, share=st.floats(0.01, 10)),
    st.builds(from_lr_decay, shape=st.sampled_from(from_lr_decay.SHAPES), steps=spans),
)
simple = unsplittable | schedules
profiles = (
    simple
    | st.builds(after, start=spans, profile=simple)
    | st.builds(lambda profile, k: profile.scaled(k), simple, st.floats(0.1, 10))
)
merging = st.tuples(
    half_lives.map(lambda h: Exponential(half_life=h)) | st.just(Uniform()), st.sampled_from(["time", "value"])
)
updates = st.lists(st.tuples(values, ticks), min_size=1, max_size=12)


def run(recurrence: Recurrence, taken: list[tuple[float, float]], mean: float = 0.0) -> float:
    for x, elapsed in taken:
        mean = toward(mean, x, recurrence.advance(elapsed))
    return mean


def largest(taken: list[tuple[float, float]]) -> float:
    return max((abs(x) for x, _ in taken), default=0.0)


@law
@given(profiles, wide, st.lists(ticks, min_size=1, max_size=12))
def test_constant_in_constant_out_exactly(profile: Profile, x: float, elapsed: list[float]):
    recurrence, mean = Recurrence(profile), 0.0
    for passed in elapsed:
        mean = toward(mean, x, recurrence.advance(passed))
        assert mean == x


@law
@given(unsplittable, st.lists(st.tuples(values, st.lists(ticks, min_size=1, max_size=5)), min_size=1, max_size=8))
def test_splitting_elapsed_into_parts_changes_nothing(profile: Profile, parts: list[tuple[float, list[float]]]):
    whole, split = Recurrence(profile), Recurrence(profile)
    mean = run(whole, [(x, sum(elapsed)) for x, elapsed in parts])
    assert run(split, [(x, part) for x, elapsed in parts for part in elapsed]) == approx(mean, rel=0, abs=1e-12 * 2**20)
    assert split.time == whole.time
    assert split.weight == approx(whole.weight, rel=1e-14)
    assert split.advance() == approx(whole.advance(), rel=1e-13)


@law
@given(updates)
def test_the_uniform_mean_is_the_mean(taken: list[tuple[float, float]]):
    observed, elapsed = zip(*taken, strict=True)
    close = 1e-14 * largest(taken)
    assert run(Recurrence(Uniform(), "value"), taken) == approx(statistics.fmean(observed), rel=0, abs=close)
    assert run(Recurrence(Uniform(), "time"), taken) == approx(statistics.fmean(observed, elapsed), rel=0, abs=close)


@law
@given(profiles, st.lists(st.tuples(wide, ticks), min_size=1, max_size=12))
def test_the_mean_lies_among_the_values(profile: Profile, taken: list[tuple[float, float]]):
    recurrence, mean, rounding = Recurrence(profile), 0.0, 2 * len(taken) * EPSILON * largest(taken)
    low, high = min(x for x, _ in taken) - rounding, max(x for x, _ in taken) + rounding
    for x, elapsed in taken:
        mean = toward(mean, x, recurrence.advance(elapsed))
    assert low <= mean <= high


@law
@given(profiles, st.lists(ticks, min_size=1, max_size=12))
def test_a_coefficient_is_a_share_and_the_first_is_1(profile: Profile, elapsed: list[float]):
    recurrence = Recurrence(profile)
    coefficients = [recurrence.advance(passed) for passed in elapsed]
    assert coefficients[0] == 1.0
    assert all(0.0 <= coefficient <= 1.0 for coefficient in coefficients)
    assert recurrence.count == len(elapsed)
    assert recurrence.time == sum(elapsed)


@law
@given(profiles, updates, st.integers(-20, 20), st.sampled_from([1.0, -1.0]))
def test_scaling_by_a_power_of_2_scales_the_mean_exactly(profile: Profile, taken, exponent: int, sign: float):
    scale = sign * 2.0**exponent
    scaled = [(x * scale, elapsed) for x, elapsed in taken]
    assert run(Recurrence(profile), scaled) == scale * run(Recurrence(profile), taken)


@law
@given(profiles, updates, values)
def test_shifting_the_values_shifts_the_mean(profile: Profile, taken: list[tuple[float, float]], shift: float):
    shifted = run(Recurrence(profile), [(x + shift, elapsed) for x, elapsed in taken])
    close = 1e-14 * (largest(taken) + abs(shift))
    assert shifted == approx(run(Recurrence(profile), taken) + shift, rel=0, abs=close)


@law
@given(profiles, st.lists(values, min_size=1, max_size=30))
def test_weights_make_the_mean(profile: Profile, observed: list[float]):
    weights = profile.weights(len(observed))
    mean = math.fsum(weight * x for weight, x in zip(weights, observed, strict=True))
    assert math.fsum(weights) == approx(1.0, rel=1e-14)
    assert run(Recurrence(profile), [(x, 1.0) for x in observed]) == approx(
        mean, rel=0, abs=1e-13 * max(map(abs, observed))
    )


def merged(first: tuple[Recurrence, float], second: tuple[Recurrence, float]) -> tuple[Recurrence, float]:
    (recurrence, mean), (later, later_mean) = first, second
    return recurrence, toward(mean, later_mean, recurrence.merge(later))


@law
@given(merging, st.lists(st.lists(st.tuples(values, ticks), max_size=6), min_size=3, max_size=3), st.booleans())
def test_runs_merge_in_either_order_into_the_run_over_all(kind, parts, left_first: bool):
    taken, whole = [update for part in parts for update in part], Recurrence(*kind)
    a, b, c = ((recurrence := Recurrence(*kind), run(recurrence, part)) for part in parts)
    recurrence, mean = merged(merged(a, b), c) if left_first else merged(a, merged(b, c))
    assert mean == approx(run(whole, taken), rel=0, abs=1e-14 * largest(taken))
    assert (recurrence.time, recurrence.count) == (whole.time, whole.count)
    assert recurrence.weight == approx(whole.weight, rel=1e-14)


@law
@given(st.lists(values, min_size=2, max_size=12))
def test_uniform_variances_are_those_of_statistics(observed: list[float]):
    moments, close = Moments(Uniform()), 1e-14 * max(map(abs, observed)) ** 2
    for x in observed:
        moments.update(x)
    assert moments.variance(unbiased=False) == approx(statistics.pvariance(observed), rel=0, abs=close)
    assert moments.variance() == approx(statistics.variance(observed), rel=0, abs=2 * close)


@law
@given(profiles, st.lists(st.tuples(values, ticks), min_size=2, max_size=12))
def test_variances_are_never_negative_and_the_unbiased_is_the_larger(profile: Profile, taken):
    moments = Moments(profile, "time")
    for x, elapsed in taken:
        moments.update(x, elapsed)
    biased, unbiased = moments.variance(unbiased=False), moments.variance()
    assert biased >= 0.0
    assert math.isnan(unbiased) or unbiased >= biased * (1 - 1e-12)


@law
@given(profiles)
def test_every_profile_survives_json_and_equals_itself(profile: Profile):
    again = from_json(profile.to_json())
    assert (again, hash(again), repr(again)) == (profile, hash(profile), repr(profile))
