"""What smooth and ewm take and give back: types, shapes, axes, time stamps, `out`; and what they refuse, in words."""

from __future__ import annotations

import array
import datetime
import math
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

import ewma
from ewma import ewm, smooth
from ewma.profiles import Power, Uniform, tensorflow
from ewma.series.sides import both_sides

NAN, INF = math.nan, math.inf
approx = pytest.approx
VALUES = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
GAPPY = [NAN, 1.0, NAN, INF, 5.0, -INF, NAN, 6.0]


def double(x: Any) -> np.ndarray:
    """Anything as a float64 array; None is NaN."""
    if isinstance(x, torch.Tensor):
        x = x.detach().double().cpu().numpy()
    return np.asarray(x, dtype=np.float64)


def definition(x: Any, alpha: float = 0.5, elapsed: list[float] | None = None) -> np.ndarray:
    """The weighted mean written out along the last axis: what is missing drops, and the time it came with."""
    x = double(x)
    if x.ndim > 1:
        return np.stack([definition(row, alpha, elapsed) for row in x]) if len(x) else np.empty(x.shape)
    result, weights = np.full(len(x), NAN), np.zeros(len(x))
    for t, value in enumerate(x):
        if math.isfinite(value):
            weights[:t] *= (1.0 - alpha) ** (1.0 if elapsed is None else elapsed[t])
            weights[t] = 1.0
        if weights.any():
            seen = weights > 0.0
            result[t] = math.fsum(weights[seen] * x[seen]) / math.fsum(weights)
    return result


RIGHT, RIGHT_GAPPY = definition(VALUES), definition(GAPPY)


def close(actual: Any, expected: Any, rtol: float = 1e-14) -> None:
    np.testing.assert_allclose(double(actual), expected, rtol=rtol, equal_nan=True)


STATISTICS = {
    "mean": lambda series, y: series.mean(),
    "var": lambda series, y: series.var(),
    "std": lambda series, y: series.std(),
    "sum": lambda series, y: series.sum(),
    "zscore": lambda series, y: series.zscore(),
    "bands": lambda series, y: series.bands().upper,
    "cov": lambda series, y: series.cov(y),
    "corr": lambda series, y: series.corr(y),
    "two-sided": lambda series, y: both_sides(series._course, series._x, None),
}
each_statistic = pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)

# ---- lists and tuples


def test_a_list_gives_a_list_of_floats():
    result = smooth([3, 1, 4, 1, 5, 9, 2, 6], alpha=0.5)
    assert (type(result), {type(mean) for mean in result}) == (list, {float})
    assert result == approx(RIGHT.tolist(), rel=1e-14)


@pytest.mark.parametrize("values", [tuple(VALUES), [int(x) for x in VALUES], [np.float32(x) for x in VALUES]], ids=str)
def test_tuples_and_lists_of_other_numbers_are_lists(values):
    result = smooth(values, alpha=0.5)
    assert type(result) is list
    assert result == approx(RIGHT.tolist(), rel=1e-14)


def test_none_is_a_missing_value():
    nothing = [None if math.isnan(x) else x for x in GAPPY]
    close(smooth(nothing, alpha=0.5), RIGHT_GAPPY)
    close(smooth([[None, 1, 2], [3, None, 4]], alpha=0.5), definition([[NAN, 1, 2], [3, NAN, 4]]))


def test_nested_lists_give_nested_lists():
    result = smooth([VALUES, GAPPY], alpha=0.5)
    assert [type(row) for row in result] == [list, list]
    close(result, [RIGHT, RIGHT_GAPPY])
    close(smooth([[[1], [2]], [[3], [4]]], alpha=0.5, axis=1), [[[1], [5 / 3]], [[3], [11 / 3]]])


def test_integers_of_any_size_are_numbers():
    assert smooth([10**30, 10**30], alpha=0.5) == [1e30, 1e30]
    assert smooth([2**63 + 2**20, None], alpha=0.5) == [2.0**63 + 2**20] * 2


def test_bools_are_numbers():
    assert smooth([True, False, False], alpha=0.5) == approx([1, 1 / 3, 1 / 7], rel=1e-14)


# ---- NumPy

NUMPY_FLOATS = ["float16", "float32", "float64", ">f4", ">f8"]
NUMPY_OTHERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", "bool", "longdouble"]


@pytest.mark.parametrize("dtype", [*NUMPY_FLOATS, *NUMPY_OTHERS])
@each_statistic
def test_numpy_floats_keep_their_dtype_and_all_else_gives_float64(statistic, dtype: str):
    x = np.array([VALUES, VALUES[::-1]]).astype(dtype)
    result = statistic(ewm(x, alpha=0.5), x)
    assert type(result) is np.ndarray
    assert (result.shape, result.dtype) == (x.shape, np.dtype(dtype if dtype in NUMPY_FLOATS else "float64"))
    exact = statistic(ewm(x.astype(np.float64), alpha=0.5), x.astype(np.float64))
    tolerance = np.finfo(result.dtype).eps
    np.testing.assert_allclose(double(result), exact, rtol=tolerance, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [*NUMPY_FLOATS, "int64", "bool"])
def test_numpy_means_are_the_definitions(dtype: str):
    x = np.array([VALUES, VALUES[::-1]]).astype(dtype)
    close(
        smooth(x, alpha=0.5),
        definition(x),
        rtol=1e-3 if dtype == "float16" else 1e-7 if "4" in dtype or "32" in dtype else 1e-14,
    )


def layouts(x: Any) -> dict[str, Any]:
    """The same numbers, laid out otherwise in memory."""
    flip = np.flip if isinstance(x, np.ndarray) else torch.flip
    wide = np.repeat(x, 2, -1) if isinstance(x, np.ndarray) else x.repeat_interleave(2, -1)
    ways = {
        "every second": wide[..., ::2],
        "transposed": (x.T.copy() if isinstance(x, np.ndarray) else x.T.contiguous()).T,
    }
    if isinstance(x, np.ndarray):
        ways["backwards"] = flip(x, -1).copy()[..., ::-1]
        ways["Fortran"] = np.asfortranarray(x)
        ways["read-only"] = np.broadcast_to(x, x.shape)
    return ways


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(7, 5), (1, 300), (300, 1), (40, 70)], ids=str)
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("missing", [False, True], ids=["finite", "gappy"])
def test_the_layout_in_memory_does_not_matter(missing: bool, kind, shape, axis: int):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    if missing:
        x[rng.random(shape) < 0.2] = NAN
    expected = double(smooth(kind(x), half_life=3, axis=axis))
    for name, laid in layouts(kind(x)).items():
        result = double(smooth(laid, half_life=3, axis=axis))
        np.testing.assert_allclose(result, expected, rtol=1e-13, atol=1e-14, err_msg=name)
        np.testing.assert_array_equal(double(laid), x, err_msg=f"{name}: the input was changed")


def test_one_column_repeated_without_memory_is_as_many_columns():
    x, t = np.random.default_rng(1).normal(size=200), torch.randn(200, dtype=torch.float64)
    np.testing.assert_array_equal(smooth(np.broadcast_to(x, (3, 200)), alpha=0.1), [smooth(x, alpha=0.1)] * 3)
    np.testing.assert_allclose(smooth(t.expand(3, 200), alpha=0.1), torch.stack([smooth(t, alpha=0.1)] * 3), rtol=1e-13)


@pytest.mark.parametrize(("dtype", "expected"), [("float16", "float16"), ("float32", "float32"), ("int64", "float64")])
def test_of_a_masked_array_the_floating_dtype_is_kept(dtype: str, expected: str):
    x = np.ma.masked_array(np.array([1, 100, 4], dtype), mask=[False, True, False])
    result = smooth(x, alpha=0.5)
    assert result.dtype == expected
    np.testing.assert_array_equal(result, smooth(np.array([1.0, NAN, 4.0], expected), alpha=0.5))


def test_what_is_masked_is_missing():
    x = np.ma.masked_array([1.0, 100.0, 4.0], mask=[False, True, False])
    close(smooth(x, alpha=0.5), definition([1.0, NAN, 4.0]))


# ---- torch

