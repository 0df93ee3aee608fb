"""Whatever may become of a model's tensors is noticed, by the compiled check and by the one in Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.conftest import NATIVE_MISSING, Small
from torch import Tensor, nn

import ewma
from ewma import kernels
from ewma.weights.places import watch


@pytest.fixture(
    params=["python", pytest.param("compiled", marks=pytest.mark.skipif(bool(NATIVE_MISSING), reason="not built"))]
)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(kernels, "missing", lambda: "not there")


def resize(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(10_000_000)


def give(make: Callable[[Tensor], Tensor]) -> Callable[[Small], None]:
    def change(model: Small) -> None:
        model.last.weight.data = make(model.last.weight.data)

    return change


CHANGES: dict[str, Callable[[Small], object]] = {
    "other memory": give(torch.clone),
    "fewer rows of the same memory": give(lambda x: x[:3]),
    "fewer dimensions of the same memory": give(lambda x: x[0]),
    "another order of the same memory": give(torch.t),
    "other strides of the same memory": give(lambda x: x.as_strided((6, 6), (0, 1))),
    "another dtype of the same memory": lambda model: setattr(
        model.norm.running_mean, "data", model.norm.running_mean.view(torch.int32)
    ),
    "transposed in place": lambda model: model.last.weight.requires_grad_(False).t_(),
    "resized": lambda model: resize(model.last.weight),
    "freed": lambda model: model.last.weight.untyped_storage().resize_(0),
    "shared": lambda model: model.share_memory(),
    "on another device": lambda model: model.to("meta"),
    "halved": lambda model: model.half(),
    "a buffer with other memory": lambda model: setattr(model.norm.running_mean, "data", torch.zeros(6)),
    "a parameter replaced": lambda model: setattr(model.first, "weight", nn.Parameter(model.first.weight.detach())),
    "a parameter removed": lambda model: delattr(model.first, "bias"),
    "the last entry removed": lambda model: delattr(model.tied, "bias"),
    "a parameter added at the end": lambda model: model.tied.register_parameter("late", nn.Parameter(torch.zeros(2))),
    "a parameter set to None": lambda model: model.first.register_parameter("bias", None),
    "a parameter added": lambda model: model.register_parameter("late", nn.Parameter(torch.zeros(2))),
    "a buffer added": lambda model: model.register_buffer("late", torch.zeros(2)),
    "a module added": lambda model: model.add_module("late", nn.Linear(1, 1)),
    "a module replaced": lambda model: model.add_module("first", nn.Linear(4, 6)),
    "untied": lambda model: setattr(model.tied, "weight", nn.Parameter(torch.zeros(6, 6))),
}


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(small: Small, change: str) -> None:
    moved = watch(small, [*small.parameters(), *small.buffers()])
    assert not moved()
    CHANGES[change](small)
    assert moved()
    assert not watch(small, [*small.parameters(), *small.buffers()])()


@pytest.mark.usefixtures("how")
def test_new_numbers_are_no_change(small: Small) -> None:
    moved = watch(small, [*small.parameters(), *small.buffers()])
    small(torch.randn(8, 4)).sum().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    small.load_state_dict(small.state_dict())
    small.train(False).requires_grad_(False)
    assert not moved()


@pytest.mark.usefixtures("how")
@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.bool, torch.int64, torch.float8_e4m3fn, torch.bfloat16], ids=str
)
def test_tensors_of_any_dtype_are_watched(dtype: torch.dtype) -> None:
    empty, scalar, tensor = (torch.zeros(shape).to(dtype) for shape in ((0, 3), (), (2, 3)))
    moved = watch(nn.Module(), [empty, scalar, tensor])
    assert not moved()
    tensor.data = torch.zeros(2, 3).to(dtype)
    assert moved()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_torch_lends_to_nobody_is_watched_all_the_same() -> None:
    """A quantized tensor has no counterpart outside of torch."""
    tensor = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    moved = watch(nn.Module(), [tensor])
    assert not moved()
    tensor.untyped_storage().resize_(1 << 20)
    assert moved()


@pytest.mark.skipif(bool(NATIVE_MISSING), reason=str(NATIVE_MISSING))
def test_what_torch_no_longer_lends_has_moved() -> None:
    tensor = torch.ones(3)
    moved = watch(nn.Module(), [tensor])
    torch.utils.swap_tensors(tensor, torch.ones(3).to_sparse())
    assert moved()


def test_averages_whose_memory_moves_are_found_again(small: Small) -> None:
    """As sharing a teacher with other processes does; whoever wrote to the old address would write to freed memory."""
    ema, other = (ewma.ModelEMA(small, half_life=3) for _ in range(2))
    for _ in range(3):
        ema.update()
        other.update()
        ema.module().share_memory()
        with torch.no_grad():
            small.first.weight += 1.0
    ema.update()
    other.update()
    for (name, average), (_, expected) in zip(ema.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(average, expected), name
    assert dict(ema.module().named_parameters())["first.weight"].is_shared()
