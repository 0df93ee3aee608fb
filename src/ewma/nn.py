"""Averages as modules inside a network: their state are buffers, saved and moved with the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ewma import profiles
from ewma.profiles import Profile
from ewma.recurrence import Recurrence, check_elapsed


class EMA(nn.Module):
    """Running mean of a tensor inside a network: DINO centres, VQ codebooks, activation statistics.

        average' = average + c * (x - average)          c = gain / weight, by time: see `ewma.profiles`

    In training mode `forward` takes x in; in evaluation mode it only looks. Both give the average, without gradient and
    in memory of its own.

    Args:
        shape: of the values, without a batch: average over the batch first.
        profile, half_life, decay, alpha, span, com, debias: how the past is weighted; see `Exponential`.
        all_reduce: in a process group, take in the mean over all ranks, so that all keep the same average. True for the
            default group, or a group.
        dtype: of what is given back. What is kept stays float64 through `.half()` and `.to(dtype)`, since an average in
            16 bits stops moving; it follows `.to(device)`.

    Before the first update the average is 0. NaN and infinite elements are left out. Everything happens on the device,
    so it compiles and can be captured.

    Beside it: `ewma.EMA` is the form outside a network, which needs no shape; BatchNorm's running statistics are an
    average with debias=False and alpha called momentum.

    >>> centre = EMA(shape=2, half_life=10)
    >>> centre(torch.tensor([1.0, 3.0]))
    tensor([1., 3.])
    """

    average: Tensor
    numbers: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        profile: Profile | None = None,
        *,
        half_life: float | None = None,
        decay: float | None = None,
        alpha: float | None = None,
        span: float | None = None,
        com: float | None = None,
        debias: bool = True,
        all_reduce: bool | dist.ProcessGroup = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        knobs = {"half_life": half_life, "decay": decay, "alpha": alpha, "span": span, "com": com}
        self.profile = profiles.resolve("nn.EMA(shape, ", profile, debias, **knobs)
        self.all_reduce = all_reduce
        self.dtype = dtype
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        # NaN marks an element that has seen nothing yet.
        self.register_buffer("average", torch.full(size, math.nan, dtype=torch.float64))
        # Time, weight, residue and count: float64 kept as the integers of the same bits, which no `.half()` touches.
        self.register_buffer("numbers", torch.zeros(len(Recurrence.NUMBERS), dtype=torch.int64))

    def forward(self, x: Tensor, elapsed: float | Tensor = 1.0) -> Tensor:
        if self.training:
            self.update(x, elapsed)
        return self.get()

    @torch.no_grad()
    def update(self, x: Tensor, elapsed: float | Tensor = 1.0) -> None:
        """Take in one value of the shape given at construction, whatever the mode."""
        if x.shape != self.average.shape:
            raise ValueError(
                f"nn.EMA: expected a value of shape {list(self.average.shape)}; got {list(x.shape)}. Average over the "
                f"batch first, for example ema(x.mean(dim=0))."
            )
        x = x.detach().double()
        if self.all_reduce and dist.is_initialized():
            group = None if self.all_reduce is True else self.all_reduce
            x = x.clone() / dist.get_world_size(group)
            dist.all_reduce(x, group=group)
        if not isinstance(elapsed, Tensor) and not torch.compiler.is_compiling():
            check_elapsed(elapsed)
        # As a tensor, or every new value of it would be compiled anew.
        coefficient = self._recurrence().advance(x.new_zeros(()) + elapsed)
        x = torch.where(torch.isfinite(x), x, self.average)
        start = torch.where(torch.isnan(self.average), x, self.average)
        moved = start + coefficient * (x - start)
        self.average.copy_(torch.where(torch.isfinite(x - start), moved, (1 - coefficient) * start + coefficient * x))

    def get(self) -> Tensor:
        """The average so far; 0 where nothing was seen yet."""
        return torch.where(torch.isnan(self.average), 0.0, self.average).to(self.dtype)

    @property
    def count(self) -> int:
        """How many updates were made. Waits for the device."""
        return int(self._recurrence().count)

    def reset(self) -> None:
        """Forget everything: the next update is the first."""
        self.average.fill_(math.nan)
        self.numbers.zero_()

    def extra_repr(self) -> str:
        return f"{tuple(self.average.shape)}, {self.profile!r}"

    def _recurrence(self) -> Recurrence:
        recurrence = Recurrence(self.profile)
        for name, number in zip(Recurrence.NUMBERS, self.numbers.view(torch.float64).unbind(), strict=True):
            setattr(recurrence, name, number)
        return recurrence

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.average
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self.average.dtype != exact.dtype:
            self.average = exact.to(self.average.device)
        return self


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module 'ewma.nn' has no attribute {name!r}; it has EMA. torch's own are in torch.nn.")