TORCH_FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TORCH_OTHERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", [*TORCH_FLOATS, *TORCH_OTHERS], ids=str)
@each_statistic
def test_torch_floats_keep_their_dtype_and_all_else_gives_float64(statistic, dtype: torch.dtype):
    x = torch.tensor([VALUES, VALUES[::-1]], dtype=torch.float64).to(dtype)
    result = statistic(ewm(x, alpha=0.5), x)
    assert (type(result), result.shape, result.device) == (torch.Tensor, x.shape, x.device)
    assert result.dtype == (dtype if dtype in TORCH_FLOATS else torch.float64)
    exact = statistic(ewm(x.double(), alpha=0.5), x.double())
    np.testing.assert_allclose(double(result), exact, rtol=torch.finfo(result.dtype).eps, atol=1e-12, equal_nan=True)


@each_statistic
def test_torch_and_numpy_agree(statistic):
    x = np.random.default_rng(2).normal(size=(3, 50))
    x[0, :3], x[1, 20:22], x[2, 5] = NAN, INF, NAN
    y = np.random.default_rng(3).normal(size=(3, 50))
    one = statistic(ewm(x, half_life=5, nan="decay"), y)
    other = statistic(ewm(torch.from_numpy(x), half_life=5, nan="decay"), torch.from_numpy(y))
    np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-12, equal_nan=True)


@each_statistic
def test_statistics_with_a_gradient_are_those_without(statistic):
    x = torch.randn(3, 60, dtype=torch.float64)
    x[0, :3], x[1, 20:22], x[2, 5] = NAN, INF, NAN
    y = torch.randn(3, 60, dtype=torch.float64)
    late = np.cumsum(np.where(np.arange(60) % 7, 1.0, 150.0))  # 30 half-lives, of which next to nothing is left
    for rule in (
        {},
        {"nan": "decay"},
        {"times": np.arange(60) ** 1.5},
        {"times": late},
        {"profile": Power(sigma_rel=0.1)},
    ):
        knob = {} if "profile" in rule else {"half_life": 5}
        plain = statistic(ewm(x, **knob, **rule), y)
        tracked = statistic(ewm(x.clone().requires_grad_(), **knob, **rule), y)
        assert tracked.requires_grad
        np.testing.assert_allclose(double(tracked), double(plain), rtol=1e-11, atol=1e-12, equal_nan=True)


def test_a_parameter_gives_a_tensor_with_a_graph_and_none_under_no_grad():
    x = torch.nn.Parameter(torch.ones(3))
    assert type(smooth(x, alpha=0.5)) is torch.Tensor
    assert smooth(x, alpha=0.5).requires_grad
    with torch.no_grad():
        assert not smooth(x, alpha=0.5).requires_grad
    assert not smooth(x.detach(), alpha=0.5).requires_grad


def test_an_infinity_with_a_gradient_is_missing_like_any_other():
    x = torch.tensor([1.0, INF, 2.0], dtype=torch.float64, requires_grad=True)
    close(smooth(x, alpha=0.5), smooth([1.0, INF, 2.0], alpha=0.5))
    assert smooth(torch.tensor([INF], requires_grad=True), alpha=0.5).isnan().all()


@each_statistic
def test_inference_mode_is_no_obstacle(statistic):
    """Neither inside it, nor outside with what was made there."""
    x = torch.tensor([VALUES, GAPPY])
    expected = statistic(ewm(x, half_life=3), x)
    with torch.inference_mode():
        made = x * 1.0
        torch.testing.assert_close(statistic(ewm(made, half_life=3), made), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(statistic(ewm(made, half_life=3), made), expected, rtol=0, atol=0, equal_nan=True)
    # and what was remembered meanwhile serves a gradient afterwards
    smooth(torch.randn(2, 8, requires_grad=True), half_life=3).nansum().backward()


@each_statistic
@pytest.mark.parametrize(
    "rule",
    [{}, {"nan": "decay"}, {"min_periods": 2}, {"times": [0, 1, 1, 2, 7]}, {"nan": "propagate"}, {"weigh": "time"}],
    ids=str,
)
def test_nothing_is_read_on_the_host(statistic, rule: dict):
    """A tensor on the meta device has no values: to read one is an error."""
    x = torch.ones(2, 5, device="meta")
    result = statistic(ewm(x, half_life=3, **rule), x)
    assert result.is_meta
    assert result.shape == x.shape


def test_knobs_and_initial_on_the_device_are_not_read_either():
    x = torch.ones(2, 5, device="meta")
    knobs = [torch.tensor(0.5, device="meta"), torch.ones(2, 1, device="meta"), torch.ones(5, device="meta")]
    for alpha in knobs:
        for initial in (None, 0.5, torch.ones(2, device="meta")):
            assert smooth(x, alpha=alpha, initial=initial).is_meta
            assert ewm(x, alpha=alpha, initial=initial).zscore().is_meta


# ---- pandas

INDEX = pd.date_range("2026-03-28 22:00", periods=8, freq="h", tz="Europe/Berlin")


def test_a_pandas_series_keeps_index_name_and_dtype():
    x = pd.Series(GAPPY, index=INDEX, name="loss")
    pd.testing.assert_series_equal(smooth(x, alpha=0.5), pd.Series(RIGHT_GAPPY, index=INDEX, name="loss"))
    single = smooth(x.astype("float32"), alpha=0.5)
    pd.testing.assert_series_equal(single, pd.Series(RIGHT_GAPPY, index=INDEX, name="loss", dtype="float32"))


def test_a_pandas_frame_is_its_columns():
    frame = pd.DataFrame({"a": VALUES, "b": GAPPY, "c": range(8), "d": [True, False] * 4}, index=INDEX)
    result = smooth(frame, alpha=0.5)
    expected = pd.DataFrame({name: smooth(frame[name], alpha=0.5) for name in frame}, index=INDEX)
    pd.testing.assert_frame_equal(result, expected, rtol=1e-14)
    pd.testing.assert_frame_equal(smooth(frame, alpha=0.5, axis=0), result)
    pd.testing.assert_frame_equal(smooth(frame, alpha=0.5, dim=0), result)


@pytest.mark.parametrize(
    "columns", [["a", "a"], [("x", 1), ("x", 2)], [3, 1], pd.MultiIndex.from_tuples([(1, 2), (1, 3)])]
)
def test_any_columns_and_index_stay(columns):
    frame = pd.DataFrame(np.ones((3, 2)), columns=columns, index=["r", "r", "s"])
    pd.testing.assert_frame_equal(smooth(frame, alpha=0.5), frame)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("float32", "float32"), ("float64", "float64"), ("int32", "float64"), ("uint8", "float64"), ("bool", "float64")],
)
def test_pandas_dtypes(dtype: str, kept: str):
    x = pd.Series([1, 0, 1]).astype(dtype)
    assert smooth(x, alpha=0.5).dtype == kept
    close(smooth(x, alpha=0.5), definition([1, 0, 1]), rtol=1e-7)
    assert set(smooth(pd.DataFrame({"a": x, "b": x}), alpha=0.5).dtypes) == {np.dtype(kept)}


@pytest.mark.parametrize("dtype", ["Int64", "UInt8", "Float64", "Float32", "boolean"])
def test_pandas_nullable_values_that_are_na_are_missing(dtype: str):
    x = pd.Series([1, None, 0, 1, None], dtype=dtype, name="x")
    result = smooth(x, alpha=0.5)
    close(result.to_numpy(dtype=float), definition([1, NAN, 0, 1, NAN]), rtol=1e-7)
    assert result.name == "x"
    assert result.dtype.kind == "f"
    frame = smooth(pd.DataFrame({"a": x, "b": [1.0, 2.0, 3.0, 4.0, 5.0]}), alpha=0.5)
    close(frame["a"].to_numpy(dtype=float), definition([1, NAN, 0, 1, NAN]), rtol=1e-7)
    close(frame["b"], definition([1, 2, 3, 4, 5]))


def test_pandas_single_precision_is_kept_where_it_is_nullable_too():
    x = pd.Series([1.0, None, 4.0], dtype="Float32")
    assert smooth(x, alpha=0.5).dtype.itemsize == 4


@each_statistic
def test_every_statistic_of_pandas_comes_back_as_pandas(statistic):
    frame = pd.DataFrame({"a": VALUES, "b": GAPPY}, index=INDEX)
    for x in (frame, frame["a"]):
        result = statistic(ewm(x, alpha=0.5), x)
        assert type(result) is type(x)
        pd.testing.assert_index_equal(result.index, INDEX)
        np.testing.assert_allclose(
            double(result), double(statistic(ewm(x.to_numpy(), alpha=0.5, axis=0), x.to_numpy()))
        )


