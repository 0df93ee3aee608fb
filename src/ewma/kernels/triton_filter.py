"""The filter of gradients in one launch, for CUDA: written in Triton.

A gradient is read once and written once, whatever it is scaled by, and nothing waits for the device: a step that was
not taken (GradScaler's `found_inf`) ends each program before it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ewma.kernels import Coefficient
from ewma.kernels.addressed_filter import AddressedFilter
from ewma.kernels.addresses import places
from ewma.kernels.triton_numbers import (
    Table,
    aligned,
    capturing,
    check,
    count,
    finite,
    halves,
    launch,
    moved,
    number,
    pointer,
    read,
    write,
)

BLOCK = 2048
"""In elements: what one program filters."""


@triton.jit
def _averaged(start, offsets, inside, value, c, AVERAGE: tl.constexpr, GUARD: tl.constexpr, FULL: tl.constexpr):
    """The average after it took the value in, where that is finite; written."""
    old = read(start, offsets, inside, AVERAGE, FULL)
    new = moved(old, value, c)
    if GUARD:
        new = tl.where(finite(value), tl.where(old == old, new, value), old)
    write(start, offsets, inside, new, AVERAGE, FULL)
    return new


@triton.jit
def _block(
    row,
    first,
    left,
    out,
    coefficient,
    raw,
    slow,
    scale,
    SETS: tl.constexpr,
    VALUE: tl.constexpr,
    AVERAGE: tl.constexpr,
    GUARD: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    inside = offsets < left
    gradient = pointer(tl.load(row), first, VALUE, FULL)
    value = read(gradient, offsets, inside, VALUE, FULL).to(AVERAGE)
    if scale is not None:
        value *= (1.0 / number(scale[0], scale[1])).to(AVERAGE)
    if GUARD:
        count(out, inside & ~finite(value))
    c = number(coefficient[0], coefficient[1])
    average = pointer(tl.load(row + 4), first, AVERAGE, FULL)
    slowly = _averaged(average, offsets, inside, value, c, AVERAGE, GUARD, FULL)
    if SETS == 2:
        square = pointer(tl.load(row + 5), first, AVERAGE, FULL)
        _averaged(square, offsets, inside, value * value, c, AVERAGE, GUARD, FULL)
    if slow is not None:
        filtered = number(slow[0], slow[1]).to(AVERAGE) * slowly
        if raw is not None:
            filtered = number(raw[0], raw[1]).to(AVERAGE) * value + filtered
        if GUARD:
            filtered = tl.where(slowly == slowly, filtered, value)
        if scale is not None:
            filtered *= number(scale[0], scale[1]).to(AVERAGE)
        write(gradient, offsets, inside, filtered, VALUE, FULL)


@triton.jit
def _filter(
    rows,
    blocks,
    out,
    taken,
    coefficient,
    raw,
    slow,
    scale,
    SETS: tl.constexpr,
    VALUE: tl.constexpr,
    AVERAGE: tl.constexpr,
    GUARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    here = blocks + 2 * tl.program_id(0).to(tl.int64)
    row = rows + (4 + SETS) * tl.load(here).to(tl.int64)
    first = BLOCK * tl.load(here + 1).to(tl.int64)
    left = tl.load(row + 1) - first
    if taken is not None:
        left = tl.where(tl.load(taken), left, 0)
    if (left >= BLOCK) & aligned(row, SETS):
        _block(row, first, left, out, coefficient, raw, slow, scale, SETS, VALUE, AVERAGE, GUARD, BLOCK, True)
    elif left > 0:
        _block(row, first, left, out, coefficient, raw, slow, scale, SETS, VALUE, AVERAGE, GUARD, BLOCK, False)


class Filter(AddressedFilter):
    def __init__(self, averages: Sequence[Tensor], squares: Sequence[Tensor] | None, guard: bool) -> None:
        super().__init__(averages, squares, guard)
        check(averages, self.averages)
        self.table: Any = None
        self.places: Any = None  # that the table was made for
        if averages:
            self.device = averages[0].device
            self.left_out = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def skipped(self) -> Any:
        return super().skipped + 0  # not the tensor that is still counted in

    def __call__(
        self,
        gradients: Sequence[Tensor],
        coefficient: Coefficient,
        raw: float,
        slow: float,
        scale: float | Tensor | None = None,
        taken: Tensor | None = None,
    ) -> None:
        now = self._places(gradients)
        # What is uploaded while a graph is captured is there only when that graph runs.
        if capturing() or now != self.places:
            self.places = None
            check(gradients, self.averages)
            self.table = Table(*self._divide(gradients), [0] * len(self.mine), BLOCK, self.table)
            self.places = now
        if self.table.programs:
            increment_version(self.written)
            increment_version([gradients[n] for n in self.mine])
            unchanged = raw == 1.0 and slow == 0.0
            launch(
                _filter,
                self.table,
                self.left_out,
                None if taken is None else taken.to(self.device),
                halves(coefficient, self.device),
                None if raw == 0.0 else halves(raw, self.device),
                None if unchanged else halves(slow, self.device),
                None if scale is None else halves(scale, self.device),
                GUARD=self.guard,
            )
        if self.rest:
            self._by_torch(self.rest, gradients, coefficient, raw, slow, scale, taken)

    def _places(self, gradients: Sequence[Tensor]) -> tuple[Any, ...]:
        """All that the table depends on."""
        tensors = [*gradients, *(average for each in self.averages for average in each)]
        return capturing(), list(map(type, gradients)), list(map(Tensor.is_neg, gradients)), places(tensors)
