"""The filter of gradients in one compiled pass over memory, for tensors on the CPU: native.c has the loops."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ewma.kernels import Coefficient, _native
from ewma.kernels.addressed_filter import AddressedFilter
from ewma.kernels.addresses import check, table
from ewma.kernels.native import LARGE


class Filter(AddressedFilter):
    """What is scaled or only perhaps taken is left to foreach, too."""

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
        if self._moved(gradients):
            self._prepare(gradients)
        increment_version(self.written)
        increment_version([gradients[n] for n in self.mine])
        several = len(self.averages)
        threads = torch.get_num_threads() if self.large else 1
        self.left_out += _native.lerp(
            self.table, [coefficient] * several, [None] * several, threads, 0, 2**63, raw, slow
        )
        if self.rest:
            self._by_torch(self.rest, gradients, coefficient, raw, slow, None, None)

    def _prepare(self, gradients: Sequence[Tensor]) -> None:
        check(gradients, self.averages)
        values, chosen = self._divide(gradients)
        self.table: array[int] = table(values, chosen, [0] * len(values), self.guard)
        self.large = sum(value.numel() for value in values) >= LARGE