def test_pandas_without_rows_or_columns():
    for frame in (pd.DataFrame({"a": [], "b": []}, dtype=float), pd.DataFrame(index=[1, 2]), pd.DataFrame()):
        pd.testing.assert_frame_equal(smooth(frame, alpha=0.5), frame, check_index_type=False, check_column_type=False)
    pd.testing.assert_series_equal(
        smooth(pd.Series([], dtype=float, name="x"), alpha=0.5), pd.Series([], dtype=float, name="x")
    )


def test_pandas_index_as_times():
    x = pd.Series(VALUES, index=INDEX)  # daylight saving time begins: hours are hours all the same
    pd.testing.assert_series_equal(smooth(x, half_life=pd.Timedelta("1h"), times=x.index), smooth(x, half_life=1))


# ---- polars


def nulls(x: np.ndarray) -> list[float | None]:
    return [None if math.isnan(v) else v for v in x.tolist()]


@pytest.mark.parametrize("dtype", [pl.Float64, pl.Float32], ids=str)
def test_a_polars_series_keeps_its_name_and_has_null_where_nothing_was_seen(dtype):
    x = pl.Series("loss", [None, 1.0, None, INF, 5.0, NAN, None, 6.0], dtype=dtype)
    result = smooth(x, alpha=0.5)
    assert (type(result), result.name, result.dtype) == (pl.Series, "loss", dtype)
    assert result[0] is None
    assert result.null_count() == 1
    assert result.to_list()[1:] == approx(RIGHT_GAPPY.tolist()[1:], rel=1e-7)


@pytest.mark.parametrize("dtype", [pl.Int64, pl.UInt8, pl.Boolean, pl.Int8], ids=str)
def test_polars_integers_and_bools_give_float64(dtype):
    result = smooth(pl.Series("x", [1, None, 0, 1], dtype=dtype, strict=False), alpha=0.5)
    assert result.dtype == pl.Float64
    close(result.to_numpy(), definition([1, NAN, 0, 1]))


def test_a_polars_frame_is_its_columns():
    frame = pl.DataFrame({"a": VALUES, "b": nulls(np.array(GAPPY)), "c": range(8)})
    result = smooth(frame, alpha=0.5)
    assert (type(result), result.columns) == (pl.DataFrame, ["a", "b", "c"])
    for name in frame.columns:
        close(result[name].fill_null(NAN).to_numpy(), smooth(frame[name], alpha=0.5).fill_null(NAN).to_numpy())
    single = frame.cast(pl.Float32)
    assert set(smooth(single, alpha=0.5).dtypes) == {pl.Float32}


@each_statistic
def test_every_statistic_of_polars_comes_back_as_polars(statistic):
    frame = pl.DataFrame({"a": VALUES, "b": nulls(np.array(GAPPY))})
    for x in (frame, frame["b"]):
        result = statistic(ewm(x, alpha=0.5), x)
        assert type(result) is type(x)
        np.testing.assert_allclose(result.to_numpy(), statistic(ewm(x.to_numpy(), alpha=0.5, axis=0), x.to_numpy()))


def test_polars_without_rows_or_columns():
    for frame in (pl.DataFrame({"a": []}, schema={"a": pl.Float64}), pl.DataFrame()):
        assert smooth(frame, alpha=0.5).equals(frame)
    assert smooth(pl.Series("x", [], dtype=pl.Float64), alpha=0.5).equals(pl.Series("x", [], dtype=pl.Float64))


# ---- axes

CUBE = np.random.default_rng(4).normal(size=(4, 5, 6))


@pytest.mark.parametrize("word", ["axis", "dim"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, np.ndarray.tolist], ids=["numpy", "torch", "list"])
def test_time_runs_along_any_axis_by_either_word(kind, axis: int, word: str):
    last = np.moveaxis(definition(np.moveaxis(CUBE, axis, -1)), -1, axis)
    close(smooth(kind(CUBE), alpha=0.5, **{word: axis}), last, rtol=1e-12)


def test_an_axis_may_be_numpys_integer():
    close(smooth(CUBE, alpha=0.5, axis=np.int64(1)), smooth(CUBE, alpha=0.5, axis=1))


@pytest.mark.parametrize("axis", [0, 1, 2])
@each_statistic
def test_every_statistic_is_that_of_each_series_alone(statistic, axis: int):
    x, y = np.moveaxis(CUBE, axis, -1), np.moveaxis(CUBE[::-1] ** 2, axis, -1)
    result = statistic(ewm(CUBE, half_life=2, axis=axis), CUBE[::-1] ** 2)
    alone = [[statistic(ewm(a, half_life=2), b) for a, b in zip(*rows, strict=True)] for rows in zip(x, y, strict=True)]
    np.testing.assert_allclose(np.moveaxis(result, axis, -1), alone, rtol=1e-11, atol=1e-12)


# ---- no values, one value, no channels


@pytest.mark.parametrize("grad", [False, True], ids=["", "gradient"])
@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (3, 0), (1, 3), (3, 1), (2, 0, 3), (0, 0)], ids=str)
@each_statistic
def test_empty_and_single_series(statistic, shape, grad: bool):
    x = np.ones(shape)
    for axis in range(len(shape)):
        for kind in (np.asarray, torch.from_numpy):
            if grad and kind is np.asarray:
                continue
            given = kind(x).requires_grad_() if grad else kind(x)
            result = statistic(ewm(given, half_life=3, axis=axis), given)
            assert type(result) is type(given)
            assert result.shape == given.shape
            assert result.dtype == given.dtype
            if grad:
                result.nansum().backward()
                assert given.grad.shape == shape


@pytest.mark.parametrize("empty", [[], (), [[]], [[], []], np.empty(0), np.empty((3, 0)), torch.empty(0)], ids=repr)
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"times": []},
        {"times": np.empty(0, "datetime64[s]")},
        {"initial": 1.0},
        {"nan": "raise"},
        {"two_sided": True},
        {"min_periods": 9},
    ],
    ids=str,
)
def test_an_empty_series_gives_an_empty_one(empty, rule: dict):
    result = smooth(empty, half_life=3, **rule)
    assert double(result).shape == double(empty).shape
    assert type(result) is (list if isinstance(empty, tuple) else type(empty))


def test_an_empty_series_with_times_may_have_a_duration_as_half_life():
    empty = np.empty(0, "datetime64[s]")
    assert smooth([], half_life=datetime.timedelta(hours=1), times=empty) == []


@pytest.mark.parametrize("x", [NAN, INF, 2.0])
def test_a_series_of_one(x: float):
    expected = [x if math.isfinite(x) else NAN]
    close(smooth([x], half_life=3), expected)
    close(smooth([x], half_life=3, debias=False), expected)
    close(smooth([x], half_life=3, min_periods=2), [NAN])
    close(smooth([x], alpha=0.5, initial=1.0, min_periods=0), [1.5 if math.isfinite(x) else 1.0])
    close(smooth([x], half_life=3, two_sided=True), expected)


# ---- options in a nutshell (their exactness is tested elsewhere)


def test_min_periods_counts_what_was_observed():
    shown = np.isfinite(smooth([1.0, NAN, 2.0, INF, 3.0, 4.0], alpha=0.5, min_periods=3))
    assert shown.tolist() == [False, False, False, False, True, True]
    assert smooth([NAN, 1.0], alpha=0.5, initial=4.0, min_periods=0) == [4.0, 2.5]
    for needed in (np.int64(2), 2):
        assert math.isnan(smooth([1.0, 2.0], alpha=0.5, min_periods=needed)[0])


@pytest.mark.parametrize("later", [[8.0, 2.0], [8.0, NAN, 2.0], [NAN, 8.0, 2.0], [INF, NAN, 8.0, 2.0]], ids=str)
@pytest.mark.parametrize("kind", [lambda x: x, np.array, torch.tensor], ids=["list", "numpy", "torch"])
@pytest.mark.parametrize("timed", [False, True])
def test_an_initial_is_the_mean_before_the_first_value(timed: bool, kind, later: list[float]):
    """As if it had always been there; also where values are missing, and with times."""
    result = smooth(kind(later), alpha=0.5, initial=4.0, min_periods=0, times=range(len(later)) if timed else None)
    mean, expected = 4.0, []
    for x in later:
        mean = 0.5 * mean + 0.5 * x if math.isfinite(x) else mean
        expected.append(mean)
    close(result, expected, rtol=1e-7)


