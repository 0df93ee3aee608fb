"""The update in one compiled pass over memory, for tensors on the CPU.

native.c has the loops and goes by pointers; this file checks, once for each preparation, all that would be a crash or a
silent mistake there. The tensors are held, so that nothing is freed; one whose memory moves must be prepared anew.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ewma.kernels import Coefficient, Word, _native, foreach
from ewma.kernels.layout import dense

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""What C calls them. Averages are of the first three; values of any other dtype are left to foreach."""

LARGE = 1 << 20
"""From how many elements on it is worth the time to wake other threads."""


class NativeLerp:
    """What only torch can read, by dtype or layout, is left to foreach."""

    def __init__(
        self, values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
    ) -> None:
        check(values, averages)
        mine = [n for n, value in enumerate(values) if plain(value, *(several[n] for several in averages))]
        others = sorted(set(range(len(values))) - set(mine))
        self.values = [values[n] for n in mine]
        chosen = [[several[n] for n in mine] for several in averages]
        check_overlap(self.values, chosen)
        self.table = table(self.values, chosen, [streams[n] for n in mine], guard)
        self.noted = [average for several in chosen for average in several]
        self.large = sum(value.numel() for value in self.values) * len(averages) >= LARGE
        self.rest = foreach.lerp(
            [values[n] for n in others],
            [[several[n] for n in others] for several in averages],
            [streams[n] for n in others],
            guard,
        )
        self.left_out = 0
        self.free = not self.rest.blocks

    @property
    def skipped(self) -> Any:
        return self.left_out + self.rest.skipped

    def __call__(self, coefficients: Sequence[Coefficient], words: Sequence[Word | None]) -> None:
        threads = torch.get_num_threads() if self.large else 1
        # Autograd refuses to go back through what was overwritten meanwhile; only torch's own operations tell it.
        increment_version(self.noted)
        self.left_out += _native.lerp(self.table, coefficients, words, threads)
        if not self.free:
            self.rest(coefficients, words)


lerp = NativeLerp


def plain(value: Tensor, *averages: Tensor) -> bool:
    """Whether the memory of all holds what they show, element beside element."""
    return value.dtype in DTYPES and all(
        _steps(tensor) == _steps(value)
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not tensor.is_neg()
        and tensor.data_ptr() % tensor.itemsize == 0
        and dense(tensor)
        for tensor in (value, *averages)
    )


def _steps(tensor: Tensor) -> list[int]:
    """The strides that matter."""
    return [step for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]


def table(
    values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
) -> array[int]:
    """Sets, dtypes and guard, then a `Row` for each tensor."""
    listed = array("Q", (len(averages), 0, 0, guard))
    if values:
        listed[1:3] = array("Q", (DTYPES[values[0].dtype], DTYPES[averages[0][0].dtype]))
    before = 0
    for value, stream, *several in zip(values, streams, *averages, strict=True):
        listed.extend((value.data_ptr(), value.numel(), stream, before, *(a.data_ptr() for a in several)))
        before += value.numel()
    return listed


def check(values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]]) -> None:
    for what, tensors in ("values", values), ("averages", [a for several in averages for a in several]):
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ValueError(f"expected {what} of one dtype; got {_listed(tensor.dtype for tensor in tensors)}")
        for tensor in tensors:
            if tensor.device.type != "cpu" or tensor.layout != torch.strided:
                raise ValueError(
                    f"the native kernel averages strided tensors on the CPU; got {what} on {tensor.device}, layout "
                    f"{tensor.layout}. Unset EWMA_KERNEL: another kernel serves those."
                )
            storage = tensor.untyped_storage()
            extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            if tensor.numel() and storage.nbytes() < (tensor.storage_offset() + extent) * tensor.itemsize:
                raise ValueError(
                    f"expected {what} with memory behind them; a tensor of shape {list(tensor.shape)} has a storage of "
                    f"{storage.nbytes()} bytes. Give it its storage back before averaging."
                )
    for several in averages:
        for value, average in zip(values, several, strict=True):
            if average.dtype not in DTYPES or average.dtype == torch.float16:
                raise ValueError(f"expected averages of float32, float64 or bfloat16; got {average.dtype}")
            if average.shape != value.shape:
                raise ValueError(f"expected an average of shape {list(value.shape)}; got {list(average.shape)}")
            if average.requires_grad:
                raise ValueError("expected averages that need no gradient; got one that does. Pass average.detach().")
            if not dense(average):
                raise ValueError(
                    f"expected dense averages; got shape {list(average.shape)} with strides {average.stride()}. Pass "
                    f"average.contiguous()."
                )


def check_overlap(values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]]) -> None:
    stretches = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, written)
        for written, tensors in ((False, values), *((True, several) for several in averages))
        for tensor in tensors
        if tensor.numel()
    )
    end = end_of_written = 0
    for start, stop, written in stretches:
        if start < end_of_written or (written and start < end):
            raise ValueError(
                "expected averages that share no memory with each other or with a value; two tensors overlap. Give "
                "each its own memory: tensor.clone()."
            )
        end = max(end, stop)
        end_of_written = max(end_of_written, stop) if written else end_of_written


def _listed(things: Iterable[Any]) -> str:
    return ", ".join(sorted({str(thing) for thing in things}))
