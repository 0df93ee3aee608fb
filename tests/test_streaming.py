"""Streaming equals one-shot: EMA, chunk by chunk and value by value, beside smooth and ewm of the whole series."""

from __future__ import annotations

import copy
import datetime
import io
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ewma
from ewma import EMA
from ewma.profiles import Exponential, Power, Uniform, after, inverse_gamma, ramp, tensorflow

NAN, INF = math.nan, math.inf
TINY = 1e-320  # below this a float has no digits left to be right in

laws = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
fewer = settings(laws, max_examples=20)

# ---- the ways a series comes


class Way(NamedTuple):
    """How a series of n numbers is given: as a whole, whose chunks are whole[..., a:b], and value by value."""

    whole: Any  # (vector of float64) -> array, time last
    value: Any  # (array, t) -> one observation
    several: bool  # whether each observation has several elements


def side_by_side(x: np.ndarray) -> np.ndarray:
    """Three series that miss different values."""
    return np.stack([x, x[::-1], 2.0 - np.roll(x, 1)])


WAYS = {
    "floats": Way(lambda x: x, lambda xs, t: float(xs[t]), False),
    "numpy": Way(side_by_side, lambda xs, t: xs[:, t], True),
    "torch": Way(lambda x: torch.from_numpy(side_by_side(x)), lambda xs, t: xs[:, t], True),
    "torch 0-dim": Way(lambda x: torch.from_numpy(x[None].copy())[0], lambda xs, t: xs[t], False),
    "torch wide": Way(
        lambda x: torch.from_numpy(side_by_side(x))[:, None].expand(3, 2, -1), lambda xs, t: xs[..., t], True
    ),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
several_ways = pytest.mark.parametrize(
    "way", [WAYS["floats"], WAYS["numpy"], WAYS["torch"]], ids=["floats", "numpy", "torch"]
)


def double(x: Any) -> np.ndarray:
    """Anything as a float64 array."""
    if isinstance(x, torch.Tensor):
        x = x.double().numpy()
    return np.asarray(x, dtype=np.float64)


def joined(parts: list[Any]) -> np.ndarray:
    return np.concatenate([double(part) for part in parts], axis=-1)


def largest(x: Any) -> float:
    x = np.abs(double(x))
    return float(x[np.isfinite(x)].max(initial=0.0))


def close(actual: Any, expected: Any, scale: float, rounding: float = 1e-14) -> None:
    """The same NaN, and values that differ by no more than `rounding` of the scale."""
    actual, expected = double(actual), double(expected)
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    there = ~np.isnan(expected)
    np.testing.assert_allclose(actual[there], expected[there], rtol=0.0, atol=rounding * scale + TINY)


# ---- random runs

NUMBERS = st.floats(-1e3, 1e3) | st.sampled_from([0.0, 0.1, 1.0, 1e6])
VALUES = NUMBERS | st.sampled_from([NAN, NAN, NAN, INF, -INF])
GAPS = [0.0, 0.25, 1.0, 1.0, 3.0, 60.0]
START = np.datetime64("2026-01-31T23:59:58.750")

EXPONENTIALS = [{"half_life": 3.0}, {"alpha": 0.3}, {"decay": 1 - 1e-9}, {"com": 0.25}, {"alpha": 1.0}]
PROFILES = [
    Uniform(),
    Power(sigma_rel=0.1),
    tensorflow(decay=0.9),
    inverse_gamma(decay=0.9),
    ramp(tau=5.0, debias=False),
    after(start=2.5, profile=Uniform()),
    after(start=3.0, profile=Exponential(half_life=2.0, debias=False)),
]


@st.composite
def rules(draw: Any, missing: tuple[str, ...] = ("skip", "decay", "propagate")) -> dict[str, Any]:
    """Keywords that EMA and smooth share."""
    if draw(st.booleans()):
        rule = dict(draw(st.sampled_from(EXPONENTIALS)), debias=draw(st.booleans()))
        rule["weigh"] = draw(st.sampled_from([None, "value", "time"]))
    else:
        rule = {"profile": draw(st.sampled_from(PROFILES))}
        if rule["profile"] == Uniform():
            rule["weigh"] = draw(st.sampled_from(["value", "time"]))
    if rule.get("profile") != Uniform():
        rule["initial"] = draw(st.sampled_from([None, None, -2.5]))
    return {**rule, "nan": draw(st.sampled_from(missing)), "min_periods": draw(st.sampled_from([0, 1, 1, 2, 4]))}


class Run(NamedTuple):
    """A series, its time stamps if it has any, and where it is cut."""

    x: np.ndarray
    times: np.ndarray | None
    cuts: list[int]
    singly: list[bool]  # for each part whether it comes value by value

    @property
    def parts(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise([0, *self.cuts, len(self.x)]))

    def stamps(self, begin: int, end: int) -> Any:
        return None if self.times is None else self.times[begin:end]


@st.composite
def runs(draw: Any, values: Any = VALUES, longest: int = 40, stamped: bool | None = None) -> Run:
    x = np.array(draw(st.lists(values, max_size=longest)), dtype=np.float64)
    cuts = sorted(draw(st.lists(st.integers(0, len(x)), max_size=6)))
    singly = draw(st.lists(st.booleans(), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    times = None
    if draw(st.booleans()) if stamped is None else stamped:
        gaps = draw(st.lists(st.sampled_from(GAPS), min_size=len(x), max_size=len(x)))
        times = np.cumsum(gaps)
        if draw(st.booleans()):
            times = START + (times * 1000).astype("timedelta64[ms]")
    return Run(x, times, cuts, singly)


def extended(ema: EMA, xs: Any, run: Run, **others: Any) -> np.ndarray:
    """What the EMA gives for the parts of the run, joined."""
    results = []
    for begin, end in run.parts:
        also = {name: other[..., begin:end] for name, other in others.items()}
        results.append(ema.extend(xs[..., begin:end], times=run.stamps(begin, end), **also))
    return joined(results)


# ---- chunks


@each_way
@laws
@given(run=runs(), rule=rules())
def test_chunks_of_any_sizes_give_what_the_whole_gives(way: Way, run: Run, rule: dict):
    """Also with empty chunks, equal time stamps, infinities, and whatever a missing value does."""
    xs = way.whole(run.x)
    ema = EMA(**rule)
    whole = ewma.smooth(xs, times=run.times, **rule)
    close(extended(ema, xs, run), whole, max(largest(xs), abs(rule.get("initial") or 0.0)))
    assert ema.count == len(run.x)
    assert ema.skipped == int((~np.isfinite(double(xs))).sum())
    if len(run.x):
        close(ema.get(), double(whole)[..., -1], max(largest(xs), 2.5))


@each_way
@laws
@given(run=runs(stamped=False), rule=rules())
def test_values_one_by_one_between_chunks_give_what_the_whole_gives(way: Way, run: Run, rule: dict):
    xs = way.whole(run.x)
    whole = ewma.smooth(xs, **rule)
    ema, scale = EMA(**rule), max(largest(xs), 2.5)
    for (begin, end), singly in zip(run.parts, run.singly, strict=True):
        if not singly:
            close(ema.extend(xs[..., begin:end]), double(whole)[..., begin:end], scale)
            continue
        for t in range(begin, end):
            ema.update(way.value(xs, t))
            close(ema.get(), double(whole)[..., t], scale)
    assert ema.count == len(run.x)


@several_ways
@fewer
@given(run=runs(), rule=rules(), data=st.data())
def test_an_elapsed_between_chunks_with_times_is_a_time_stamp(way: Way, run: Run, rule: dict, data):
    """A value by update comes `elapsed` after the last stamp, and later stamps go on from there."""
    n = len(run.x)
    gaps = np.array(data.draw(st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=n, max_size=n)))
    times = np.cumsum(gaps)
    if data.draw(st.booleans()):
        times = START + (times * 1000).astype("timedelta64[ms]")
    xs = way.whole(run.x)
    whole = ewma.smooth(xs, times=times, **rule)
    ema, scale, begun = EMA(**rule), max(largest(xs), 2.5), False
    for (begin, end), singly in zip(run.parts, run.singly, strict=True):
        if singly and begun:
            for t in range(begin, end):
                ema.update(way.value(xs, t), gaps[t])
                close(ema.get(), double(whole)[..., t], scale)
        else:
            close(ema.extend(xs[..., begin:end], times=times[begin:end]), double(whole)[..., begin:end], scale)
            begun = begun or end > begin


@several_ways
@fewer
@given(run=runs(stamped=True), rule=rules(missing=("raise",)))
def test_raise_leaves_what_came_before_the_chunk(way: Way, run: Run, rule: dict):
    """The chunk with a missing value is refused whole; those before it stay as they were taken in."""
    xs = way.whole(run.x)
    ema, finite = EMA(**rule), True
    for begin, end in run.parts:
        before = ema.state_dict()
        part = xs[..., begin:end]
        if np.isfinite(double(part)).all():
            ema.extend(part, times=run.stamps(begin, end))
            continue
        finite = False
        with pytest.raises(ValueError, match=r'EMA\.extend: expected finite values only, by nan="raise"'):
            ema.extend(part, times=run.stamps(begin, end))
        unchanged(ema, before)
        break
    if finite:
        return
    with pytest.raises(ValueError, match=r'expected finite values only, by nan="raise"; got one that is not at step'):
        ewma.smooth(xs, times=run.times, **rule)


SCALES = [1e-310, 1e-160, 1e150, 1.7e308]


@several_ways
@pytest.mark.parametrize("scale", SCALES)
@fewer
@given(run=runs(values=st.floats(-1.0, 1.0) | st.just(NAN)), rule=rules())
def test_the_smallest_and_the_largest_floats_stream_too(way: Way, scale: float, run: Run, rule: dict):
    rule["initial"] = None if rule.get("initial") is None else 0.5 * scale
    xs = way.whole(run.x) / 3.0 * scale  # side by side they are up to 3
    close(extended(EMA(**rule), xs, run), ewma.smooth(xs, times=run.times, **rule), max(largest(xs), 0.5 * scale))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@laws
@given(run=runs(), rule=rules())
def test_float32_chunks_give_what_the_whole_gives_up_to_one_rounding(kind: str, run: Run, rule: dict):
    with np.errstate(all="ignore"):
        xs: Any = side_by_side(run.x).astype(np.float32)
    xs = torch.from_numpy(xs) if kind == "torch" else xs
    ema = EMA(**rule)
    result = extended(ema, xs, run)
    whole = double(ewma.smooth(xs, times=run.times, **rule))
    np.testing.assert_array_equal(np.isnan(result), np.isnan(whole))
    np.testing.assert_allclose(result, whole, rtol=2**-23, atol=1e-14 * max(largest(xs), 2.5), equal_nan=True)
    assert ema.extend(xs[..., :0]).dtype == xs.dtype
    if len(run.x):
        assert ema.get().dtype == xs.dtype
        np.testing.assert_allclose(double(ema.get()), whole[..., -1], rtol=2**-23, atol=1e-14 * max(largest(xs), 2.5))


LONG_RULES = [
    {"half_life": 50.0},
    {"alpha": 1e-6, "debias": False},
    {"profile": Uniform()},
    {"profile": Power(sigma_rel=0.2)},
    {"alpha": 0.02, "nan": "decay"},
    {"alpha": 0.02, "nan": "decay", "debias": False, "min_periods": 30},
]


@several_ways
@pytest.mark.parametrize("gappy", [False, True], ids=["finite", "gappy"])
@pytest.mark.parametrize("rule", LONG_RULES, ids=str)
def test_long_series_cut_anywhere_give_what_the_whole_gives(way: Way, gappy: bool, rule: dict):
    """Around the sizes of the blocks of the scan, and longer than what is in work at a time."""
    rng = np.random.default_rng(5)
    x = rng.normal(1e3, 1.0, size=1500)
    if gappy:
        x[rng.random(1500) < 0.1], x[:7], x[900:1200] = NAN, NAN, -INF
    xs = way.whole(x)
    sizes = [31, 32, 33, 0, 63, 64, 65, 127, 128, 129, 1, 2, 255, 256]
    run = Run(x, None, list(np.cumsum(sizes)), [])
    close(extended(EMA(**rule), xs, run), ewma.smooth(xs, **rule), largest(xs))


def test_a_series_longer_than_a_piece_gives_what_its_chunks_give():
    x = np.random.default_rng(6).normal(size=300_000)
    x[200_000:200_010] = NAN
    run = Run(x, None, [100_000, 131_072, 131_073, 262_144], [])
    close(extended(EMA(half_life=1000.0), x, run), ewma.smooth(x, half_life=1000.0), largest(x))


# ---- what chunks may come as


EMPTY = {
    "list": [],
    "tuple": (),
    "numpy": np.empty(0),
    "numpy float32": np.empty(0, dtype=np.float32),
    "numpy int": np.empty(0, dtype=np.int64),
    "numpy wide": np.empty((3, 0), dtype=np.float32),
    "torch": torch.empty(0),
    "torch bfloat16": torch.empty(2, 3, 0, dtype=torch.bfloat16),
    "torch int": torch.empty(2, 0, dtype=torch.int32),
}


@pytest.mark.parametrize(
    "rule", [{}, {"nan": "decay"}, {"initial": 1.0}, {"nan": "raise"}, {"min_periods": 0}], ids=str
)
@pytest.mark.parametrize("empty", EMPTY.values(), ids=EMPTY)
def test_an_empty_chunk_gives_what_smooth_gives_and_changes_nothing(empty, rule: dict):
    """At the very start it does not even decide of what kind the values are."""
    ema = EMA(half_life=3.0, **rule)
    for also in ({}, {"times": []}, {"y": empty}):
        result, expected = ema.extend(empty, **also), ewma.smooth(empty, half_life=3.0, **rule)
        assert type(result) is type(expected)
        assert getattr(result, "dtype", None) == getattr(expected, "dtype", None)
        assert getattr(result, "shape", None) == getattr(expected, "shape", None)
        unchanged(ema, EMA(half_life=3.0, **rule).state_dict())
    begun = np.ones((*empty.shape[:-1], 2), dtype="float32") if hasattr(empty, "shape") else [1.0, 1.0]
    begun = torch.from_numpy(begun) if torch.is_tensor(empty) else begun
    ema.extend(begun, times=[0, 1])
    before = ema.state_dict()
    ema.extend(empty), ema.extend(empty, times=[])
    unchanged(ema, before)


@pytest.mark.parametrize("rule", [{"profile": Power(sigma_rel=0.1)}, {"alpha": 1.0}, {"decay": 1e-300}], ids=str)
@several_ways
def test_an_initial_stays_until_there_is_a_value_also_where_nothing_is_left_of_its_weight(way: Way, rule: dict):
    xs = way.whole(np.array([NAN, INF, NAN, NAN]))
    for cut in range(5):
        ema = EMA(**rule, initial=-2.5, nan="decay", min_periods=0)
        parts = [ema.extend(xs[..., :cut]), ema.extend(xs[..., cut:])]
        expected = ewma.smooth(xs, **rule, initial=-2.5, nan="decay", min_periods=0)
        close(joined(parts), expected, 2.5)
        assert (double(expected) == -2.5)[~np.isfinite(double(xs)).any(axis=-1)].all()


@laws
@given(run=runs(stamped=False))
def test_lists_and_arrays_of_numbers_and_floats_are_one_kind(run: Run):
    ema, singly = EMA(half_life=3.0), EMA(half_life=3.0)
    results = [ema.extend(run.x[begin:end].tolist()) for begin, end in run.parts]
    assert all(type(part) is list for part in results)
    assert all(type(mean) is float for part in results for mean in part)
    for t, x in enumerate(run.x.tolist()):
        singly.update(x)
        close(singly.get(), joined(results)[t], largest(run.x))
    if len(run.x):
        assert type(ema.get()) is float


def test_pandas_and_polars_chunks_come_back_as_they_came():
    index = pd.date_range("2026-01-01", periods=6, freq="h")
    frame = pd.DataFrame({"a": [1.0, NAN, 3.0, 4.0, 2.0, 0.5], "b": [1.0, 2.0, 4.0, NAN, 8.0, 9.0]}, index=index)
    whole = ewma.smooth(frame, half_life=3.0)
    ema = EMA(half_life=3.0)
    parts = [ema.extend(part) for part in (frame[:2], frame[2:2], frame[2:])]
    pd.testing.assert_frame_equal(pd.concat(parts), whole, rtol=1e-14, check_freq=False)
    series, single = EMA(half_life=3.0), whole["a"]
    parts = [series.extend(part) for part in (frame["a"][:4], frame["a"][4:])]
    pd.testing.assert_series_equal(pd.concat(parts), single, rtol=1e-14, check_freq=False)
    column, third = pl.Series("a", [None, 1.0, 3.0, None, 2.0]), EMA(half_life=3.0)
    parts = [third.extend(column[:3]), third.extend(column[3:])]
    assert [part.name for part in parts] == ["a", "a"]
    assert parts[0].to_list()[0] is None
    close(joined(parts), ewma.smooth(column, half_life=3.0).to_numpy(), 3.0)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_time_may_run_along_any_axis(kind, axis: int):
    x = np.random.default_rng(7).normal(size=(4, 5, 6))
    x[1, 2, 3], x[0], x[:, 0] = NAN, INF, NAN
    x = np.ascontiguousarray(np.moveaxis(x, 0, axis))
    ema, parts = EMA(half_life=3.0), np.array_split(x, [1, 1, 3], axis=axis)
    result = np.concatenate([double(ema.extend(kind(part), axis=axis)) for part in parts], axis=axis)
    np.testing.assert_allclose(result, double(ewma.smooth(kind(x), half_life=3.0, axis=axis)), rtol=1e-13, atol=1e-13)
    np.testing.assert_array_equal(double(ema.get()), np.take(result, -1, axis=axis))
    # and value by value, by update, on top of it
    ema.update(ema.get() * 0.0 + 1.0)


@pytest.mark.parametrize("kind", [lambda x: x, side_by_side, lambda x: torch.from_numpy(side_by_side(x))])
@pytest.mark.parametrize("dtype", ["int64", "float16", "bool"])
def test_chunks_of_other_dtypes_are_averaged_in_float64(kind, dtype: str):
    values = np.random.default_rng(8).integers(0, 2 if dtype == "bool" else 50, size=20).astype(dtype)
    xs = kind(values.astype(np.int64) if dtype == "bool" else values)
    ema = EMA(half_life=3.0)
    result = joined([ema.extend(xs[..., :7]), ema.extend(xs[..., 7:])])
    np.testing.assert_allclose(
        result, double(ewma.smooth(xs, half_life=3.0)), rtol=1e-3 if dtype == "float16" else 1e-14
    )


@laws
@given(run=runs())
def test_a_dict_of_chunks_is_each_chunk_alone(run: Run):
    given_as = {name: way.whole(run.x) for name, way in WAYS.items() if name != "torch wide"}
    ema, alone = EMA(half_life=3.0), {name: EMA(half_life=3.0) for name in given_as}
    for begin, end in run.parts:
        chunk = {name: xs[..., begin:end] for name, xs in given_as.items()}
        result = ema.extend(chunk, times=run.stamps(begin, end))
        assert list(result) == list(chunk)
        for name, part in chunk.items():
            np.testing.assert_array_equal(
                double(result[name]), double(alone[name].extend(part, run.stamps(begin, end)))
            )
    assert ema.skipped == sum(each.skipped for each in alone.values())
    assert ema.count == len(run.x)


# ---- time stamps

SECONDS = [0.0, 1.0, 1.0, 2.5, 9.0]
STAMPS = {
    "numbers": SECONDS,
    "array": np.array(SECONDS),
    "datetimes": [datetime.datetime(2026, 1, 1) + datetime.timedelta(seconds=s) for s in SECONDS],
    "with a zone": [
        datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=s) for s in SECONDS
    ],
    "timedeltas": [datetime.timedelta(seconds=s) for s in SECONDS],
    "datetime64": START + (np.array(SECONDS) * 1e6).astype("timedelta64[us]"),
    "timedelta64": (np.array(SECONDS) * 1e9).astype("timedelta64[ns]"),
    "pandas": pd.Timestamp("2026-03-29", tz="Europe/Berlin") + pd.to_timedelta(SECONDS, unit="s"),
    "polars": pl.Series([datetime.datetime(2026, 1, 1) + datetime.timedelta(seconds=s) for s in SECONDS]),
    "torch": torch.tensor(SECONDS),
}
X = [3.0, 1.0, 4.0, 1.0, 5.0]


@pytest.mark.parametrize("times", STAMPS.values(), ids=STAMPS)
def test_time_stamps_of_any_kind_go_on_from_the_last_chunks(times):
    expected = ewma.smooth(X, half_life=2.0, times=SECONDS)
    for cut in range(6):
        ema = EMA(half_life=2.0)
        result = [*ema.extend(X[:cut], times=times[:cut]), *ema.extend(X[cut:], times=times[cut:])]
        assert result == pytest.approx(expected, rel=1e-14)


def test_after_times_a_chunk_without_them_goes_one_unit_at_a_time():
    whole = EMA(half_life=2.0).extend(X, times=[0.0, 2.0, 3.0, 4.0, 7.0])
    ema = EMA(half_life=2.0)
    assert ema.extend(X[:2], times=[0.0, 2.0]) + ema.extend(X[2:4]) + ema.extend(X[4:], times=[7.0]) == whole


@pytest.mark.parametrize("half_life", [datetime.timedelta(seconds=2), pd.Timedelta(2, "s"), np.timedelta64(2000, "ms")])
def test_a_half_life_may_be_a_duration(half_life):
    assert EMA(half_life=half_life).profile == Exponential(half_life=2)


NANOSECONDS = 1_767_225_600_000_000_000  # 2026-01-01 since 1970: float64 is 256 apart there


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_time_stamps_in_nanoseconds_keep_every_digit_through_update_and_state(dtype: str):
    times = NANOSECONDS + np.array([0, 1, 2, 5, 9]).astype(dtype)
    expected = ewma.smooth(X, half_life=2.0, times=[0, 1, 2, 5, 9])
    ema, resumed = EMA(half_life=2.0), EMA(half_life=2.0)
    result = ema.extend(X[:2], times=times[:2])
    resumed.load_state_dict(through_torch(ema.state_dict()))
    for each in (ema, resumed):
        each.update(X[2])
        rest = [each.get(), *each.extend(X[3:], times=times[3:])]
        assert [*result, *rest] == pytest.approx(expected, rel=1e-14)


# ---- second moments


@several_ways
@laws
@given(run=runs(), rule=rules())
def test_variance_and_deviation_are_ewms(way: Way, run: Run, rule: dict):
    xs = way.whole(run.x)
    ema, series = EMA(**rule), ewma.ewm(xs, times=run.times, **rule)
    scale = max(largest(xs), 2.5) ** 2
    for unbiased in (True, False):
        ema.reset()
        expected = double(series.var(unbiased=unbiased))
        for begin, end in run.parts:
            ema.extend(xs[..., begin:end], times=run.stamps(begin, end))
            if end:
                close(ema.var(unbiased=unbiased), expected[..., end - 1], scale, 1e-13)
                with np.errstate(invalid="ignore"):
                    close(ema.std(unbiased=unbiased), np.sqrt(double(ema.var(unbiased=unbiased))), scale, 1e-15)


@several_ways
@laws
@given(run=runs(stamped=False), rule=rules())
def test_variance_value_by_value_is_ewms(way: Way, run: Run, rule: dict):
    xs = way.whole(run.x)
    ema, expected = EMA(**rule), double(ewma.ewm(xs, **rule).var())
    for (begin, end), singly in zip(run.parts, run.singly, strict=True):
        if not singly:
            ema.extend(xs[..., begin:end])
            continue
        for t in range(begin, end):
            ema.update(way.value(xs, t))
            close(ema.var(), expected[..., t], max(largest(xs), 2.5) ** 2, 1e-13)


@each_way
def test_of_what_is_forgotten_no_digit_stays(way: Way):
    xs, ema = way.whole(np.array([3.0, 0.1, 7.0, 1e-30])), EMA(alpha=1.0)
    for t in range(4):
        ema.update(way.value(xs, t))
        np.testing.assert_array_equal(double(ema.get()), double(way.value(xs, t)))
        assert not double(ema.var(unbiased=False)).any()


@each_way
@pytest.mark.parametrize("value", [NAN, INF, 1.7e308], ids=str)
def test_one_odd_element_among_values_one_by_one(way: Way, value: float):
    xs = way.whole(np.array([1.0, -2.0, 3.0, value, -value, 5.0, 4.0, -1.0]))
    ema, expected = EMA(half_life=2), double(ewma.smooth(xs, half_life=2))
    for t in range(8):
        ema.update(way.value(xs, t))
        close(ema.get(), expected[..., t], largest(xs), 1e-14)
    assert ema.skipped == (0 if math.isfinite(value) else 2 * double(way.value(xs, 0)).size)


@several_ways
def test_an_offset_costs_the_variance_nothing(way: Way):
    x = 1e4 + np.random.default_rng(9).normal(size=400)
    xs, shifted = way.whole(x - 1e4), way.whole(x)
    one, other = EMA(half_life=20.0), EMA(half_life=20.0)
    one.extend(xs)
    extended(other, shifted, Run(x, None, [0, 1, 17, 50, 51, 300], []))
    np.testing.assert_allclose(double(other.var()), double(one.var()), rtol=1e-9)


@several_ways
@laws
@given(run=runs(), other=st.randoms(use_true_random=False), rule=rules())
def test_covariance_and_correlation_are_ewms(way: Way, run: Run, other, rule: dict):
    """Where one of the two is missing, both are."""
    y = np.array([other.choice([NAN, other.uniform(-10.0, 10.0), 2.0 * v, v]) for v in run.x])
    xs, ys = way.whole(run.x), way.whole(y)
    series = ewma.ewm(xs, times=run.times, **rule)
    expected = {unbiased: double(series.cov(ys, unbiased=unbiased)) for unbiased in (True, False)}
    correlation, spread = double(series.corr(ys)), double(ewma.ewm(xs, times=run.times, **rule).cov(xs))
    ema, scale = EMA(**rule), max(largest(xs), 2.5) * max(largest(ys), 2.5)
    extended(ema, xs, run, y=ys)
    if not len(run.x):
        return
    for unbiased, cov in expected.items():
        close(ema.cov(unbiased=unbiased), cov[..., -1], scale, 1e-13)
    result = double(ema.corr())
    assert result.shape == spread[..., -1].shape
    # The correlation of what all but rounding is constant is arbitrary.
    vary = np.abs(expected[False][..., -1]) > 1e-9 * scale
    np.testing.assert_allclose(result[vary], correlation[..., -1][vary], rtol=1e-3)


@several_ways
@pytest.mark.parametrize("rule", [{"half_life": 5.0}, {"alpha": 0.2, "debias": False}, {"profile": Uniform()}], ids=str)
def test_covariance_value_by_value_chunk_by_chunk_and_mixed_is_ewms(way: Way, rule: dict):
    rng = np.random.default_rng(10)
    x, y = rng.normal(3.0, 1.0, size=(2, 60))
    x[[0, 5, 6]], y[[5, 7]], y[40] = NAN, NAN, INF
    xs, ys = way.whole(x), way.whole(y)
    series = ewma.ewm(xs, **rule)
    by_value, by_chunk, mixed = EMA(**rule), EMA(**rule), EMA(**rule)
    for t in range(60):
        by_value.update(way.value(xs, t), y=way.value(ys, t))
    extended(by_chunk, xs, Run(x, None, [0, 1, 6, 32], []), y=ys)
    mixed.extend(xs[..., :31], y=ys[..., :31])
    for t in range(31, 33):
        mixed.update(way.value(xs, t), y=way.value(ys, t))
    mixed.extend(xs[..., 33:], y=ys[..., 33:])
    for ema in (by_value, by_chunk, mixed):
        np.testing.assert_allclose(double(ema.cov()), double(series.cov(ys))[..., -1], rtol=1e-11)
        np.testing.assert_allclose(double(ema.corr()), double(series.corr(ys))[..., -1], rtol=1e-11)
        np.testing.assert_allclose(double(ema.get()), double(series.mean())[..., -1], rtol=1e-13)
        np.testing.assert_allclose(double(ema.var()), double(series.var())[..., -1], rtol=1e-11)


@several_ways
def test_a_variance_too_large_for_a_float_is_infinite(way: Way):
    xs = way.whole(np.array([1.0, -1.0, 0.5, 0.25])) * 5e307
    ema, series = EMA(half_life=3.0), ewma.ewm(xs, half_life=3.0)
    ema.extend(xs)
    assert (double(ema.var()) == INF).all()
    np.testing.assert_array_equal(double(ema.std()), double(series.std())[..., -1])


@several_ways
def test_what_a_gap_takes_of_a_long_memory_is_not_told_from_what_it_leaves(way: Way):
    xs, times = way.whole(np.array([0.0] * 10 + [NAN, 1.0] + [0.0] * 10)), np.repeat([0.0, 0.25], [10, 12])
    rule: dict = {"decay": 1.0 - 1e-9, "debias": False, "nan": "decay", "initial": -2.5}
    ema, right = EMA(**rule), double(ewma.ewm(xs, times=times, **rule).var())
    for begin, end in ((0, 11), (11, 22)):
        ema.extend(xs[..., begin:end], times=times[begin:end])
    close(ema.var(), right[..., -1], 6.25, 1e-13)


def test_a_missing_value_beside_an_initial_leaves_its_variance():
    ema = EMA(half_life=3.0, initial=2.0, min_periods=0)
    ema.extend([NAN])
    assert (ema.get(), ema.var(unbiased=False)) == (2.0, 0.0)


def test_covariance_of_dicts_is_that_of_each_name():
    x, y = np.random.default_rng(11).normal(size=(2, 9))
    ema, alone = EMA(half_life=3.0), EMA(half_life=3.0)
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        ema.update({"a": a, "b": torch.tensor([a, b])}, y={"a": b, "b": torch.tensor([a, b])})
        alone.update(a, y=b)
    assert (ema.cov()["a"], ema.corr()["a"]) == (alone.cov(), alone.corr())
    assert ema.corr()["b"].tolist() == pytest.approx([1.0, 1.0])
    assert (type(alone.cov()), type(alone.corr())) == (float, float)


STATISTICS = {
    "get": lambda ema, x: ema.get(),
    "var": lambda ema, x: ema.var(),
    "std": lambda ema, x: ema.std(),
    "zscore": lambda ema, x: ema.zscore(x),
    "cov": lambda ema, x: ema.cov(),
    "corr": lambda ema, x: ema.corr(),
}
OBSERVATIONS = {
    "float": [1.0, 2.0, 4.0],
    "numpy 0-d": [np.array(1.0), np.array(2.0), np.array(4.0)],
    "numpy float32": [np.array([[1.0, 2.0]], dtype=np.float32) * k for k in (1, 2, 4)],
    "torch 0-d": [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)],
    "torch bfloat16": [torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16) * k for k in (1, 2, 4)],
    "torch some missing": [torch.tensor([1.0, NAN]), torch.tensor([2.0, 1.0]), torch.tensor([4.0, 3.0])],
}