def test_an_initial_broadcasts_to_one_value():
    x = np.random.default_rng(5).normal(size=(3, 4, 5))
    for axis, shapes in {0: [(), (5,), (4, 1), (4, 5)], 1: [(), (5,), (3, 1), (3, 5)], 2: [(), (4,), (3, 1)]}.items():
        for shape in shapes:
            start = np.random.default_rng(6).normal(size=shape)
            sizes = tuple(size for place, size in enumerate(x.shape) if place != axis)
            put = np.expand_dims(np.broadcast_to(start, sizes), axis)
            first = np.take(smooth(x, alpha=0.5, axis=axis, initial=start), [0], axis=axis)
            np.testing.assert_allclose(first, 0.5 * put + 0.5 * np.take(x, [0], axis=axis), rtol=1e-13)


def test_each_channel_and_each_step_may_have_a_memory_of_its_own():
    alphas = np.array([0.1, 0.5, 1.0])
    x = CUBE[0, :3]
    np.testing.assert_allclose(
        smooth(x, alpha=alphas[:, None]), [smooth(r, alpha=a) for r, a in zip(x, alphas, strict=True)], rtol=1e-12
    )
    by_step = np.linspace(0.1, 1.0, 6)
    mean, expected = 0.0, []
    for t, value in enumerate(x[0]):
        mean += (by_step[t] if t else 1.0) * (value - mean)
        expected.append(mean)
    np.testing.assert_allclose(smooth(x[0], alpha=by_step, debias=False), expected, rtol=1e-13)


KNOBS = {"half_life": [3.0, 7.0], "decay": [0.5, 0.9], "alpha": [0.1, 1.0], "span": [1.0, 9.0], "com": [0.0, 4.0]}


@pytest.mark.parametrize("knob", KNOBS)
@pytest.mark.parametrize(
    "as_array", [np.array, list, lambda x: np.array(x, "float32"), tuple], ids=["numpy", "list", "float32", "tuple"]
)
def test_every_knob_may_be_an_array(knob: str, as_array):
    x, values = np.stack([VALUES, VALUES[::-1]], axis=1), KNOBS[knob]
    result = smooth(x, axis=0, **{knob: as_array(values)})
    for channel, value in enumerate(values):
        exact = float(np.float32(value)) if getattr(as_array(values), "dtype", None) == np.float32 else value
        np.testing.assert_allclose(result[:, channel], smooth(x[:, channel], **{knob: exact}), rtol=1e-13)
    tensor = smooth(torch.from_numpy(x), axis=0, **{knob: torch.tensor(values, dtype=torch.float64)})
    np.testing.assert_allclose(tensor, smooth(x, axis=0, **{knob: np.array(values)}), rtol=1e-13)


