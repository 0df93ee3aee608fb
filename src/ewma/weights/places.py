"""Whether the tensors of a model are still the same, where they were: asked at every step, and answered completely."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ewma import kernels
from ewma.shards import is_sharded, local

PART = operator.attrgetter("_local_tensor")
"""The tensor that a DTensor holds, not a view of it as `to_local` gives: asked at every step."""


def watch(model: nn.Module, tensors: Sequence[Tensor]) -> Callable[[], bool]:
    """Note what a model holds and where some of it lies; what is returned tells whether anything has changed since.

    Args:
        model: its modules' tables of parameters, buffers and submodules are compared, member by member.
        tensors: of these also memory, dtype, shape and strides: a tensor that was given other storage
            (`p.data = other`), was reshaped in place or resized stays the same object. Of a DTensor, that of its part
            here, which may be exchanged as well.
    """
    moved = _watch(model, [local(tensor) if is_sharded(tensor) else tensor for tensor in tensors])
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if not sharded:
        return moved
    parts = list(map(PART, sharded))
    return lambda: moved() or not all(map(operator.is_, map(PART, sharded), parts))


def _watch(model: nn.Module, watched: list[Tensor]) -> Callable[[], bool]:
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers, module._modules)]
    members = [member for table in tables for member in table.values()]
    if not kernels.missing() and all(isinstance(table, dict) for table in tables):  # a scripted module's are none
        from ewma.kernels import _native

        exchange = torch.Tensor.__dlpack_c_exchange_api__
        try:
            noted = _native.places(watched, exchange)
        except (BufferError, RuntimeError):  # there is a tensor of a kind that torch lends to nobody
            return partial(_moved, tables, members, watched, _places(watched))
        parts = array("Q", (part._cdata for each in watched for part in (each, each.untyped_storage())))
        return partial(_native.moved, tables, members, watched, parts, exchange, *noted)
    return partial(_moved, tables, members, watched, _places(watched))


def _moved(
    tables: list[dict[str, Any]], members: list[Any], tensors: list[Tensor], places: list[tuple[Any, ...]]
) -> bool:
    now = [member for table in tables for member in table.values()]
    return len(now) != len(members) or not all(map(operator.is_, now, members)) or _places(tensors) != places


def _places(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
