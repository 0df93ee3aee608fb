"""The update in one compiled pass over memory, for tensors on the CPU.

c/lerp.c has the loops and goes by pointers; what must hold of those is checked once for each preparation. The tensors
are held, so that nothing is freed; one whose memory moves must be prepared anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ewma.kernels import Coefficient, Word, _native
from ewma.kernels.addresses import check, divide, table

LARGE = 1 << 20
"""From how many elements on it is worth the time to wake other threads."""


class NativeLerp:
    """What only torch can read, by dtype or layout, is left to foreach."""

    def __init__(
        self, values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
    ) -> None:
        check(values, averages)
        self.values, chosen, mine, self.rest = divide(values, averages, streams, guard)
        self.table = table(self.values, chosen, mine, guard)
        self.noted = [average for several in chosen for average in several]
        self.large = sum(value.numel() for value in self.values) * len(averages) >= LARGE
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
