"""`out`: in any floating dtype, anywhere in memory, sharing x's or not; and what cannot be written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from tests.streams import INF, NAN, double

from ewma import ewm, smooth

VALUES = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
GAPPY = [NAN, 1.0, NAN, INF, 5.0, -INF, NAN, 6.0]
RIGHT = smooth(VALUES, alpha=0.5)
TORCH_FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OUT_DTYPES = ["float16", "float32", "float64", ">f8", "longdouble"]


@pytest.mark.parametrize("two_sided", [False, True], ids=["", "two-sided"])
@pytest.mark.parametrize("dtype", OUT_DTYPES)
def test_out_takes_the_result_in_any_floating_dtype(dtype: str, two_sided: bool):
    x, out = np.array([VALUES, GAPPY]), np.full((2, 8), 7.0, dtype=dtype)
    assert smooth(x, alpha=0.5, two_sided=two_sided, out=out) is out
    expected = smooth(x, alpha=0.5, two_sided=two_sided)
    np.testing.assert_array_equal(out, expected.astype(dtype))


@pytest.mark.parametrize("two_sided", [False, True], ids=["", "two-sided"])
@pytest.mark.parametrize("dtype", TORCH_FLOATS, ids=str)
def test_out_takes_a_tensor_in_any_floating_dtype(dtype, two_sided: bool):
    x, out = torch.tensor([VALUES, GAPPY], dtype=torch.float64), torch.full((2, 8), 7.0, dtype=dtype)
    assert smooth(x, alpha=0.5, two_sided=two_sided, out=out) is out
    torch.testing.assert_close(out, smooth(x, alpha=0.5, two_sided=two_sided).to(dtype), rtol=0, atol=0, equal_nan=True)


def places(x: Any) -> dict[str, tuple[Any, Any]]:
    """Inputs equal to x with a place for the result, which may share its memory."""
    whole = np.empty((4, 2 * x.shape[1] + 1)) if isinstance(x, np.ndarray) else x.new_empty(4, 2 * x.shape[1] + 1)
    n = x.shape[1]
    copied = x.copy() if isinstance(x, np.ndarray) else x.clone()
    whole[:2, :n], shifted = x, whole[:2, :n]
    below = np.empty((x.shape[1], 2)) if isinstance(x, np.ndarray) else x.new_empty(x.shape[1], 2)
    return {
        "x itself": (copied, copied),
        "shifted by one": (shifted, whole[:2, 1 : n + 1]),
        "every second": (x, whole[2:, : 2 * n : 2]),
        "transposed": (x, below.T),
        "overlapping, every second": (shifted, whole[:2, : 2 * n : 2]),
    }


@pytest.mark.parametrize("two_sided", [False, True], ids=["", "two-sided"])
@pytest.mark.parametrize("n", [8, 300])
@pytest.mark.parametrize("gappy", [False, True], ids=["finite", "gappy"])
@pytest.mark.parametrize(
    "place", ["x itself", "shifted by one", "every second", "transposed", "overlapping, every second"]
)
@pytest.mark.parametrize("kind", [np.array, torch.from_numpy], ids=["numpy", "torch"])
def test_out_may_lie_anywhere(kind, place: str, gappy: bool, n: int, two_sided: bool):
    values = np.random.default_rng(8).normal(size=(2, n))
    if gappy:
        values[0, ::3] = NAN
    for axis in (0, 1):
        expected = smooth(values, half_life=3, axis=axis, two_sided=two_sided)
        x, out = places(kind(values.copy()))[place]
        assert smooth(x, half_life=3, axis=axis, two_sided=two_sided, out=out) is out
        np.testing.assert_allclose(double(out), expected, rtol=1e-12, atol=1e-13)


def test_out_is_for_lists_and_frames_too_an_array():
    for x in (VALUES, pd.Series(VALUES), pl.Series(VALUES)):
        out = np.empty(8)
        assert smooth(x, alpha=0.5, out=out) is out
        np.testing.assert_array_equal(out, RIGHT)


def test_the_mean_of_ewm_takes_out():
    out = np.empty(8)
    assert ewm(np.array(VALUES), alpha=0.5).mean(out=out) is out
    np.testing.assert_array_equal(out, RIGHT)


def test_out_of_an_inference_tensor():
    with torch.inference_mode():
        x, out = torch.tensor(VALUES), torch.empty(8)
        smooth(x, alpha=0.5, out=out)
    np.testing.assert_allclose(out, RIGHT, rtol=1e-6)
    inside = torch.empty(8)
    np.testing.assert_allclose(smooth(x, alpha=0.5, out=inside), RIGHT, rtol=1e-6)


X, T = np.array(VALUES), torch.tensor(VALUES)
LOCKED = np.zeros(8)
LOCKED.flags.writeable = False
GRADIENT = {"requires_grad": True}
OUT_ERRORS = [
    (X, [0.0] * 8, TypeError, "expected out to be an array or a tensor, as x is; got list"),
    (X, torch.zeros(8), TypeError, "expected out to be an array or a tensor, as x is; got Tensor"),
    (T, np.zeros(8), TypeError, "expected out to be an array or a tensor, as x is; got ndarray"),
    (pd.Series(VALUES), pd.Series(VALUES), TypeError, "expected out to be an array or a tensor, as x is; got Series"),
    (X, np.zeros(7), ValueError, r"expected out of x's shape, \[8\]; got \[7\]"),
    (X, np.zeros((1, 8)), ValueError, r"expected out of x's shape, \[8\]; got \[1, 8\]"),
    (T, torch.zeros(9), ValueError, r"expected out of x's shape, \[8\]; got \[9\]"),
    (X, np.zeros(8, int), TypeError, "expected out of a floating dtype; got int64"),
    (X, np.zeros(8, complex), TypeError, "expected out of a floating dtype; got complex128"),
    (
        T,
        torch.zeros(8, dtype=torch.int32),
        TypeError,
        r"expected out of a floating dtype on cpu; got torch.int32 on cpu",
    ),
    (
        T,
        torch.zeros(8, device="meta"),
        TypeError,
        r"expected out of a floating dtype on cpu; got torch.float32 on meta",
    ),
    (X, LOCKED, ValueError, "expected out to be writeable; got a read-only array"),
    (
        T,
        torch.zeros(8, **GRADIENT),
        ValueError,
        r"out needs a gradient, and cannot be written in place: give out\.detach\(\)",
    ),
    (
        T.clone().requires_grad_(),
        torch.zeros(8),
        ValueError,
        r"out= cannot be written where autograd has to remember: leave it",
    ),
    (torch.zeros(2, 8), torch.zeros(8).expand(2, 8), (ValueError, RuntimeError), "memory"),
]


@pytest.mark.parametrize("two_sided", [False, True], ids=["", "two-sided"])
@pytest.mark.parametrize(("x", "out", "error", "text"), OUT_ERRORS, ids=[text for *_, text in OUT_ERRORS])
def test_out_errors_leave_it_as_it_was(x, out, error, text: str, two_sided: bool):
    with pytest.raises(error, match=text):
        smooth(x, alpha=0.5, out=out, two_sided=two_sided)
    assert not torch.is_tensor(out) or out.is_meta or not out.any()
    assert torch.is_tensor(out) or not isinstance(out, np.ndarray) or not out.any()


@pytest.mark.parametrize("two_sided", [False, True], ids=["", "two-sided"])
@pytest.mark.parametrize("n", [3, 200_000])
@pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_raise_leaves_out_untouched(kind, n: int, two_sided: bool):
    values = np.ones(n)
    values[-1] = NAN
    out = kind(np.full(n, 7.0))
    with pytest.raises(
        ValueError, match=f'expected finite values only, by nan="raise"; got one that is not at step {n - 1}'
    ):
        smooth(kind(values), alpha=0.5, nan="raise", out=out, two_sided=two_sided)
    assert (out == 7.0).all()