@pytest.mark.parametrize(
    "knob",
    [{"alpha": 1.0}, {"decay": 0.0}, {"alpha": [1.0]}, {"alpha": [1.0] * 4}, {"span": 1.0}, {"com": [0.0]}],
    ids=str,
)
@pytest.mark.parametrize("kind", [lambda x: x, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_where_nothing_is_kept_the_mean_is_the_newest_also_at_equal_times(kind, knob: dict):
    """Equal time stamps forget nothing between them: such values weigh alike, whatever the memory."""
    weigh = {"weigh": "value"}
    close(smooth(kind([1.0, 2.0, 4.0, 8.0]), times=[0, 1, 2, 3], **knob, **weigh), [1.0, 2.0, 4.0, 8.0])
    close(smooth(kind([1.0, 2.0, 4.0, 8.0]), times=[0, 0, 1, 1], **knob, **weigh), [1.0, 1.5, 4.0, 6.0])


# ---- bands and z-scores


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, pd.Series], ids=["numpy", "torch", "list", "pandas"])
@pytest.mark.parametrize("how", [{}, {"k": 3.0}, {"k": 0.5, "unbiased": False}], ids=str)
def test_bands_lie_k_deviations_around_the_mean(how: dict, kind):
    series = ewm(kind(VALUES), half_life=3)
    lower, mean, upper = series.bands(**how)
    width = how.get("k", 2.0) * double(series.std(unbiased=how.get("unbiased", True)))
    close(mean, double(series.mean()))
    np.testing.assert_allclose(double(upper) - double(mean), width, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(double(mean) - double(lower), width, rtol=1e-6, atol=1e-6)
    bands = series.bands(**how)
    assert type(bands.mean) is type(kind(VALUES))
    assert (type(bands).__name__, bands._fields) == ("Bands", ("lower", "mean", "upper"))


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "rule", [{}, {"debias": False}, {"nan": "decay"}, {"initial": 1.0}, {"profile": Power(sigma_rel=0.1)}], ids=str
)
def test_a_zscore_compares_with_what_came_before(kind, rule: dict):
    knob = {} if "profile" in rule else {"half_life": 3}
    x = kind([2.0, 3.0, NAN, 1.0, 5.0, 100.0, 2.0, INF, 3.0])
    series = ewm(x, **knob, **rule)
    before, std = double(series.mean())[:-1], double(series.std())[:-1]
    expected = np.append(NAN, (double(x)[1:] - before) / std)
    if "initial" not in rule:
        expected[1] = NAN  # one value has no spread
    expected[~np.isfinite(double(x))] = NAN
    np.testing.assert_allclose(double(series.zscore()), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_beside_a_constant_every_other_value_is_infinitely_far(kind):
    close(ewm(kind([2.0, 2.0, 2.0, 3.0]), half_life=3).zscore(), [NAN, NAN, NAN, INF])
    close(ewm(kind([2.0, 2.0, 2.0, 1.0]), half_life=3).zscore(), [NAN, NAN, NAN, -INF])


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@each_statistic
def test_a_series_longer_than_a_piece_goes_on_where_the_piece_ended(statistic, kind):
    """Read backwards from the end: the last steps know nothing of where pieces begin."""
    n, late = 300_000, 400
    x = np.random.default_rng(7).normal(size=n)
    result = double(statistic(ewm(kind(x), half_life=8.0), kind(x[::-1].copy())))
    alone = double(statistic(ewm(kind(x[-2 * late :].copy()), half_life=8.0), kind(x[::-1][-2 * late :].copy())))
    np.testing.assert_allclose(result[-late:], alone[-late:], rtol=1e-7, atol=1e-9)


# ---- time stamps

SECONDS = [0.0, 1.0, 1.0, 2.5, 9.0, 9.0, 9.5, 3600.0]
DAY = datetime.datetime(2026, 3, 29, 0, 0, 0)
DELTAS = [datetime.timedelta(seconds=s) for s in SECONDS]
STAMPS = {
    "list": SECONDS,
    "tuple": tuple(SECONDS),
    "array": np.array(SECONDS),
    "float32": np.array(SECONDS, dtype="float32"),
    "float16": np.array(SECONDS, dtype="float16"),
    "torch": torch.tensor(SECONDS),
    "torch bfloat16": torch.tensor(SECONDS).bfloat16(),
    "torch with a gradient": torch.tensor(SECONDS, requires_grad=True),
    "pandas": pd.Series(SECONDS, index=range(8, 16)),
    "pandas index": pd.Index(SECONDS),
    "polars": pl.Series(SECONDS),
    "datetimes": [DAY + delta for delta in DELTAS],
    "datetimes in an array of objects": np.array([DAY + delta for delta in DELTAS], dtype=object),
    "timedeltas": DELTAS,
    "timedeltas in an array of objects": np.array(DELTAS, dtype=object),
    "datetime64[ns]": np.datetime64(DAY) + (np.array(SECONDS) * 1e9).astype("timedelta64[ns]"),
    "datetime64[ms]": np.datetime64(DAY, "ms") + (np.array(SECONDS) * 1e3).astype("timedelta64[ms]"),
    "timedelta64[us]": (np.array(SECONDS) * 1e6).astype("timedelta64[us]"),
    "list of datetime64": list(np.datetime64(DAY) + (np.array(SECONDS) * 1e9).astype("timedelta64[ns]")),
    "list of timedelta64": list((np.array(SECONDS) * 1e6).astype("timedelta64[us]")),
    "pandas datetimes": pd.Series(pd.Timestamp(DAY) + pd.to_timedelta(SECONDS, unit="s")),
    "pandas datetime index": pd.Timestamp(DAY) + pd.to_timedelta(SECONDS, unit="s"),
    "pandas timestamps": list(pd.Timestamp(DAY) + pd.to_timedelta(SECONDS, unit="s")),
    "pandas timedeltas": pd.to_timedelta(SECONDS, unit="s"),
    "list of pandas timedeltas": list(pd.to_timedelta(SECONDS, unit="s")),
    "polars datetimes": pl.Series([DAY + delta for delta in DELTAS]),
    "polars durations": pl.Series(DELTAS),
}


@pytest.mark.parametrize("times", STAMPS.values(), ids=STAMPS)
@pytest.mark.parametrize("kind", [list, torch.tensor], ids=["list", "torch"])
def test_times_may_be_numbers_datetimes_or_timedeltas_of_any_library(kind, times):
    expected = definition(VALUES, 1 - 2**-0.5, np.diff(SECONDS, prepend=-1.0).tolist())
    approximately = 1e-3 if "16" in str(getattr(times, "dtype", "")) else 1e-6 if kind is torch.tensor else 1e-13
    close(smooth(kind(VALUES), half_life=2.0, times=times), expected, rtol=approximately)


BERLIN = "Europe/Berlin"
ZONES = {
    "aware": [(DAY + datetime.timedelta(hours=h)).replace(tzinfo=datetime.UTC) for h in range(5)],
    "mixed": [
        (DAY + datetime.timedelta(hours=h))
        .replace(tzinfo=datetime.UTC)
        .astimezone(datetime.timezone(datetime.timedelta(hours=h)))
        for h in range(5)
    ],
    "pandas index": pd.date_range("2026-03-29", periods=5, freq="h", tz=BERLIN),
    "pandas series": pd.Series(pd.date_range("2026-03-29", periods=5, freq="h", tz=BERLIN)),
    "pandas timestamps": list(pd.date_range("2026-03-29", periods=5, freq="h", tz=BERLIN)),
    "polars": pl.datetime_range(DAY, DAY + datetime.timedelta(hours=4), "1h", time_zone="UTC", eager=True),
    "polars, in a zone": pl.datetime_range(
        DAY, DAY + datetime.timedelta(hours=4), "1h", time_zone="UTC", eager=True
    ).dt.convert_time_zone(BERLIN),
}


@pytest.mark.parametrize("times", ZONES.values(), ids=ZONES)
def test_hours_are_hours_in_any_time_zone_and_when_summer_begins(times):
    assert smooth(VALUES[:5], half_life=3600.0, times=times) == approx(smooth(VALUES[:5], half_life=1.0), rel=1e-13)


def test_dates_are_days():
    dates = [datetime.date(2026, 1, 30) + datetime.timedelta(days=d) for d in range(5)]
    expected = approx(smooth(VALUES[:5], half_life=1.0), rel=1e-13)
    for times in (
        dates,
        pl.Series(dates),
        np.array(dates, "datetime64[D]"),
        [*dates[:2], *map(pd.Timestamp, dates[2:])],
    ):
        assert smooth(VALUES[:5], half_life=datetime.timedelta(days=1), times=times) == expected


def test_months_are_as_long_as_they_are():
    months = np.arange(5).astype("datetime64[M]")
    expected = smooth(VALUES[:5], half_life=86400.0, times=months.astype("datetime64[D]"))
    assert smooth(VALUES[:5], half_life=86400.0, times=months) == approx(expected, rel=1e-13)


NANOSECONDS = 1_767_225_600_000_000_000  # 2026-01-01 since 1970: float64 is 256 apart there


@pytest.mark.parametrize(
    "times",
    [
        NANOSECONDS + np.array([0, 1, 2, 4]),
        (NANOSECONDS + np.array([0, 1, 2, 4])).astype("uint64"),
        (NANOSECONDS + np.array([0, 1, 2, 4])).tolist(),
        torch.tensor([NANOSECONDS, NANOSECONDS + 1, NANOSECONDS + 2, NANOSECONDS + 4]),
        pd.Series(NANOSECONDS + np.array([0, 1, 2, 4])),
        pl.Series(NANOSECONDS + np.array([0, 1, 2, 4])),
        np.array([-128, -127, -126, -124], dtype="int8"),
        np.array([251, 252, 253, 255], dtype="uint8"),
    ],
    ids=lambda x: f"{type(x).__module__} {getattr(x, 'dtype', '')}",
)
def test_integer_times_keep_every_digit(times):
    assert smooth(VALUES[:4], half_life=2.0, times=times) == approx(
        smooth(VALUES[:4], half_life=2.0, times=[0, 1, 2, 4]), rel=1e-14
    )


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_integer_times_as_far_apart_as_their_dtype_goes(dtype: str):
    ends = np.iinfo(dtype)
    times = np.array([ends.min, 0, ends.max], dtype=dtype)
    expected = smooth([1.0, 2.0, 4.0], half_life=float(ends.max), times=times.astype(float))
    assert smooth([1.0, 2.0, 4.0], half_life=float(ends.max), times=times) == approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    "half_life", [datetime.timedelta(seconds=2), pd.Timedelta(2, "s"), np.timedelta64(2000, "ms")], ids=type
)
@pytest.mark.parametrize(
    "times",
    [STAMPS["datetimes"], STAMPS["timedelta64[us]"], STAMPS["polars datetimes"]],
    ids=["datetimes", "timedeltas", "polars"],
)
def test_a_half_life_may_be_a_duration(times, half_life):
    expected = smooth(VALUES, half_life=2.0, times=SECONDS)
    assert smooth(VALUES, half_life=half_life, times=times) == approx(expected, rel=1e-14)


def test_durations_differ_by_channel_as_numpys_arrays():
    x, times = np.array([VALUES, VALUES[::-1]]), STAMPS["datetime64[ns]"]
    half_lives = np.array([[2000], [500]], dtype="timedelta64[ms]")
    for row, half_life in enumerate((2.0, 0.5)):
        np.testing.assert_allclose(
            smooth(x, half_life=half_lives, times=times)[row],
            smooth(x[row], half_life=half_life, times=SECONDS),
            rtol=1e-13,
        )


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    "profile", [ewma.Exponential(half_life=2), Uniform(), Power(sigma_rel=0.1), tensorflow(decay=0.9)], ids=repr
)
def test_equal_times_weigh_alike_whatever_the_order(kind, profile):
    """By value; and nothing at all where a value counts for the time that it stands for."""
    x = np.array([1.0, 2.0, 4.0, 8.0])
    by_value = isinstance(profile, ewma.Exponential | Uniform)
    result = double(smooth(kind(x), profile, times=[0, 1, 1, 1]))
    swapped = double(smooth(kind(x[[0, 3, 1, 2]]), profile, times=[0, 1, 1, 1]))
    if by_value:
        assert swapped[-1] == approx(result[-1], rel=1e-14)
    else:
        assert result.tolist() == approx([*result[:2], result[1], result[1]])


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list, pd.Series, pl.Series])
def test_raise_names_the_first_step_where_a_value_is_missing(kind):
    for bad in (NAN, INF, -INF):
        with pytest.raises(ValueError, match=r'got one that is not at step 2\. nan="skip" leaves such values out'):
            smooth(kind([1.0, 2.0, bad, NAN]), alpha=0.5, nan="raise")
    with pytest.raises(ValueError, match="at step 1"):
        smooth([[1.0, 2.0, NAN], [1.0, NAN, 3.0]], alpha=0.5, nan="raise")
    with pytest.raises(ValueError, match="at step 0"):
        smooth([[1.0, 2.0, NAN], [1.0, 2.0, 3.0]], alpha=0.5, nan="raise", axis=0)
    with pytest.raises(ValueError, match="at step 1"):
        ewm([1.0, 2.0], alpha=0.5, nan="raise").corr([1.0, NAN])


# ---- what is refused, and the words for it

