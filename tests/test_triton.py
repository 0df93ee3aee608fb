"""What is particular to the kernels in Triton; that they do what all kernels do is in test_kernels and their like."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from tests import lent
from tests.conftest import NATIVE_MISSING, TRITON_MISSING
from torch import Tensor, nn

from ewma import Exponential, GradientEMA, ModelEMA, kernels
from ewma.kernels import noise

if TRITON_MISSING:
    pytest.skip(TRITON_MISSING, allow_module_level=True)

from ewma.kernels import triton, triton_filter, triton_numbers

bf16, f16, f32, f64, f8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")
DTYPES = [f32, f64, bf16, f16]
BITS = {f32: torch.int32, f64: torch.int64, bf16: torch.int16, f16: torch.int16}
DEVICE = lent.DEVICE
on_a_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """NumPy, in which Triton's interpreter works, warns of NaN."""
    with numpy.errstate(all="ignore"):
        yield


def numbers(size: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """But for NaN, which is NaN."""
    one, other = (torch.where(x.isnan(), NAN, x) for x in (one, other))
    return torch.equal(one.view(BITS[one.dtype]), other.view(BITS[one.dtype]))


LARGEST = [torch.finfo(dtype).max for dtype in (f16, bf16, f32)]
LARGE = torch.tensor([sign * x * (1 + 2.0**-n) for sign in (1, -1) for n in (100, 13, 1) for x in LARGEST], dtype=f64)
"""The largest numbers, a little more, and much more."""


@pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))
@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "propagating"])
def test_every_bit_is_the_compiled_kernels(value_dtype: torch.dtype, dtype: torch.dtype, guard: bool) -> None:
    native: Any = importlib.import_module("ewma.kernels.native")
    sizes, coefficients = [0, 1, 2, 63, triton.BLOCK + 1000], [1.0, 0.7, 1e-3, 0.0]
    words = [None] * 4 if dtype == f64 else [None, 5, 2**32 - 1, None]
    values = [numbers(size, value_dtype, 1 + number) for number, size in enumerate(sizes)]
    values[3][[0, 5, 9]] = torch.tensor([NAN, INF, -INF]).to(value_dtype)
    old = [[numbers(size, dtype, 10 * k + number) for number, size in enumerate(sizes)] for k in range(4)]
    values[4][100:1000] *= 1e-6
    if guard:
        values[4][: len(LARGE)] = LARGE.to(value_dtype)
    for averages in old:
        averages[4][100:500] *= 1e-5
        averages[4][::7] = NAN
        averages[3][[1, 5]] = torch.tensor([NAN, INF], dtype=dtype)
    results = []
    for kernel in (native, lent):
        new = [[average.clone() for average in averages] for averages in old]
        lerp = kernel.lerp(values, new, range(50, 55), guard)
        lerp(coefficients, words)
        results.append(([average for averages in new for average in averages], int(lerp.skipped)))
    (right, right_skipped), (got, skipped) = results
    assert all(map(same_bits, got, right))
    assert skipped == right_skipped == guard * sum(int((~noise.fits(value, dtype)).sum()) for value in values)


@pytest.mark.parametrize("first", [2**31 - 1000, 2**31, 2**32, 5 * 10**9])
@pytest.mark.parametrize("drawn", [None, 5])
def test_far_into_a_tensor_larger_than_this_machine(first: int, drawn: int | None) -> None:
    """The table tells of a tensor that begins far before the memory that is there."""
    first -= first % triton.BLOCK
    value, average = (numbers(1000, f32, seed).to(DEVICE) for seed in (0, 1))
    exact = average.double() + 0.25 * (value.double() - average.double())
    lerp = triton.lerp([value], [[average]], [11], True)
    lerp.table.rows[0, 1] = first + 1000
    lerp.table.rows[0, [0, 4]] -= 4 * first
    lerp.table.blocks[0, 1] = first // triton.BLOCK
    lerp([0.25], [drawn])
    bits = noise.bits(torch.arange(first, first + 1000, device=DEVICE), 5, 11)
    right = exact.float() if drawn is None else noise.round_stochastically(exact, f32, bits)
    torch.testing.assert_close(average, right, rtol=0 if drawn else 2.0**-23, atol=0 if drawn else 2.0**-23)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    launch = triton.launch
    monkeypatch.setattr(
        triton, "launch", lambda kernel, *given, **more: made.append(kernel) or launch(kernel, *given, **more)
    )
    return made


