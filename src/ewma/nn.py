"""Averages as modules inside a network: their state are buffers, saved and moved with the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ewma import profiles
from ewma.profiles import Profile
from ewma.recurrence import Recurrence, check_elapsed
from ewma.series.moments import Moments
from ewma.series.weighting import Rule


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
        if x.is_complex():
            _check_floating("nn.EMA", x)
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


class Decoded(NamedTuple):
    """Where `Smooth.decode` stands: the mean so far and its weight, of x's shape without time."""

    mean: Tensor
    weight: Tensor


class Smooth(nn.Module):
    """Running mean along time, whose half-life is learned: one for each channel, in steps.

        mean[t] = mean[t-1] + c[t] * (x[t] - mean[t-1])         c[t] = 1 / weight[t]
        weight[t] = decay * weight[t-1] + 1                     decay = 2 ** (-1 / half_life)

    Args:
        channels: how many channels x has, along its last dimension.
        half_life: where learning starts: a number of steps, or one for each channel. Spread over the scales that may
            matter, for example `torch.logspace(0, 3, channels)`.
        dim: of time in x.
        learn: False keeps the half-lives as they are, as a buffer.
        debias: True is the true weighted mean of what was seen, False starts at the first value.

    What is learned is `log_half_life`, so a half-life stays above 0 and moves by shares of itself. The arithmetic is in
    float64; the result has x's shape and dtype. Causal: no output depends on a later input. NaN and infinite elements
    are left out; before the first other one the mean is 0. `torch.compile` calls it as it is, between two graphs.

    Beside it: `nn.EMA` averages over the steps of training and learns nothing; a one-pole filter of state-space models
    (Mega's damped EMA, ETSformer) is this with debias=False and a projection around it.

    >>> smooth = Smooth(channels=2, half_life=[1.0, 100.0])
    >>> smooth(torch.tensor([[[1.0, 1.0], [4.0, 4.0]]])).detach()
    tensor([[[1.0000, 1.0000],
             [3.0000, 2.5052]]])
    """

    log_half_life: Tensor

    def __init__(
        self,
        channels: int,
        half_life: float | Sequence[float] | Tensor,
        *,
        dim: int = -2,
        learn: bool = True,
        debias: bool = True,
    ) -> None:
        super().__init__()
        start = torch.as_tensor(half_life, dtype=torch.float32)
        if start.shape not in ((), (channels,)):
            raise ValueError(
                f"nn.Smooth: expected one half-life, or one for each of {channels} channels; got shape "
                f"{list(start.shape)}"
            )
        if not start.is_meta and not bool(((start > 0) & torch.isfinite(start)).all()):
            raise ValueError(f"nn.Smooth: half-lives must be finite and above 0, in steps; got {half_life}")
        self.dim, self.debias = dim, debias
        logarithm = start.log().expand(channels).clone()
        if learn:
            self.log_half_life = nn.Parameter(logarithm)
        else:
            self.register_buffer("log_half_life", logarithm)

    @property
    def half_life(self) -> Tensor:
        """The half-life of each channel, in steps, as float64."""
        return self.log_half_life.double().exp()

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor
        mean, _ = self.decode(x)
        return mean

    # Tracing the scan takes half a minute, and gives something slower.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def decode(self, x: Tensor, state: Decoded | None = None) -> tuple[Tensor, Decoded]:
        """The same piece by piece: takes the next steps, and where the last piece left off; gives both again.

        >>> smooth, x = Smooth(channels=3, half_life=5), torch.randn(2, 7, 3)
        >>> first, state = smooth.decode(x[:, :4])
        >>> second, state = smooth.decode(x[:, 4:], state)
        >>> torch.allclose(torch.cat((first, second), dim=1), smooth(x))
        True
        """
        _check_floating("nn.Smooth", x)
        dim = self.dim % x.dim()
        if x.shape[-1] != len(self.log_half_life) or dim == x.dim() - 1:
            raise ValueError(
                f"nn.Smooth: expected {len(self.log_half_life)} channels along the last dimension and time along "
                f"dim={self.dim}; got shape {list(x.shape)}"
            )
        if not x.shape[dim]:
            raise ValueError(f"nn.Smooth: expected one step or more along dim={self.dim}; got none")
        before, after = x.shape[:dim], x.shape[dim + 1 :]
        shape = (before.numel(), x.shape[dim], after.numel())
        alpha = -torch.expm1(-math.log(2.0) / self.half_life)
        alpha = alpha.expand(1, 1, *after).reshape(1, 1, -1)
        moments = Moments(Rule(None, self.debias, "value", alpha=alpha))
        if state is not None:
            mean, weight = (part.reshape(shape[0], 1, shape[2]) for part in state)
            moments.means, moments.weight, moments.count = (mean,), weight, (weight > 0.0).double()
        chunk = moments.advance((x.reshape(shape),))
        y = torch.where(chunk.count > 0.0, chunk.means[0], 0.0)
        size = (*before, *after)
        weight = moments.weight.expand(shape[0], 1, shape[2]).reshape(size)
        return y.reshape(x.shape).to(x.dtype), Decoded(moments.means[0].reshape(size), weight)

    def extra_repr(self) -> str:
        return f"channels={len(self.log_half_life)}, dim={self.dim}, debias={self.debias}"


def _check_floating(where: str, x: Tensor) -> None:
    if not x.is_floating_point():
        cure = "Average x.real and x.imag" if x.is_complex() else "Convert it: x.float()"
        raise TypeError(f"{where}: expected a tensor of floating-point numbers; got {x.dtype}. {cure}.")


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"module 'ewma.nn' has no attribute {name!r}; it has EMA and Smooth. torch's own are in torch.nn."
    )
