"""The compiled kernel by itself: the same bits everywhere, threads, forks, and what is refused before C is entered.

What it has in common with the other kernels, test_kernels.py tests.
"""

from __future__ import annotations

import itertools
import math
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.conftest import NATIVE_MISSING
from torch import Tensor

from ewma.kernels import noise, reference

if NATIVE_MISSING:
    pytest.skip(NATIVE_MISSING, allow_module_level=True)

from ewma.kernels import _native, native

bf16, f16, f32, f64, f8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn
NAN, INF = math.nan, math.inf
VALUES = [f16, bf16, f32, f64]
WAYS = [(f16, None), (f16, 5), (bf16, None), (bf16, 5), (f32, None), (f32, 5), (f64, None)]
LARGE = native.LARGE + 12_345

each_value = pytest.mark.parametrize("value_dtype", VALUES, ids=str)
each_way = pytest.mark.parametrize("way", WAYS, ids=str)


@pytest.fixture(params=_native.instruction_sets())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.use(request.param)
    yield request.param
    _native.use(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape: int, dtype: torch.dtype = f32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, and a NaN like a NaN."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))


def updated(
    value: Tensor, average: Tensor, c: float = 0.3, drawn: Any = None, guard: bool = True, kernel: Any = native
) -> Tensor:
    average = average.clone()
    kernel.lerp([value], [[average]], [11], guard)([c], [drawn])
    return average


def poisoned(size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Numbers of all magnitudes that the dtype has, some of them NaN, infinite, zero, or nearly too large."""
    finfo = torch.finfo(dtype)
    magnitudes = torch.linspace(math.log2(finfo.smallest_normal) - 8, math.log2(finfo.max), size, dtype=f64).exp2()
    x = (normal(size, dtype=f64, seed=seed).sign() * magnitudes).to(dtype)
    x[5::97], x[7::89], x[11::83], x[13::79], x[17::73] = NAN, INF, -INF, finfo.max, finfo.min
    x[19::71] = 0.0
    return x[torch.randperm(size, generator=torch.Generator().manual_seed(seed))]


# Bits


@each_value
@pytest.mark.parametrize("way", [(f16, 5), (bf16, 5), (f32, 5), (f64, None)], ids=str)
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("c", [0.0, 1e-4, 0.3])
def test_the_bits_are_the_references_where_both_compute_in_float64(
    instructions: str, way: Any, value_dtype: torch.dtype, guard: bool, c: float
) -> None:
    (dtype, drawn), size = way, 20_011
    for value, average in (
        (normal(size, dtype=value_dtype), normal(size, dtype=dtype, seed=1)),
        (poisoned(size, value_dtype), poisoned(size, dtype, seed=1)),
    ):
        got, expected = (updated(value, average, c, drawn, guard, kernel) for kernel in (native, reference))
        assert same(got, expected)


@each_value
@each_way
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("c", [1e-4, 0.3, 0.7, 1.0])
def test_every_instruction_set_gives_the_same_bits(
    instructions: str, way: Any, value_dtype: torch.dtype, guard: bool, c: float
) -> None:
    (dtype, drawn), best = way, _native.instruction_sets()[0]
    for size, make in itertools.product((1, 15, 4097, 20_011), (normal, poisoned)):
        value, average = make(size, dtype=value_dtype), make(size, dtype=dtype, seed=1)
        got = updated(value, average, c, drawn, guard)
        _native.use(best)
        expected = updated(value, average, c, drawn, guard)
        _native.use(instructions)
        assert same(got, expected)


def test_the_best_instruction_set_is_used() -> None:
    before = _native.use("baseline")
    _native.use(before)
    assert before == _native.instruction_sets()[0]


@pytest.mark.usefixtures("instructions")
@each_way
@pytest.mark.parametrize("c", [1e-9, 1e-4, 0.3, 0.5, 0.9, 1.0])
def test_what_is_constant_stays_so_bit_for_bit(way: Any, c: float) -> None:
    dtype, drawn = way
    average = poisoned(10_000, dtype)
    average = average[average.isfinite()]
    assert torch.equal(updated(average.clone(), average, c, drawn), average)


@pytest.mark.usefixtures("instructions")
@each_value
@each_way
def test_a_coefficient_of_one_gives_the_value_itself(way: Any, value_dtype: torch.dtype) -> None:
    dtype, drawn = way
    value = normal(10_000).to(bf16).to(f16).to(value_dtype)  # that no dtype of an average rounds
    assert torch.equal(updated(value, normal(10_000, dtype=dtype, seed=1), 1.0, drawn), value.to(dtype))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_every_16_bit_number_is_read_right(dtype: torch.dtype) -> None:
    value = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for wide in (f32, f64):
        got = updated(value, torch.zeros(value.shape, dtype=wide), 1.0)
        assert torch.equal(got, torch.where(value.isfinite(), value.to(wide), 0.0))
        got = updated(value, torch.zeros(value.shape, dtype=wide), 1.0, guard=False)
        assert same(got, value.to(wide))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("dtype", "below"), [(bf16, 0x7FFF), (f16, 0xFFF)], ids=str)
def test_16_bits_are_rounded_to_the_nearest_and_ties_to_even(dtype: torch.dtype, below: int) -> None:
    value = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    value[::3] &= ~below  # ties, and what is exact
    value[1::3] = (value[1::3] & ~(0xFF << 23)) + (100 << 23) + (value[1::3] & 0x2F) * (1 << 23)  # in float16's reach
    value = value.view(f32)
    assert same(updated(value, torch.zeros(value.shape, dtype=dtype), 1.0, guard=False), value.to(dtype))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("guard", [True, False])
def test_numbers_too_large_for_the_average_are_not_finite_there(dtype: torch.dtype, guard: bool) -> None:
    value = torch.tensor([1e300, 1.0, -1e40], dtype=f64)
    for drawn in (None, 5):
        average = torch.ones(3, dtype=dtype)
        lerp = native.lerp([value], [[average]], [11], guard)
        lerp([0.25], [drawn])
        assert average.tolist() == ([1, 1, 1] if guard else [INF, 1, -INF])
        assert lerp.skipped == (2 if guard else 0)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("first", [2**31 - 500, 2**32 - 500, 2**32 + 5])
def test_elements_far_into_a_tensor_larger_than_this_machine(dtype: torch.dtype, first: int) -> None:
    """Room for so many elements is reserved but never filled; only 1,000 of them are touched."""
    size = first + 1000
    rooms = [mmap.mmap(-1, size * each.itemsize, flags=0x4022) for each in (bf16, dtype)]  # private, without reserve
    whole = [torch.frombuffer(room, dtype=each) for room, each in zip(rooms, (bf16, dtype), strict=True)]
    value, average = (each[first:] for each in whole)
    value.copy_(normal(1000))
    average.copy_(old := normal(1000, dtype=dtype, seed=1))
    small = native.lerp([torch.zeros(10)], [[torch.zeros(10, dtype=dtype)]], [10], True)
    lerp = native.lerp(whole[:1], [whole[1:]], [11], True)
    table = small.table[:1] + lerp.table[1:4] + small.table[4:] + lerp.table[4:]
    table[4 + 5 + 3] = 10  # elements that come before
    assert _native.lerp(table, [0.25], [5], 2, 10 + first, 10 + size) == 0
    exact = old.double() + 0.25 * (value.double() - old.double())
    assert torch.equal(average, noise.round_stochastically(exact, dtype, noise.bits(torch.arange(first, size), 5, 11)))
    assert whole[1][0] == whole[1][first - 1] == 0


# Threads


@each_way
def test_threads_give_the_bits_of_one_thread(way: Any, threads: Callable[[int], None]) -> None:
    (dtype, drawn), sizes = way, [3, LARGE, 0, 70_000, 1 << 17, 1, (1 << 18) + 1, *([500] * 600)]
    values = [poisoned(size, f32, seed=i) if size > 3 else normal(size) for i, size in enumerate(sizes)]
    old = [[normal(size, dtype=dtype, seed=i + k) for i, size in enumerate(sizes)] for k in (1, 2)]
    results = []
    for number in (1, 2, 5):
        threads(number)
        new = [[average.clone() for average in several] for several in old]
        lerp = native.lerp(values, new, range(len(sizes)), True)
        lerp([0.3, 1e-4], [drawn, drawn])
        results.append([*itertools.chain(*new), torch.tensor(lerp.skipped)])
    assert results[0][-1] == sum(int((~noise.fits(value, dtype)).sum()) for value in values) > 0
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_several_python_threads_average_at_once(threads: Callable[[int], None]) -> None:
    threads(3)
    value, parties = torch.ones(LARGE), 6
    together = threading.Barrier(parties)

    def average(_: int) -> bool:
        average, expected, right = torch.zeros(LARGE), 0.0, []
        lerp = native.lerp([value], [[average]], [11], True)
        for _ in range(30):
            together.wait(60)
            lerp([0.25], [None])
            expected += 0.25 * (1 - expected)
            right.append(average.sub(expected).abs().max().item() < 1e-6)  # at once: nothing may still be running
        return all(right)

    with ThreadPoolExecutor(parties) as pool:
        assert all(pool.map(average, range(parties)))


@pytest.mark.parametrize("number", [1, 3])
def test_only_the_elements_asked_for_are_averaged(number: int) -> None:
    sizes = [100, 300_000, 7, 200_000]
    values, averages = [torch.ones(size) for size in sizes], [torch.zeros(size) for size in sizes]
    lerp = native.lerp(values, [averages], range(4), True)
    assert _native.lerp(lerp.table, [0.5], [None], number, 50, 400_000) == 0
    everything = torch.cat(averages)
    assert (everything[50:400_000] == 0.5).all()
    assert everything.count_nonzero() == 400_000 - 50


def test_other_python_threads_run_meanwhile() -> None:
    """The longest of switching intervals: another thread gets a turn only where one is given."""
    lerp = native.lerp([normal(LARGE)], [[torch.zeros(LARGE)]], [11], True)
    go, ran = threading.Event(), threading.Event()
    other = threading.Thread(target=lambda: (go.wait(), ran.set()))
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    try:
        go.set()
        meanwhile = False
        for _ in range(100):
            lerp([0.3], [5])
            meanwhile = meanwhile or ran.is_set()
    finally:
        sys.setswitchinterval(interval)
    other.join()
    assert meanwhile


FORKS = """
import os, signal, torch
from ewma.kernels import native

torch.set_num_threads(3)
value, average = torch.ones({size}), torch.zeros({size})
lerp = native.lerp([value], [[average]], [11], True)
tasks = lambda: len(os.listdir("/proc/self/task"))
lerp([0.5], [None])
for generation in range(2):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status == 0
        break
    signal.alarm(20)
    before = tasks()
    lerp([0.5], [None])
    assert (before, tasks()) == (1, 3)
assert set(average.tolist()) == {{1 - 0.5 ** (1 + generation + (child == 0))}}
lerp([0.5], [None])
assert set(average.tolist()) == {{1 - 0.5 ** (2 + generation + (child == 0))}}
print("right", flush=True)
os._exit(0)
"""

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")


@linux
def test_a_forked_child_has_threads_of_its_own(python: Callable[[str], str]) -> None:
    assert python(FORKS.format(size=LARGE)).split() == ["right"] * 3


@linux
def test_small_work_wakes_nobody(python: Callable[[str], str]) -> None:
    program = """
import os, torch
from ewma.kernels import native

torch.set_num_threads(3)
for size in ({small}, {large}):
    lerp = native.lerp([torch.ones(size)], [[torch.zeros(size)]], [11], True)
    before = len(os.listdir("/proc/self/task"))
    lerp([0.5], [None])
    print(len(os.listdir("/proc/self/task")) - before)
"""
    assert python(program.format(small=native.LARGE - 1, large=native.LARGE)).split() == ["0", "2"]


# With torch


def test_autograd_is_told_what_was_overwritten() -> None:
    x, average = torch.ones(3, requires_grad=True), torch.zeros(3)
    lerp = native.lerp([torch.ones(3)], [[average]], [11], True)
    y = (x * average).sum()
    lerp([0.5], [None])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_averages_made_in_inference_mode_are_averaged() -> None:
    with torch.inference_mode():
        average = torch.zeros(3)
    native.lerp([torch.ones(3)], [[average]], [11], True)([0.5], [None])
    assert average.tolist() == [0.5] * 3


def test_what_only_torch_can_read_is_left_to_torch() -> None:
    shown = torch.complex(torch.zeros(1), torch.ones(1)).conj().imag  # lazily negated: the memory holds 1
    bytes_ = bytearray(17)
    unaligned = torch.frombuffer(bytes_, dtype=f32, offset=1, count=4).copy_(torch.ones(4))
    values = [shown, unaligned, torch.ones(4), torch.ones(4, 2)[:, 0]]
    values[2][3] = values[3][1] = NAN
    averages = [torch.zeros(value.shape) for value in values]
    lerp = native.lerp(values, [averages], [1, 2, 3, 4], True)
    lerp([0.5], [None])
    assert [each.tolist() for each in averages] == [[-0.5], [0.5] * 4, [0.5, 0.5, 0.5, 0], [0.5, 0, 0.5, 0.5]]
    assert len(lerp.values) == 1
    assert int(lerp.skipped) == 2


def test_ones_among_the_sizes_do_not_matter_to_the_layout() -> None:
    value = torch.ones(8, 16, 1, 1).to(memory_format=torch.channels_last)
    assert len(native.lerp([value], [[torch.zeros(8, 16, 1, 1).contiguous()]], [1], True).values) == 1


def freed(size: int) -> Tensor:
    tensor = torch.ones(size)
    tensor.untyped_storage().resize_(0)
    return tensor


ROOM = torch.zeros(10)
BAD: dict[str, tuple[Sequence[Tensor], Sequence[Sequence[Tensor]], str]] = {
    "another device": (
        [torch.ones(3, device="meta")],
        [[torch.zeros(3)]],
        "on the CPU; got values on meta.*Unset EWMA",
    ),
    "averages on another device": ([torch.ones(3)], [[torch.zeros(3, device="meta")]], "got averages on meta"),
    "sparse": ([torch.ones(3).to_sparse()], [[torch.zeros(3)]], "strided tensors .* layout torch.sparse_coo"),
    "values of two dtypes": ([torch.ones(3), torch.ones(3, dtype=f64)], [[torch.zeros(3)] * 2], "values of one dtype"),
    "averages of two dtypes": (
        [torch.ones(3)] * 2,
        [[torch.zeros(3), torch.zeros(3, dtype=f64)]],
        "averages of one dt",
    ),
    "float8 averages": ([torch.ones(3)], [[torch.zeros(3).to(f8)]], "float64, bfloat16 or float16; got torch.float8"),
    "another shape": ([torch.ones(3)], [[torch.zeros(4)]], r"expected an average of shape \[3\]; got \[4\]"),
    "needs a gradient": ([torch.ones(3)], [[torch.zeros(3, requires_grad=True)]], "Pass average.detach()"),
    "holes": ([torch.ones(3)], [[torch.zeros(6)[::2]]], r"strides \(2,\). Pass average.contiguous()"),
    "expanded": ([torch.ones(3)], [[torch.zeros(1).expand(3)]], "expected dense averages"),
    "freed value": ([freed(3)], [[torch.zeros(3)]], "with memory behind them; .* storage of 0 bytes"),
    "freed average": ([torch.ones(3)], [[freed(3)]], "expected averages with memory behind them"),
    "value and average overlap": ([ROOM[:4]], [[ROOM[3:7]]], "share no memory with each other or with a value"),
    "value is average": ([ROOM], [[ROOM]], "share no memory.*tensor.clone()"),
    "averages overlap": ([torch.ones(3), torch.ones(3)], [[ROOM[:3], ROOM[2:5]]], "share no memory"),
    "sets overlap": ([torch.ones(3)], [[ROOM[:3]], [ROOM[:3]]], "share no memory"),
    "value within average": ([ROOM[4:5], torch.ones(10)], [[torch.zeros(1), ROOM]], "share no memory"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_before_c_is_entered(what: str) -> None:
    values, averages, said = BAD[what]
    with pytest.raises(ValueError, match=said):
        native.lerp(values, averages, range(len(values)), True)


def test_neighbours_in_one_memory_do_not_overlap() -> None:
    room = torch.zeros(9)
    native.lerp([room[:3], room[:3]], [[room[3:6], room[6:]]], [1, 2], True)


def test_wrong_calls_are_refused() -> None:
    lerp = native.lerp([torch.ones(3)], [[torch.zeros(3)], [torch.zeros(3)]], [11], True)
    for coefficients, words in (([0.3], [None]), ([0.3, 0.3], [None]), ([], [])):
        with pytest.raises(ValueError, match="expected 2 coefficients and 2 words, one for each set"):
            lerp(coefficients, words)
    with pytest.raises(TypeError, match="real number"):
        lerp([0.3, "x"], [None, None])
    with pytest.raises(TypeError, match="integer"):
        lerp([0.3, 0.3], [None, "x"])
    lerp = native.lerp([torch.ones(3, dtype=f64)], [[torch.zeros(3, dtype=f64)]], [11], True)
    with pytest.raises(ValueError, match="float64 averages are rounded to nearest; expected None for their word"):
        lerp([0.3], [5])
    for table in (lerp.table[:3], lerp.table[:-1], lerp.table[1:]):
        with pytest.raises(ValueError, match="no table"):
            _native.lerp(table, [0.3], [None], 1)
    with pytest.raises(ValueError, match="no instruction set called 'mmx'"):
        _native.use("mmx")
