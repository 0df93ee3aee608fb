"""The filter of gradients by torch's own operations: any device, no compiler.

Gradients are taken in packs that fit the processor's shared cache: averaged there, and filtered before the next pack
comes. A pack of another dtype than the averages' is converted in reused space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ewma.kernels import Coefficient
from ewma.kernels.foreach import carefully, packs, tame
from ewma.kernels.layout import dense, flat

PACK = 1 << 17
"""In elements: gradients and averages of a pack fit a core's own cache, from which they are read three times."""


class Filter:
    def __init__(self, averages: Sequence[Tensor], squares: Sequence[Tensor] | None, guard: bool) -> None:
        self.like = averages
        self.averages = [flat(average) for average in averages]
        self.squares = None if squares is None else [flat(square) for square in squares]
        self.guard = guard
        self.skipped: Any = 0
        pieces = [
            (number, slice(start, min(start + PACK, average.numel())))
            for number, average in enumerate(self.averages)
            for start in range(0, average.numel(), PACK)
        ]
        chosen = packs([part.stop - part.start for _, part in pieces], PACK)
        self.packs = [[pieces[place] for place in pack] for pack in chosen]
        self.parts = [[self.averages[k][part] for k, part in pack] for pack in self.packs]
        self.calm = [False] * len(self.packs)  # a NaN says that nothing was seen yet
        self.scratch: Tensor | None = None

    def __call__(
        self,
        gradients: Sequence[Tensor],
        coefficient: Coefficient,
        raw: float,
        slow: float,
        scale: float | Tensor | None = None,
        taken: Tensor | None = None,
    ) -> None:
        copies = {}
        vectors = []
        for number, (gradient, average) in enumerate(zip(gradients, self.like, strict=True)):
            if gradient.is_neg() or not (dense(gradient) and gradient.stride() == average.stride()):
                copies[number] = gradient
                gradient = torch.empty_like(average, dtype=gradient.dtype).copy_(gradient)
            vectors.append(flat(gradient))
        for number, pack in enumerate(self.packs):
            self._filter(number, [vectors[k][part] for k, part in pack], coefficient, raw, slow, scale, taken)
        for number, gradient in copies.items():
            gradient.copy_(vectors[number].as_strided(gradient.shape, self.like[number].stride()))

    def _filter(
        self,
        number: int,
        gradients: list[Tensor],
        coefficient: Coefficient,
        raw: float,
        slow: float,
        scale: float | Tensor | None,
        taken: Tensor | None,
    ) -> None:
        pack = self.packs[number]
        averages = self.parts[number]
        values = gradients
        plain = scale is None and taken is None
        if not plain or gradients[0].dtype != averages[0].dtype:
            values = self._converted(gradients, averages[0], scale)
        calm = plain and (not self.guard or (self.calm[number] and self._tame(values, averages[0])))
        if calm and self.squares is None:
            _lerp(averages, values, coefficient)
        else:
            for (k, part), average, value in zip(pack, averages, values, strict=True):
                self._average(average, value, coefficient, taken, counts=True)
                if self.squares is not None:
                    self._average(self.squares[k][part], value.square(), coefficient, taken, counts=False)
            self.calm[number] = averages[0].is_cpu and all(tame([average], average.dtype) for average in averages)
        if calm or self.calm[number] or not self.guard:
            _mix(values, averages, raw, slow)
        else:
            for average, value in zip(averages, values, strict=True):
                mixed = slow * average if raw == 0.0 else raw * value + slow * average
                value.copy_(torch.where(torch.isnan(average), value, mixed))
        if values is not gradients:
            for gradient, value in zip(gradients, values, strict=True):
                filtered = value if scale is None else value.mul_(scale)
                gradient.copy_(filtered if taken is None else torch.where(taken, filtered, gradient.to(value.dtype)))

    def _average(
        self, average: Tensor, value: Tensor, coefficient: Coefficient, taken: Tensor | None, counts: bool
    ) -> None:
        if self.guard and counts:
            missing = (~torch.isfinite(value)).sum()
            self.skipped = self.skipped + (missing if taken is None else missing * taken)
        old = average.clone()
        if self.guard:
            moved = carefully(old.clone(), value.clone(), coefficient, old.dtype)
        else:
            moved = old.lerp(value, coefficient.to(old) if isinstance(coefficient, Tensor) else coefficient)
        average.copy_(moved if taken is None else torch.where(taken, moved, old))

    def _converted(self, gradients: list[Tensor], like: Tensor, scale: float | Tensor | None) -> list[Tensor]:
        size = sum(gradient.numel() for gradient in gradients)
        if self.scratch is None or self.scratch.numel() < size:
            self.scratch = like.new_empty(max(size, min(PACK, sum(average.numel() for average in self.averages))))
        values = list(self.scratch[:size].split([gradient.numel() for gradient in gradients]))
        for value, gradient in zip(values, gradients, strict=True):
            value.copy_(gradient)
        if scale is not None:
            self.scratch[:size].div_(scale)
        return values

    def _tame(self, values: list[Tensor], like: Tensor) -> bool:
        together = values
        if len(values) > 1 and values[0].is_cpu:
            together = [torch.cat(values)]
        return tame(together, like.dtype)


def _lerp(averages: list[Tensor], values: list[Tensor], coefficient: Coefficient) -> None:
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(averages[0])
    torch._foreach_lerp_(averages, values, coefficient)  # type: ignore[arg-type]  # a 0-dim tensor is one, too


def _mix(values: list[Tensor], averages: list[Tensor], raw: float, slow: float) -> None:
    if raw == 0.0:
        torch._foreach_copy_(values, averages)
        if slow != 1.0:
            torch._foreach_mul_(values, slow)
        return
    if raw != 1.0:
        torch._foreach_mul_(values, raw)
    if slow != 0.0:
        torch._foreach_add_(values, averages, alpha=slow)
