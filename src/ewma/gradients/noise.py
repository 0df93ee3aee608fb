"""How noisy gradients are: inner products of what lies on several ranks, and the noise scale from two batch sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ewma import files, profiles
from ewma.gradients.resuming import check
from ewma.profiles import Profile, choose
from ewma.recurrence import Recurrence
from ewma.shards import local, summed

_PARTS = ("clock", "signal", "spread")

PIECE = 1 << 20
"""How many elements are multiplied at a time, in float64."""


def product(one: Tensor, other: Tensor, like: Tensor) -> Tensor:
    """The inner product of two tensors' local parts, over all ranks that share `like`: a 0-dim float64 tensor.

    What is not a number in one of them has no part in it.
    """
    one, other = local(one).reshape(-1), local(other).reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    for piece, fellow in zip(one.split(PIECE), other.split(PIECE), strict=True):
        several = piece.to(torch.complex128) if piece.is_complex() else piece.double()
        total = total + torch.nansum((several * fellow.conj()).real)
    return summed(total, like)


class NoiseScale:
    """The simple noise scale from gradients of two batch sizes, each part averaged on its own.

        |G|^2 = (B L - b s) / (B - b)       tr(S) = (s - L) / (1 / b - 1 / B)

    s and L are the squared norms of the gradients of a small batch of b samples and a big one of B: of one microbatch
    and of all of them, or of one rank before and after the all-reduce. The noise scale is the ratio of the averages,
    never the average of the ratios.

    Args:
        profile, half_life, decay, alpha, span, com: how the past is weighted, in updates; see `Exponential`.

    Source: McCandlish et al. 2018, arXiv 1812.06162, appendix A.1. Beside it: `GradientEMA.noise_scale` needs no second
    batch size, but a buffer more, and a gradient that drifts slowly.

    >>> scale = NoiseScale(half_life=100)
    >>> scale.update(small_square=5.0, big_square=2.0, small=1, big=4)
    >>> float(scale.get())
    4.0
    """

    def __init__(
        self,
        profile: Profile | None = None,
        *,
        half_life: float | None = None,
        decay: float | None = None,
        alpha: float | None = None,
        span: float | None = None,
        com: float | None = None,
    ) -> None:
        knobs = {"half_life": half_life, "decay": decay, "alpha": alpha, "span": span, "com": com}
        self.clock = Recurrence(profiles.resolve("NoiseScale(", profile, True, **knobs))
        self.signal: Any = 0.0
        self.spread: Any = 0.0

    def update(self, small_square: Any, big_square: Any, small: float, big: float) -> None:
        """Take in one pair: the squared norms (numbers or 0-dim tensors) and the batch sizes, small below big.

        A pair of which one is NaN or infinite does not enter.
        """
        if not 0.0 < small < big:
            raise ValueError(
                f"expected two batch sizes, 0 < small < big; got small={small} and big={big}. With one microbatch only "
                f"there is nothing to compare: see GradientEMA.noise_scale."
            )
        signal = (big * big_square - small * small_square) / (big - small)
        spread = (small_square - big_square) / (1.0 / small - 1.0 / big)
        known = (abs(signal) < math.inf) & (abs(spread) < math.inf)  # False for NaN
        if not isinstance(known, Tensor) or known.is_cpu:
            known = bool(known)
        if known is False:
            return
        coefficient = self.clock.advance(choose(known, 1.0, 0.0))
        self.signal = self.signal + coefficient * (choose(known, signal, 0.0) - self.signal)
        self.spread = self.spread + coefficient * (choose(known, spread, 0.0) - self.spread)

    def get(self) -> Any:
        """tr(S) / |G|^2, in samples; of tensors a tensor, not waited for. Infinite or negative where no signal is."""
        if isinstance(self.clock.count, float) and not self.clock.count:
            raise RuntimeError("NoiseScale.get: there is no average before the first update; call update(...) first")
        if isinstance(self.signal, float) and self.signal == 0.0:
            return math.inf if self.spread > 0.0 else math.nan
        return self.spread / self.signal

    def state_dict(self) -> dict[str, Any]:
        """All there is to save: numbers and strings."""
        return {
            "format": files.FORMAT,
            "kind": "NoiseScale",
            "profile": self.clock.profile.to_json(),
            "clock": self.clock.numbers(),
            "signal": float(self.signal),
            "spread": float(self.spread),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        check("NoiseScale.load_state_dict", state, "NoiseScale", self.clock.profile, "NoiseScale", _PARTS)
        self.clock = Recurrence(self.clock.profile)
        self.clock.load(state["clock"])
        self.signal, self.spread = state["signal"], state["spread"]