def test_a_whole_list_is_one_launch(launches: list[Any]) -> None:
    values = [numbers(size % 7, bf16, size).to(DEVICE) for size in range(30)]
    averages = [[torch.zeros_like(value, dtype=f32) for value in values] for _ in range(2)]
    lerp = triton.lerp(values, averages, range(30), True)
    assert lerp.free
    lerp([0.5, 0.25], [None, 7])
    assert len(launches) == 1
    for value, *several in zip(values, *averages, strict=True):
        torch.testing.assert_close(several, [0.5 * value.float(), 0.25 * value.float()])


def test_where_there_is_nothing_nothing_is_launched(launches: list[Any]) -> None:
    triton.lerp([torch.ones(0, device=DEVICE)], [[torch.ones(0, device=DEVICE)]], [1], True)([0.5], [None])
    assert not launches


def test_what_only_torch_can_read_is_left_to_it() -> None:
    values = [torch.randn(6, 5, device=DEVICE).t(), torch.ones(8, device=DEVICE)[::2], torch.ones(3, device=DEVICE)]
    averages = [torch.zeros(5, 6, device=DEVICE), torch.zeros(4, device=DEVICE), torch.zeros(3, device=DEVICE)]
    lerp = triton.lerp(values, [averages], [1, 2, 3], True)
    assert len(lerp.values) == 1
    assert not lerp.free
    values[2][0] = NAN
    values[1][0] = NAN
    lerp([0.5], [None])
    assert int(lerp.skipped) == 2
    torch.testing.assert_close(averages[0], 0.5 * values[0])


def test_tensors_that_begin_anywhere() -> None:
    """Each for itself: among many one whose memory is not aligned makes no other slower."""
    room, rooms = torch.randn(3 * triton.BLOCK, device=DEVICE), torch.zeros(4, 2 * triton.BLOCK, device=DEVICE)
    values = [room[offset : offset + triton.BLOCK + 3] for offset in range(4)]
    averages = [one[offset : offset + triton.BLOCK + 3] for one, offset in zip(rooms, (0, 1, 2, 0), strict=True)]
    triton.lerp(values, [averages], range(4), True)([0.5], [None])
    for value, average in zip(values, averages, strict=True):
        assert torch.equal(average, 0.5 * value)
    assert int((rooms != 0).sum()) == 4 * (triton.BLOCK + 3)


