"""The filter of gradients in one compiled pass over memory, for tensors on the CPU: c/lerp.c has the loops.

At nearly every step the gradients lie elsewhere, but laid out as before. Then only their addresses are exchanged, and
only what depends on these is checked again.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ewma.kernels import Coefficient, _native
from ewma.kernels.addressed_filter import AddressedFilter
from ewma.kernels.addresses import check, disjoint, readdress, table
from ewma.kernels.native import LARGE


class Filter(AddressedFilter):
    """What is scaled or only perhaps taken is left to foreach, too."""

    def __init__(self, averages: Sequence[Tensor], squares: Sequence[Tensor] | None, guard: bool) -> None:
        super().__init__(averages, squares, guard)
        self.both = [average for each in self.averages for average in each]
        self.layout: Any = None  # of what the table was made for
        self.addresses = b""

    def __call__(
        self,
        gradients: Sequence[Tensor],
        coefficient: Coefficient,
        raw: float,
        slow: float,
        scale: float | Tensor | None = None,
        taken: Tensor | None = None,
    ) -> None:
        if scale is not None or taken is not None or isinstance(coefficient, Tensor):
            self._by_torch(tuple(range(len(gradients))), gradients, coefficient, raw, slow, scale, taken)
            return
        self._follow(gradients)
        increment_version(self.written)
        increment_version([gradients[n] for n in self.mine])
        several = len(self.averages)
        threads = torch.get_num_threads() if self.large else 1
        self.left_out += _native.lerp(
            self.table, [coefficient] * several, [None] * several, threads, 0, 2**63, raw, slow
        )
        if self.rest:
            self._by_torch(self.rest, gradients, coefficient, raw, slow, None, None)

    def _follow(self, gradients: Sequence[Tensor]) -> None:
        """Let the table say where everything lies now."""
        layout, addresses = self._places(gradients)
        known = layout is not None and layout == self.layout
        if not (known and (addresses == self.addresses or self._readdressed(gradients, addresses))):
            self.layout = None
            self._prepare(gradients)
        self.layout, self.addresses = layout, addresses

    def _places(self, gradients: Sequence[Tensor]) -> tuple[Any, bytes]:
        """All that the table depends on, or None where torch does not tell; but the gradients' addresses apart."""
        end = array("Q").itemsize * len(gradients)
        try:
            layouts, addresses = _native.places([*gradients, *self.both], torch.Tensor.__dlpack_c_exchange_api__)
        except (BufferError, RuntimeError):
            return None, b""
        kinds = [*map(type, gradients), *map(Tensor.is_neg, gradients)]
        return (kinds, layouts, addresses[end:]), addresses[:end]

    def _readdressed(self, gradients: Sequence[Tensor], addresses: bytes) -> bool:
        """Exchange the addresses, unless something does not hold of them: `_prepare` then says what."""
        starts = array("Q", addresses)
        ends = (storage.data_ptr() + storage.nbytes() for storage in map(Tensor.untyped_storage, gradients))
        holds = (
            not self.rest
            and not any(map(operator.mod, starts, repeat(gradients[0].itemsize)))
            and all(map(operator.le, map(operator.add, starts, self.sizes), ends))
            and disjoint([*starts, *map(Tensor.data_ptr, self.both)], self.sizes)
        )
        if holds:
            readdress(self.table, starts)
        return holds

    def _prepare(self, gradients: Sequence[Tensor]) -> None:
        check(gradients, self.averages)
        values, chosen = self._divide(gradients)
        self.table: array[int] = table(values, chosen, [0] * len(values), self.guard)
        self.large = sum(value.numel() for value in values) >= LARGE
        self.sizes = [tensor.nbytes for tensor in (*gradients, *self.both)]
