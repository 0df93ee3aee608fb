"""Two runs merged are as one run; what cannot be merged is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.streams import (
    DATA,
    ELAPSED,
    GAPPY,
    NAN,
    STREAMS,
    double,
    each_array,
    each_kind,
    each_weigh,
    fed,
    map_kind,
    unchanged,
)

from ewma import EMA
from ewma.profiles import Exponential, Power, Uniform, after, tensorflow

approx = pytest.approx

MERGED = [Exponential(half_life=3), Exponential(alpha=1), Uniform()]
each_merged = pytest.mark.parametrize("profile", MERGED, ids=str)


@each_weigh
@each_merged
@pytest.mark.parametrize("stream", ["float", "numpy", "numpy 0-d", "numpy empty", "torch", "dict"])
@pytest.mark.parametrize("cut", [0, 1, 2, 5, 8])
def test_two_merged_runs_are_one_run(profile, weigh: str, stream: str, cut: int):
    """Also into an empty EMA, and of an empty one; each element misses other values."""
    values, elapsed = STREAMS[stream], [*ELAPSED, 1.0, 2.0]
    whole = fed(EMA(profile, weigh=weigh), values, elapsed)
    first = fed(EMA(profile, weigh=weigh), values[:cut], elapsed[:cut])
    second = fed(EMA(profile, weigh=weigh), values[cut:], elapsed[cut:])
    before = second.state_dict()
    first.merge(second)
    close = {"rtol": 1e-6, "atol": 1e-7} if stream in ("numpy", "dict") else {"rtol": 1e-13, "atol": 1e-14}
    torch.testing.assert_close(first.get(), whole.get(), equal_nan=True, **close)
    fed(first, values[:3]), fed(whole, values[:3])
    torch.testing.assert_close(first.get(), whole.get(), equal_nan=True, **close)
    assert (first.count, first.skipped) == (whole.count, whole.skipped)
    unchanged(second, before)


@each_kind
@each_weigh
@each_merged
def test_three_runs_merge_in_either_order(kind, profile, weigh: str):
    a, b, c, d = (fed(EMA(profile, weigh=weigh), map_kind(kind, GAPPY[cut : cut + 2])) for cut in (0, 2, 4, 4))
    left, right = copy.deepcopy(a), copy.deepcopy(b)
    left.merge(b), left.merge(c)
    right.merge(d), a.merge(right)
    whole = fed(EMA(profile, weigh=weigh), map_kind(kind, GAPPY))
    assert float(left.get()) == approx(float(whole.get()), rel=1e-14)
    assert float(a.get()) == approx(float(whole.get()), rel=1e-14)


@each_array
@each_weigh
@each_merged
def test_an_element_that_only_one_run_has_seen(kind, profile, weigh: str):
    first, second = ([kind([1.0, NAN, NAN])] * 2, [kind([NAN, 2.0, NAN])] * 2)
    ema, later = fed(EMA(profile, weigh=weigh), first), fed(EMA(profile, weigh=weigh), second)
    ema.merge(later)
    np.testing.assert_array_equal(double(ema.get()), [1.0, 2.0, NAN])
    assert ema.skipped == 8


@each_kind
@each_weigh
def test_the_widest_floats_merge(kind, weigh: str):
    ema, later = (fed(EMA(alpha=0.5, weigh=weigh), [kind(x)]) for x in (1e308, -1e308))
    ema.merge(later)
    assert float(ema.get()) == approx(-1e308 / 3, rel=1e-14)


def test_merging_dicts_name_by_name():
    ema, later = fed(EMA(half_life=1), [{"a": 1.0, "b": 1.0}]), fed(EMA(half_life=1), [{"b": 4.0, "c": 5.0}])
    ema.merge(later)
    assert ema.get() == {"a": 1.0, "b": 3.0, "c": 5.0}
    assert ema.count == 2


def test_merging_the_empty_changes_nothing():
    ema, empty = fed(EMA(half_life=3), DATA), EMA(half_life=3)
    before = ema.state_dict()
    ema.merge(EMA(half_life=3))
    unchanged(ema, before)
    empty.merge(EMA(half_life=3))
    unchanged(empty, EMA(half_life=3).state_dict())


UNMERGEABLE = [
    Power(sigma_rel=0.1),
    Exponential(half_life=3, debias=False),
    tensorflow(),
    after(start=2, profile=Uniform()),
]
NOT_MERGED = [
    (EMA(half_life=3), EMA(half_life=4), ValueError, "cannot merge .* make both with the same profile and weigh="),
    (EMA(half_life=3), EMA(half_life=3, weigh="time"), ValueError, "make both with the same profile and weigh="),
    (
        EMA(half_life=3),
        EMA(Uniform()),
        ValueError,
        r"cannot merge EMA\(Uniform\(\).* into EMA\(Exponential\(half_life=3\)",
    ),
    *(
        (EMA(p), EMA(p), ValueError, "known only for a debiased Exponential and for Uniform. Update")
        for p in UNMERGEABLE
    ),
]


@each_kind
@pytest.mark.parametrize(("ema", "later", "error", "text"), NOT_MERGED)
def test_what_cannot_be_merged_is_refused_and_changes_nothing(kind, ema: EMA, later: EMA, error, text: str):
    ema, later = fed(copy.deepcopy(ema), [kind(1.0)]), fed(copy.deepcopy(later), [kind(2.0)])
    before = ema.state_dict()
    with pytest.raises(error, match=text):
        ema.merge(later)
    unchanged(ema, before)


@pytest.mark.parametrize(
    ("x", "later", "error", "text"),
    [
        (1.0, {"a": 1.0}, TypeError, "one averages a dict, the other a single value"),
        ({"a": 1.0}, 1.0, TypeError, "one averages a dict, the other a single value"),
        (1.0, np.array(1.0), TypeError, "expected a number value"),
        (np.ones(2), np.ones(3), ValueError, r"expected shape \[2\].*got \[3\]"),
        ({"a": 1.0, "b": torch.ones(2)}, {"a": 2.0, "b": torch.ones(3)}, ValueError, r"'b': expected shape \[2\]"),
    ],
    ids=str,
)
def test_values_that_cannot_be_merged_are_refused_and_change_nothing(x, later, error, text: str):
    ema = fed(EMA(half_life=3), [x])
    before = ema.state_dict()
    with pytest.raises(error, match=text):
        ema.merge(fed(EMA(half_life=3), [later]))
    unchanged(ema, before)