def test_autograd_is_told_of_what_was_overwritten() -> None:
    average, weight = torch.zeros(8, device=DEVICE), torch.ones(8, device=DEVICE, requires_grad=True)
    product = weight * average
    triton.lerp([torch.ones(8, device=DEVICE)], [[average]], [1], True)([0.5], [None])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "elsewhere": (
        torch.ones(3, device="meta"),
        torch.zeros(3, device="meta"),
        "strided tensors on a CUDA device .*meta",
    ),
    "float8 averages": (torch.ones(3), torch.zeros(3).to(f8), "averages of float32, float64, bfloat16 or float16"),
    "shape": (torch.ones(3), torch.zeros(4), r"expected an average of shape \[3\]; got \[4\]"),
    "holes": (torch.ones(3), torch.zeros(6)[::2], "expected dense averages"),
    "gradient": (torch.ones(3), torch.zeros(3, requires_grad=True), "expected averages that need no gradient"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_launched(name: str) -> None:
    value, average, said = REFUSED[name]
    if not value.is_meta:
        grad = average.requires_grad
        value, average = (
            value.to(DEVICE),
            average.detach().to(DEVICE).requires_grad_(grad) if grad else average.to(DEVICE),
        )
    if name == "holes":
        average = torch.zeros(6, device=DEVICE)[::2]
    with pytest.raises(ValueError, match=said):
        triton.lerp([value], [[average]], [1], True)


def test_memory_that_is_shared_is_refused() -> None:
    room = torch.zeros(8, device=DEVICE)
    with pytest.raises(ValueError, match="two tensors overlap"):
        triton.lerp([room[:4]], [[room[2:6]]], [1], True)


def test_forced_it_serves_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EWMA_KERNEL", "triton")
    value, average = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    lerp = kernels.lerp([value], [[average]], [1])
    lerp([0.25], [None])
    assert type(lerp).__module__ == "ewma.kernels.triton"
    assert average.tolist() == [0.25] * 3


def test_the_filter_is_one_launch_and_its_table_is_kept_until_a_gradient_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[Any] = []
    launch = triton_filter.launch
    monkeypatch.setattr(
        triton_filter, "launch", lambda *given, **more: tables.append(given[1]) or launch(*given, **more)
    )
    gradients = [numbers(size % 7, bf16, size).to(DEVICE) for size in range(30)]
    averages = [torch.zeros_like(gradient, dtype=f32) for gradient in gradients]
    filtering = triton_filter.Filter(averages, None, True)
    filtering(gradients, 0.5, 0.0, 1.0)
    filtering(gradients, 0.5, 0.0, 1.0)
    assert len(tables) == 2
    assert tables[0] is tables[1]
    moved = [gradient.clone() for gradient in gradients]
    filtering(moved, 0.5, 0.0, 1.0)
    assert tables[2] is not tables[0]


def test_where_gradients_move_only_their_addresses_are_uploaded() -> None:
    gradients, averages = ([torch.ones(size, device=DEVICE) for size in (3, 5)] for _ in range(2))
    filtering = triton_filter.Filter(averages, None, True)
    filtering(gradients, 0.5, 0.0, 1.0)
    first = filtering.table
    filtering([gradient.clone() for gradient in gradients], 0.5, 0.0, 1.0)
    assert filtering.table is not first
    assert filtering.table.blocks is first.blocks
    assert filtering.table.rows is not first.rows
    filtering([gradient.clone() for gradient in gradients], 0.5, 0.0, 1.0)
    assert averages[1].tolist() == [1.0] * 5


class Place:
    """A tensor of which only the streams are noted that it is used on."""

    def __init__(self) -> None:
        self.used_on: list[object] = []

    def record_stream(self, stream: object) -> None:
        self.used_on.append(stream)


def test_what_a_launch_reads_stays_on_other_streams_and_in_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    average = torch.zeros(8, device=DEVICE)
    lerp = triton.lerp([torch.ones(8, device=DEVICE)], [[average]], [1], True)
    table, kept = lerp.table, {}
    monkeypatch.setattr(triton_numbers, "_kept", kept)
    parts = table.rows, table.blocks, counter = Place(), Place(), Place()
    table.used(counter)
    assert not any(part.used_on for part in parts)
    assert not kept
    monkeypatch.setattr(triton_numbers, "_stream", lambda device: "another")
    monkeypatch.setattr(triton_numbers, "capturing", lambda: True)
    table.used(counter)
    assert all(part.used_on == ["another"] for part in parts)
    assert list(kept.values()) == [*parts]


def test_only_measured_gradients_keep_every_bit() -> None:
    gradient = torch.tensor([1.0, -0.0, 3e-42, NAN, INF], device=DEVICE)
    before, average = gradient.clone(), torch.zeros(5, device=DEVICE)
    triton_filter.Filter([average], None, True)([gradient], 0.5, 1.0, 0.0, 3.0)
    assert torch.equal(gradient.view(torch.int32), before.view(torch.int32))
    torch.testing.assert_close(average, torch.tensor([1 / 6, 0, 5e-43, 0, 0], device=DEVICE))


@on_a_gpu
def test_in_a_cuda_graph_gradients_may_lie_elsewhere() -> None:
    average, gradient = torch.zeros(100, device=DEVICE), torch.ones(100, device=DEVICE)
    filtering = triton_filter.Filter([average], None, True)
    filtering([gradient.clone()], 0.5, 0.0, 1.0)
    average.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filtering([gradient], 0.5, 0.0, 1.0)
    graph.replay()
    assert gradient.tolist() == [0.5] * 100
    filtering([gradient], 0.5, 0.0, 1.0)
    assert gradient.tolist() == [0.5] * 100


@on_a_gpu
def test_no_device_is_waited_for() -> None:
    value, average = torch.randn(5000, device=DEVICE), torch.zeros(5000, device=DEVICE)
    lerp = triton.lerp([value], [[average]], [1], True)
    lerp([0.5], [None])
    c, drawn = torch.tensor(0.5, dtype=f64, device=DEVICE), torch.tensor(5, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton.lerp([value], [[average]], [1], True)
        lerp([0.5], [None])
        lerp([c], [drawn])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [{}, {"capturable": True}, {"dtype": bf16}, {"dtype": bf16, "capturable": True}, {"dtype": f16}],
    ids=str,
)
def test_a_model_is_averaged_as_by_torch(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """16 bits to the last one, since both draw the same."""
    averages = []
    for kernel in ("triton", "foreach"):
        monkeypatch.setenv("EWMA_KERNEL", kernel)
        model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).to(DEVICE)
        profiles = {"fast": Exponential(half_life=5), "slow": Exponential(half_life=50_000)}
        ema = ModelEMA(model, profiles, **options)
        for step in range(4):
            for number, parameter in enumerate(model.parameters()):
                parameter.data = numbers(parameter.numel(), f32, 10 * step + number).view_as(parameter).to(DEVICE)
            ema.update()
        averages.append([average for name in profiles for _, average in ema[name].named_parameters()])
    step = 0.0 if "dtype" in options else 2.0**-22
    for got, right in zip(*averages, strict=True):
        torch.testing.assert_close(got, right, rtol=step, atol=step)


@pytest.mark.parametrize("mix", [(0.0, 1.0), (1.0, 2.0)])
def test_an_optimizer_gets_the_gradients_that_torch_filters(
    monkeypatch: pytest.MonkeyPatch, mix: tuple[float, float]
) -> None:
    trained = []
    for kernel in ("triton", "foreach"):
        monkeypatch.setenv("EWMA_KERNEL", kernel)
        weight = nn.Parameter(numbers(50, f32, 0).to(DEVICE))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        GradientEMA(optimizer, half_life=3, raw=mix[0], slow=mix[1])
        for step in range(4):
            weight.grad = numbers(50, f32, 1 + step).to(DEVICE)
            optimizer.step()
        trained.append(weight.detach())
    torch.testing.assert_close(*trained)


@on_a_gpu
def test_in_a_cuda_graph_the_coefficient_is_read_anew() -> None:
    value, average = torch.ones(100, device=DEVICE), torch.zeros(100, device=DEVICE)
    c = torch.tensor(0.5, dtype=f64, device=DEVICE)
    lerp = triton.lerp([value], [[average]], [1], True)
    lerp([c], [None])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lerp([c], [None])
    average.zero_()
    for coefficient, right in ((0.5, 0.5), (0.25, 0.625)):
        c.fill_(coefficient)
        graph.replay()
        assert average[0].item() == right


COMPILED = """
from tests import ahead
import torch
from ewma.kernels import triton, triton_filter
bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ahead.compile_for(90)
c, drawn = torch.tensor(.5, dtype=f64), torch.tensor(5)

def lerp(value, average, coefficients, words):
    values, averages = [torch.ones(8, dtype=value)], [[torch.ones(8, dtype=average)] for _ in words]
    triton.lerp(values, averages, [1], True)(coefficients, words)
    return ahead.made[-1]

ways = (f32, f32, None), (bf16, f32, None), (bf16, bf16, 5), (f32, f16, 5), (f16, f64, None), (f64, f32, 5)
for value, average, word in ways:
    lerp(value, average, [.3], [word])
    assert not ahead.count("fma"), "operations are fused"
    assert not ahead.count("ftz"), "small numbers are flushed"
    assert ahead.count(r"ld.global[^;]*[.]v[24]") >= 2, "not 16 bytes at a time"
    assert ahead.count(r"st.global[^;]*[.]v[24]") >= 1
assert lerp(f32, f32, [.3] * 3, [5, 1, 16]) is lerp(f32, f32, [1., 0., 1e-9], [0, 2**32 - 1, 7]), "two for one"
lerp(f32, f32, [.3, c, c, .1], [5, None, drawn, None])

def filtered(value, average, squares, *given):
    averages = [torch.ones(8, dtype=average) for _ in "12"]
    prepared = triton_filter.Filter(averages[:1], averages[1:] if squares else None, True)
    prepared([torch.ones(8, dtype=value)], *given)
    return ahead.made[-1]

taken, scale = torch.tensor(True), torch.tensor(8.)
for value, average, squares in ((f32, f32, False), (bf16, f32, True), (f16, f32, False), (f16, f64, True)):
    filtered(value, average, squares, .3, 1., 2.)
    assert not ahead.count("fma")
    assert ahead.count(r"ld.global[^;]*[.]v[24]") >= 2
    assert ahead.count(r"st.global[^;]*[.]v[24]") >= 2
    filtered(value, average, squares, c, 0., 1., scale, taken)
assert filtered(f32, f32, False, .3, 1., 2.) is filtered(f32, f32, False, 1., 16., 1.)
"""


def test_it_compiles_for_cuda(python: Any) -> None:
    python(COMPILED)
