"""What must hold of tensors whose memory is read by its address, where anything else is a crash or a silent mistake."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ewma import kernels
from ewma.kernels import foreach
from ewma.kernels.layout import dense

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""What C calls them. Values of any other dtype are left to foreach."""


HEADER, ROW = 4, 4
"""The length of a table's header; and of a row, but for one average in each of its sets."""


def divide(
    values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
) -> tuple[list[Tensor], list[list[Tensor]], list[int], foreach.ForeachLerp]:
    """Values, averages and streams of the plain tensors; and the update of those that only torch can read."""
    mine = [n for n, value in enumerate(values) if plain(value, *(several[n] for several in averages))]
    others = sorted(set(range(len(values))) - set(mine))

    def chosen(which: list[int]) -> tuple[list[Tensor], list[list[Tensor]], list[int]]:
        several = [[each[n] for n in which] for each in averages]
        return [values[n] for n in which], several, [streams[n] for n in which]

    check_overlap(*chosen(mine)[:2])
    return *chosen(mine), foreach.lerp(*chosen(others), guard)


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


def places(tensors: Sequence[Tensor]) -> Any:
    """What differs as soon as one of the tensors lies elsewhere, or otherwise, than when this was asked before."""
    if not kernels.missing():
        from ewma.kernels import _native

        try:
            return _native.places(list(tensors), torch.Tensor.__dlpack_c_exchange_api__)
        except (BufferError, RuntimeError):  # there is a tensor of a kind that torch lends to nobody
            pass
    return [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


def _steps(tensor: Tensor) -> list[int]:
    """The strides that matter."""
    return [step for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n != 1]


def rows(
    values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int]
) -> Iterable[tuple[int, ...]]:
    """Of each tensor: where its value lies, its size, its stream, how many elements come before it; its averages."""
    before = 0
    for value, stream, *several in zip(values, streams, *averages, strict=True):
        yield (value.data_ptr(), value.numel(), stream, before, *(average.data_ptr() for average in several))
        before += value.numel()


def table(
    values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
) -> array[int]:
    """Sets, dtypes and guard, then a `Row` for each tensor."""
    listed = array("Q", (len(averages), 0, 0, guard))
    if values:
        listed[1:3] = array("Q", (DTYPES[values[0].dtype], DTYPES[averages[0][0].dtype]))
    for row in rows(values, averages, streams):
        listed.extend(row)
    return listed


def readdress(listed: array[int], addresses: array[int]) -> None:
    """Exchange in a table where the values lie."""
    listed[HEADER :: ROW + listed[0]] = addresses


PLACES = {"native": "the CPU", "triton": "a CUDA device (or on the CPU, slowly, for tests: TRITON_INTERPRET=1)"}


def check(
    values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], kernel: str = "native", device: str = "cpu"
) -> None:
    """Raise where the tensors are not for a kernel that serves devices of this type."""
    for what, tensors in ("values", values), ("averages", [a for several in averages for a in several]):
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ValueError(f"expected {what} of one dtype; got {_listed(tensor.dtype for tensor in tensors)}")
        for tensor in tensors:
            if tensor.device.type != device or tensor.layout != torch.strided:
                raise ValueError(
                    f"the {kernel} kernel averages strided tensors on {PLACES[kernel]}; got {what} on {tensor.device}, "
                    f"layout {tensor.layout}. Unset EWMA_KERNEL: another kernel serves those."
                )
            _check_storage(tensor, what)
    for several in averages:
        for value, average in zip(values, several, strict=True):
            _check_average(value, average)
    devices = {tensor.device for each in (values, *averages) for tensor in each}
    if len(devices) > 1:
        raise ValueError(
            f"the {kernel} kernel averages tensors on one device; got {_listed(devices)}. Unset EWMA_KERNEL: another "
            f"kernel serves those."
        )


def _check_storage(tensor: Tensor, what: str) -> None:
    storage = tensor.untyped_storage()
    extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.numel() and storage.nbytes() < (tensor.storage_offset() + extent) * tensor.itemsize:
        raise ValueError(
            f"expected {what} with memory behind them; a tensor of shape {list(tensor.shape)} has a storage of "
            f"{storage.nbytes()} bytes. Give it its storage back before averaging."
        )


def _check_average(value: Tensor, average: Tensor) -> None:
    if average.dtype not in DTYPES:
        raise ValueError(f"expected averages of float32, float64, bfloat16 or float16; got {average.dtype}")
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


def disjoint(starts: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether no two stretches of memory overlap: each has ended when the next begins."""
    begin = list(compress(starts, sizes))
    end = sorted(map(operator.add, begin, filter(None, sizes)))
    return all(map(operator.le, end, sorted(begin)[1:]))


def _listed(things: Iterable[object]) -> str:
    return ", ".join(sorted({str(thing) for thing in things}))
