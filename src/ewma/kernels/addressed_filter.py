"""What the filters that go by addresses share: gradients lie elsewhere at every step.

Where one lies is asked anew each time. What only torch can read, by dtype or layout, is left to foreach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ewma.kernels import Coefficient, foreach_filter
from ewma.kernels.addresses import check_overlap, plain


class AddressedFilter:
    left_out: Any

    def __init__(self, averages: Sequence[Tensor], squares: Sequence[Tensor] | None, guard: bool) -> None:
        self.averages = [list(averages)] if squares is None else [list(averages), list(squares)]
        self.guard = guard
        self.left_out = 0
        self.others: dict[tuple[int, ...], foreach_filter.Filter] = {}

    @property
    def skipped(self) -> Any:
        return self.left_out + sum((other.skipped for other in self.others.values()), start=0)

    def _divide(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The plain gradients and their averages; the numbers of the others are kept in `rest`."""
        self.mine = [n for n, gradient in enumerate(gradients) if plain(gradient, *(each[n] for each in self.averages))]
        self.rest = tuple(sorted(set(range(len(gradients))) - set(self.mine)))
        values, chosen = [gradients[n] for n in self.mine], [[each[n] for n in self.mine] for each in self.averages]
        try:
            check_overlap([], [values, *chosen])
        except ValueError:
            raise ValueError(
                "expected gradients that share no memory with each other or an average, being changed in place; "
                "two tensors overlap. Give each its own before the step: parameter.grad = parameter.grad.clone()."
            ) from None
        self.written = [average for each in chosen for average in each]
        return values, chosen

    def _by_torch(
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
        other.calm = [False] * len(other.packs)  # the passes in between may have left a NaN
        other([gradients[n] for n in which], coefficient, raw, slow, scale, taken)