@pytest.mark.parametrize("values", OBSERVATIONS.values(), ids=OBSERVATIONS)
@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_statistic_has_the_values_type_shape_and_dtype(statistic: str, values: list):
    ema = EMA(half_life=3.0)
    for x in values:
        ema.update(x, y=x)
    result = STATISTICS[statistic](ema, values[0])
    assert type(result) is type(values[0])
    assert getattr(result, "shape", ()) == getattr(values[0], "shape", ())
    assert getattr(result, "dtype", float) == getattr(values[0], "dtype", float)


# ---- z-scores


@several_ways
@pytest.mark.parametrize(
    "rule",
    [{}, {"unbiased": False}, {"nan": "decay"}, {"initial": 0.5}, {"debias": False}, {"min_periods": 3}],
    ids=str,
)
def test_a_zscore_asked_before_the_update_is_ewms(way: Way, rule: dict):
    how = {"unbiased": rule["unbiased"]} if "unbiased" in rule else {}
    rule = {name: value for name, value in rule.items() if name != "unbiased"}
    x = np.random.default_rng(12).normal(size=40)
    x[[0, 1, 7, 20]] = NAN, 3.0, INF, NAN
    xs = way.whole(x)
    expected = double(ewma.ewm(xs, half_life=5.0, **rule).zscore(**how))
    ema, scores = EMA(half_life=5.0, **rule), []
    for t in range(40):
        value = way.value(xs, t)
        scores.append(double(ema.zscore(value, **how)) if t else expected[..., 0])
        ema.update(value)
    np.testing.assert_allclose(np.stack(scores, axis=-1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_a_float32_zscore_loses_no_more_than_its_last_rounding(kind):
    """Not computed from a mean and a deviation rounded to float32 beforehand."""
    values = np.random.default_rng(13).normal(1000.0, 0.01, size=(200, 3)).astype(np.float32)
    ema, exact = EMA(half_life=20.0), EMA(half_life=20.0)
    for x in values[:-1]:
        ema.update(kind(x))
        exact.update(x.astype(np.float64))
    right = exact.zscore(values[-1].astype(np.float64))
    np.testing.assert_allclose(double(ema.zscore(kind(values[-1]))), right, rtol=1e-6)


@pytest.mark.parametrize(
    "kind", [float, np.asarray, torch.tensor, lambda x: np.array([x]), lambda x: torch.tensor([x])]
)
def test_beside_a_constant_every_other_value_is_infinitely_far(kind):
    ema = EMA(half_life=3.0)
    for _ in range(3):
        ema.update(kind(2.0))
    assert [double(ema.zscore(kind(x))).item() for x in (1.0, 3.0)] == [-INF, INF]
    assert np.isnan(double(ema.zscore(kind(2.0)))).all()


# ---- merging

MERGED = {
    "memory": st.sampled_from([{"half_life": 3.0}, {"alpha": 1.0}, {"decay": 1 - 1e-9}, {"profile": Uniform()}]),
    "weigh": st.sampled_from(["value", "time"]),
    "nan": st.sampled_from(["skip", "decay", "propagate"]),
    "min_periods": st.sampled_from([1, 3]),
}


@several_ways
@laws
@given(run=runs(stamped=False), rule=st.fixed_dictionaries(MERGED))
def test_merged_runs_have_the_moments_of_one_run(way: Way, run: Run, rule: dict):
    """Means, variances and covariances, of any parts, empty ones too, and what comes after them."""
    rule = {**rule["memory"], **{name: value for name, value in rule.items() if name != "memory"}}
    xs = way.whole(run.x)
    ys = way.whole(np.roll(run.x, 2) + 1.0) if len(run.x) else xs
    whole, merged = EMA(**rule), EMA(**rule)
    for begin, end in run.parts:
        later = EMA(**rule)
        whole.extend(xs[..., begin:end], y=ys[..., begin:end])
        later.extend(xs[..., begin:end], y=ys[..., begin:end])
        before = later.state_dict()
        merged.merge(later)
        unchanged(later, before)
        assert (merged.count, merged.skipped) == (whole.count, whole.skipped)
        if not end:
            continue
        scale = max(largest(xs), largest(ys), 1.0)
        close(merged.get(), whole.get(), scale, 1e-13)
        for unbiased in (True, False):
            close(merged.var(unbiased=unbiased), whole.var(unbiased=unbiased), scale**2, 1e-12)
            close(merged.cov(unbiased=unbiased), whole.cov(unbiased=unbiased), scale**2, 1e-12)
    for part in (xs[..., :3], xs[..., 3:]):
        close(merged.extend(part, y=part), whole.extend(part, y=part), max(largest(xs), largest(ys), 1.0), 1e-13)


def test_merged_runs_with_times_go_on_from_the_last_stamp():
    whole, first, second = (EMA(half_life=2.0) for _ in range(3))
    expected = whole.extend([1.0, 2.0, 4.0, 8.0, 3.0], times=[0.0, 0.5, 1.5, 4.0, 9.0])
    first.extend([1.0, 2.0], times=[0.0, 0.5])
    second.extend([4.0, 8.0], times=[1.5, 4.0])  # which a unit before had nothing
    first.merge(second)
    assert first.extend([3.0], times=[9.0]) == pytest.approx(expected[-1:], rel=1e-14)
    assert first.var() == pytest.approx(whole.var(), rel=1e-13)


def test_what_is_merged_comes_after_what_was_seen():
    ema, later = EMA(half_life=2.0), EMA(half_life=2.0)
    ema.extend([1.0, 2.0], times=[10, 11]), later.extend([3.0, 4.0], times=[2, 3])
    before = ema.state_dict()
    with pytest.raises(ValueError, match="expected values that came later; the last of them is of 3, before 11"):
        ema.merge(later)
    unchanged(ema, before)
    later = EMA(half_life=2.0)
    later.extend([3.0], times=np.array(["2026-01-01"], "datetime64[s]"))
    with pytest.raises(TypeError, match="expected times as before, such as 11; got"):
        ema.merge(later)


def test_merged_values_without_times_move_the_last_stamp_on_by_what_has_passed():
    whole, ema, later = (EMA(half_life=2.0) for _ in range(3))
    ema.extend([1.0, 2.0], times=[0, 1]), later.update(3.0), later.update(4.0, elapsed=2.0)
    ema.merge(later)
    assert ema.extend([5.0], times=[6]) == pytest.approx(
        whole.extend([1.0, 2.0, 3.0, 4.0, 5.0], times=[0, 1, 2, 4, 6])[-1:]
    )


def test_a_run_with_a_y_merges_with_one_that_has_it_too():
    ema, later = EMA(half_life=2.0), EMA(half_life=2.0)
    ema.update(1.0, y=2.0), later.update(3.0)
    for first, second in ((ema, later), (later, ema)):
        before = first.state_dict()
        with pytest.raises(TypeError, match="only one of them has seen a y; a covariance needs every pair"):
            first.merge(second)
        unchanged(first, before)


# ---- what was given stays as it was


@pytest.mark.parametrize("x", [1.0, np.ones(2), torch.ones(2)], ids=["float", "numpy", "torch"])
def test_a_copy_goes_its_own_way(x):
    ema = EMA(half_life=3.0)
    ema.update(x)
    before = ema.state_dict()
    for twin in (copy.copy(ema), copy.deepcopy(ema)):
        twin.update(9.0 * x)
        assert twin.count == 2
    unchanged(ema, before)


@pytest.mark.parametrize("n", [1, 2, 40, 200])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("missing", [False, True], ids=["finite", "gappy"])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_chunks_and_results_are_never_changed_later(kind, missing: bool, dtype: str, n: int):
    x = np.random.default_rng(14).normal(size=(3, n)).astype(dtype)
    if missing:
        x[0, 0], x[1, -1] = NAN, INF
    chunk, ema = kind(x.copy()), EMA(half_life=3.0)
    results = [ema.extend(chunk), ema.get(), ema.var()]
    copies = copy.deepcopy(results)
    np.testing.assert_array_equal(double(chunk), x)
    for _ in range(2):
        ema.extend(kind(x)), ema.update(kind(x)[..., 0])
    for result, kept in zip(results, copies, strict=True):
        np.testing.assert_array_equal(double(result), double(kept))


@pytest.mark.parametrize("n", [1, 2, 40, 200])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("missing", [False, True], ids=["finite", "gappy"])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_changing_a_chunk_or_a_result_afterwards_changes_nothing(kind, missing: bool, dtype: str, n: int):
    x = np.random.default_rng(14).normal(size=(3, n)).astype(dtype)
    if missing:
        x[0, 0], x[1, -1] = NAN, INF
    ema, twin, chunk = EMA(half_life=3.0), EMA(half_life=3.0), kind(x.copy())
    twin.extend(kind(x))
    for array in (ema.extend(chunk), chunk, ema.get(), ema.var(), ema.state_dict()["cells"][""]["mean"]):
        if isinstance(array, list):  # how a state holds NumPy's
            array.clear()
        else:
            array[...] = 7.0
    np.testing.assert_array_equal(double(ema.extend(kind(x))), double(twin.extend(kind(x))))
    np.testing.assert_array_equal(double(ema.var()), double(twin.var()))


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_an_initial_that_is_changed_later_changes_nothing(kind):
    start = kind([1.0, 2.0])
    ema = EMA(alpha=0.5, initial=start, min_periods=0)
    start += 100.0
    ema.update(kind([3.0, NAN]))
    start += 100.0
    assert ema.get().tolist() == [2.0, 2.0]
    ema.update(kind([3.0, 3.0]))
    assert ema.get().tolist() == [2.5, 2.5]


def test_results_have_no_graph_and_leave_inference_mode_outside():
    x = torch.arange(4.0, requires_grad=True)
    ema = EMA(half_life=3.0)
    assert not ema.extend(x * 2).requires_grad
    with torch.inference_mode():
        ema.extend(torch.ones(4))
    weight = torch.ones((), requires_grad=True)
    (weight * ema.get()).backward()
    assert weight.grad == ema.get()


# ---- states


def through_torch(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(one: Any, other: Any) -> bool:
    """The same state, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        if one.is_meta:
            return one.shape == other.shape
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(nan=1e300), other.nan_to_num(nan=1e300))
    return one == other or (one != one and other != other)


def unchanged(ema: EMA, before: dict) -> None:
    """What was refused left everything as it was."""
    assert equal(ema.state_dict(), before)


RESUMED = {
    "floats": lambda x: x,
    "float32": lambda x: side_by_side(x).astype(np.float32),
    "torch": lambda x: torch.from_numpy(side_by_side(x)),
    "bfloat16": lambda x: torch.from_numpy(side_by_side(x)).bfloat16(),
    "dict": lambda x: {"a": x, "b": side_by_side(x), "c": torch.from_numpy(side_by_side(x))},
}
RESUMED_RULES = [
    {"half_life": 3.0},
    {"half_life": 3.0, "weigh": "time", "min_periods": 5},
    {"alpha": 0.2, "debias": False, "nan": "decay"},
    {"alpha": 0.2, "initial": 1.5, "nan": "decay"},
    {"alpha": 0.2, "nan": "propagate"},
    {"profile": Power(sigma_rel=0.1)},
    {"profile": Uniform(), "nan": "decay"},
]


def part_of(xs: Any, place: Any) -> Any:
    """A chunk, by a slice; one observation, by an index."""
    if isinstance(xs, dict):
        return {name: part_of(x, place) for name, x in xs.items()}
    return xs[place] if xs.ndim == 1 else xs[..., place]


@pytest.mark.parametrize("rule", RESUMED_RULES, ids=str)
@pytest.mark.parametrize(
    ("kind", "stamped"),
    [
        *((kind, stamped) for kind in ("floats", "torch") for stamped in ("no times", "numbers", "datetimes")),
        ("float32", "no times"),
        ("bfloat16", "datetimes"),
        ("dict", "datetimes"),
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(kind: str, stamped: str, rule: dict):
    """By chunks and by values, with a second series and without; through a file that holds no code."""
    rng = np.random.default_rng(15)
    x, y = rng.normal(size=(2, 30))
    x[[0, 4, 14, 15, 22]] = NAN, INF, NAN, NAN, NAN
    given_as, stamps = RESUMED[kind], np.cumsum(rng.integers(0, 5, size=30) / 4.0)
    stamps[16:] += 2.0  # an update comes in between
    stamps = START + (stamps * 1000).astype("timedelta64[ms]") if stamped == "datetimes" else stamps
    for other in ({}, {"y": given_as(y)}):
        whole, resumed = EMA(**rule), EMA(**rule)

        def go_on(ema: EMA, begin: int, end: int, other: dict = other) -> Any:
            part = slice(begin, end)
            times = None if stamped == "no times" else stamps[part]
            return ema.extend(part_of(given_as(x), part), times=times, **part_of(other, part))

        go_on(whole, 0, 15)
        resumed.load_state_dict(through_torch(whole.state_dict()))
        assert equal(resumed.state_dict(), whole.state_dict())
        for ema in (whole, resumed):
            ema.update(part_of(given_as(x), 15), 0.5, **part_of(other, 15))
        results = [go_on(ema, 16, 30) for ema in (whole, resumed)]
        readers = [EMA.get, EMA.var, EMA.std, *([EMA.cov, EMA.corr] if other else [])]
        for one, same in [results, *([read(whole), read(resumed)] for read in readers)]:
            torch.testing.assert_close(one, same, rtol=0, atol=0, equal_nan=True)
        assert equal(resumed.state_dict(), whole.state_dict())


# ---- nothing is imported that need not be

FLOATS = """
import sys, ewma
ema, later = ewma.EMA(half_life=3, nan="decay", min_periods=2), ewma.EMA(half_life=3, nan="decay", min_periods=2)
for x in (1.0, float("nan"), 4.0, 2):
    ema.update(x, 2.0)
    later.update(x)
ema.get(), ema.var(), ema.std(), ema.zscore(3.0), ema.skipped, ema.merge(later)
later.load_state_dict(ema.state_dict())
start = ewma.EMA(alpha=0.5, initial=1.0)
start.update(2.0)
try:
    ema.update("3")
except TypeError:
    pass
"""
LISTS = """
import sys, ewma
ema = ewma.EMA(half_life=3)
ema.extend([1.0, None, 3.0], times=[0, 1, 1]), ema.extend([1, 2]), ema.update(3.0), ema.var()
ewma.smooth([[1.0, 2.0], [3.0, 4.0]], alpha=[[0.5], [0.1]], axis=0)
series = ewma.ewm([1.0, float("inf"), 3.0], half_life=3, nan="decay")
series.std(), series.corr([1.0, 2.0, 4.0]), series.bands(), series.zscore(), series.sum()
ewma.smooth([1.0, 2.0], half_life=3, two_sided=True)
"""
ARRAYS = """
import sys, numpy, ewma
x = numpy.arange(12.0).reshape(3, 4)
ema = ewma.EMA(ewma.Power(sigma_rel=0.1))
ema.extend(x, y=x), ema.update(x[:, 0], y=x[:, 1]), ema.cov(), ema.corr()
twin = ewma.EMA(ewma.Power(sigma_rel=0.1))
twin.load_state_dict(ema.state_dict())
ewma.smooth(x, half_life=3, times=numpy.arange(4).astype("datetime64[D]"), out=numpy.empty((3, 4)))
ewma.ewm(x, alpha=0.5).cov(x)
"""
PANDAS = """
import sys, pandas, ewma
index = pandas.date_range("2026-01-01", periods=3, freq="h")
frame = pandas.DataFrame({"a": [1.0, 2.0, None]}, index=index)
ewma.smooth(frame, half_life=pandas.Timedelta("1h"), times=frame.index)
ewma.ewm(frame["a"], half_life=3).std(), ewma.EMA(half_life=3).extend(frame)
"""
POLARS = """
import sys, polars, ewma
frame = polars.DataFrame({"a": [1.0, 2.0, None], "t": [0, 1, 2]})
ewma.smooth(frame["a"], half_life=3, times=frame["t"]), ewma.smooth(frame, half_life=3)
ewma.EMA(half_life=3).extend(frame)
"""
REPORT = "\nprint(*[name for name in ('numpy', 'torch', 'pandas', 'polars') if name in sys.modules])"


@pytest.mark.parametrize(
    ("program", "allowed"),
    [(FLOATS, ""), (LISTS, "numpy"), (ARRAYS, "numpy"), (PANDAS, "numpy pandas"), (POLARS, "numpy polars")],
    ids=["floats", "lists", "numpy", "pandas", "polars"],
)
def test_nothing_is_imported_that_need_not_be(python, program: str, allowed: str):
    assert python(program + REPORT) == allowed


# ---- no wait for a device


@pytest.mark.parametrize(
    ("rule", "shape", "with_y"),
    [
        ({}, (), False),
        ({}, (2, 3), False),
        ({"debias": False}, (2,), True),
        ({"weigh": "time"}, (), True),
        ({"nan": "decay"}, (2,), True),
        ({"nan": "propagate"}, (2,), True),
        ({"min_periods": 3}, (2,), False),
        ({"initial": 1.0}, (2,), True),
        ({"initial": torch.tensor(1.0)}, (2,), False),
    ],
    ids=str,
)
def test_update_extend_and_the_statistics_read_no_value_on_the_host(rule: dict, with_y: bool, shape: tuple):
    """A tensor on the meta device has none: to read one, as skipped must, is an error."""
    ema = EMA(half_life=3.0, **rule)
    x = torch.ones(shape, device="meta")
    xs = x[..., None].expand(*shape, 5)
    both = {"y": xs} if with_y else {}
    ema.update(x, **({"y": x} if with_y else {}))
    ema.update(x, 2.0, **({"y": x} if with_y else {}))
    assert ema.extend(xs, **both).shape == xs.shape
    ema.extend(xs, times=[0, 1, 1, 2, 5], **both)
    ema.extend(xs[..., :0], times=[], **({"y": xs[..., :0]} if with_y else {}))
    ema.extend(xs, times=[6, 7, 8, 9, 9], **both)
    read = [ema.get(), ema.var(), ema.std(), ema.zscore(x), *([ema.cov(), ema.corr()] if with_y else [])]
    assert all(one.is_meta and one.shape == shape for one in read)
    if "debias" not in rule and "initial" not in rule:
        ema.merge(copy.deepcopy(ema))
    copy.deepcopy(ema.profile)
    with pytest.raises(RuntimeError, match="meta"):
        _ = ema.skipped


# ---- errors, and what is refused changes nothing

CHUNK = np.array([1.0, 2.0, 3.0])
WIDE = np.stack([CHUNK, CHUNK])
DATE = datetime.datetime(2026, 1, 1)
REFUSED = [
    # how it began, what comes, the error, its text
    (
        (CHUNK,),
        {},
        (3.0,),
        {},
        TypeError,
        r"expected a list, a NumPy array, a torch tensor, or a pandas or polars .* float",
    ),
    (
        (CHUNK,),
        {},
        (np.array(3.0),),
        {},
        ValueError,
        r"expected a series; got a single number\. One value at a time is",
    ),
    ((CHUNK,), {}, ("123",), {}, TypeError, "expected a list, .*; got str"),
    ((CHUNK,), {}, (["1", "2"],), {}, TypeError, r"expected real numbers; got text\. Parse it first"),
    ((CHUNK,), {}, (CHUNK * 1j,), {}, TypeError, r"expected real numbers; got an array of complex128"),
    ((CHUNK,), {}, ([[1.0], [2.0, 3.0]],), {}, ValueError, r"expected numbers, in lists of equal lengths"),
    ((CHUNK,), {}, (CHUNK,), {"axis": 1}, ValueError, "expected axis from -1 to 0, x having 1 of them; got axis=1"),
    (
        (CHUNK,),
        {},
        (WIDE,),
        {},
        TypeError,
        r"EMA\.extend: expected a number value, .*; got a chunk of numpy values\. Use",
    ),
    ((CHUNK,), {}, (torch.ones(3),), {}, TypeError, "expected a number value, .*; got a chunk of torch values"),
    (
        (CHUNK,),
        {},
        ({"a": CHUNK},),
        {},
        TypeError,
        r"EMA\.extend: expected a single value, as at the first update; got dict",
    ),
    ((WIDE,), {}, (CHUNK,), {}, TypeError, "expected a numpy value, .*; got a chunk of number values"),
    (
        (WIDE,),
        {},
        (np.ones((3, 5)),),
        {},
        ValueError,
        r"EMA\.extend: expected shape \[2\], .*; got \[3\]\. Use one EMA",
    ),
    ((torch.ones(2, 3),), {}, (torch.ones(2, 3, device="meta"),), {}, ValueError, "expected a tensor on device cpu"),
    (
        ({"a": CHUNK},),
        {},
        (CHUNK,),
        {},
        TypeError,
        r"EMA\.extend: expected a dict, as at the first update; got ndarray",
    ),
    (({"a": CHUNK},), {}, ({"a": CHUNK, 3: CHUNK},), {}, TypeError, "a dict's names must be strings; got 3"),
    (
        ({"a": CHUNK},),
        {},
        ({"a": CHUNK, "b": CHUNK[:2]},),
        {},
        ValueError,
        "expected chunks of one length and shape; 'b'",
    ),
    (({"a": CHUNK},), {}, ({"a": CHUNK, "b": 3.0},), {}, TypeError, "expected a list, a NumPy array"),
    (
        (CHUNK, [0, 1, 2]),
        {},
        (CHUNK, [2, 3]),
        {},
        ValueError,
        r"expected times of length 3, one for each value .* shape \[2\]",
    ),
    (
        (CHUNK, [0, 1, 2]),
        {},
        (CHUNK, [1, 3, 4]),
        {},
        ValueError,
        r"times that never decrease; times\[0\] = 1 comes after 2\.",
    ),
    ((CHUNK, [0, 1, 2]), {}, (CHUNK, [3, 5, 4]), {}, ValueError, r"times\[2\] = 4 comes after 5\. Sort by time first"),
    (
        (CHUNK, [0, 1, 2]),
        {},
        (CHUNK, [3, NAN, 4]),
        {},
        ValueError,
        r"expected a time for every value; times\[1\] is nan",
    ),
    ((CHUNK, [0, 1, 2]), {}, (CHUNK, "abc"), {}, TypeError, "expected times as a list or an array; got 'abc'"),
    ((CHUNK, [0, 1, 2]), {}, (CHUNK[:1], [DATE]), {}, TypeError, "expected times as before, such as .*2.*; got"),
    ((CHUNK[:1], [DATE]), {}, (CHUNK[:1], [5]), {}, TypeError, "expected times as before, such as .*2026-01-01.*; got"),
    ((CHUNK, [0, 1, 2]), {}, (CHUNK[:1], np.array([9], "m8[s]")), {}, TypeError, "expected times as before, such as"),
    ((CHUNK[:1], np.array([9], "m8[s]")), {}, (CHUNK[:1], [10]), {}, TypeError, "expected times as before, such as"),
    (
        (CHUNK,),
        {},
        (CHUNK,),
        {"y": CHUNK},
        TypeError,
        "expected no y, as at the first update: a covariance needs every pair",
    ),
    (
        (CHUNK,),
        {"y": CHUNK},
        (CHUNK,),
        {},
        TypeError,
        "expected a y, as at the first update: a covariance needs every pair",
    ),
    ((CHUNK,), {"y": CHUNK}, (CHUNK,), {"y": CHUNK[:2]}, ValueError, "expected chunks of one length and shape"),
    ((CHUNK,), {"y": CHUNK}, (CHUNK,), {"y": WIDE}, ValueError, "expected chunks of one length and shape"),
    (
        (CHUNK,),
        {"y": CHUNK},
        (CHUNK,),
        {"y": torch.ones(3)},
        ValueError,
        "expected y of x's kind and shape: number.*torch",
    ),
    ((CHUNK,), {"y": CHUNK}, (CHUNK,), {"y": {"a": CHUNK}}, TypeError, "expected y as x is: of the same kind"),
    (
        ({"a": CHUNK},),
        {"y": {"a": CHUNK}},
        ({"a": CHUNK},),
        {"y": {"b": CHUNK}},
        TypeError,
        "a dict with the same names",
    ),
]


@pytest.mark.parametrize(
    ("begun", "began", "arguments", "keywords", "error", "text"), REFUSED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_refused_chunk_leaves_everything_as_it_was(begun, began, arguments, keywords, error, text: str):
    ema, fresh = EMA(half_life=3.0), EMA(half_life=3.0)
    ema.extend(*begun, **began)
    before = ema.state_dict()
    with pytest.raises(error, match=text):
        ema.extend(*arguments, **keywords)
    unchanged(ema, before)
    fresh.extend(*begun, **began)
    torch.testing.assert_close(ema.extend(*begun[:1], **began), fresh.extend(*begun[:1], **began), rtol=0, atol=0)


def test_a_refused_first_chunk_leaves_nothing():
    ema = EMA(half_life=3.0)
    for x, times in [("abc", None), (CHUNK, [3, 2, 1]), ({"a": CHUNK, "b": CHUNK[:1]}, None), ({1: CHUNK}, None)]:
        with pytest.raises((TypeError, ValueError)):
            ema.extend(x, times=times)
        unchanged(ema, EMA(half_life=3.0).state_dict())
    assert ema.extend(torch.ones(3)).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("first", "x", "y", "error", "text"),
    [
        ((1.0, 2.0), 1.0, None, TypeError, "expected a y, as at the first update: a covariance needs every pair"),
        ((1.0, None), 1.0, 2.0, TypeError, "expected no y, as at the first update"),
        ((1.0, 2.0), 1.0, np.ones(1), ValueError, r"expected y of x's kind and shape: number, \[\]; got numpy, \[1\]"),
        ((1.0, 2.0), 1.0, "2", TypeError, "y: expected a real number.*got str"),
        (
            (CHUNK, CHUNK),
            CHUNK,
            CHUNK[:2],
            ValueError,
            r"expected y of x's kind and shape: numpy, \[3\]; got numpy, \[2\]",
        ),
        ((CHUNK, CHUNK), CHUNK, torch.ones(3), ValueError, "expected y of x's kind and shape: numpy, .* got torch"),
        ((torch.ones(3),) * 2, torch.ones(3), torch.ones(3, device="meta"), ValueError, "device"),
        (({"a": 1.0}, {"a": 1.0}), {"a": 1.0}, {"b": 1.0}, TypeError, "expected y as x is: .* with the same names"),
        (({"a": 1.0}, {"a": 1.0}), {"a": 1.0}, 1.0, TypeError, "expected y as x is: of the same kind"),
    ],
)
def test_a_refused_y_leaves_everything_as_it_was(first, x, y, error, text: str):
    ema = EMA(half_life=3.0)
    for _ in range(2):
        ema.update(first[0], y=first[1])
    before = ema.state_dict()
    with pytest.raises(error, match=text):
        ema.update(x, y=y)
    unchanged(ema, before)


@several_ways
@pytest.mark.parametrize("bad", [NAN, INF])
def test_raise_refuses_a_missing_y_as_it_refuses_a_missing_x(way: Way, bad: float):
    xs = way.whole(np.array([1.0, 2.0, 4.0]))
    wrong = xs * 1.0
    wrong[..., 1] = bad
    ema = EMA(half_life=3.0, nan="raise")
    ema.extend(xs, y=xs)
    before = ema.state_dict()
    for call in (
        lambda: ema.extend(xs, y=wrong),
        lambda: ema.extend(wrong, y=xs),
        lambda: ema.update(way.value(xs, 1), y=way.value(wrong, 1)),
        lambda: ema.update(way.value(wrong, 1), y=way.value(xs, 1)),
        lambda: ewma.ewm(xs, half_life=3.0, nan="raise").cov(wrong),
    ):
        with pytest.raises(ValueError, match=r'expected finite values only, by nan="raise"'):
            call()
        unchanged(ema, before)


@pytest.mark.parametrize(
    ("ask", "error", "text"),
    [
        (
            lambda ema: ema.var(),
            RuntimeError,
            r"EMA\.var: there is no average before the first update; call ema\.update",
        ),
        (lambda ema: ema.std(), RuntimeError, r"EMA\.std: there is no average before the first update"),
        (lambda ema: ema.zscore(1.0), RuntimeError, r"EMA\.zscore: there is no average before the first update"),
        (
            lambda ema: ema.cov(),
            RuntimeError,
            r"EMA\.cov: nothing is known of a second series; give it with ema\.update",
        ),
        (lambda ema: ema.corr(), RuntimeError, r"EMA\.corr: nothing is known of a second series"),
    ],
)
def test_there_is_nothing_to_ask_before_the_first_update(ask, error, text: str):
    ema = EMA(half_life=3.0)
    with pytest.raises(error, match=text):
        ask(ema)
    ema.extend([])
    with pytest.raises(error, match=text):
        ask(ema)


def test_a_zscore_of_what_was_never_seen_names_it():
    ema = EMA(half_life=3.0)
    ema.update({"a": 1.0})
    with pytest.raises(KeyError, match=r"EMA\.zscore: nothing was seen yet of 'b'; update first"):
        ema.zscore({"b": 1.0})
    with pytest.raises(TypeError, match=r"EMA\.zscore: expected a dict, as at the first update; got float"):
        ema.zscore(1.0)
    with pytest.raises(
        TypeError, match=r"EMA\.zscore, 'a': expected a number value, as at the first update; got ndarray"
    ):
        ema.zscore({"a": np.ones(2)})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"nan": "drop"}, ValueError, "nan must be one of 'skip', 'decay', 'propagate', 'raise'; got 'drop'"),
        ({"min_periods": -1}, ValueError, "min_periods must be an integer of at least 0; got -1"),
        ({"min_periods": 1.5}, ValueError, r"min_periods must be an integer of at least 0; got 1\.5"),
        ({"min_periods": True}, ValueError, "min_periods must be an integer of at least 0; got True"),
        ({"initial": NAN}, ValueError, "expected initial to be finite; got nan"),
        ({"initial": "1"}, TypeError, "initial"),
        ({"initial": 1j}, TypeError, "initial"),
    ],
)
def test_construction_errors(arguments: dict, error, text: str):
    with pytest.raises(error, match=text):
        EMA(half_life=3.0, **arguments)


def test_an_initial_needs_a_profile_that_forgets_and_cannot_be_merged():
    with pytest.raises(ValueError, match=r"initial= needs a profile that forgets, .*; Uniform\(\) does not"):
        EMA(Uniform(), initial=1.0)
    for initial, other, which in ((1.0, 1.0, "second"), (None, 1.0, "second"), (1.0, None, "first")):
        ema, later = EMA(half_life=3.0, initial=initial), EMA(half_life=3.0, initial=other)
        ema.update(1.0), later.update(2.0)
        before = ema.state_dict()
        with pytest.raises(ValueError, match=rf"cannot merge .*: the {which} began at initial=, .*Leave initial= out"):
            ema.merge(later)
        unchanged(ema, before)


@pytest.mark.parametrize("x", [1.0, np.ones(3), torch.ones(3)], ids=["float", "numpy", "torch"])
def test_an_initial_of_another_shape_is_refused_and_named(x):
    ema = EMA(half_life=3.0, initial=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"initial .*\[2\]"):
        ema.update(x)
    unchanged(ema, EMA(half_life=3.0, initial=[1.0, 2.0]).state_dict())


def test_merging_with_another_rule_names_what_differs():
    ema = EMA(half_life=3.0)
    ema.update(1.0)
    before = ema.state_dict()
    for later in (EMA(half_life=3.0, nan="decay"), EMA(Uniform())):
        later.update(2.0)
        with pytest.raises(ValueError, match="cannot merge .* make both with the same profile and weigh=, and nan="):
            ema.merge(later)
        unchanged(ema, before)
    with pytest.raises(TypeError, match=r"merge takes another EMA; got float\. One value is taken in by ema\.update"):
        ema.merge(3.0)


@pytest.mark.parametrize("x", [pd.Series([1.0, 2.0]), pd.DataFrame({"a": [1.0]}), pl.Series([1.0])], ids=str)
def test_a_series_as_one_value_is_refused_with_what_to_write(x):
    ema = EMA(half_life=3.0)
    text = (
        rf"EMA\.update: .*got (pandas|polars)'s {type(x).__name__}\. As one value it is x\.to_numpy\(\); values along"
    )
    with pytest.raises(TypeError, match=text):
        ema.update(x)
    ema.update(x.to_numpy())


def test_what_is_masked_is_missing():
    ema, plain = EMA(half_life=3.0), EMA(half_life=3.0)
    for mask in ([False, False], [False, True], [True, False]):
        x = np.ma.masked_array(np.array([1.0 + sum(mask), 5.0], "float32"), mask)
        ema.update(x, y=2 * x), plain.update(x.filled(NAN), y=2 * x.filled(NAN))
        np.testing.assert_array_equal(ema.get(), plain.get())
    assert (ema.skipped, ema.get().dtype) == (2, np.float32)
    np.testing.assert_array_equal(ema.cov(), plain.cov())
    np.testing.assert_array_equal(ema.zscore(x), plain.zscore(x.filled(NAN)))


@pytest.mark.parametrize("elapsed", [datetime.timedelta(minutes=30), np.timedelta64(30, "m"), 1800])
def test_an_elapsed_may_be_a_duration(elapsed):
    ema = EMA(half_life=datetime.timedelta(hours=1))
    ema.update(1.0), ema.update(2.0, elapsed=elapsed)
    assert ema.get() == (2.0 + 0.5**0.5) / (1.0 + 0.5**0.5)


def test_a_too_large_elapsed_is_refused():
    with pytest.raises(ValueError, match="elapsed must be a finite number above 0"):
        EMA(half_life=3.0).update(1.0, elapsed=10**400)


@pytest.mark.parametrize("initial", [None, 1.0])
def test_a_state_that_began_at_an_initial_needs_one(initial):
    """Without it each value would weigh something else from then on."""
    saved, ema = EMA(half_life=3.0, initial=initial), EMA(half_life=3.0, initial=2.0 if initial is None else None)
    saved.update(5.0), ema.update(4.0)
    before = ema.state_dict()
    theirs, ours = ("value", "value from initial=") if initial is None else ("value from initial=", "value")
    text = rf"the state was saved with .* by {theirs}, but this EMA has .* by {ours}\. Make it with the saved ones"
    with pytest.raises(ValueError, match=text):
        ema.load_state_dict(saved.state_dict())
    unchanged(ema, before)
    old = saved.state_dict()
    del old["initial"]  # as versions before this wrote it
    resumed = EMA(half_life=3.0, initial=initial)
    resumed.load_state_dict(old)
    assert resumed.get() == saved.get()


@pytest.mark.parametrize("debias", [True, False])
def test_a_gap_before_a_value_by_update_is_as_long_as_the_times_say(debias: bool):
    """For floats, arrays and tensors, and resumed from a state."""
    expected = ewma.smooth([1.0, NAN, 3.0], alpha=0.3, times=[0, 1, 2], debias=debias, nan="decay")[-1]
    for make in (list, lambda x: np.array([x]), lambda x: torch.tensor([x], dtype=torch.float64)):
        for resumed in (False, True):
            ema = EMA(alpha=0.3, debias=debias, nan="decay")
            ema.extend(make([1.0, NAN]), times=[0, 1])
            if resumed:
                state, ema = ema.state_dict(), EMA(alpha=0.3, debias=debias, nan="decay")
                ema.load_state_dict(state)
            twin = copy.deepcopy(ema)
            ema.update(make([3.0])[0]), twin.extend(make([3.0]))
            assert double(ema.get()).ravel().tolist() == pytest.approx([expected], rel=1e-14)
            assert double(twin.get()).ravel().tolist() == pytest.approx([expected], rel=1e-14)


def test_no_warning_where_an_unbiased_variance_has_no_digits():
    ema = EMA(decay=5e-324)
    ema.update(np.array([1.0])), ema.update(np.array([1.0]))
    ema.var()
