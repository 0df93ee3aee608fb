"""Steps that differ, missing values and second moments in compiled passes: beside whole-array operations and the
definition."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy
import pytest
import torch
from tests.conftest import NATIVE_MISSING

import ewma
from ewma import kernels

if NATIVE_MISSING:
    pytest.skip(NATIVE_MISSING, allow_module_level=True)

from ewma.kernels import _native

LARGE = (1 << 20) + 12_345


def values(*shape: int, dtype: str = "d", offset: float = 0.0) -> Any:
    return (numpy.random.default_rng(0).normal(size=shape) + offset).astype(dtype)


def with_gaps(x: Any, seed: int = 1) -> Any:
    x = x.copy()
    x[numpy.random.default_rng(seed).uniform(size=x.shape) < 0.2] = math.nan
    return x


def both_ways(monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[Any, Any]:
    made = []
    for kernel in ("native", "foreach"):
        monkeypatch.setenv("EWMA_KERNEL", kernel)
        made.append(numpy.asarray(call(), "d"))
    return made[0], made[1]


def statistics(x: Any, y: Any, **arguments: Any) -> Any:
    series = ewma.ewm(x, **arguments)
    made = [series.mean(), series.var(), series.std(unbiased=False), series.zscore(), series.cov(y), series.corr(y)]
    return [numpy.asarray(one, "d") for one in (*made, *series.bands())]


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("nan", ["skip", "decay", "propagate"])
@pytest.mark.parametrize(("debias", "timed"), list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize(("shape", "axis"), [((300,), 0), ((3, 130), 1), ((130, 20), 0), ((2, 90, 3), 1)])
def test_every_statistic_is_that_of_the_general_way(
    monkeypatch: pytest.MonkeyPatch, shape: Any, axis: int, debias: bool, timed: bool, nan: Any, gaps: bool
) -> None:
    x, y = values(*shape, offset=2.0), values(*shape)[::-1].copy()
    if gaps:
        x, y = with_gaps(x), with_gaps(y, 2)
    times = numpy.cumsum(numpy.random.default_rng(3).integers(0, 4, shape[axis])) if timed else None
    got, right = both_ways(
        monkeypatch, lambda: statistics(x, y, half_life=5.0, axis=axis, debias=debias, nan=nan, times=times)
    )
    numpy.testing.assert_allclose(got, right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("alpha_shape", [(60, 1), (1, 7), (60, 7)], ids=str)
@pytest.mark.parametrize("nan", ["skip", "decay"])
def test_shares_that_differ_by_step_and_channel(monkeypatch: pytest.MonkeyPatch, alpha_shape: Any, nan: Any) -> None:
    x, alpha = with_gaps(values(60, 7)), numpy.random.default_rng(4).uniform(0.01, 1.0, alpha_shape)
    got, right = both_ways(monkeypatch, lambda: statistics(x, values(60, 7), alpha=alpha, axis=0, nan=nan))
    numpy.testing.assert_allclose(got, right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("profile", [ewma.Power(sigma_rel=0.1), ewma.Uniform()], ids=str)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_tensors_of_other_profiles(monkeypatch: pytest.MonkeyPatch, name: str, profile: Any) -> None:
    x = torch.from_numpy(with_gaps(values(3, 500))).to(getattr(torch, name))
    got, right = both_ways(monkeypatch, lambda: [ewma.smooth(x, profile).double(), ewma.ewm(x, profile).var().double()])
    numpy.testing.assert_allclose(got, right, rtol=2.0 * torch.finfo(x.dtype).eps)


def test_a_tensor_that_needs_a_gradient_is_read_without_one() -> None:
    x = torch.from_numpy(with_gaps(values(200))).requires_grad_()
    with torch.no_grad():
        made = ewma.ewm(x, alpha=0.1).var()
    torch.testing.assert_close(made, ewma.ewm(x.detach(), alpha=0.1).var(), equal_nan=True)


@pytest.mark.parametrize("large", [1e200, 1.7e308])
def test_what_overflows_goes_the_general_way(monkeypatch: pytest.MonkeyPatch, large: float) -> None:
    x = with_gaps(values(300)) * (large / 4.0)
    got, right = both_ways(monkeypatch, lambda: ewma.smooth(x, alpha=0.2))
    numpy.testing.assert_allclose(got, right, rtol=1e-12, atol=1e-13 * large)


# The spread of whole series


def truth(x: Any, lost: float, held: float | None, unbiased: bool) -> tuple[Any, Any]:
    """Mean and variance step by step, in more digits than float64 has; not debiased from `held`, the mean before."""
    wide = numpy.longdouble
    means, variances = [], []
    weight, mean, spread, pairs = wide(0 if held is None else 1), wide(held or 0), wide(0), wide(0)
    keep = 1 - wide(lost)
    for value in x.astype(wide):
        gain = wide(1) if held is None else wide(lost)
        after = keep * weight + gain
        d, share = value - mean, gain / after
        mean, spread = mean + share * d, (1 - share) * (spread + share * d * d)
        pairs = keep**2 * pairs + 2 * keep * weight * gain
        weight = after
        means.append(mean)
        some = float(pairs) > 0.0
        variances.append(spread if not unbiased else spread * weight**2 / pairs if some else wide(math.nan))
    return numpy.array(means), numpy.array(variances)


def spread(
    x: Any,
    lost: float,
    start: float | None,
    kind: int,
    unbiased: bool,
    k: float = 2.0,
    threads: int = 1,
    dtype: str = "d",
) -> Any:
    outs = tuple(numpy.full(x.shape, 7.0, dtype) for _ in range(3 if kind == 2 else 1))
    begin = None if start is None else numpy.full((x.shape[0], 1, x.shape[2]), start)
    held = 0.0 if start is None else 1.0 / lost
    assert _native.spread(x, outs, begin, held, lost, 1.0 - lost, start is None, kind, k, unbiased, threads)
    return outs


@pytest.mark.parametrize("instructions", _native.instruction_sets())
@pytest.mark.parametrize("n", [1, 2, 15, 17, 1007, 1009, 3100])
@pytest.mark.parametrize("lost", [1e-6, 1e-3, 0.3, 0.9])
@pytest.mark.parametrize("start", [None, 1.5])
@pytest.mark.parametrize("unbiased", [True, False])
def test_spreads_are_the_definition_s(
    instructions: str, n: int, lost: float, start: float | None, unbiased: bool
) -> None:
    x = values(n, offset=3.0)
    means, variances = truth(x, lost, start, unbiased)
    before = _native.use(instructions)
    try:
        for kind, right in enumerate([[variances], [numpy.sqrt(variances)]]):
            (got,) = spread(x.reshape(1, n, 1), lost, start, kind, unbiased)
            numpy.testing.assert_allclose(got.ravel(), numpy.array(right[0], "d"), rtol=1e-11, atol=1e-13)
        bands = spread(x.reshape(1, n, 1), lost, start, 2, unbiased, k=3.0)
        width = 3.0 * numpy.sqrt(variances)
        for got, right in zip(bands, (means - width, means, means + width), strict=True):
            numpy.testing.assert_allclose(got.ravel(), right.astype("d"), rtol=1e-11, atol=1e-12)
    finally:
        _native.use(before)


@pytest.mark.parametrize("dtype", "fde")
@pytest.mark.parametrize("view", [lambda x: x[:, ::-1], lambda x: x[::-1, ::3], lambda x: x.transpose(2, 1, 0)])
def test_spreads_of_any_layout(view: Any, dtype: str) -> None:
    x = view(values(4, 400, 5, dtype=dtype))
    (got,) = spread(x, 0.05, None, 0, True, dtype=dtype)
    for row, column in itertools.product(range(x.shape[0]), range(x.shape[2])):
        _, right = truth(x[row, :, column], 0.05, None, True)
        numpy.testing.assert_allclose(got[row, :, column], right.astype(dtype), rtol=4.0 * numpy.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", "fde")
@pytest.mark.parametrize("inner", [8, 63, 64, 300, 1100])
@pytest.mark.parametrize("start", [None, 1.5])
def test_spreads_of_columns_are_the_definition_s(start: float | None, inner: int, dtype: str) -> None:
    x = values(2, 1030, inner, dtype=dtype, offset=4.0)
    for unbiased in (True, False):
        bands = spread(x, 0.02, start, 2, unbiased, k=3.0, dtype=dtype)
        (variance,), (deviation,) = (spread(x, 0.02, start, kind, unbiased, dtype=dtype) for kind in (0, 1))
        for row, column in ((0, 0), (1, inner // 2), (1, inner - 1)):
            mean, right = truth(x[row, :, column], 0.02, start, unbiased)
            expected = (right, numpy.sqrt(right), *(mean + k * numpy.sqrt(right) for k in (-3, 0, 3)))
            for got, wide in zip((variance, deviation, *bands), expected, strict=True):
                wide = wide if got is not bands[1] else mean
                close = {"rtol": 1e-11, "atol": 1e-13} if dtype == "d" else {"rtol": 2.0 * numpy.finfo(dtype).eps}
                numpy.testing.assert_allclose(got[row, :, column], wide.astype("d"), **close)


@pytest.mark.parametrize("shape", [(1, 2100, 150), (3, 700, 40), (1, 90, 2500)])
def test_columns_have_the_same_bits_from_every_instruction_set_and_any_threads(shape: tuple[int, int, int]) -> None:
    x = values(*shape, dtype="f", offset=4.0)
    right = spread(x, 0.02, None, 2, True, dtype="f")
    for name, threads in itertools.product(_native.instruction_sets(), (1, 2, 3)):
        before = _native.use(name)
        got = spread(x, 0.02, None, 2, True, threads=threads, dtype="f")
        _native.use(before)
        for one, other in zip(got, right, strict=True):
            numpy.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("threads", [1, 2])
def test_spreads_of_series_that_take_turns(threads: int) -> None:
    x = values(1, 2100, 300, offset=4.0)[:, :, ::2]
    bands = spread(x, 0.02, None, 2, True, threads=threads)
    for column in (0, 63, 64, 149):
        for got, right in zip(bands, spread(x[:, :, column : column + 1].copy(), 0.02, None, 2, True), strict=True):
            numpy.testing.assert_allclose(got[:, :, column : column + 1], right, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("x_dtype", "dtype"), [("d", "f"), ("f", "d"), ("e", "f")])
def test_spreads_of_another_dtype(x_dtype: str, dtype: str) -> None:
    x = values(1, 300, 70, dtype=x_dtype)
    for got, right in zip(
        *(spread(one, 0.02, None, 2, True, dtype=dtype) for one in (x, x.astype(dtype))), strict=True
    ):
        numpy.testing.assert_allclose(got, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 4, 7])
@pytest.mark.parametrize("inner", [1, 8, 61, 128])
def test_large_spreads_go_around_the_caches_wherever_they_begin(inner: int, offset: int) -> None:
    n = (1 << 22) // inner + 77
    x = values(1, n, inner, dtype="f")
    rooms = [numpy.full(n * inner + 16, 7.0, "f") for _ in range(3)]
    outs = tuple(room[offset : offset + n * inner].reshape(x.shape) for room in rooms)
    assert _native.spread(x, outs, None, 0.0, 0.01, 0.99, True, 2, 2.0, True, 2)
    small = spread(x[:, :1000], 0.01, None, 2, True, dtype="f")
    for room, out, right in zip(rooms, outs, small, strict=True):
        assert (room[:offset] == 7.0).all()
        assert (room[offset + n * inner :] == 7.0).all()
        numpy.testing.assert_allclose(out[:, :1000], right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lost", [1e-6, 1e-3, 0.3])
def test_threads_agree_on_spreads(lost: float) -> None:
    x = values(1, LARGE, 1, offset=5.0)
    one, *others = (spread(x, lost, None, 2, True, threads=threads) for threads in (1, 2, 3))
    for other in others:
        for got, right in zip(other, one, strict=True):
            numpy.testing.assert_allclose(got, right, rtol=1e-10, atol=1e-12)


def test_a_missing_value_and_a_mean_that_hides_are_told() -> None:
    def fits(x: Any) -> bool:
        out = (numpy.empty_like(x),)
        return _native.spread(x, out, None, 0.0, 0.1, 0.9, True, 0, 0.0, True, 1)

    x = values(2, 3000, 1)
    assert fits(x)
    for place in ((0, 0, 0), (1, 1500, 0), (1, 2999, 0)):
        wrong = x.copy()
        wrong[place] = math.nan
        assert not fits(wrong)
    x[1, :, 0] = values(3000) + numpy.repeat([1e8, 1e9], 1500)
    assert not fits(x)


def test_what_a_mean_hides_is_told_in_more_digits() -> None:
    x = values(4000) + numpy.repeat([1e8, 1e9], 2000)
    exact = (x - 1e9)[2600:]
    got = ewma.ewm(x, alpha=0.3).var(unbiased=False)[2600:]
    right = truth(exact, 0.3, None, False)[1]
    numpy.testing.assert_allclose(got[400:], right[400:].astype("d"), rtol=1e-6)


# What is refused


def test_refused_before_anything_is_read() -> None:
    x, out = numpy.ones((2, 5, 3)), numpy.zeros((2, 5, 3))
    terms, state = (numpy.ones((2, 5, 3)),) * 4, numpy.zeros((5, 2, 1, 3))
    results = tuple(numpy.empty((2, 5, 3)) for _ in range(5))
    assert _native.weigh((x,), terms, results, state, True, False, False, False) is None
    for xs, steps, made, held, said in (
        ((x[:, :4],), terms, results, state, "of one shape"),
        ((x,), terms[:3], results, state, "as many arrays as are needed"),
        ((x,), terms, (*results[:4], None), state, "got None"),
        ((x,), terms, (*results[:4], out.astype("f")), state, "expected float64"),
        ((x,), terms, results, state[:4], "one for each series"),
    ):
        with pytest.raises(ValueError, match=said):
            _native.weigh(xs, steps, made, held, True, False, False, False)
    shares, sums = (numpy.ones((2, 5, 3)),) * 2, numpy.zeros((5, 2, 1, 3))
    assert _native.average((x,), shares, (out,), (out.copy(),), bytes([0, 0]), sums, False)[0]
    for share, means, spreads, pairs, held, said in (
        (shares[:1], (out,), (out,), bytes([0, 0]), sums, "as many arrays as are needed"),
        (shares, (None,), (out,), bytes([0, 0]), sums, "got None"),
        (shares, (out,), (out,), bytes([0]), sums, "two numbers for each spread"),
        (shares, (out,), (out,), bytes([0, 1]), sums, "spreads of the given series"),
        (shares, (out,), (), b"", sums, "one for each series"),
    ):
        with pytest.raises(ValueError, match=said):
            _native.average((x,), share, means, spreads, pairs, held, False)
    given: list[Any] = [x, (out,), None, 0.0, 0.5, 0.5, True, 0, 0.0, True, 1]
    assert _native.spread(*given)
    for place, wrong, said in (
        (1, (out, out), "one array to write"),
        (1, (x,), "shares no memory"),
        (2, numpy.zeros(5), "one for each series"),
        (4, 1.5, "from 0 to 1"),
        (5, 0.0, "keep something"),
        (7, 3, "one array to write"),
    ):
        with pytest.raises(ValueError, match=said):
            _native.spread(*given[:place], wrong, *given[place + 1 :])


def test_it_serves_unless_another_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    compiled = kernels.compiled()
    monkeypatch.setattr(compiled, "average", lambda *given: called.append(1) or _native.average(*given))
    ewma.smooth(with_gaps(values(50)), alpha=0.1)
    assert called
    called.clear()
    monkeypatch.setenv("EWMA_KERNEL", "foreach")
    ewma.smooth(with_gaps(values(50)), alpha=0.1)
    assert not called
