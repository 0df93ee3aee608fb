"""Profiles: the five knobs beside 50 digits, each schedule beside its formula, profiles as values, and every error."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mpf

from ewma import profiles
from ewma.profiles import (
    KNOBS,
    PROFILES,
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
    resolve,
    tensorflow,
    triangular,
)

approx = pytest.approx
mpmath.mp.dps = 50

SCHEDULES = {  # each beside its published formula d(n)
    inverse_gamma(gamma=5, power=0.75, decay=0.97): lambda n: min(0.97, 1 - (1 + n / 5) ** -0.75),
    tensorflow(decay=0.9): lambda n: min(0.9, (1 + n) / (10 + n)),
    cosine(first=0.9, steps=100): lambda n: 1 - (1 - 0.9) * (1 + math.cos(math.pi * min(n, 100) / 100)) / 2,
    ramp(decay=0.99, tau=30): lambda n: 0.99 * (1 - math.exp(-n / 30)),
    mean_teacher(decay=0.95): lambda n: min(0.95, 1 - 1 / (n + 1)),
    linear(first=0.5, last=0.99, steps=40): lambda n: 0.5 + (0.99 - 0.5) * min(n / 40, 1),
    fraction(share=0.25): lambda n: 2 ** (-1 / (0.25 * n)) if n else 0.0,
}
OTHERS = (
    Exponential(half_life=2000),
    Exponential(half_life=1.5, debias=False),
    Exponential(decay=0.9999),
    Exponential(decay=0),
    Exponential(alpha=0.125),
    Exponential(span=9),
    Exponential(com=4.5),
    Power(sigma_rel=0.1),
    Uniform(),
    tensorflow(decay=0.9, debias=False),
    after(start=5, profile=Uniform()),
    after(start=2.5, profile=cosine(steps=10)),
    after(start=4, profile=Exponential(half_life=3, debias=False)),
    from_lr_decay(shape="linear", steps=30),
    from_lr_decay(shape="cosine", steps=30),
    from_lr_decay(shape="sqrt", steps=30),
    triangular(steps=30),
    triangular(steps=30, peak=0.5),
    triangular(steps=30, peak=0),
    cosine(steps=10).scaled(4),
    after(start=3, profile=ramp(tau=7).scaled(2)).scaled(2.5),
)
EVERY = (*SCHEDULES, *OTHERS)
every_profile = pytest.mark.parametrize("profile", EVERY, ids=repr)


def test_the_profiles_tried_here_are_all_there_are():
    assert {type(profile).__name__ for profile in EVERY} == set(PROFILES)


def test_importing_profiles_and_recurrence_imports_neither_torch_nor_numpy():
    code = "import sys, ewma.profiles, ewma.recurrence; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- the five knobs, beside 50 digits

RATE_OF = {
    "half_life": lambda h: mpmath.log(2) / h,
    "decay": lambda d: -mpmath.log(d),
    "alpha": lambda a: -mpmath.log(1 - a),
    "span": lambda s: mpmath.log1p(2 / (s - 1)),
    "com": lambda c: mpmath.log1p(1 / c),
}
OF_RATE = {
    "half_life": lambda r: mpmath.log(2) / r,
    "decay": lambda r: mpmath.exp(-r),
    "alpha": lambda r: -mpmath.expm1(-r),
    "span": lambda r: 1 / mpmath.tanh(r / 2),
    "com": lambda r: 1 / mpmath.expm1(r),
}
HALF_LIVES = (1e-3, 0.0123, 0.06, 0.1, 0.45, 1.0, 1.6, 3.0, 20.0, 693.1, 2000.0, 1e5, 3e8, 1e12, 7e15, 1e18)
DEGENERATE = {"decay": (0.0, 1.0), "alpha": (0.0, 1.0), "span": (1.0,), "com": (0.0,), "half_life": ()}
GIVEN = [
    (knob, value)
    for knob, half_life in itertools.product(KNOBS, HALF_LIVES)
    if (value := float(OF_RATE[knob](mpmath.log(2) / mpf(half_life)))) not in DEGENERATE[knob]
]


@pytest.mark.parametrize(("knob", "value"), GIVEN)
def test_each_knob_gives_all_the_others_to_a_few_last_bits(knob: str, value: float):
    profile, rate = Exponential(**{knob: value}), RATE_OF[knob](mpf(value))
    right = {name: float(of_rate(rate)) for name, of_rate in OF_RATE.items()}
    assert profile.rate == approx(float(rate), rel=1e-15, abs=0)
    assert profile.alpha == approx(right["alpha"], rel=1e-15, abs=0)
    assert profile.half_life == approx(right["half_life"], rel=1e-15, abs=0)
    assert profile.span == approx(right["span"], rel=1e-15, abs=0)
    # exp(-rate) loses as many last bits as the rate is large: no float rate can hold more
    assert profile.com == approx(right["com"], rel=1e-15 * max(1.0, float(rate)), abs=0)
    assert profile.decay == approx(right["decay"], rel=1e-15 * max(1.0, float(rate)), abs=0)
    assert profile.decay == approx(right["decay"], rel=0, abs=1e-15)


@pytest.mark.parametrize("knobs", [{"decay": 0}, {"alpha": 1}, {"span": 1}, {"com": 0}], ids=str)
def test_keeping_nothing_is_the_same_by_every_knob_that_can_say_it(knobs: dict[str, float]):
    profile = Exponential(**knobs)
    assert profile == Exponential(decay=0) == profile.scaled(3)
    assert [getattr(profile, name) for name in ("half_life", *KNOBS[1:])] == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert profile.weights(3) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.75, 0.9, 0.99, 0.9965, 0.999, 0.9999, 1 - 2**-53])
def test_a_given_decay_is_kept_exactly(decay: float):
    assert Exponential(decay=decay).decay == decay


@pytest.mark.parametrize("profile", [Exponential(half_life=3), Exponential(alpha=0.125), Exponential(span=9)], ids=repr)
def test_com_is_the_mean_age_of_the_weights(profile: Exponential):
    ages = math.fsum(age * weight for age, weight in enumerate(reversed(profile.weights(500))))
    assert profile.mean_age == profile.com == approx(ages, rel=1e-13)


def test_the_landmarks_of_a_half_life_of_2000():
    profile = Exponential(half_life=2000)
    assert profile.decay == approx(0.99965, abs=5e-6)
    assert profile.decay**7700 == approx(0.07, abs=1e-3)
    assert Exponential(decay=0.999).half_life == approx(693, abs=0.5)
    assert Exponential(decay=0.9999).half_life == approx(6931, abs=0.5)


# ---- each schedule beside its formula


@pytest.mark.parametrize("elapsed", [1.0, 2.5])
@pytest.mark.parametrize("n", [0, 1, 7, 39.5, 40, 79, 81, 100, 1000])
@pytest.mark.parametrize("profile", SCHEDULES, ids=repr)
def test_a_schedule_keeps_its_decay_to_the_power_of_what_elapsed(profile: Profile, n: float, elapsed: float):
    right = SCHEDULES[profile](n) ** elapsed
    assert profile.step(time=n + elapsed, elapsed=elapsed) == approx((right, 1 - right), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    ("profile", "n", "decay"),
    [
        (inverse_gamma(power=2 / 3), 31_600, 0.999),
        (inverse_gamma(power=2 / 3), 1_000_000, 0.9999),
        (inverse_gamma(power=3 / 4), 10_000, 0.999),
        (inverse_gamma(power=3 / 4), 215_000, 0.9999),
        (inverse_gamma(power=1, decay=0.9), 1e9, 0.9),
        (tensorflow(), 90_000, 0.9999),
        (mean_teacher(), 1_000, 0.999),
        (cosine(steps=1_000), 0, 0.996),
        (cosine(steps=1_000), 500, 0.998),
        (cosine(steps=1_000), 5_000, 1.0),
        (ramp(), 0, 0.0),
        (ramp(), 1e9, 0.9999),
        (fraction(share=0.5), 2, 0.5),
    ],
)
def test_the_published_landmarks(profile: Profile, n: float, decay: float):
    assert profile.step(time=n + 1)[0] == approx(decay, abs=5e-7)


def test_tensorflow_overrides_the_decay_for_9_over_alpha_steps():
    keeps = [tensorflow(decay=0.9999).step(time=n + 1.0)[0] for n in (1_000, 89_900, 90_000)]
    assert keeps == approx([1_001 / 1_010, 89_901 / 89_910, 0.9999], abs=1e-15)
    assert keeps[1] < 0.9999


@pytest.mark.parametrize(
    ("profile", "time", "lost"),
    [
        (Exponential(half_life=1e18), 1.0, mpmath.log(2) / mpf(10) ** 18),
        (inverse_gamma(power=1), 1e17, 1 / mpf(10) ** 17),
        (tensorflow(decay=1), 1e18, 9 / mpf(10) ** 18),
        (Power(sigma_rel=0.1), 1e18, (Power(sigma_rel=0.1).gamma + mpf(1)) / mpf(10) ** 18),
        (fraction(share=0.5), 1e18, mpmath.log(2) / (mpf(10) ** 18 / 2)),
    ],
    ids=repr,
)
def test_what_is_lost_has_all_its_bits_where_keep_rounds_to_1(profile: Profile, time: float, lost: mpf):
    assert profile.change(time, 1.0)[1] == approx(float(lost), rel=1e-15, abs=0)
    assert profile.step(time, 1.0)[0] == 1.0


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.288675, 0.0)])
def test_the_published_widths_of_the_power_profile(sigma_rel: float, gamma: float):
    assert Power(sigma_rel=sigma_rel).gamma == approx(gamma, abs=0.005)


@settings(deadline=None)
@given(st.floats(1e-4, 0.3002))
def test_gamma_is_the_largest_root_of_its_width(sigma_rel: float):
    gamma = Power(sigma_rel=sigma_rel).gamma
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == approx(sigma_rel, rel=1e-12)
    assert gamma > (math.sqrt(5) - 3) / 2  # the widest profile of all: left of it lie the other roots


# ---- weights, scaled, after, from_lr_decay


@every_profile
def test_weights_are_each_gain_times_the_keeps_after_it_and_sum_to_1(profile: Profile):
    n = 25
    keeps, gains = zip(*(profile.step(time=t) for t in range(1, n + 1)), strict=True)
    gains = gains if profile.debias else (1.0, *gains[1:])
    products = [gain * math.prod(keeps[step + 1 :]) for step, gain in enumerate(gains)]
    assert profile.weights(n) == approx([product / sum(products) for product in products], rel=1e-11, abs=1e-15)
    assert math.fsum(profile.weights(n)) == approx(1.0, rel=1e-14)


def test_weights_of_no_step_are_none():
    assert Exponential(half_life=3).weights(0) == []


@pytest.mark.parametrize("k", [0.5, 1, 3])
@every_profile
def test_scaled_is_the_same_memory_in_a_unit_k_times_as_long(profile: Profile, k: float):
    for time, elapsed in [(1.0, 1.0), (4.0, 0.75), (9.0, 2.0), (40.0, 1.0)]:
        keep, gain = profile.step(k * time, k * elapsed)
        unit = k if profile == Uniform() else 1  # which weighs by elapsed, whatever its unit
        assert profile.scaled(k).step(time, elapsed) == approx((keep, gain / unit), rel=1e-13, abs=1e-16)


@pytest.mark.parametrize("k", [2, 0.25, 7.5])
@pytest.mark.parametrize("debias", [True, False])
def test_scaled_takes_a_decay_to_the_power_k(k: float, debias: bool):
    profile = Exponential(decay=0.99, debias=debias).scaled(k)
    assert profile.decay == approx(0.99**k, rel=1e-14)
    assert profile.debias is debias


@pytest.mark.parametrize("profile", SCHEDULES, ids=repr)
def test_scaled_takes_a_schedule_to_the_power_k_and_stretches_it(profile: Profile):
    for n in (0, 2, 11, 30):
        assert profile.scaled(4).step(n + 1.0)[0] == approx(SCHEDULES[profile](4 * n) ** 4, rel=1e-12, abs=1e-15)


def test_scaled_reads_in_the_same_knob():
    assert repr(Exponential(half_life=2000).scaled(4)) == "Exponential(half_life=500)"
    assert Exponential(half_life=2000).scaled(1) == Exponential(half_life=2000)
    assert Power(sigma_rel=0.1).scaled(8) == Power(sigma_rel=0.1)
    assert Uniform().scaled(8) == Uniform()


def test_after_is_the_profile_over_the_tail():
    assert after(start=3, profile=Uniform()).weights(7) == approx([0, 0, 0, 0.25, 0.25, 0.25, 0.25], rel=1e-15)
    late = after(start=3, profile=Power(sigma_rel=0.1)).weights(9)
    assert late == approx([0, 0, 0, *Power(sigma_rel=0.1).weights(6)], rel=1e-14)
    assert after(start=3, profile=Uniform()).weights(2) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("profile", "gain"),
    [
        (Uniform(), 2.0),
        (Exponential(decay=0.9), 1 - 0.9**2),
        (Exponential(decay=0.9, debias=False), 1.0),
        (Power(sigma_rel=0.1), 1.0),
    ],
    ids=repr,
)
def test_an_update_across_the_start_counts_for_what_lies_after_it(profile: Profile, gain: float):
    late = after(start=5, profile=profile)
    assert late.step(time=5, elapsed=2) == (0.0, 1.0)
    assert late.step(time=7, elapsed=4) == (0.0, approx(gain, rel=1e-15))
    assert late.step(time=7, elapsed=2) == (0.0, approx(gain, rel=1e-15))
    assert late.step(time=8, elapsed=1) == approx(profile.step(time=3, elapsed=1), rel=1e-15)


@pytest.mark.parametrize(
    ("shape", "multiplier"),
    [
        ("linear", lambda share: 1 - share),
        ("cosine", lambda share: (1 + math.cos(math.pi * share)) / 2),
        ("sqrt", lambda share: 1 - math.sqrt(share)),
    ],
)
def test_an_update_counts_as_often_as_the_decayed_rate_would_have_made_it(shape: str, multiplier):
    weights = from_lr_decay(shape=shape, steps=12).weights(15)
    right = [multiplier(j / 12) - multiplier((j + 1) / 12) for j in range(12)]
    assert weights == approx([*right, 0, 0, 0], rel=1e-13, abs=1e-15)
    assert [math.fsum(weights[i:]) for i in range(12)] == approx([multiplier(i / 12) for i in range(12)], rel=1e-13)


def test_the_average_for_a_linear_decay_is_the_uniform_mean():
    assert from_lr_decay(shape="linear", steps=20).weights(20) == approx(Uniform().weights(20), rel=1e-13)


@pytest.mark.parametrize("peak", [0.0, 0.3, 0.5, 1.0])
def test_a_triangle_has_the_areas_of_a_triangle(peak: float):
    def height(x: float) -> float:  # of a triangle of area 1 over [0, 1]
        return 2 * x / peak if x < peak else 2 * (1 - x) / (1 - peak) if peak < 1 else 2.0

    fine = 20_000
    areas = [sum(height((k + (i + 0.5) / fine) / 10) for i in range(fine)) / fine / 10 for k in range(10)]
    assert triangular(steps=10, peak=peak).weights(12) == approx([*areas, 0.0, 0.0], abs=1e-6)


# ---- profiles as values


@every_profile
def test_a_profile_survives_json(profile: Profile):
    again = from_json(profile.to_json())
    assert (again, repr(again), again.weights(9)) == (profile, repr(profile), profile.weights(9))
    assert "\n" not in profile.to_json()


@every_profile
def test_a_profile_prints_as_the_call_that_makes_it(profile: Profile):
    assert eval(repr(profile), vars(profiles)) == profile


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, lambda profile: pickle.loads(pickle.dumps(profile))])
@every_profile
def test_a_copy_is_an_equal_profile(profile: Profile, through):
    again = through(profile)
    assert (again, hash(again), repr(again)) == (profile, hash(profile), repr(profile))
    assert again.weights(9) == profile.weights(9)


def test_profiles_compare_and_hash_by_value():
    assert len(set(EVERY)) == len(EVERY)
    assert Exponential(alpha=0.5) == Exponential(decay=0.5) == Exponential(com=1)
    assert hash(Exponential(alpha=0.5)) == hash(Exponential(decay=0.5))
    assert Exponential(alpha=0.5) != Exponential(alpha=0.5, debias=False)
    assert tensorflow(decay=0.9) != mean_teacher(decay=0.9)
    assert after(start=1, profile=tensorflow()) != after(start=1, profile=ramp())


@pytest.mark.parametrize("name", ["debias", "sigma_rel", "decay"])
@every_profile
def test_a_profile_cannot_be_changed(profile: Profile, name: str):
    with pytest.raises(FrozenInstanceError, match=name):
        setattr(profile, name, 0.5)


@pytest.mark.parametrize("number", [np.int64(2000), np.float64(2000), np.float32(2000), Fraction(2000)], ids=type)
def test_any_kind_of_number_makes_the_same_profile(number):
    profile = Exponential(half_life=number)
    assert (profile, repr(profile), profile.scaled(3)) == (
        Exponential(half_life=2000),
        "Exponential(half_life=2000)",
        Exponential(half_life=2000 / 3),
    )
    assert json.loads(profile.to_json())["half_life"] == 2000
    assert json.loads(tensorflow(decay=number / 4000).to_json())["decay"] == 0.5


# ---- errors: what was expected, what came, what was meant


@pytest.mark.parametrize("profile", [Power(sigma_rel=0.1), Uniform(), cosine(steps=9), *OTHERS[10:]], ids=repr)
@pytest.mark.parametrize("name", ["half_life", "span", "mean_age"])
def test_a_memory_that_is_not_one_constant_has_no_half_life(profile: Profile, name: str):
    with pytest.raises(AttributeError, match=rf"has no {name}: .* not one constant\. \w+\.weights\(n\) gives"):
        getattr(profile, name)


def test_an_unknown_attribute_is_an_ordinary_attribute_error():
    with pytest.raises(AttributeError, match="'Uniform' object has no attribute 'halflife'"):
        _ = Uniform().halflife


def test_no_knob_says_which_there_are():
    with pytest.raises(TypeError, match="one of half_life, decay, alpha, span, com; got none"):
        Exponential()


def test_two_knobs_names_both_and_the_fix():
    with pytest.raises(TypeError, match=r"got half_life=7 and alpha=0.5. Keep one, for example half_life=7\."):
        Exponential(half_life=7, alpha=0.5)


@pytest.mark.parametrize(
    ("knob", "value", "text"),
    [
        ("half_life", 0, "half_life must be a finite number above 0; got half_life=0"),
        ("half_life", -2, "half_life must be a finite number above 0; got half_life=-2"),
        ("half_life", math.inf, "above 0; got half_life=inf"),
        ("half_life", 10**400, "above 0; got half_life=inf"),
        ("span", -(10**400), "at least 1; got span=-inf"),
        ("decay", 1, r"decay must be in \[0, 1\); got decay=1. decay=1 never moves"),
        ("decay", 1.5, "got decay=1.5. .* may have been meant as half_life="),
        ("decay", -0.1, "got decay=-0.1"),
        ("alpha", 0, r"alpha must be in \(0, 1\]; got alpha=0. It is the weight of the newest"),
        ("alpha", 20, "got alpha=20. .* may have been meant as span= or half_life="),
        ("span", 0.5, "span must be a finite number of at least 1; got span=0.5"),
        ("span", math.inf, "got span=inf"),
        ("com", -1e-9, "com must be a finite number of at least 0; got com=-1e-09"),
        ("com", math.inf, "got com=inf"),
        *((knob, math.nan, f"{knob} must be .*; got {knob}=nan") for knob in KNOBS),
    ],
)
def test_a_knob_out_of_range(knob: str, value: float, text: str):
    with pytest.raises(ValueError, match=text):
        Exponential(**{knob: value})


@pytest.mark.parametrize(("value", "came"), [(True, r"True \(bool\)"), ("0.9", r"'0.9' \(str\)"), (1j, "1j")])
@pytest.mark.parametrize("knob", KNOBS)
def test_a_knob_that_is_no_number(knob: str, value, came: str):
    with pytest.raises(TypeError, match=f"{knob} must be a number; got {came}"):
        Exponential(**{knob: value})


@pytest.mark.parametrize(
    ("number", "first", "second"), [(100, "half_life", "span"), (0.9, "decay", "alpha"), (1, "decay", "alpha")]
)
def test_a_positional_number_is_told_both_its_readings(number: float, first: str, second: str):
    readings = (
        rf"\({number}\) could be read two ways. Write {{0}}{first}={number}\) for .*, or {{0}}{second}={number}\)"
    )
    with pytest.raises(TypeError, match="Exponential" + readings.format(r"Exponential\(")):
        Exponential(number)
    with pytest.raises(TypeError, match="EMA" + readings.format(r"EMA\(")):
        resolve("EMA(", number)


@pytest.mark.parametrize(
    ("sigma_rel", "text"),
    [
        (0, r"in \(0, 0.3003\]; got sigma_rel=0"),
        (0.31, "the width as a share"),
        (2000, "write Exponential"),
        (math.nan, "nan"),
    ],
)
def test_a_width_out_of_range(sigma_rel: float, text: str):
    with pytest.raises(ValueError, match=text):
        Power(sigma_rel=sigma_rel)


def test_a_width_goes_by_name_and_is_a_number():
    with pytest.raises(TypeError, match=r"by name; write Power\(sigma_rel=0.05\)"):
        Power(0.05)
    with pytest.raises(TypeError, match=r"by name; write Power\(sigma_rel=0.1\)"):
        Power()
    with pytest.raises(TypeError, match=r"sigma_rel must be a number; got True \(bool\)"):
        Power(sigma_rel=True)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: tensorflow(decay=1.1), r"decay must be in \[0, 1\]; got decay=1.1"),
        (lambda: inverse_gamma(power=0), "power must be a finite number above 0; got power=0"),
        (lambda: inverse_gamma(gamma=math.inf), "gamma must be a finite number above 0; got gamma=inf"),
        (lambda: cosine(first=-0.5, steps=10), r"first must be in \[0, 1\]"),
        (lambda: cosine(steps=math.nan), "steps must be a finite number above 0; got steps=nan"),
        (lambda: linear(first=0.5, last=2, steps=10), r"last must be in \[0, 1\]"),
        (lambda: ramp(tau=-1), "tau must be a finite number above 0"),
        (lambda: fraction(share=0), "share must be a finite number above 0"),
        (lambda: after(start=-1, profile=Uniform()), "start must be at least 0; got start=-1"),
        (lambda: triangular(steps=9, peak=1.5), r"peak must be in \[0, 1\]"),
        (lambda: from_lr_decay(steps=0), "steps must be a finite number above 0"),
        (lambda: from_lr_decay(shape="step", steps=9), "shape must be one of linear, cosine, sqrt; got 'step'"),
        (lambda: cosine(steps=9).scaled(0), "k must be a finite number above 0; got k=0"),
        (lambda: Exponential(half_life=9).scaled(math.nan), "k must be a finite number above 0; got k=nan"),
    ],
)
def test_a_schedule_out_of_range(make, text: str):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: tensorflow(decay="0.9"), r"decay must be a number; got '0.9' \(str\)"),
        (lambda: cosine(steps=True), r"steps must be a number; got True \(bool\)"),
        (lambda: after(start=5, profile=0.9), r"profile must be a profile, such as Power\(sigma_rel=0.1\); got 0.9"),
    ],
)
def test_a_schedule_of_the_wrong_type(make, text: str):
    with pytest.raises(TypeError, match=text):
        make()


@pytest.mark.parametrize(("time", "elapsed"), [(1, 0), (5, -1), (1, 2), (1, math.nan), (math.nan, 1)])
def test_a_step_takes_some_of_the_time_there_was(time: float, elapsed: float):
    text = rf"step needs 0 < elapsed <= time, .* got time={time}, elapsed={elapsed}. .* step\(time=1, elapsed=1\)"
    with pytest.raises(ValueError, match=text):
        Uniform().step(time, elapsed)


def test_resolve_takes_a_profile_or_one_knob():
    assert resolve("EMA(", Power(sigma_rel=0.1), half_life=None) == Power(sigma_rel=0.1)
    assert resolve("EMA(", None, half_life=5, decay=None) == Exponential(half_life=5)
    assert resolve("EMA(", None, debias=False, alpha=0.5) == Exponential(alpha=0.5, debias=False)


@pytest.mark.parametrize(
    ("profile", "knobs", "text"),
    [
        (None, {}, "expected exactly one of half_life, .*; got none"),
        (None, {"decay": 0.9, "alpha": 0.1}, "got decay=0.9 and alpha=0.1"),
        ("cosine", {}, r"profile must be a profile, such as Power\(sigma_rel=0.1\); got 'cosine'"),
        (Uniform, {}, "profile must be a profile, .*; got <class"),
        (Uniform(), {"half_life": 9}, r"got Uniform\(\) and half_life=: keep one .* for example EMA\(Uniform\(\)\)"),
    ],
)
def test_resolve_refuses_all_else(profile, knobs: dict[str, float], text: str):
    with pytest.raises(TypeError, match=text):
        resolve("EMA(", profile, **knobs)


def test_json_of_an_unknown_profile_names_the_known():
    with pytest.raises(ValueError, match=rf"no profile is called 'Cubic'; there are {', '.join(PROFILES)}"):
        from_json('{"kind": "Cubic", "power": 3}')


@pytest.mark.parametrize("text", ["", "not json", '{"profile": "Uniform"', "[1]", "3", "null", '"Uniform"'])
def test_json_that_is_no_profile(text: str):
    with pytest.raises(ValueError, match=r"expected a profile as Profile\.to_json writes it; got"):
        from_json(text)
