"""The filter of gradients as it is defined: one tensor at a time, in float64, without regard to speed or memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ewma.kernels import Coefficient


class Filter:
    def __init__(self, averages: Sequence[Tensor], squares: Sequence[Tensor] | None, guard: bool) -> None:
        self.averages, self.squares, self.guard = averages, squares, guard
        self.skipped: Any = 0

    def __call__(
        self,
        gradients: Sequence[Tensor],
        coefficient: Coefficient,
        raw: float,
        slow: float,
        scale: float | Tensor | None = None,
        taken: Tensor | None = None,
    ) -> None:
        happens = torch.tensor(True) if taken is None else taken
        for number, gradient in enumerate(gradients):
            value = gradient.double() if scale is None else gradient.double() / scale
            self.skipped = self.skipped + happens * (self.guard * ~torch.isfinite(value)).sum()
            average = self.averages[number]
            average.copy_(torch.where(happens, self._moved(average.double(), value, coefficient), average))
            if self.squares is not None:
                square = self.squares[number]
                square.copy_(torch.where(happens, self._moved(square.double(), value * value, coefficient), square))
            slowly = average.double()
            filtered = slow * slowly if raw == 0.0 else raw * value + slow * slowly
            if self.guard:
                filtered = torch.where(torch.isnan(slowly), value, filtered)
            gradient.copy_(torch.where(happens, filtered if scale is None else filtered * scale, gradient.double()))

    def _moved(self, old: Tensor, new: Tensor, coefficient: Coefficient) -> Tensor:
        moved = old + coefficient * (new - old)
        if not self.guard:
            return moved
        moved = torch.where(torch.isnan(old), new, moved)
        return torch.where(new.abs() <= torch.finfo(self.averages[0].dtype).max, moved, old)
