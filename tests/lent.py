"""The kernels in Triton as kernels for tensors on the CPU, so that one set of tests serves all: on a GPU by lending it
copies of the memory that stands behind the tensors, holes and all; without one in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


BLOCK = 1 << 13
"""In elements: Triton's interpreter takes milliseconds a block, of any size."""


class Lent:
    """What is there of tensors on the CPU, there."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[Any, Any]] = {}

    def there(self, tensor: Any) -> Any:
        if DEVICE.type == "cpu" or not isinstance(tensor, Tensor):
            return tensor
        here = tensor.untyped_storage()
        _, there = self.storages.setdefault(here._cdata, (here, here.to(device=DEVICE)))
        room = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
        return room.set_(there, tensor.storage_offset(), tensor.shape, tensor.stride())

    def all(self, tensors: Sequence[Any]) -> list[Any]:
        return [self.there(tensor) for tensor in tensors]

    def forth(self) -> None:
        for here, there in self.storages.values():
            there.copy_(here)

    def back(self) -> None:
        for here, there in self.storages.values():
            here.copy_(there)


class Lerp(Lent):
    def __init__(
        self, values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
    ) -> None:
        super().__init__()
        kernel: Any = importlib.import_module("ewma.kernels.triton")
        with pytest.MonkeyPatch.context() as patch:
            if DEVICE.type == "cpu":
                largest = max((value.numel() for value in values), default=0)
                patch.setattr(kernel, "BLOCK", max(kernel.BLOCK, 1 << (largest // 4).bit_length()))
            there = self.all(values), [self.all(each) for each in averages]
            self.prepared = kernel.lerp(*there, streams, guard)

    @property
    def skipped(self) -> Any:
        return self.prepared.skipped

    def __call__(self, coefficients: Sequence[Any], words: Sequence[Any]) -> None:
        self.forth()
        with numpy.errstate(all="ignore"):
            self.prepared(coefficients, words)
        self.back()


class Filter(Lent):
    def __init__(self, averages: Sequence[Tensor], squares: Sequence[Tensor] | None, guard: bool = True) -> None:
        super().__init__()
        self.kernel: Any = importlib.import_module("ewma.kernels.triton_filter")
        self.prepared = self.kernel.Filter(self.all(averages), squares if squares is None else self.all(squares), guard)

    @property
    def skipped(self) -> Any:
        return self.prepared.skipped

    def __call__(self, gradients: Sequence[Tensor], *more: Any) -> None:
        there, others = self.all(gradients), self.all(more)
        self.forth()
        with pytest.MonkeyPatch.context() as patch, numpy.errstate(all="ignore"):
            if DEVICE.type == "cpu":
                patch.setattr(self.kernel, "BLOCK", BLOCK)
            self.prepared(there, *others)
        self.back()
        if DEVICE.type == "cuda":
            increment_version(gradients)


lerp = Lerp
