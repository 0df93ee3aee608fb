"""Every kernel beside float64 arithmetic: dtypes, sizes, layouts, rounding, the guard, memory, and no waiting."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from tests import lent
from tests.conftest import TRITON_MISSING
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ewma import kernels
from ewma.kernels import foreach, noise, reference
from ewma.kernels.noise import word

bf16, f16, f32, f64, f8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn
NAN, INF = math.nan, math.inf

native = None if kernels.missing() else importlib.import_module("ewma.kernels.native")
KERNELS = [
    reference,
    foreach,
    pytest.param(native, id="native", marks=pytest.mark.skipif(native is None, reason=str(kernels.missing()))),
    pytest.param(lent, id="triton", marks=pytest.mark.skipif(TRITON_MISSING is not None, reason=str(TRITON_MISSING))),
]
VALUES = [f8, f16, bf16, f32, f64]
WAYS = [(f16, None), (f16, 5), (bf16, None), (bf16, 5), (f32, None), (f32, 5), (f64, None)]
"""Dtype of the averages, and the word of the random bits; float64 is rounded to nearest only."""
SIZES = [0, 1, 2, 63, 1000, 16323, 40000, foreach.BLOCK + 4321]
TOLERANCE = {f64: 4 * 2.0**-53, f32: 4 * 2.0**-24, bf16: 4 * 2.0**-9, f16: 4 * 2.0**-12}
"""Of the larger of average and value: a few roundings to nearest."""
INTEGERS = {f64: torch.int64, f32: torch.int32, bf16: torch.int16, f16: torch.int16}


def name_of(x: Any) -> str:
    if isinstance(x, ModuleType):
        return x.__name__.rpartition(".")[2]
    if isinstance(x, tuple):
        return f"{name_of(x[0])}-{'plain' if x[1] is None else 'rounded'}"
    return str(x).removeprefix("torch.")


each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=name_of)
each_value = pytest.mark.parametrize("value_dtype", VALUES, ids=name_of)
each_way = pytest.mark.parametrize("way", WAYS, ids=name_of)
each_rounded = pytest.mark.parametrize("dtype", [f16, bf16, f32], ids=name_of)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads that meet after every small operation take a hundred times as long where others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """In this mode torch fills what it allocates with NaN, so that reading scratch space before writing it shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@functools.cache
def fixed(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normal(*shape: int, dtype: torch.dtype = f32, seed: int = 0) -> Tensor:
    return fixed(shape, dtype, seed).clone()


def draw(sizes: Sequence[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [normal(size, dtype=dtype, seed=seed + number) for number, size in enumerate(sizes)]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def update(kernel: ModuleType, value: Tensor, average: Tensor, c: Any = 0.3, drawn: Any = None, **options: Any) -> int:
    """One update of one average, in place; gives how many elements were left out."""
    lerp = kernel.lerp([value], [[average]], [options.get("stream", 11)], options.get("guard", True))
    lerp([c], [drawn])
    return int(lerp.skipped)


def updated(kernel: ModuleType, value: Tensor, average: Tensor, *args: Any, **options: Any) -> Tensor:
    """The same on a copy, which it gives."""
    average = average.clone()
    update(kernel, value, average, *args, **options)
    return average


def not_too_large(kernel: Any, size: int) -> None:
    if kernel is lent and size > 200_000 and lent.DEVICE.type == "cpu":
        pytest.skip("a second in Triton's interpreter")


def in_float64(old: Tensor, value: Tensor, c: float) -> Tensor:
    return old.double() + c * (value.double() - old.double())


def rounded(exact: Tensor, average: Tensor, drawn: int, stream: int) -> Tensor:
    """By the bits of noise.py, an element's index being its place in the average's memory."""
    place = torch.empty_like(average, dtype=torch.int64)
    place.as_strided((place.numel(),), (1,)).copy_(torch.arange(place.numel()))
    return noise.round_stochastically(exact, average.dtype, noise.bits(place, drawn, stream))


def apart(one: Tensor, other: Tensor) -> Tensor:
    """How many steps from one representable number to the next lie between."""
    kind = INTEGERS[one.dtype]
    one, other = (x.contiguous().view(kind).long() for x in (one, other))
    lowest = torch.iinfo(kind).min
    return (torch.where(one < 0, lowest - one, one) - torch.where(other < 0, lowest - other, other)).abs()


def assert_near(got: Tensor, expected: Tensor, old: Tensor, value: Tensor) -> None:
    largest = torch.maximum(old.double().abs(), value.double().abs())
    excess = (got.double() - expected).abs() - TOLERANCE[got.dtype] * largest
    assert (excess <= 0).all(), f"{(excess > 0).sum()} of {got.numel()} are beyond the tolerance, by {excess.max()}"


def assert_updated(got: Tensor, old: Tensor, value: Tensor, c: float, drawn: int | None, stream: int = 11) -> None:
    """As float64 says; and rounded as noise.py says, but where float64's own last bit decides: rarely, or near 0."""
    exact = in_float64(old, value, c)
    if drawn is None:
        return assert_near(got, exact, old, value)
    expected = rounded(exact, got, drawn, stream)
    units = apart(got, expected)
    error = (got.double() - expected.double()).abs()
    cancelled = error <= TOLERANCE[f64] * torch.maximum(old.double().abs(), value.double().abs())
    assert ((units <= 1) | cancelled).all()
    assert ((units > 0) & ~cancelled).sum() <= 1e-5 * units.numel()
    return None


@each_kernel
@each_value
@each_way
@pytest.mark.parametrize("coefficients", [(0.3,), (1.0, 1e-4, 0.0)], ids=["K=1", "K=3"])
def test_updates_are_what_float64_says(
    kernel: ModuleType, value_dtype: torch.dtype, way: Any, coefficients: Sequence[float]
) -> None:
    (dtype, drawn), sets, sizes = way, len(coefficients), SIZES[:-1]
    values, streams = draw(sizes, value_dtype, 0), range(50, 50 + len(sizes))
    old = [draw(sizes, dtype, 100 * (k + 1)) for k in range(sets)]
    new = [clones(each) for each in old]
    lerp = kernel.lerp(values, new, streams, True)
    lerp(coefficients, [drawn] * sets)
    for k, i in itertools.product(range(sets), range(len(sizes))):
        assert_updated(new[k][i], old[k][i], values[i], coefficients[k], drawn, streams[i])
    assert all(map(torch.equal, values, draw(sizes, value_dtype, 0)))
    assert int(lerp.skipped) == 0


@each_kernel
@each_way
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value_dtype", [bf16, f32], ids=name_of)
def test_a_tensor_alone_is_what_float64_says(kernel: ModuleType, way: Any, size: int, value_dtype: torch.dtype) -> None:
    not_too_large(kernel, size)
    (dtype, drawn), value = way, normal(size, dtype=value_dtype)
    old = normal(size, dtype=dtype, seed=1)
    for c in (1.0, 0.3, 1e-4) if size < SIZES[-1] else (0.3,):
        assert_updated(updated(kernel, value, old, c, drawn), old, value, c, drawn)


@each_kernel
@each_way
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_zero_coefficient_leaves_the_averages_bit_for_bit(kernel: ModuleType, way: Any, as_tensor: bool) -> None:
    dtype, drawn = way
    for value_dtype, size in itertools.product((bf16, f32, f64), (63, 70_000)):
        old = normal(size, dtype=dtype, seed=1)
        c = torch.tensor(0.0, dtype=f64) if as_tensor else 0.0
        assert torch.equal(updated(kernel, normal(size, dtype=value_dtype), old, c, drawn), old)


@each_kernel
@each_way
@pytest.mark.parametrize("c", [1.0, 0.3, 1e-4])
def test_a_coefficient_in_a_tensor_equals_the_float(kernel: ModuleType, way: Any, c: float) -> None:
    dtype, drawn = way
    for size, poison in itertools.product((63, 70_000), (0.0, NAN)):
        value, old = normal(size), normal(size, dtype=dtype, seed=1)
        value[0] = poison
        one, other = (updated(kernel, value, old, each, drawn) for each in (c, torch.tensor(c, dtype=f64)))
        if way in ((f16, None), (bf16, None)):  # the tensor is rounded to the average's dtype first
            assert_near(other, one.double(), old, value.nan_to_num())
        else:
            assert torch.equal(one, other)


@each_kernel
@each_rounded
def test_a_word_in_a_tensor_equals_the_integer(kernel: ModuleType, dtype: torch.dtype) -> None:
    for drawn, stream, size in itertools.product((0, word(1, 2), 2**32 - 1), (3, 2**32 - 1), (63, 200_000)):
        value, old = normal(size), normal(size, dtype=dtype, seed=1)
        one, other = (updated(kernel, value, old, 0.3, each, stream=stream) for each in (drawn, torch.tensor(drawn)))
        assert torch.equal(one, other)


@each_kernel
@pytest.mark.parametrize("sets", [1, 3])
def test_no_values_are_no_work(kernel: ModuleType, sets: int) -> None:
    lerp = kernel.lerp([], [[]] * sets, [], True)
    lerp([0.3] * sets, [None] * sets)
    lerp([0.3] * sets, [5] * sets)
    assert int(lerp.skipped) == 0


@each_kernel
def test_each_set_has_its_own_word_or_none(kernel: ModuleType) -> None:
    words, value, old = [None, 5, 6, None], normal(70_000), normal(70_000, seed=1)
    new = [[old.clone()] for _ in words]
    kernel.lerp([value], new, [11], True)([0.3, 0.3, 0.1, 0.2], words)
    for (got,), c, drawn in zip(new, [0.3, 0.3, 0.1, 0.2], words, strict=True):
        assert_updated(got, old, value, c, drawn)


@pytest.mark.parametrize("other", [torch.zeros(2, 3, dtype=f64), torch.zeros(3, 2).t()], ids=["dtype", "layout"])
def test_sets_that_differ_are_refused(other: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected averages of one dtype, device and layout in all sets"):
        kernels.lerp([torch.ones(2, 3)], [[torch.zeros(2, 3)], [other]], [11])


# Rounding


@each_kernel
@each_rounded
@pytest.mark.parametrize("value_dtype", [bf16, f32, f64], ids=name_of)
@pytest.mark.parametrize("size", [foreach.ROUNDED_BLOCK + 1, 200_000, foreach.BLOCK + 12_345])
def test_the_bits_go_by_the_element_in_however_many_blocks(
    kernel: ModuleType, dtype: torch.dtype, value_dtype: torch.dtype, size: int
) -> None:
    not_too_large(kernel, size)
    old, value = torch.randint(-250, 250, (2, size), generator=torch.Generator().manual_seed(0)).to(value_dtype)
    got = updated(kernel, value, old.to(dtype), 2.0**-20, drawn=word(3, 4), stream=2**31 + 7)
    assert torch.equal(got, rounded(in_float64(old, value, 2.0**-20), got, word(3, 4), 2**31 + 7))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("drawn", [0, word(1, 2), 2**31, 2**32 - 1])
def test_foreachs_bits_are_the_defined_ones(drawn: int, as_tensor: bool) -> None:
    rounding = foreach.Rounding(1000, torch.device("cpu"), True)
    for stream, first in itertools.product((0, 2**31 + 5, 2**32 - 1), (0, 1, foreach.ROUNDED_BLOCK, 2**31 + 1)):
        offset = (torch.tensor(drawn) if as_tensor else drawn) + stream + first * noise.GOLDEN
        expected = noise.bits(torch.arange(first, first + 1000), drawn, stream)
        assert torch.equal(rounding._bits(1000, offset).long() & noise.MASK, expected)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("first", [2**31 + 1, 2**32 + 5, 5 * 10**9])
def test_foreachs_bits_are_right_far_into_a_tensor_larger_than_this_machine(first: int, as_tensor: bool) -> None:
    value, average = normal(1000), normal(1000, seed=1)
    exact, bits = in_float64(average, value, 0.25), noise.bits(torch.arange(first, first + 1000), 5, 11)
    lerp = foreach.lerp([value], [[average]], [11], True)
    lerp.blocks[0].places = [(11, first)]
    lerp([0.25], [torch.tensor(5) if as_tensor else 5])
    assert torch.equal(average, noise.round_stochastically(exact, f32, bits))


@each_kernel
@each_rounded
def test_the_random_bits_repeat_and_differ_by_stream_and_word(kernel: ModuleType, dtype: torch.dtype) -> None:
    value, old = normal(1000), normal(1000, dtype=dtype, seed=1)
    go = functools.partial(updated, kernel, value, old, 0.3)
    assert torch.equal(go(drawn=5, stream=1), go(drawn=5, stream=1))
    assert not torch.equal(go(drawn=5, stream=1), go(drawn=5, stream=2))
    assert not torch.equal(go(drawn=5, stream=1), go(drawn=6, stream=1))


@each_kernel
@pytest.mark.parametrize("c", [0.3, 0.7, 1e-4])
@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1e-9])
def test_subnormal_float16_is_rounded_by_the_same_bits(kernel: ModuleType, c: float, scale: float) -> None:
    value, old = scale * normal(10_000), (scale * normal(10_000, seed=1)).to(f16)
    assert_updated(updated(kernel, value, old, c, 5), old, value, c, 5)


@each_kernel
@each_rounded
@pytest.mark.parametrize("c", [1e-2, 1e-4, 1e-6])
def test_rounding_is_unbiased(kernel: ModuleType, dtype: torch.dtype, c: float) -> None:
    """Each error has mean 0 and variance (exact - below) * (above - exact): the sum of many stays within 6 sigma."""
    value, old = normal(10_000), normal(10_000, dtype=dtype, seed=1)
    exact = in_float64(old, value, c)
    results = torch.stack([updated(kernel, value, old, c, word(9, count)) for count in range(20)])
    direction = torch.copysign(torch.tensor(INF), exact - results.double()).to(dtype)
    across = torch.nextafter(results, direction).double()
    error = results.double() - exact
    variance = -error * (across - exact)
    assert (variance >= 0).all()  # the two are neighbours on either side
    assert error.sum().abs() < 6 * variance.sum().sqrt()
    assert (error.sum(1).abs() < 6 * variance.sum(1).sqrt()).all()
    assert (error.sum(0).abs() < 8 * variance.sum(0).sqrt() + across.sub(results).abs().amax(0)).all()


TINY = [1e-4, 1e-5, 1e-6]


@pytest.mark.parametrize(
    ("kernel", "coefficients"),
    [(reference, [1e-5]), (foreach, TINY), pytest.param(native, TINY, marks=KERNELS[2].marks)],
    ids=name_of,
)
def test_20_000_tiny_updates_of_float32_arrive(kernel: ModuleType, coefficients: Sequence[float]) -> None:
    value, averages = torch.full((64,), 1.0005), [torch.ones(64) for _ in coefficients]
    lerp = kernel.lerp([value], [[average] for average in averages], [11], True)
    for count in range(20_000):
        lerp(coefficients, [word(0, count)] * len(coefficients))
    for c, average in zip(coefficients, averages, strict=True):
        moved = -math.expm1(20_000 * math.log1p(-c)) * (value.double() - 1).mean().item()
        assert average.double().mean().item() - 1 == pytest.approx(moved, rel=0.1)


@each_kernel
@pytest.mark.parametrize("c", [1e-5, 1e-6])
def test_tiny_updates_of_float32_never_arrive_where_rounded_to_nearest(kernel: ModuleType, c: float) -> None:
    average = torch.ones(64)
    lerp = kernel.lerp([torch.full((64,), 1.0005)], [[average]], [11], True)
    for _ in range(100):
        lerp([c], [None])
    assert torch.equal(average, torch.ones(64))


@pytest.mark.parametrize("kernel", KERNELS[:3], ids=name_of)
@pytest.mark.parametrize(
    ("dtype", "size", "start", "end"), [(bf16, 20_000, 1.0, 2.0), (f16, 2_000, 1.0, 2.0), (f16, 2_000, 0.0, 1e-5)]
)
def test_4_000_small_updates_in_16_bits_arrive(
    kernel: ModuleType, dtype: torch.dtype, size: int, start: float, end: float
) -> None:
    value, average = torch.full((size,), end), torch.full((size,), start, dtype=dtype)
    lerp = kernel.lerp([value], [[average]], [11], True)
    for count in range(4_000):
        lerp([1e-4], [word(0, count)])
    moved = -math.expm1(4_000 * math.log1p(-1e-4)) * (end - start)
    assert average.double().mean().item() - start == pytest.approx(moved, rel=0.01)
    lerp([1e-4], [None])
    assert average.double().mean().item() - start == pytest.approx(moved, rel=0.01)


# Layouts

DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "unaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}
HOLEY: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@each_kernel
@pytest.mark.parametrize("drawn", [None, 5], ids=["plain", "rounded"])
@pytest.mark.parametrize("average_layout", DENSE)
@pytest.mark.parametrize("value_layout", DENSE | HOLEY)
def test_any_layout_of_values_and_averages(
    kernel: ModuleType, drawn: int | None, average_layout: str, value_layout: str
) -> None:
    for shape, dtypes in itertools.product(
        [(3, 5, 7, 6), (8, 16, 1, 1), (64, 33, 5, 7)], [(f32, f32), (bf16, f32), (f32, bf16)]
    ):
        value = (DENSE | HOLEY)[value_layout](normal(*shape, dtype=dtypes[0]))
        average = DENSE[average_layout](normal(*shape, dtype=dtypes[1], seed=1))
        old, stride = average.clone(), average.stride()
        update(kernel, value, average, 0.3, drawn)
        assert_updated(average, old, value, 0.3, drawn)
        assert average.stride() == stride


@each_kernel
@each_way
def test_large_tensors_of_another_layout(kernel: ModuleType, way: Any) -> None:
    dtype, drawn = way
    value, old = normal(1100, 1001).t(), normal(1001, 1100, dtype=dtype, seed=1)
    assert_updated(updated(kernel, value, old, 0.3, drawn), old, value, 0.3, drawn)


@each_kernel
@each_way
@each_value
def test_tensors_without_dimensions(kernel: ModuleType, way: Any, value_dtype: torch.dtype) -> None:
    (dtype, drawn), value = way, normal(dtype=value_dtype)
    old = normal(dtype=dtype, seed=1)
    assert_updated(updated(kernel, value, old, 0.3, drawn), old, value, 0.3, drawn)


@each_kernel
@each_way
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second"])
def test_prepared_once_it_sees_the_values_of_every_call(kernel: ModuleType, way: Any, layout: str) -> None:
    dtype, drawn = way
    values = [(DENSE | HOLEY)[layout](normal(*shape)) for shape in ((3, 4), (300, 301))]
    averages = [normal(*value.shape, dtype=dtype, seed=1) for value in values]
    lerp = kernel.lerp(values, [averages], [11, 12], True)
    for c in (1.0, 0.3, 1e-4):
        old = clones(averages)
        lerp([c], [drawn])
        for average, before, value, stream in zip(averages, old, values, (11, 12), strict=True):
            assert_updated(average, before, value, c, drawn, stream)
            value.mul_(-1.5).add_(0.25)


# The guard


@each_kernel
@each_way
@pytest.mark.parametrize("value_dtype", VALUES[1:], ids=name_of)
def test_non_finite_elements_leave_their_averages_alone_and_are_counted_once(
    kernel: ModuleType, way: Any, value_dtype: torch.dtype
) -> None:
    (dtype, drawn), coefficients = way, (0.3, 0.9, 1e-4)
    sizes = [3, 63, 40_000, SIZES[-1] if value_dtype == f32 and kernel is not lent else 70_000]
    values = draw(sizes, value_dtype, 0)
    old = [draw(sizes, dtype, 10 * (k + 1)) for k in range(3)]
    for value in values:
        value[0], value[-1], value[value.numel() // 2] = NAN, INF, -INF
    new = [clones(each) for each in old]
    lerp = kernel.lerp(values, new, [11] * 4, True)
    lerp(coefficients, [drawn] * 3)
    assert int(lerp.skipped) == 12
    for k, i in itertools.product(range(3), range(4)):
        bad = ~values[i].isfinite()
        assert torch.equal(new[k][i][bad], old[k][i][bad])
        seen = torch.where(bad, old[k][i].double(), values[i].double())
        assert_updated(new[k][i], old[k][i], seen, coefficients[k], drawn)
    lerp(coefficients, [drawn] * 3)
    assert int(lerp.skipped) == 24


@each_kernel
@each_way
@pytest.mark.parametrize("value_dtype", [bf16, f32], ids=name_of)
@pytest.mark.parametrize("size", [3, 1000, 70_000])
def test_an_average_that_has_seen_nothing_takes_the_first_finite_value_whole(
    kernel: ModuleType, way: Any, value_dtype: torch.dtype, size: int
) -> None:
    (dtype, drawn), first = way, normal(size, dtype=bf16)
    value, old = normal(size, dtype=bf16).to(value_dtype), normal(size, dtype=dtype, seed=1)
    old[1:3], value[2] = NAN, INF
    average = old.clone()
    lerp = kernel.lerp([value], [[average]], [11], True)
    lerp([0.25], [drawn])
    assert average[1] == first[1]
    assert average[2].isnan()
    assert_updated(average[:1], old[:1], value[:1], 0.25, drawn)
    value[2] = first[2]
    lerp([0.25], [drawn])
    assert average[2] == first[2]
    value.mul_(4)
    before = average.clone()
    lerp([0.25], [drawn])
    assert_updated(average, before, value, 0.25, drawn)
    assert int(lerp.skipped) == 1


@each_kernel
@each_way
def test_without_the_guard_everything_propagates(kernel: ModuleType, way: Any) -> None:
    dtype, drawn = way
    value, average = torch.tensor([NAN, INF, -INF, 1.0, 2.0]), torch.tensor([1.0, 1, 1, NAN, 2], dtype=dtype)
    assert update(kernel, value, average, 0.25, drawn, guard=False) == 0
    assert torch.equal(average.nan_to_num(9, 8, 7), torch.tensor([9.0, 8, 7, 9, 2], dtype=dtype))


@each_kernel
@each_way
@pytest.mark.parametrize("size", [63, 70_000])
def test_values_whose_squares_overflow_are_averaged_and_not_counted(kernel: ModuleType, way: Any, size: int) -> None:
    dtype, drawn = way
    scale = {f64: 1e200, f16: 1e3}.get(dtype, 1e30)
    value, old = normal(size, dtype=f64).mul(scale).to(dtype), normal(size, dtype=dtype, seed=1)
    average = old.clone()
    assert update(kernel, value, average, 0.3, drawn) == 0
    assert_updated(average, old, value, 0.3, drawn)


@each_kernel
@each_way
@pytest.mark.parametrize("c", [0.3, 0.5, 0.7, 1e-4, 1.0])
def test_opposite_values_near_the_largest_number_do_not_overflow(kernel: ModuleType, way: Any, c: float) -> None:
    dtype, drawn = way
    huge = {f64: 1.7e308, f16: 6e4}.get(dtype, 3e38)
    value, old = torch.tensor([huge, -huge], dtype=dtype), torch.tensor([-huge, huge], dtype=dtype)
    average = old.clone()
    assert update(kernel, value, average, c, drawn) == 0
    expected = old.double() * (1 - c) + value.double() * c
    assert_near(average, expected, old, value)


def about_the_largest(dtype: torch.dtype) -> Tensor:
    """The largest number, what is rounded to it, what is rounded to infinity, and what is far beyond."""
    largest, below = (
        torch.finfo(dtype).max,
        torch.nextafter(torch.tensor(INF, dtype=dtype), torch.tensor(0.0).to(dtype)),
    )
    step = largest - torch.nextafter(below, torch.zeros_like(below)).item()
    return torch.tensor([largest, largest + 0.49 * step, largest + 0.5 * step, 2 * largest, 1e200], dtype=f64)


each_narrow = pytest.mark.parametrize("way", WAYS[:-1], ids=name_of)


@each_kernel
@each_narrow
@pytest.mark.parametrize("c", [1e-4, 0.3, 0.7, 1.0])
def test_a_value_that_is_infinite_in_the_averages_dtype_stays_out(kernel: ModuleType, way: Any, c: float) -> None:
    (dtype, drawn), value = way, about_the_largest(way[0]).repeat(20)
    old = torch.linspace(-1, 1, 100).to(dtype)
    for signed in (value, -value):
        average = old.clone()
        assert update(kernel, signed, average, c, drawn) == 60
        stays = ~noise.fits(signed, dtype)
        assert stays.tolist() == 20 * [False, False, True, True, True]
        assert torch.equal(average[stays], old[stays])
        assert_updated(average[~stays], old[~stays], signed[~stays].clamp(-signed[0].abs(), signed[0].abs()), c, None)


@each_kernel
@each_narrow
@pytest.mark.parametrize("value_dtype", [bf16, f32, f64], ids=name_of)
def test_what_finite_values_average_to_is_finite(kernel: ModuleType, way: Any, value_dtype: torch.dtype) -> None:
    """Also where a value between the largest number and infinity would be rounded up."""
    (dtype, drawn), value = way, about_the_largest(way[0])[:2].to(value_dtype)
    value = torch.where(noise.fits(value, dtype), value, torch.zeros_like(value))
    value = torch.cat([value, -value]).repeat(500)
    largest = torch.finfo(dtype).max
    average = torch.tensor([largest, -largest]).to(dtype).repeat_interleave(1000)
    lerp = kernel.lerp([value], [[average]], [11], True)
    for count, c in enumerate([0.4] * 5 + [1.0]):
        lerp([c], [drawn if drawn is None else word(0, count)])
        assert average.isfinite().all()
    assert torch.equal(average, value.double().clamp(-largest, largest).to(dtype))
    assert int(lerp.skipped) == 0


@each_kernel
@each_narrow
def test_without_the_guard_what_is_too_large_is_not_finite(kernel: ModuleType, way: Any) -> None:
    (dtype, drawn), value = way, about_the_largest(way[0])
    average = torch.zeros(5, dtype=dtype)
    update(kernel, value, average, 1.0, drawn, guard=False)
    assert average[:2].tolist() == 2 * [torch.finfo(dtype).max]
    assert not average[2:].isfinite().any()


@each_kernel
@each_way
@pytest.mark.parametrize("size", [7, 1000, 70_000])
def test_what_lies_beside_values_and_averages_is_neither_read_nor_written(
    kernel: ModuleType, way: Any, size: int
) -> None:
    dtype, drawn = way
    around = [torch.full((3, size + 9), NAN, dtype=each) for each in (f32, dtype)]
    values, averages = ([row[5:-4] for row in each] for each in around)
    for i in range(3):
        values[i].copy_(normal(size, seed=i))
        averages[i].copy_(normal(size, dtype=dtype, seed=10 + i))
    averages[1].fill_(NAN)
    old = clones(averages)
    lerp = kernel.lerp(values, [averages], [11, 12, 13], True)
    lerp([0.3], [drawn])
    for i in (0, 2):
        assert_updated(averages[i], old[i], values[i], 0.3, drawn, 11 + i)
    assert averages[1].isfinite().all()
    assert int(lerp.skipped) == 0
    for each in around:
        assert each[:, :5].isnan().all()
        assert each[:, -4:].isnan().all()


# What it costs


def most_memory(work: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator had handed out at any time during the work, over what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_the_memory_that_work_takes_is_measured() -> None:
    assert most_memory(lambda: torch.zeros(1000) + torch.zeros(1000) * 2) in range(12_000, 20_000)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ("float32", None),
        ("float32", 5),
        ("bfloat16", None),
        ("bfloat16", 5),
        ("transposed", None),
        ("one is NaN", None),
        ("one is NaN", 5),
    ],
)
def test_no_temporary_comes_near_the_size_of_the_model(values: str, drawn: int | None) -> None:
    """25 million parameters as in a ResNet-50; scratch space that is kept from the preparation on counts too."""
    shapes = [(1024, 1024)] * 20 + [(256, 1024)] * 16 + [(64, 32)] * 500
    averages = [torch.zeros(shape) for shape in shapes]
    given = [torch.ones(shape, dtype=bf16 if values == "bfloat16" else f32) for shape in shapes]
    if values == "transposed":
        given = [value.t().contiguous().t() if value.numel() < 2**20 else value for value in given]
    if values == "one is NaN":
        given[0][0, 0] = NAN
    taken = most_memory(lambda: foreach.lerp(given, [averages], range(len(shapes)), True)([1e-4], [drawn]))
    assert taken < 0.05 * sum(average.nbytes for average in averages)


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "propagating"])
@pytest.mark.parametrize("shape", [(3,), (300, 301)])
@each_value
@each_way
def test_no_device_is_waited_for(way: Any, value_dtype: torch.dtype, shape: tuple[int, ...], guard: bool) -> None:
    """On meta there is nothing to wait for: whatever reads a number on the host raises."""
    (dtype, drawn), make = way, functools.partial(torch.empty, device="meta")
    values = [make(shape, dtype=value_dtype), make(shape[::-1], dtype=value_dtype).t()]
    averages = [[make(shape, dtype=dtype) for _ in values] for _ in range(2)]
    lerp = foreach.lerp(values, averages, [11, 12], guard)
    drawn = drawn and make((), dtype=torch.int64)
    for c in (0.3, make((), dtype=f64)):
        lerp([c, c], [drawn, None])
    assert isinstance(lerp.skipped, Tensor) == guard