EXPECTED_KINDS = "x: expected a list, a NumPy array, a torch tensor, or a pandas or polars series or frame; got "
BAD_SERIES = [
    ("abc", TypeError, EXPECTED_KINDS + r"str\. An iterator becomes a list with list\(x\)\."),
    (b"abc", TypeError, EXPECTED_KINDS + "bytes"),
    (3.0, TypeError, EXPECTED_KINDS + "float"),
    (None, TypeError, EXPECTED_KINDS + "NoneType"),
    ({"a": [1.0]}, TypeError, EXPECTED_KINDS + "dict"),
    ({1.0}, TypeError, EXPECTED_KINDS + "set"),
    (iter([1.0]), TypeError, EXPECTED_KINDS + "list_iterator"),
    (range(3), TypeError, EXPECTED_KINDS + "range"),
    (array.array("d", [1.0]), TypeError, EXPECTED_KINDS + "array"),
    (
        np.float64(3.0),
        ValueError,
        "x: expected a series; got a single number. One value at a time is ewma.EMA's update",
    ),
    (np.array(3.0), ValueError, "x: expected a series; got a single number"),
    (torch.tensor(3.0), ValueError, "x: expected a series; got a single number"),
    (["a", "b"], TypeError, r"x: expected real numbers; got text\. Parse it first: \[float\(text\) for text in x\]"),
    (["1", "2"], TypeError, "x: expected real numbers; got text"),
    ([1.0, "2"], TypeError, "x: expected real numbers; got text"),
    ([None, "2"], TypeError, "x: expected real numbers; got text"),
    ([None, "a"], TypeError, "x: expected real numbers; got text"),
    ([1j, 2.0], TypeError, r"x: expected real numbers; got an array of complex128\. Smooth x\.real and x\.imag\."),
    ([[1.0, 2.0], [3.0]], ValueError, "x: expected numbers, in lists of equal lengths; .* None is a missing value"),
    ([1.0, [2.0]], ValueError, "x: expected numbers, in lists of equal lengths"),
    ([DAY], (TypeError, ValueError), "x: expected"),
    ([datetime.timedelta(1)], (TypeError, ValueError), "x: expected"),
    ([object()], (TypeError, ValueError), "x: expected"),
    ([{}], (TypeError, ValueError), "x: expected"),
    (
        np.ones(2) * 1j,
        TypeError,
        r"x: expected real numbers; got an array of complex128\. Smooth x\.real and x\.imag\.",
    ),
    (
        np.array(["a"]),
        TypeError,
        r"got an array of <U1\. Parse text first, for example with \[float\(text\) for text in x\]",
    ),
    (np.array([b"a"]), TypeError, r"x: expected real numbers; got an array of \|S1"),
    (
        np.array([1.0, None]),
        TypeError,
        "got an array of object. Its values must be real numbers; None is a missing one",
    ),
    (
        np.array(["2026-01-01"], "datetime64[D]"),
        TypeError,
        r"got an array of datetime64\[D\]\. Datetimes go to times=\.",
    ),
    (
        np.array([1], "timedelta64[s]"),
        TypeError,
        r"timedelta64\[s\]\. Durations are smoothed as numbers: x / numpy\.timedelta64",
    ),
    (np.zeros(2, [("a", float)]), TypeError, "x: expected real numbers; got an array of"),
    (
        torch.ones(2) * 1j,
        TypeError,
        r"x: expected a dense tensor of real numbers; got torch\.complex64, layout torch\.strided",
    ),
    (
        torch.ones(2).to_sparse(),
        TypeError,
        r"x: expected a dense tensor of real numbers; got torch\.float32, layout torch\.sparse",
    ),
    (torch.ones(2).to(torch.float8_e4m3fn), TypeError, "x: expected .*float8_e4m3fn"),
    ([torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)], (TypeError, ValueError), "x: .*torch.stack"),
    (
        pd.Series(["a"], name="n"),
        TypeError,
        r"x: expected a series of real numbers; got one of str\. Convert it first: pandas\.to_numeric\(x\)",
    ),
    (pd.Series([1j], name="n"), TypeError, "x: expected a series of real numbers; got one of complex128"),
    (
        pd.Series([1.0, None], dtype=object, name="n"),
        TypeError,
        "x: expected a series of real numbers; got one of object",
    ),
    (pd.Series([DAY], name="n"), TypeError, "x: expected a series of real numbers; got one of datetime64"),
    (
        pd.Series([1], dtype="category", name="n"),
        TypeError,
        "x: expected a series of real numbers; got one of category",
    ),
    (
        pd.DataFrame({"a": [1.0], "b": ["x"], "c": [DAY]}),
        TypeError,
        r"'b', 'c' are not\. .* x\.select_dtypes\(\"number\"\)",
    ),
    (pd.Index([1.0, 2.0]), TypeError, "x: expected .* got Index"),
    (
        pl.Series("n", ["a"]),
        TypeError,
        r"x: expected a series of real numbers; got one of String\. Convert it first: x\.cast\(polars\.Float64\)",
    ),
    (pl.Series("n", [[1.0], [2.0]]), TypeError, "x: expected a series of real numbers; got one of List"),
    (pl.Series("n", [DAY]), TypeError, "x: expected a series of real numbers; got one of Datetime"),
    (
        pl.DataFrame({"a": [1.0], "b": ["x"]}),
        TypeError,
        r"x: expected columns of real numbers; 'b' are not\. .*polars\.selectors\.numeric",
    ),
    ([10**400, 1], ValueError, "x: expected numbers, .* int too large to convert to float. None is a missing value"),
    (pl.LazyFrame({"a": [1.0]}), TypeError, "x: .*LazyFrame"),
]


@pytest.mark.parametrize(
    ("x", "error", "text"), BAD_SERIES, ids=[f"{type(x).__name__}-{k}" for k, (x, *_) in enumerate(BAD_SERIES)]
)
def test_what_is_no_series_of_real_numbers_is_refused(x, error, text: str):
    for call in (lambda: smooth(x, alpha=0.5), lambda: ewm(x, alpha=0.5)):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize(
    ("x", "axis", "error", "text"),
    [
        (np.ones((2, 3)), 2, ValueError, "x: expected axis from -2 to 1, x having 2 of them; got axis=2"),
        (torch.ones(2, 3), -3, ValueError, "x: expected axis from -2 to 1, x having 2 of them; got axis=-3"),
        ([1.0], 1, ValueError, "x: expected axis from -1 to 0, x having 1 of them; got axis=1"),
        (np.ones(2), 0.0, TypeError, r"x: axis must be an integer; got 0\.0"),
        (np.ones(2), True, TypeError, "x: axis must be an integer; got True"),
        (np.ones(2), "rows", TypeError, "x: axis must be an integer; got 'rows'"),
        (
            pd.DataFrame({"a": [1.0]}),
            1,
            ValueError,
            "x: a frame's time runs along its rows, axis 0; got axis=1. Leave axis out",
        ),
        (pd.DataFrame({"a": [1.0]}), -1, ValueError, "x: a frame's time runs along its rows, axis 0; got axis=-1"),
        (pl.DataFrame({"a": [1.0]}), 1, ValueError, "x: a frame's time runs along its rows, axis 0; got axis=1"),
        (pl.Series([1.0]), 1, ValueError, "x: a frame's time runs along its rows, axis 0; got axis=1"),
    ],
)
def test_an_axis_that_does_not_exist_is_refused(x, axis, error, text: str):
    with pytest.raises(error, match=text):
        smooth(x, alpha=0.5, axis=axis)
    with pytest.raises(error, match=text):
        smooth(x, alpha=0.5, dim=axis)


def test_axis_and_dim_are_one_word_too_many():
    with pytest.raises(
        TypeError, match=r"axis= and dim= are two words for one thing; got axis=0 and dim=1\. Keep one\."
    ):
        smooth(np.ones((2, 2)), alpha=0.5, axis=0, dim=1)


