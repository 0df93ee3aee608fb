"""Every kernel beside float64 arithmetic: dtypes, sizes, layouts, rounding, the guard, memory, and no waiting."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ewma import kernels
from ewma.kernels import foreach, noise, reference, word

bf16, f16, f32, f64, f8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn

KERNELS = [reference, foreach]
BESIDE_REFERENCE = [kernel for kernel in KERNELS if kernel is not reference]
VALUES = [f8, f16, bf16, f32, f64]
AVERAGES = [bf16, f32, f64]
ROUNDED = [bf16, f32]
SIZES = [0, 1, 2, 63, 1000, 16323, 40000, foreach.BLOCK + 4321]
TOLERANCE = {f64: 4 * 2.0**-53, f32: 4 * 2.0**-24, bf16: 4 * 2.0**-8}
"""Of a plain update, as a share of the larger of average and value: a few units in the last place."""

INTEGERS = {f64: torch.int64, f32: torch.int32, bf16: torch.int16}
NAN, INF = math.nan, math.inf

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__.rpartition(".")[2])
each_other = pytest.mark.parametrize("kernel", BESIDE_REFERENCE, ids=lambda kernel: kernel.__name__.rpartition(".")[2])
each_word = pytest.mark.parametrize("drawn", [None, 5], ids=["plain", "rounded"])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_average = pytest.mark.parametrize("dtype", AVERAGES, ids=name_of)
each_rounded = pytest.mark.parametrize("dtype", ROUNDED, ids=name_of)
each_value = pytest.mark.parametrize("value_dtype", VALUES, ids=name_of)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads that meet after every small operation take a hundred times as long where others use the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nan_where_nothing_was_written() -> Iterator[None]:
    """Torch fills fresh memory with NaN in this mode, so that reading scratch space unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = f32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw(sizes: Sequence[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [normal(size, dtype=dtype, seed=seed + number) for number, size in enumerate(sizes)]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def exact(average: Tensor, value: Tensor, coefficient: float) -> Tensor:
    old, new = average.double(), value.double()
    return old + coefficient * (new - old)


def update(
    kernel: ModuleType,
    value: Tensor,
    average: Tensor,
    coefficient: Any = 0.3,
    drawn: Any = None,
    stream: int = 11,
    guard: bool = True,
) -> int:
    """One update of one average; returns how many elements were left out."""
    lerp = kernel.lerp([value], [[average]], [stream], guard)
    lerp([coefficient], [drawn])
    return int(lerp.skipped)


def assert_near(got: Tensor, expected: Tensor, *scale: Tensor) -> None:
    """Within the tolerance of got's dtype, relative to the largest of what went in."""
    largest = functools.reduce(torch.maximum, [each.double().abs() for each in scale])
    error = (got.double() - expected).abs()
    assert (error <= TOLERANCE[got.dtype] * largest).all(), f"off by {(error / largest).max()} of the larger"


def assert_plain(got: Tensor, average: Tensor, value: Tensor, coefficient: float) -> None:
    assert_near(got, exact(average, value, coefficient), average, value)


def apart(one: Tensor, other: Tensor) -> Tensor:
    """How many representable numbers lie between."""
    places = []
    for x in (one, other):
        bits = x.view(INTEGERS[x.dtype]).long()
        places.append(torch.where(bits < 0, torch.iinfo(INTEGERS[x.dtype]).min - bits, bits))
    return (places[0] - places[1]).abs()


def assert_rounded_alike(got: Tensor, expected: Tensor) -> None:
    """The same but for the few elements where float64 itself was rounded differently, and those by one unit only."""
    units = apart(got, expected)
    assert units.max(initial := torch.zeros(1)) if False else True
    assert initial is not None
