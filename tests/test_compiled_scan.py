"""The compiled scan along time beside the recurrence as it is written, in more digits; its threads; what is refused."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch
from tests.conftest import NATIVE_MISSING

import ewma
from ewma import kernels
from ewma.kernels import reference

if NATIVE_MISSING:
    pytest.skip(NATIVE_MISSING, allow_module_level=True)

from ewma.kernels import _native, compiled_scan

SIZES = [0, 1, 2, 15, 16, 17, 63, 1000, 1007, 1008, 1009, 1024, 16323]
LOST = [0.0, 1e-6, 1e-3, 0.3, 0.5, 0.9, 1.0]
ROUNDING = {"f": 2.0**-24, "d": 1e-14, "e": 2.0**-11}
LARGE = (1 << 20) + 12_345

each_dtype = pytest.mark.parametrize("dtype", "fde")
each_lost = pytest.mark.parametrize("lost", LOST)


@pytest.fixture(params=_native.instruction_sets())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.use(request.param)
    yield request.param
    _native.use(_native.instruction_sets()[0])


def values(*shape: int, dtype: str = "d", offset: float = 0.0) -> Any:
    return (numpy.random.default_rng(0).normal(size=shape) + offset).astype(dtype)


def truth(x: Any, base: Any, sums: Any, lost: Any, pre: Any, post: Any) -> Any:
    """The recurrence step by step, in more digits than float64 has."""
    wide = numpy.longdouble
    n = x.shape[1]
    lost, pre, post = (numpy.broadcast_to(numpy.asarray(each, wide), n) for each in (lost, pre, post))
    s, out = sums[:, 0].astype(wide), numpy.empty(x.shape, wide)
    for t in range(n):
        s = s + (pre[t] * (x[:, t].astype(wide) - base[:, 0]) - lost[t] * s)
        out[:, t] = base[:, 0] + post[t] * s
    return out


def ran(
    x: Any, lost: Any, pre: Any = 1.0, post: Any = 1.0, threads: int = 1, out: Any = None, seed: int = 1
) -> tuple[Any, Any, Any]:
    """What the kernel makes of x, with what is left of the sums; and what is right."""
    outer, _, inner = x.shape
    base, sums = numpy.random.default_rng(seed).normal(size=(2, outer, 1, inner))
    right = truth(x, base, sums, lost, pre, post)
    out = numpy.full(x.shape, numpy.nan, x.dtype) if out is None else out
    assert _native.scan(x, out, base, sums, lost, pre, post, threads)
    return out, sums, right


def error(got: Any, right: Any) -> float:
    """In units of the largest value."""
    if not right.size:
        return 0.0
    assert numpy.isfinite(got).all()
    return float(abs(got - right).max() / max(abs(right).max(), 1e-300))


# Values


@each_dtype
@each_lost
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.usefixtures("instructions")
def test_one_series_of_any_length(n: int, lost: float, dtype: str) -> None:
    x = values(1, n, 1, dtype=dtype)
    got, sums, right = ran(x, lost, post=lost or 1.0)
    assert error(got, right) <= 1.01 * ROUNDING[dtype]
    if n and dtype == "d":
        assert sums[0, 0, 0] * (lost or 1.0) == pytest.approx(float(got[0, -1, 0]), abs=8.0)  # the base is between


@each_dtype
@pytest.mark.parametrize("lost", [0.01, 0.8])
@pytest.mark.parametrize(("outer", "inner"), list(itertools.product([1, 3, 17, 300], repeat=2)))
def test_many_series(outer: int, inner: int, lost: float, dtype: str) -> None:
    got, _, right = ran(values(outer, 37, inner, dtype=dtype), lost, post=lost or 1.0)
    assert error(got, right) <= 1.01 * ROUNDING[dtype]


@each_dtype
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 1), (1, 3), (2, 40), (1, 300)])
def test_the_sums_go_on(outer: int, inner: int, dtype: str) -> None:
    x = values(outer, 1500, inner, dtype=dtype)
    base, sums = numpy.zeros((2, outer, 1, inner))
    right, out = truth(x, base, sums, 0.01, 1.0, 0.01), numpy.empty_like(x)
    for begin, end in itertools.pairwise([0, 1, 1, 17, 600, 1500]):
        part = slice(begin, end)
        assert _native.scan(x[:, part], out[:, part], base, sums, 0.01, 1.0, 0.01, 1)
    assert error(out, right) <= 1.01 * ROUNDING[dtype]


@each_dtype
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 1), (1, 3), (2, 40)])
@pytest.mark.parametrize("which", ["pre", "post", "both", "neither"])
@pytest.mark.parametrize("lost", [0.1, 0.9])
def test_factors_of_each_step(outer: int, inner: int, lost: float, which: str, dtype: str) -> None:
    n = 1100
    drawn = numpy.random.default_rng(2).uniform(size=(2, n))
    factors: dict[str, Any] = {"pre": 1.0 if which == "post" else 1.5, "post": 0.5}
    for name, vector in zip(factors, drawn, strict=True):
        if which in (name, "both"):
            factors[name] = numpy.ascontiguousarray(vector)
    got, _, right = ran(values(outer, n, inner, dtype=dtype), lost, **factors)
    assert error(got, right) <= 1.01 * ROUNDING[dtype]


@pytest.mark.parametrize("lost", [1e-6, 1e-4, 0.02, 0.7])
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 8)])
def test_float32_rounds_once_whatever_the_offset(lost: float, outer: int, inner: int) -> None:
    """As right as the nearest float32, and half as much again for the step between two."""
    n = 300_000
    x = values(outer, n, inner, dtype="f", offset=1000.0)
    out = numpy.empty_like(x)
    assert _native.mean(x, out, None, 1.0 / lost, lost, False, 1)
    first = x[:, :1].astype("d")
    right = truth(x[:, :20_000], first, numpy.zeros_like(first), lost, 1.0, lost)
    assert (abs(out[:, :20_000] - right) <= 0.5001 * numpy.spacing(out[:, :20_000])).all()


@each_dtype
@each_lost
@pytest.mark.parametrize("debias", [True, False])
def test_a_constant_stays_what_it_is(debias: bool, lost: float, dtype: str) -> None:
    for shape in ((1, 3000, 1), (2, 50, 30), (4, 700, 2), (1, 70, 133)):
        x, start = numpy.full(shape, 0.1, dtype), numpy.full((shape[0], 1, shape[2]), numpy.array(0.1, dtype), "d")
        for begin, held in ((None, 0.0), (None, 3.0), (start, 1e6)):
            out = numpy.empty_like(x)
            assert _native.mean(x, out, begin, held, lost, debias, 1)
            assert (out == x).all()


@each_dtype
@each_lost
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("outer", "n", "inner"), [(1, 3100, 1), (3, 999, 1), (2, 1100, 40), (1, 37, 3), (1, 20, 700)])
def test_debiased_means(outer: int, n: int, inner: int, share: float, lost: float, dtype: str) -> None:
    """mean[t] = mean[t-1] + (x[t] - mean[t-1]) / weight[t], in more digits than float64 has."""
    x, start, held = values(outer, n, inner, dtype=dtype, offset=1.0), values(outer, 1, inner), share / (lost or 1e-7)
    mean, weight, right = start[:, 0].astype(numpy.longdouble), numpy.longdouble(held), []
    for t in range(n):
        weight = weight + (1 - lost * weight)
        mean = mean + (x[:, t] - mean) / weight
        right.append(mean)
    out = numpy.full_like(x, numpy.nan)
    assert _native.mean(x, out, start, held, lost, True, 1)
    assert error(out, numpy.stack(right, 1)) <= 1.01 * ROUNDING[dtype]


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (2, 24)])
def test_a_spike_leaves_nothing_where_it_is_forgotten(outer: int, inner: int) -> None:
    x = values(outer, 200, inner)
    x[:, 3] = 1e30
    got, _, right = ran(x, 0.9)
    assert error(got[:, 150:], right[:, 150:]) < 1e-14


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (3, 1), (2, 40)])
def test_tensors_round_as_torch_does(name: str, outer: int, inner: int) -> None:
    dtype = getattr(torch, name)
    x = torch.from_numpy(values(outer, 999, inner)).to(dtype)
    x[:, 7] = x[:, 8] = 1e-7  # below what float16 has in full
    base, sums, out = *numpy.zeros((2, outer, 1, inner)), torch.full_like(x, math.nan)
    assert compiled_scan.mean(x, out, base, 1.0 / 0.3, 0.3, False)
    right = truth(x.double().numpy(), base, sums, 0.3, 1.0, 0.3).astype("d")
    same = out == torch.from_numpy(right).to(dtype)
    if name != "float64":  # the others differ only where a value lies next to the middle of two
        assert same.double().mean() > 0.999
    torch.testing.assert_close(out, torch.from_numpy(right).to(dtype))


@pytest.mark.parametrize("made", [torch.from_numpy, numpy.asarray])
@pytest.mark.parametrize("shape", [(1, 1000, 1), (3, 63, 1), (1, 63, 17), (4, 20, 300), (2, 0, 3), (0, 5, 2)])
@pytest.mark.parametrize("broadcast", [(1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 0, 0), (1, 0, 0)])
@pytest.mark.parametrize("with_kept", [False, True])
def test_shares_of_each_element(
    shape: tuple[int, int, int], broadcast: tuple[int, int, int], with_kept: bool, made: Any
) -> None:
    rng = numpy.random.default_rng(3)
    sizes = [1 if one else size for one, size in zip(broadcast, shape, strict=True)]
    kept = rng.uniform(size=sizes) ** rng.integers(1, 30, sizes)
    u, lost, kept = (made(array) for array in (values(*shape), 1.0 - kept, kept))
    initial = made(values(shape[0], 1, shape[2]))
    got, right = made(numpy.full(shape, numpy.nan)), made(numpy.full(shape, numpy.nan))
    assert compiled_scan.scan(u, lost, initial, got, kept if with_kept else None)
    reference.scan(u, lost, initial, right, kept if with_kept else None)
    numpy.testing.assert_allclose(numpy.asarray(got), numpy.asarray(right), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1000, 1), (3, 63, 1), (1, 63, 17), (2, 0, 3)])
@pytest.mark.parametrize("lost", [0.0, 0.25, 0.75, 1.0])
def test_sums_of_one_share(shape: tuple[int, int, int], lost: float) -> None:
    u, initial = values(*shape), values(shape[0], 1, shape[2])
    got, right = numpy.full(shape, numpy.nan), numpy.full(shape, numpy.nan)
    assert compiled_scan.scan(u, lost, initial, got, None)
    reference.scan(u, lost, initial, right)
    numpy.testing.assert_allclose(got, right, rtol=1e-12, atol=1e-12)


# Every instruction set, any number of threads


@each_dtype
@each_lost
def test_every_instruction_set_gives_the_same_bits(lost: float, dtype: str) -> None:
    for shape in ((1, 5001, 1), (3, 700, 5), (2, 100, 77)):
        x = values(*shape, dtype=dtype)
        made = []
        for name in _native.instruction_sets():
            _native.use(name)
            made.append(ran(x[:, ::-1], lost)[0])
        _native.use(_native.instruction_sets()[0])
        assert all((one == made[0]).all() for one in made)


@pytest.mark.parametrize("lost", [0.0, 1e-6, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, LARGE, 1), (2, LARGE // 2, 1), (LARGE // 100, 100, 1), (1, LARGE // 100, 100)])
def test_threads_agree(lost: float, shape: tuple[int, int, int]) -> None:
    x, made, ends, debiased = values(*shape, dtype="f", offset=10.0), [], [], []
    for threads in (1, 2, 3):
        base, sums, out = numpy.full((shape[0], 1, shape[2]), 10.0), *numpy.zeros((2, shape[0], 1, shape[2]))
        out, mean = numpy.full((2, *shape), numpy.nan, "f")
        assert _native.scan(x, out, base, sums, lost, 1.0, lost or 1e-6, threads)
        assert _native.mean(x, mean, None, 0.0, lost, True, threads)
        made.append(out)
        ends.append(sums)
        debiased.append(mean)
    for out, sums, mean in zip(made, ends, debiased, strict=True):
        assert (abs(out - made[0]) <= numpy.spacing(abs(made[0]))).all()
        assert (abs(mean - debiased[0]) <= numpy.spacing(abs(debiased[0]))).all()
        numpy.testing.assert_allclose(sums, ends[0], rtol=1e-9, atol=1e-9)


def test_a_past_too_large_to_be_forgotten_is_not() -> None:
    """Each segment begins by reading only so much of the past; a spike before that still counts."""
    x = values(1, LARGE, 1)
    x[0, 1000] = 1e300
    made = []
    for threads in (1, 2):
        base, sums, out = *numpy.zeros((2, 1, 1, 1)), numpy.empty_like(x)
        assert _native.scan(x, out, base, sums, 1e-3, 1.0, 1e-3, threads)
        made.append(out)
    numpy.testing.assert_allclose(made[1], made[0], rtol=1e-6)


def test_from_several_python_threads() -> None:
    xs = [values(1, LARGE, 1, dtype="f", offset=k) for k in range(4)]
    right = [ewma.smooth(x[0, :, 0], alpha=0.01) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            made = pool.map(lambda x: ewma.smooth(x[0, :, 0], alpha=0.01), xs)
            assert all(numpy.allclose(one, other, rtol=1e-6) for one, other in zip(made, right, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_after_a_fork() -> None:
    x = values(1, LARGE, 1, dtype="f")[0, :, 0]
    right = ewma.smooth(x, alpha=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that there are threads, which is the point
        child = os.fork()
    if not child:
        same = numpy.allclose(ewma.smooth(x, alpha=0.01), right, rtol=1e-6)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Layouts


@each_dtype
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::-1],
        lambda x: x[::-1, ::2, ::-1],
        lambda x: x.transpose(2, 1, 0),
        lambda x: x.transpose(0, 2, 1),
        lambda x: x.transpose(1, 0, 2),
        lambda x: x[:, :, 3:4],
        lambda x: x[1:2, 5:],
        lambda x: numpy.broadcast_to(x[:1], x.shape),
    ],
)
@pytest.mark.parametrize("lost", [0.2, 0.9])
def test_any_strides(view: Any, lost: float, dtype: str) -> None:
    x, out = values(31, 600, 7, dtype=dtype), numpy.full((31, 600, 7), numpy.nan, dtype)
    if not view(out).flags.writeable:
        got, _, right = ran(view(x), lost)
        assert error(got, right) <= 1.01 * ROUNDING[dtype]
        return
    for given, target in ((view(x), None), (view(x).copy(), view(out)), (view(x), view(out))):
        got, _, right = ran(given, lost, out=target)
        assert error(got, right) <= 1.01 * ROUNDING[dtype]
    untouched = numpy.ones_like(out, bool)
    view(untouched)[...] = False
    assert numpy.isnan(out[untouched]).all()


@each_dtype
@pytest.mark.parametrize("apart", [0, 1, 2])
@pytest.mark.parametrize("inner", [1, 64])
def test_steps_of_an_array_larger_than_this_machine(apart: int, inner: int, dtype: str) -> None:
    """Room is reserved but never filled: along one axis, what is touched lies more than 2**32 elements apart."""
    steps = [inner, inner, 1]
    steps[apart] = 2**32 + 5
    shape = [1, 40, inner]
    shape[apart] = 3
    whole = mmap.mmap(-1, 4 * steps[apart] * numpy.dtype(dtype).itemsize, flags=0x4022)  # private, without reserve
    room = numpy.frombuffer(whole, dtype)
    far = numpy.lib.stride_tricks.as_strided(room, shape, [step * room.itemsize for step in steps])
    x = values(*shape, dtype=dtype)
    far[...] = x
    got, _, right = ran(far, 0.1)
    assert error(got, right) <= 1.01 * ROUNDING[dtype]
    out = numpy.empty_like(x)
    assert _native.mean(far, out, None, 0.0, 0.1, True, 2)
    near = numpy.empty_like(x)
    assert _native.mean(x, near, None, 0.0, 0.1, True, 2)
    numpy.testing.assert_array_equal(out, near)
    assert _native.mean(x, far, None, 0.0, 0.1, True, 2)
    numpy.testing.assert_array_equal(far, near)


@pytest.mark.parametrize(("x_dtype", "dtype"), list(itertools.permutations("fde", 2)))
@pytest.mark.parametrize("shape", [(1, 700, 1), (2, 30, 40)])
def test_results_of_another_dtype(shape: tuple[int, int, int], x_dtype: str, dtype: str) -> None:
    got, _, right = ran(values(*shape, dtype=x_dtype), 0.1, post=0.1, out=numpy.full(shape, numpy.nan, dtype))
    assert error(got, right) <= 1.01 * ROUNDING[dtype]


@pytest.mark.parametrize("offset", [0, 1, 3, 7])
@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("inner", [1, 5, 64])
def test_large_results_go_around_the_caches_wherever_they_begin(inner: int, step: int, offset: int) -> None:
    n = (1 << 22) // inner + 77
    x = values(1, n, inner, dtype="f")
    room = numpy.full(n * inner + 16, 7.0, "f")
    whole = room[offset : offset + n * inner].reshape(1, n, inner)
    assert _native.mean(x[:, ::step], whole[:, ::step], None, 0.0, 0.01, True, 2)
    assert (room[:offset] == 7.0).all()
    assert (room[offset + n * inner :] == 7.0).all()
    part = x[:, ::step][:, :1000]
    small = numpy.empty_like(part)
    assert _native.mean(part, small, None, 0.0, 0.01, True, 1)
    numpy.testing.assert_allclose(whole[:, ::step][:, :1000], small, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(1, (1 << 22) + 77, 1), (1, 1 << 16, 70), (70, 1 << 16, 1)])
def test_memory_that_was_never_touched_gets_the_same_bits(shape: tuple[int, int, int]) -> None:
    x = values(*shape, dtype="f")
    around, through = numpy.empty_like(x), numpy.empty_like(x)
    for out, untouched in ((around, False), (through, True)):
        assert _native.mean(x, out, None, 0.0, 0.01, True, 2, untouched)
    numpy.testing.assert_array_equal(around, through)
    for out, untouched in ((around, False), (through, True)):
        out.fill(numpy.nan)
        base, sums = numpy.zeros((2, shape[0], 1, shape[2]))
        assert _native.scan(x, out, base, sums, 0.01, 1.0, 0.01, 2, untouched)
    numpy.testing.assert_array_equal(around, through)


# Missing values and what overflows


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(1, 3000, 1), (1, 20, 70), (40, 30, 3), (5, 700, 1)])
@pytest.mark.parametrize("lost", [0.0, 0.01, 0.7, 1.0])
def test_a_missing_value_is_told(shape: tuple[int, int, int], bad: float, lost: float) -> None:
    for place in ((0, 0, 0), (-1, shape[1] // 2, -1), (0, -1, -1)):
        x = values(*shape, dtype="f")
        base, sums, out = *numpy.zeros((2, shape[0], 1, shape[2])), numpy.empty_like(x)
        assert _native.scan(x, out, base, sums, lost, 1.0, 1.0, 1)
        x[place] = bad
        assert not _native.scan(x, out, base, sums, lost, 1.0, 1.0, 1)


def test_a_missing_value_in_any_segment_is_told() -> None:
    for place in (0, 1, LARGE // 2, LARGE // 2 + 100_000, LARGE - 1):
        x = values(1, LARGE, 1, dtype="f")
        x[0, place] = math.nan
        for threads in (1, 2, 3):
            assert not _native.mean(x, numpy.empty_like(x), None, 0.0, 0.3, True, threads)


@pytest.mark.parametrize("bad", [math.nan, 1.7e308])
def test_smooth_goes_the_general_way_then(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    x = values(5000)
    x[0], x[1235] = bad, -bad
    made = ewma.smooth(x, alpha=0.1)
    monkeypatch.setenv("EWMA_KERNEL", "foreach")
    numpy.testing.assert_allclose(made, ewma.smooth(x, alpha=0.1), rtol=1e-11, atol=1e-14 * numpy.nanmax(abs(x)))


# What is refused


def call(**changed: Any) -> Any:
    given: dict[str, Any] = {
        "x": numpy.ones((2, 10, 3)),
        "out": numpy.empty((2, 10, 3)),
        "base": numpy.zeros((2, 1, 3)),
        "sums": numpy.zeros((2, 1, 3)),
        "lost": 0.5,
        "pre": 1.0,
        "post": 1.0,
        "threads": 1,
    }
    return _native.scan(*{**given, **changed}.values())


def unaligned(shape: tuple[int, ...]) -> Any:
    room = numpy.zeros(math.prod(shape) * 8 + 1, "u1")
    return room[1:].view("d").reshape(shape)


def read_only(shape: tuple[int, ...]) -> Any:
    array = numpy.zeros(shape)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"x": numpy.ones((2, 10, 3), "i8")}, ValueError, "expected native float32, float64, float16, or the bits"),
        ({"x": numpy.ones((2, 10, 3), ">f8")}, ValueError, "expected native"),
        ({"out": numpy.ones((2, 10, 3), "D")}, ValueError, "expected native"),
        ({"x": numpy.ones((2, 10))}, ValueError, "of one shape"),
        ({"out": numpy.ones((2, 9, 3))}, ValueError, "of one shape"),
        ({"x": unaligned((2, 10, 3))}, ValueError, "expected aligned memory|expected native"),
        ({"out": unaligned((2, 10, 3))}, ValueError, "expected aligned memory|expected native"),
        ({"out": read_only((2, 10, 3))}, ValueError, "read-only"),
        ({"sums": read_only((2, 1, 3))}, ValueError, "read-only"),
        ({"base": numpy.zeros((2, 1, 2))}, ValueError, "one for each series"),
        ({"base": numpy.zeros((2, 1, 3), "f")}, ValueError, "one for each series"),
        ({"lost": numpy.zeros(9)}, TypeError, "only"),
        ({"pre": 0.0}, ValueError, "expected pre as 1.0, above 0"),
        ({"pre": 2.0, "post": numpy.ones(10)}, ValueError, "expected pre as 1.0"),
        ({"pre": numpy.zeros(9)}, ValueError, "one float64 for each step"),
        ({"post": numpy.zeros(10, "f")}, ValueError, "one float64 for each step"),
        ({"pre": numpy.zeros(20)[::2]}, ValueError, "not C-contiguous"),
        ({"lost": -0.1}, ValueError, "from 0 to 1"),
        ({"lost": math.nan}, ValueError, "from 0 to 1"),
        ({"x": [1.0]}, TypeError, "bytes-like"),
        ({"out": torch.ones(2, 10, 3)}, TypeError, "bytes-like"),
    ],
)
def test_refused_before_anything_is_read(changed: dict[str, Any], kind: type[Exception], said: str) -> None:
    assert call() is True
    with pytest.raises(kind, match=said):
        call(**changed)


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (0, numpy.ones((2, 10)), "of one shape"),
        (1, numpy.ones((2, 9, 3)), "of one shape"),
        (1, read_only((2, 10, 3)), "read-only"),
        (2, numpy.zeros((2, 1, 2)), "one for each series"),
        (2, numpy.zeros((2, 1, 3), "f"), "one for each series"),
        (4, 1.1, "from 0 to 1"),
        (4, math.nan, "from 0 to 1"),
    ],
)
def test_means_refused(place: int, wrong: Any, said: str) -> None:
    given: list[Any] = [numpy.ones((2, 10, 3)), numpy.empty((2, 10, 3)), numpy.zeros((2, 1, 3)), 1.0, 0.5, True, 1]
    assert _native.mean(*given) is True
    given[place] = wrong
    with pytest.raises(ValueError, match=said):
        _native.mean(*given)


@pytest.mark.parametrize(
    ("place", "wrong", "said"),
    [
        (0, numpy.ones((2, 10)), "of one shape"),
        (0, numpy.ones((2, 10, 3), "f"), "expected float64"),
        (1, numpy.ones((2, 9, 3)), "of one shape"),
        (2, numpy.ones((2, 9, 3)), "of one shape"),
        (3, read_only((2, 10, 3)), "read-only"),
        (3, numpy.ones((2, 10, 2)), "of one shape"),
        (4, numpy.ones((2, 1, 2)), "one for each series"),
    ],
)
def test_elements_refused(place: int, wrong: Any, said: str) -> None:
    given: list[Any] = [numpy.ones((2, 10, 3)) for _ in range(4)] + [numpy.zeros((2, 1, 3))]
    assert _native.scan_elements(*given, 1) is None
    given[place] = wrong
    with pytest.raises(ValueError, match=said):
        _native.scan_elements(*given, 1)


def test_overlaps_are_refused() -> None:
    room = numpy.zeros((2, 20, 3))
    for x, out in ((room[:, :10], room[:, :10]), (room[:, 5:15], room[:, :10]), (room[:, :10][:, ::-1], room[:, 9:19])):
        with pytest.raises(ValueError, match="shares no memory with x"):
            call(x=x, out=out)
    flat = numpy.zeros(120)
    assert call(x=flat[:60].reshape(2, 10, 3), out=flat[60:].reshape(2, 10, 3))


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.to("meta"),
        lambda x: x.to(torch.int32),
        lambda x: torch.complex(x, x),
        lambda x: torch._neg_view(x),
        lambda x: x.to_sparse(),
    ],
)
def test_other_tensors_are_left_to_others(other: Any) -> None:
    x = torch.ones(1, 4, 1)
    assert compiled_scan.lend(x) is not None
    assert compiled_scan.lend(other(x)) is None


def test_other_arrays_are_left_to_others() -> None:
    for x in (
        unaligned((1, 4, 1)),
        numpy.ones((1, 4, 1), ">f4"),
        numpy.ones((1, 4, 1), "g"),
        numpy.ones((1, 4, 1), int),
    ):
        assert compiled_scan.lend(x) is None
        numpy.testing.assert_allclose(ewma.smooth(x.ravel(), alpha=0.5).astype("d"), x.ravel().astype("d"))


def test_it_serves_unless_another_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EWMA_KERNEL", raising=False)
    assert kernels.compiled() is compiled_scan
    for name in ("foreach", "reference"):
        monkeypatch.setenv("EWMA_KERNEL", name)
        assert kernels.compiled() is None


# Gradients


@pytest.mark.parametrize("arguments", [{}, {"initial": 1.0}, {"debias": False}], ids=str)
@pytest.mark.parametrize("alpha", [1e-3, 0.3, 1.0])
@pytest.mark.parametrize(("shape", "axis"), [((50,), 0), ((3, 4200), 1), ((700, 9), 0), ((2, 30, 9), 1)])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_gradients_are_those_of_the_general_way(
    monkeypatch: pytest.MonkeyPatch, name: str, shape: tuple[int, ...], axis: int, alpha: float, arguments: Any
) -> None:
    made = []
    for kernel in ("native", "foreach"):
        monkeypatch.setenv("EWMA_KERNEL", kernel)
        x = torch.from_numpy(values(*shape)).to(getattr(torch, name)).requires_grad_()
        smoothed = ewma.smooth(x, alpha=alpha, axis=axis, **arguments)
        (dx,) = torch.autograd.grad(smoothed, x, torch.linspace(-1.0, 1.0, x.numel(), dtype=x.dtype).reshape(shape))
        made.append((smoothed.detach(), dx))
    for got, right in zip(*made, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5 if name == "float32" else 1e-11, atol=1e-6)


def test_gradients_of_gradients_and_of_a_sum() -> None:
    x = torch.from_numpy(values(3, 7)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ewma.smooth(x, alpha=0.3), x)
    assert torch.autograd.gradgradcheck(lambda x: ewma.smooth(x, alpha=0.3) ** 2, x)
    ewma.smooth(x, alpha=0.3).sum().backward()  # a gradient of no strides
    assert x.grad is not None
    assert float(x.grad.sum()) == pytest.approx(21.0)


def test_a_gradient_that_is_nan_reaches_all_before_it() -> None:
    x = torch.zeros(LARGE, requires_grad=True)
    dy = torch.ones(LARGE)
    dy[LARGE - 5] = math.nan
    (dx,) = torch.autograd.grad(ewma.smooth(x, alpha=0.3), x, dy)
    assert bool(dx[: LARGE - 4].isnan().all())
    assert bool(dx[LARGE - 4 :].isfinite().all())