BAD_TIMES = [
    (
        [0, 2, 1],
        ValueError,
        r"expected times that never decrease; times\[2\] = 1 comes after 2\. Sort by time first: order = ",
    ),
    (
        [3, 2, 4],
        ValueError,
        r"times\[1\] = 2 comes after 3\. .* order = numpy\.argsort\(times\), then x\[order\] and times\[order\]",
    ),
    (
        np.array([0, 2, 1], "datetime64[s]"),
        ValueError,
        r"never decrease; times\[2\] = 1970-01-01T00:00:01 comes after 1970",
    ),
    (torch.tensor([0.0, 2.0, 1.0]), ValueError, r"times\[2\] = 1\.0 comes after 2\.0"),
    ([0, 1], ValueError, r"expected times of length 3, one for each value along the axis; got shape \[2\]"),
    ([], ValueError, r"expected times of length 3, one for each value along the axis; got shape \[0\]"),
    ([[0, 1, 2]], ValueError, r"expected times of length 3, .*; got shape \[1, 3\]"),
    ([0, NAN, 2], ValueError, r"expected a time for every value; times\[1\] is nan"),
    ([0, 1, INF], ValueError, r"expected a time for every value; times\[2\] is inf"),
    (np.array(["2026-01-01", "NaT", "2026-01-02"], "datetime64[D]"), ValueError, r"for every value; times\[1\] is NaT"),
    (np.array([0, "NaT", 2], "timedelta64[s]"), ValueError, r"expected a time for every value; times\[1\] is NaT"),
    (pd.Series([0, None, 2], dtype="Int64"), ValueError, r"expected a time for every value; times\[1\] is nan"),
    (pl.Series([DAY, None, DAY]), ValueError, r"expected a time for every value; times\[1\] is NaT"),
    ([DAY, None, DAY], TypeError, "expected every time to be a datetime, as the first is; got None"),
    ([DAY, 1, 2], TypeError, "expected every time to be a datetime, as the first is; got 1"),
    ([1, DAY, DAY], TypeError, r"expected times as numbers, datetimes or timedeltas; got times\[1\] = datetime"),
    ([1, None, 2], TypeError, r"expected times as numbers, datetimes or timedeltas; got times\[1\] = None$"),
    ([1, "2", 3], TypeError, "expected times as numbers, .* Text is parsed by"),
    ([10**30, 10**30 + 1, 10**30 + 2], TypeError, r"too large\. Count from the first: \[time - times\[0\] for time in"),
    (
        [DAY, DAY.replace(tzinfo=datetime.UTC), DAY],
        TypeError,
        "expected all times with a time zone or none; got .* and ",
    ),
    (pd.period_range("2026", periods=3), TypeError, r"A period becomes its begin with times\.to_timestamp\(\)"),
    ([datetime.timedelta(0), None, datetime.timedelta(1)], (TypeError, ValueError), "expected"),
    (
        [datetime.time(1), datetime.time(2), datetime.time(3)],
        TypeError,
        "expected times as numbers, datetimes or timedeltas",
    ),
    (
        ["a", "b", "c"],
        TypeError,
        r"expected times as numbers, .*; got <U1\. Text is parsed by numpy\.asarray\(times, dtype=",
    ),
    (
        ["2026-01-01"] * 3,
        TypeError,
        r"got <U10\. Text is parsed by .*datetime64\[s\]'\) or pandas\.to_datetime\(times\)",
    ),
    (pd.Series(["a", "b", "c"]), TypeError, "expected times as numbers, datetimes or timedeltas"),
    ([0, 1j, 2], TypeError, "expected times as numbers, datetimes or timedeltas; got complex128"),
    ([False, True, True], TypeError, "expected times as numbers, datetimes or timedeltas; got bool"),
    ("abc", TypeError, "expected times as a list or an array; got 'abc'"),
    (3, TypeError, "expected times as a list or an array; got 3"),
    (iter([0, 1, 2]), TypeError, "expected times as a list or an array; got <list_iterator"),
]


@pytest.mark.parametrize(("times", "error", "text"), BAD_TIMES, ids=[text for *_, text in BAD_TIMES])
@pytest.mark.parametrize("two_sided", [False, True], ids=["", "two-sided"])
def test_bad_times_are_refused(two_sided: bool, times, error, text: str):
    with pytest.raises(error, match=text):
        smooth([1.0, 2.0, 3.0], half_life=1.0, times=times, two_sided=two_sided)


def test_times_are_as_many_as_values_along_the_axis():
    x = np.ones((2, 3))
    for axis, n in ((0, 2), (1, 3)):
        smooth(x, half_life=1.0, times=range(n), axis=axis)
        with pytest.raises(ValueError, match=f"expected times of length {n}, one for each value along the axis"):
            smooth(x, half_life=1.0, times=range(5 - n), axis=axis)


@pytest.mark.parametrize("half_life", [datetime.timedelta(seconds=2), np.timedelta64(2, "s"), pd.Timedelta("2s")])
@pytest.mark.parametrize("times", [None, [0, 1, 2]], ids=["no times", "numbers"])
def test_a_duration_needs_times_that_are_datetimes(times, half_life):
    with pytest.raises(
        TypeError, match=r"half_life=.*2.* is a duration, which needs times= of datetimes or timedeltas"
    ):
        smooth([1.0, 2.0, 3.0], half_life=half_life, times=times)


@pytest.mark.parametrize("half_life", [datetime.timedelta(0), datetime.timedelta(seconds=-1), np.timedelta64("NaT")])
def test_a_duration_is_longer_than_nothing(half_life):
    with pytest.raises(ValueError, match="half_life must be a finite number above 0"):
        smooth([1.0, 2.0, 3.0], half_life=half_life, times=STAMPS["datetimes"][:3])


OUTSIDE = [
    ("alpha", [0.0, -0.1, 1.1, NAN, INF], r"in \(0, 1\]"),
    ("decay", [1.0, -0.1, 1.1, NAN, INF], r"in \[0, 1\)"),
    ("half_life", [0.0, -1.0, NAN, INF], "finite.* above 0"),
    ("span", [0.9, 0.0, -1.0, NAN, INF], "finite.* at least 1"),
    ("com", [-0.1, NAN, INF], "finite.* at least 0"),
]


