"""The filter of gradients in one compiled pass over memory, for tensors on the CPU: native.c has the loops.

Gradients lie elsewhere at every step. Where one lies is asked anew each time, and all is checked again where anything
has changed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ewma.kernels import Coefficient, _native, foreach_filter
from ewma.kernels.addresses import check, check_overlap, plain, table
from ewma.kernels.native import LARGE


class Filter:
    """What only torch can read, by dtype or layout, is left to foreach; so is what is scaled or only perhaps taken."""

    def __init__(self, averages: Sequence[Tensor], squares: Sequence[Tensor] | None, guard: bool) -> None:
        self.averages = [list(averages)] if squares is None else [list(averages), list(squares)]
        self.guard = guard
        self.places: list[Any] | None = None
        self.left_out = 0
        self.others: dict[tuple[int, ...], foreach_filter.Filter] = {}

    @property
    def skipped(self) -> Any:
        return self.left_out + sum((other.skipped for other in self.others.values()), start=0)

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
            self._rest(tuple(range(len(gradients))), gradients, coefficient, raw, slow, scale, taken)
            return
        places = [(gradient.data_ptr(), gradient.dtype, gradient.stride()) for gradient in gradients]
        if places != self.places:
            self._prepare(gradients)
            self.places = places
        increment_version(self.written)
        increment_version([gradients[n] for n in self.mine])
        several = len(self.averages)
        threads = torch.get_num_threads() if self.large else 1
        self.left_out += _native.lerp(
            self.table, [coefficient] * several, [None] * several, threads, 0, 2**63, raw, slow
        )
        if self.rest:
            self._rest(self.rest, gradients, coefficient, raw, slow, None, None)

    def _prepare(self, gradients: Sequence[Tensor]) -> None:
        check(gradients, self.averages)
        self.mine = [n for n, gradient in enumerate(gradients) if plain(gradient, *(each[n] for each in self.averages))]
        self.rest = tuple(sorted(set(range(len(gradients))) - set(self.mine)))
        values, chosen = [gradients[n] for n in self.mine], [[each[n] for n in self.mine] for each in self.averages]
        check_overlap([], [values, *chosen])
        self.table: array[int] = table(values, chosen, [0] * len(values), self.guard)
        self.written = [average for each in chosen for average in each]
        self.large = sum(value.numel() for value in values) >= LARGE

    def _rest(
        self,
        which: tuple[int, ...],
        gradients: Sequence[Tensor],
        coefficient: Coefficient,
        raw: float,
        slow: float,
        scale: float | Tensor | None,
        taken: Tensor | None,
    ) -> None:
        if which not in self.others:
            averages, *squares = ([each[n] for n in which] for each in self.averages)
            self.others[which] = foreach_filter.Filter(averages, squares[0] if squares else None, self.guard)
        other = self.others[which]
        other.calm = [False] * len(other.packs)  # the compiled passes in between may have left a NaN
        other([gradients[n] for n in which], coefficient, raw, slow, scale, taken)
