"""The truth: one tensor at a time, in float64, without regard to speed or memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ewma.arrays import Array, like, module_of
from ewma.kernels import Coefficient, Word, noise
from ewma.kernels.layout import dense, flat


class ReferenceLerp:
    noted: Sequence[Tensor] = ()
    free = False

    def __init__(
        self, values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
    ) -> None:
        self.values, self.averages, self.streams, self.guard = values, averages, streams, guard
        self.skipped = 0

    def __call__(self, coefficients: Sequence[Coefficient], words: Sequence[Word | None]) -> None:
        for index, value in enumerate(self.values):
            if self.guard:
                self.skipped += int((~noise.fits(value, self.averages[0][index].dtype)).sum())
            for averages, coefficient, word in zip(self.averages, coefficients, words, strict=True):
                self._update(averages[index], value, coefficient, word, self.streams[index])

    def _update(self, average: Tensor, value: Tensor, coefficient: Coefficient, word: Word | None, stream: int) -> None:
        old, new = average.double(), value.to(average.device, torch.float64)
        result = old + coefficient * (new - old)
        result = torch.where(torch.isfinite(new - old), result, (1 - coefficient) * old + coefficient * new)
        if self.guard:
            result = torch.where(torch.isnan(old), new, result)
            result = torch.where(noise.fits(new, average.dtype), result, old)
        if word is None:
            average.copy_(result)
        else:
            # An element's index is its place in the average's memory, so that a transposed layout is served too.
            ordered = torch.empty_like(average, dtype=torch.float64).copy_(result)
            assert dense(average)
            elements = torch.arange(average.numel(), device=average.device)
            bits = noise.bits(elements, word, stream)
            flat(average).copy_(noise.round_stochastically(flat(ordered), average.dtype, bits))


lerp = ReferenceLerp


def scan(u: Array, lost: float | Array, initial: Array, out: Array, kept: Array | None = None) -> None:
    """The recurrence as it is written, one step after the other."""
    module = module_of(u)
    lost = module.broadcast_to(like(u, lost), u.shape)
    kept = 1.0 - lost if kept is None else module.broadcast_to(kept, u.shape)
    y = initial[:, 0]
    for t in range(u.shape[1]):
        y = module.where(lost[:, t] > 0.5, kept[:, t] * y + u[:, t], y + (u[:, t] - lost[:, t] * y))
        out[:, t] = y
