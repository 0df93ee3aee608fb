"""Every kernel's filter of gradients beside the definition in float64."""

from __future__ import annotations

import pytest
import torch
from tests import lent
from tests.conftest import NATIVE_MISSING, TRITON_MISSING
from torch import Tensor

from ewma import kernels
from ewma.kernels import reference_filter

KERNELS = ["foreach", "native", "triton"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [0, 1, 2, 63, 1000, 16323]
ROUNDING = {torch.float32: 2.0**-22, torch.float64: 2.0**-51, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "native" and NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING)
    if request.param == "triton":
        if TRITON_MISSING:
            pytest.skip(TRITON_MISSING)
        monkeypatch.setattr(kernels, "filter", lent.Filter)
    monkeypatch.setenv("EWMA_KERNEL", request.param)
    return str(request.param)


def tensors(dtype: torch.dtype, seed: int, sizes: list[int] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def close(got: list[Tensor], right: list[Tensor], rounding: float) -> None:
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2 * rounding, atol=2 * rounding, equal_nan=True)


def both(
    gradients: list[Tensor],
    averages: list[Tensor],
    squares: list[Tensor] | None,
    steps: list[tuple],
    guard: bool = True,
) -> None:
    """Run the chosen kernel and the definition side by side through several steps, and compare all they leave."""
    mine = [[t.clone() for t in each] for each in (averages, squares or [])]
    true = [[t.double().clone() for t in each] for each in (averages, squares or [])]
    prepared = kernels.filter(mine[0], mine[1] if squares else None, guard)
    defined = reference_filter.Filter(true[0], true[1] if squares else None, guard)
    defined.averages = true[0]
    narrow = ROUNDING[averages[0].dtype]
    for coefficient, raw, slow, scale, taken in steps:
        got = [t.clone() for t in gradients]
        right = [t.double().clone() for t in gradients]
        prepared(got, coefficient, raw, slow, scale, taken)
        defined(right, coefficient, raw, slow, scale, taken)
        size = 1.0 if scale is None else float(scale)
        close([t / size for t in got], [t / size for t in right], max(narrow, ROUNDING[gradients[0].dtype]))
        for one, other in zip(mine, true, strict=True):
            close(one, other, narrow * 4)
    assert int(prepared.skipped) == int(defined.skipped)


PLAIN = [
    (1.0, 0.0, 1.0, None, None),
    (0.1, 1.0, 2.0, None, None),
    (0.25, 0.5, -1.0, None, None),
    (0.6, 0.0, 3.0, None, None),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.usefixtures("kernel")
def test_the_filter_is_the_definition(dtype: torch.dtype, wide: torch.dtype, squared: bool) -> None:
    unseen = [torch.full_like(t, torch.nan, dtype=wide) for t in tensors(dtype, 0)]
    both(tensors(dtype, 0), unseen, unseen if squared else None, PLAIN)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.usefixtures("kernel")
def test_what_is_not_finite_stays_out_and_is_counted(squared: bool) -> None:
    gradients = tensors(torch.float32, 1)
    gradients[3][[0, 5]] = torch.tensor([torch.nan, torch.inf])
    gradients[5][-1] = -torch.inf
    averages = tensors(torch.float32, 2)
    averages[4][::7] = torch.nan
    averages[3][0] = torch.nan
    squares = [average.square() for average in averages] if squared else None
    both(gradients, averages, squares, PLAIN[1:])


@pytest.mark.usefixtures("kernel")
def test_unguarded_it_goes_in_and_stays() -> None:
    gradients, averages = tensors(torch.float32, 1), tensors(torch.float32, 2)
    squares = [average.square() for average in averages]
    gradients[3][0], averages[4][5] = torch.nan, torch.nan
    both(gradients, averages, squares, PLAIN[1:], guard=False)
    both(gradients, averages, None, PLAIN[1:], guard=False)
    prepared = kernels.filter(averages, None, guard=False)
    prepared(gradients, 0.5, 0.0, 1.0)
    gradients[3][0] = 1.0
    prepared(gradients, 0.5, 1.0, 1.0)
    assert averages[3][0].isnan()
    assert gradients[3][0].isnan()
    assert not averages[3][1:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taken", [None, True, False])
@pytest.mark.usefixtures("kernel")
def test_scaled_gradients_and_steps_that_only_the_device_knows(dtype: torch.dtype, taken: bool | None) -> None:
    gradients = [8.0 * t for t in tensors(dtype, 3)]
    if taken is False:
        gradients[2][0] = torch.inf
    flag = None if taken is None else torch.tensor(taken)
    coefficient = torch.tensor(0.25 if taken is not False else 0.0, dtype=torch.float64)
    both(gradients, tensors(torch.float32, 4), None, [(coefficient, 1.0, 2.0, torch.tensor(8.0), flag)])


@pytest.mark.usefixtures("kernel")
def test_a_step_that_was_not_taken_changes_no_bit() -> None:
    gradients, averages = tensors(torch.float16, 5), tensors(torch.float32, 6)
    gradients[1][0], averages[2][1] = torch.inf, torch.nan
    before = [[t.clone() for t in each] for each in (gradients, averages)]
    prepared = kernels.filter(averages, None)
    prepared(gradients, torch.tensor(0.0, dtype=torch.float64), 1.0, 2.0, torch.tensor(8.0), torch.tensor(False))
    for each, was in zip((gradients, averages), before, strict=True):
        torch.testing.assert_close(each, was, rtol=0, atol=0, equal_nan=True)
    assert int(prepared.skipped) == 0


@pytest.mark.usefixtures("kernel")
def test_any_layout_and_any_place() -> None:
    room = torch.randn(4, 40, 30)
    gradients = [room[0].t(), room[1, ::2, ::3], room[2].view(-1)[1:1001].view(10, 100), room[3, :1].expand(6, 30)[:1]]
    averages = [torch.zeros(30, 40), torch.zeros(20, 10), torch.zeros(10, 100), torch.zeros(1, 30)]
    right = [gradient.clone() for gradient in gradients]
    untouched = room[1, 1::2].clone()
    prepared = kernels.filter(averages, None)
    prepared(gradients, 0.5, 1.0, 2.0)
    for gradient, before, average in zip(gradients, right, averages, strict=True):
        torch.testing.assert_close(average, 0.5 * before)
        torch.testing.assert_close(gradient, 2.0 * before)
    torch.testing.assert_close(room[1, 1::2], untouched, rtol=0, atol=0)


@pytest.mark.usefixtures("kernel")
def test_gradients_may_lie_elsewhere_at_every_step() -> None:
    averages = tensors(torch.float32, 0)
    right = [average.clone() for average in averages]
    prepared = kernels.filter(averages, None)
    for step in range(4):
        gradients = tensors(torch.float32, step + 1)
        values = [gradient.clone() for gradient in gradients]
        prepared(gradients, 0.5, 0.0, 1.0)
        right = [0.5 * (average + value) for average, value in zip(right, values, strict=True)]
        torch.testing.assert_close(averages, right)
        torch.testing.assert_close(gradients, right)


@pytest.mark.usefixtures("kernel")
def test_autograd_is_told_of_what_was_overwritten() -> None:
    average, gradient = torch.zeros(8), torch.ones(8)
    weight = torch.ones(8, requires_grad=True)
    product = weight * gradient
    kernels.filter([average], None)([gradient], 0.5, 1.0, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("threads", [1, 2])
def test_large_tensors_on_any_number_of_threads(kernel: str, threads: int) -> None:
    if kernel == "triton":
        pytest.skip("no threads there, and its interpreter takes a minute")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        sizes = [(1 << 20) + 7, 3, 1 << 19]
        both(tensors(torch.bfloat16, 0, sizes), tensors(torch.float32, 1, sizes), None, PLAIN[:2])
    finally:
        torch.set_num_threads(before)


def test_gradients_that_share_memory_are_refused_by_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING)
    monkeypatch.setenv("EWMA_KERNEL", "native")
    gradient = torch.ones(8)
    with pytest.raises(ValueError, match="two tensors overlap"):
        kernels.filter([torch.zeros(8), torch.zeros(8)], None)([gradient, gradient], 0.5, 1.0, 1.0)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    if NATIVE_MISSING:
        pytest.skip(NATIVE_MISSING)
    monkeypatch.setenv("EWMA_KERNEL", "native")


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(4)
    return tensor


ROOM = torch.ones(40)
LATER = {
    "share memory": (lambda: [ROOM[:8], ROOM[7:15]], "two tensors overlap"),
    "share memory with an average": (lambda: [AVERAGES[1].view(8), torch.ones(8)], "two tensors overlap"),
    "have lost their memory": (lambda: [torch.ones(8), freed(torch.ones(8))], "with memory behind them"),
    "have other shapes": (lambda: [torch.ones(8), torch.ones(7)], r"expected an average of shape \[7\]; got \[8\]"),
    "have other dtypes": (lambda: [torch.ones(8), torch.ones(8).double()], "expected values of one dtype"),
}
AVERAGES = [torch.zeros(8), torch.zeros(8)]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("what", LATER)
def test_what_later_gradients_must_not_do_is_refused_each_time(what: str) -> None:
    make, message = LATER[what]
    prepared = kernels.filter(AVERAGES, None)
    good = [torch.ones(8), torch.ones(8)]
    prepared(good, 0.5, 1.0, 0.0)
    bad = make()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            prepared(bad, 0.5, 1.0, 0.0)
    prepared(good, 0.5, 1.0, 0.0)


@pytest.mark.usefixtures("kernel")
def test_later_gradients_may_be_neighbours_or_of_a_kind_that_only_torch_reads() -> None:
    averages = [torch.zeros(8), torch.zeros(0), torch.zeros(8)]
    prepared = kernels.filter(averages, None)
    room, negated = torch.zeros(3, 8), torch._neg_view(torch.zeros(8))
    for step, (value, other) in enumerate(
        [(room[0], room[1]), (room[1], room[0]), (negated, room[2]), (room[1], negated), (room[2], room[1])], 1
    ):
        before = [average.clone() for average in averages]
        prepared([value.fill_(step), room[0][:0], other.fill_(-step)], 0.5, 1.0, 2.0)
        torch.testing.assert_close(averages, [0.5 * (before[0] + step), before[1], 0.5 * (before[2] - step)])
        torch.testing.assert_close([value + 0.0, other + 0.0], [step + 2.0 * averages[0], 2.0 * averages[2] - step])


@pytest.mark.usefixtures("compiled")
def test_averages_whose_memory_moves_are_found_again() -> None:
    average, gradient = torch.zeros(8), torch.ones(8)
    prepared = kernels.filter([average], None)
    prepared(gradient.split(8), 0.5, 1.0, 0.0)
    average.share_memory_()
    prepared(gradient.split(8), 0.5, 1.0, 0.0)
    assert average.tolist() == [0.75] * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_averages_are_refused(dtype: torch.dtype) -> None:
    said = rf"in float32 or float64; got {dtype}. Keep them wide: average.float\(\)"
    with pytest.raises(ValueError, match=said):
        kernels.filter([torch.zeros(4, dtype=dtype)], None)