@pytest.mark.parametrize(
    ("knob", "bad", "domain"), [(knob, bad, domain) for knob, several, domain in OUTSIDE for bad in several]
)
def test_knobs_outside_their_range_are_refused(knob: str, bad: float, domain: str):
    with pytest.raises(ValueError, match=f"{knob} must be .*{domain}; got {knob}={bad:g}"):
        smooth([1.0, 2.0], **{knob: bad})
    good = {"alpha": 0.5, "decay": 0.5, "half_life": 2.0, "span": 2.0, "com": 2.0}[knob]
    for several in ([bad], [good, bad], np.array([good, bad]), np.array(bad)):
        with pytest.raises(ValueError, match=f"{knob} must be {domain}, everywhere; got {bad:g}"):
            smooth([1.0, 2.0], **{knob: several})
    for tensor in (torch.tensor([good, bad]), torch.tensor(bad), torch.tensor(bad, requires_grad=True)):
        with pytest.raises(ValueError, match=f"{knob} must be {domain}, everywhere; got {bad:g}"):
            smooth(torch.ones(2), **{knob: tensor})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, TypeError, "expected exactly one of half_life, decay, alpha, span, com; got none"),
        ({"alpha": 0.5, "decay": 0.9}, TypeError, r"got decay=0\.9 and alpha=0\.5\. Keep one"),
        ({"alpha": [0.5, 0.5], "decay": 0.9}, TypeError, r"got alpha= and decay=\. Keep one\."),
        (
            {"alpha": [0.5, 0.5], "decay": [0.9]},
            TypeError,
            r"expected exactly one of half_life, .*; got decay= and alpha=",
        ),
        ({"profile": Uniform(), "alpha": 0.5}, TypeError, r"got Uniform\(\) and alpha=: keep one of them"),
        ({"profile": Uniform(), "alpha": [0.5]}, TypeError, r"got Uniform\(\) and alpha=: keep one of them"),
        (
            {"profile": "uniform"},
            TypeError,
            r"profile must be a profile, such as Power\(sigma_rel=0\.1\); got 'uniform'",
        ),
        (
            {"profile": Uniform(), "debias": False},
            TypeError,
            r"debias= belongs to the profile: Exponential\(half_life=\.\.\., deb",
        ),
        (
            {"profile": Uniform(), "initial": 1.0},
            ValueError,
            r"initial= needs a profile that forgets, .*; Uniform\(\) does not",
        ),
        (
            {"profile": Power(sigma_rel=0.1), "weigh": "value"},
            ValueError,
            r'weigh="value" has a meaning for Exponential and Uni',
        ),
        ({"alpha": "0.5"}, TypeError, r"alpha must be a number; got '0\.5' \(str\)"),
        ({"alpha": True}, TypeError, r"alpha must be a number; got True \(bool\)"),
        ({"alpha": 0.5j}, TypeError, r"alpha must be a number; got 0\.5j \(complex\)"),
        ({"alpha": ["0.5", "0.5"]}, TypeError, "alpha"),
        ({"alpha": ["a", "b"]}, TypeError, "alpha"),
        ({"alpha": [0.5j, 0.5]}, TypeError, "alpha"),
        ({"alpha": [[0.5], [0.5, 0.4]]}, (TypeError, ValueError), "alpha"),
        (
            {"alpha": torch.tensor([0.5, 0.5])},
            TypeError,
            r"alpha is a tensor, but x is not one: give both as tensors, or alpha\.numpy",
        ),
        (
            {"alpha": [0.5] * 3},
            ValueError,
            r"expected alpha of a shape that broadcasts to x's, \[2\]; got \[3\]\. One for each step",
        ),
        ({"alpha": [[0.5, 0.5]]}, ValueError, r"expected alpha of a shape that broadcasts to x's, \[2\]; got \[1, 2\]"),
        ({"alpha": []}, ValueError, r"expected alpha of a shape that broadcasts to x's, \[2\]; got \[0\]"),
        (
            {"half_life": [3.0] * 3},
            ValueError,
            r"expected half_life of a shape that broadcasts to x's, .* size 1 along axis 0",
        ),
        ({"alpha": 0.5, "weigh": "times"}, ValueError, """weigh must be "time" or "value"; got 'times'"""),
        ({"alpha": [0.5], "weigh": "times"}, ValueError, """weigh must be "time" or "value"; got 'times'"""),
        (
            {"alpha": 0.5, "nan": "drop"},
            ValueError,
            "nan must be one of 'skip', 'decay', 'propagate', 'raise'; got 'drop'",
        ),
        (
            {"alpha": [0.5], "nan": None},
            ValueError,
            "nan must be one of 'skip', 'decay', 'propagate', 'raise'; got None",
        ),
        ({"alpha": 0.5, "min_periods": -1}, ValueError, "min_periods must be an integer of at least 0; got -1"),
        ({"alpha": 0.5, "min_periods": 1.0}, ValueError, r"min_periods must be an integer of at least 0; got 1\.0"),
        ({"alpha": 0.5, "min_periods": True}, ValueError, "min_periods must be an integer of at least 0; got True"),
        ({"alpha": 0.5, "min_periods": None}, ValueError, "min_periods must be an integer of at least 0; got None"),
        ({"alpha": 0.5, "initial": NAN}, ValueError, "expected initial to be finite; got nan"),
        ({"alpha": 0.5, "initial": np.array(INF)}, ValueError, "expected initial to be finite; got inf"),
        (
            {"alpha": 0.5, "initial": [1.0, 2.0]},
            ValueError,
            r"expected initial of a shape that broadcasts to x's without its axis, \[\]",
        ),
        ({"alpha": 0.5, "initial": "1.5"}, TypeError, "initial"),
        ({"alpha": 0.5, "initial": "a"}, TypeError, "initial"),
        ({"alpha": 0.5, "initial": 1j}, TypeError, "initial"),
        (
            {"alpha": 0.5, "initial": torch.tensor(1.0, requires_grad=True)},
            TypeError,
            "initial is a tensor, but x is not one",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, error, text: str):
    with pytest.raises(error, match=text):
        smooth([1.0, 2.0], **arguments)
    with pytest.raises(error, match=text):
        ewm([1.0, 2.0], **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"initial": torch.tensor([1.0, NAN])},
            ValueError,
            r"expected initial to be finite; got tensor\(\[1., nan\]\)",
        ),
        ({"initial": torch.ones(3)}, ValueError, r"expected initial of a shape .* without its axis, \[2\]; got \[3\]"),
        ({"initial": torch.tensor(1j)}, TypeError, "initial"),
        (
            {"alpha": torch.ones(2)},
            ValueError,
            r"expected alpha of a shape that broadcasts to x's, \[2, 4\]; got \[2\]",
        ),
        ({"alpha": torch.tensor(0.5j)}, TypeError, "alpha"),
        ({"alpha": torch.tensor([[0.5], [2.0]])}, ValueError, r"alpha must be in \(0, 1\], everywhere; got 2"),
    ],
)
def test_bad_tensors_are_refused(arguments: dict, error, text: str):
    with pytest.raises(error, match=text):
        smooth(torch.ones(2, 4), **{"alpha": 0.5, **arguments})


@pytest.mark.parametrize(("positional", "readings"), [(0.9, ("decay", "alpha")), (100, ("half_life", "span"))])
def test_a_positional_number_could_be_read_two_ways(positional: float, readings: tuple[str, str]):
    for name, call in (("smooth", smooth), ("ewm", ewm)):
        text = (
            rf"{name}\(x, {positional}\) could be read two ways\. Write {name}\(x, {readings[0]}={positional}\) .*, or "
        )
        with pytest.raises(TypeError, match=text + rf"{name}\(x, {readings[1]}={positional}\)"):
            call([1.0, 2.0], positional)


def test_a_sum_has_nothing_to_debias():
    for rule in ({"debias": False}, {"initial": 1.0}):
        with pytest.raises(
            ValueError, match="a sum starts at 0, with nothing to debias: leave out debias=False and initial="
        ):
            ewm([1.0, 2.0], alpha=0.5, **rule).sum()


def test_both_sides_have_nothing_to_debias():
    for rule in ({"debias": False}, {"initial": 1.0}):
        with pytest.raises(ValueError, match="two_sided weighs by distance alone: leave out debias=False and initial="):
            smooth([1.0, 2.0], alpha=0.5, two_sided=True, **rule)


BAD_Y = [
    ([1.0, 2.0, 3.0], [1.0, 2.0], ValueError, r"expected y of x's shape, \[3\]; got \[2\]"),
    ([[1.0, 2.0]], [1.0, 2.0], ValueError, r"expected y of x's shape, \[1, 2\]; got \[2\]"),
    ([1.0], "a", TypeError, "y: expected a list, a NumPy array, .*; got str"),
    ([1.0], ["a"], TypeError, "y: expected real numbers; got text"),
    ([1.0], [1j], TypeError, "y: expected real numbers; got an array of complex128"),
    ([1.0], 1.0, TypeError, "y: expected a list, a NumPy array, .*; got float"),
    ([1.0], None, TypeError, "y: expected a list, a NumPy array, .*; got NoneType"),
    ([1.0], [[1.0], [1.0, 2.0]], ValueError, "y: expected numbers, in lists of equal lengths"),
    (np.ones(2), torch.ones(2), TypeError, "y"),
    (torch.ones(2), np.ones(2), TypeError, "y"),
    (torch.ones(2), torch.ones(2, device="meta"), (TypeError, ValueError), "y.*device"),
]


@pytest.mark.parametrize(("x", "y", "error", "text"), BAD_Y, ids=[text for *_, text in BAD_Y])
@pytest.mark.parametrize("statistic", ["cov", "corr"])
def test_a_y_that_does_not_fit_is_refused(statistic: str, x, y, error, text: str):
    with pytest.raises(error, match=text):
        getattr(ewm(x, alpha=0.5), statistic)(y)


def test_x_and_y_may_differ_in_dtype_and_in_the_kind_of_list():
    given, tensor = np.array(VALUES), torch.tensor(VALUES)
    expected = ewm(given, alpha=0.5).cov(given[::-1])
    for x, y in (
        (VALUES, given[::-1]),
        (given, VALUES[::-1]),
        (given, given[::-1].astype("float32")),
        (given, given[::-1].astype(int)),
    ):
        close(ewm(x, alpha=0.5).cov(y), expected, rtol=1e-12)
    assert ewm(given.astype("float32"), alpha=0.5).cov(given).dtype == np.float32
    mixed = ewm(tensor.double(), alpha=0.5).cov(tensor.flip(0).bfloat16())
    np.testing.assert_allclose(mixed, expected, rtol=1e-12)


def test_what_failed_leaves_the_input_and_the_series_as_they_were():
    x = np.array(GAPPY)
    series = ewm(x, alpha=0.5, nan="raise")
    with pytest.raises(ValueError, match="finite values only"):
        series.mean()
    np.testing.assert_array_equal(x, GAPPY)
    series = ewm(x, alpha=0.5)
    first = [series.mean(), series.var(), series.mean(), series.var()]
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(first[1], first[3])
    np.testing.assert_array_equal(x, GAPPY)


def test_a_negated_view_is_smoothed_as_what_it_is():
    x = torch.tensor([1.0 + 2.0j, 3.0 + 4.0j]).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(smooth(x, alpha=0.5), smooth(-torch.tensor([2.0, 4.0]), alpha=0.5))
