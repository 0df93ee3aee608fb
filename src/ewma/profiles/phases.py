"""Profiles for parts of a run: begin late, or stand in for a learning-rate decay at its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ewma.profiles.base import Profile, Scalar, above_zero, call, check_profile, choose, in_range


@dataclass(frozen=True, kw_only=True)
class after(Profile):
    """Follow the newest value until `start` (in steps), then begin `profile` there, as if all before had not been.

    `after(start=75_000, profile=Uniform())` is SWA; with `Exponential` it is the usual "update_after_step". An update
    that spans the start counts for the part of its elapsed that lies after it.
    """

    start: float
    profile: Profile

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", in_range("start", self.start, "at least 0", lambda s: 0.0 <= s < math.inf))
        check_profile(self.profile)

    def _within(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar]:
        """The inner profile's time and elapsed; of an update that ends before `start`, as if it were its first."""
        begun = time > self.start
        inner_time = choose(begun, time - self.start, elapsed)
        return inner_time, choose(elapsed < inner_time, elapsed, inner_time)

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        begun_before = time - elapsed > self.start
        inner = self.profile.forgetting(*self._within(time, elapsed))
        return inner if begun_before is True else choose(begun_before, inner, math.inf)

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        begun_before = time - elapsed > self.start
        keep, lost, gain = self.profile.change(*self._within(time, elapsed))
        fresh = gain if self.profile.debias else 1.0
        gain = choose(begun_before, gain, choose(time > self.start, fresh, 1.0))
        return choose(begun_before, keep, 0.0), choose(begun_before, lost, 1.0), gain


@dataclass(frozen=True, kw_only=True)
class from_lr_decay(Profile):
    """The average that stands in for a learning-rate decay: from a constant rate, weights as if it had been decayed.

    With a multiplier w going from 1 to 0 over the last `steps`, the update of step i counts w_i times, so the weights
    of step j count `c_j = w_j - w_(j+1)`: `keep = 1`, `gain = w(time - elapsed) - w(time)`. Begin it where the decay
    would have begun: `after(start=90_000, profile=from_lr_decay(shape="cosine", steps=10_000))`.

    Args:
        shape: "linear" (the uniform mean), "cosine" or "sqrt" (1 - sqrt).
        steps: length of the decay. After it nothing more is added.

    Source: WSM, arXiv 2507.17634; Sandler et al. 2023, arXiv 2301.02312. Exact only to first order: it supposes that
    the updates would have been the same.
    """

    shape: str = "linear"
    steps: float
    SHAPES: ClassVar[tuple[str, ...]] = ("linear", "cosine", "sqrt")

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", in_range("steps", self.steps, "a finite number above 0", above_zero))
        if self.shape not in self.SHAPES:
            raise ValueError(f"shape must be one of {', '.join(self.SHAPES)}; got {self.shape!r}")

    def multiplier(self, time: Scalar) -> Scalar:
        """What the learning rate would be multiplied by at `time`: 1 at the start, 0 from `steps` on."""
        share = choose(time < self.steps, time / self.steps, 1.0)
        if self.shape == "cosine":
            return (1.0 + call("cos", math.pi * share)) / 2.0
        return 1.0 - (share if self.shape == "linear" else share**0.5)

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return 0.0 * elapsed

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        return 1.0, 0.0 * elapsed, self.multiplier(time - elapsed) - self.multiplier(time)


@dataclass(frozen=True, kw_only=True)
class triangular(Profile):
    """Weights that rise in a straight line, and fall again: `keep = 1`, `gain` the triangle's area over the update.

    Begin it where the window does: `after(start=90_000, profile=triangular(steps=10_000))`. After `steps` nothing more
    is added.

    Args:
        steps: length of the window.
        peak: where the weights are highest, as a share of it: 1 rises to the newest (the weighted moving average of
            checkpoints, arXiv 2505.12082), .5 is symmetric.

    >>> [round(weight, 3) for weight in triangular(steps=4).weights(4)]
    [0.062, 0.188, 0.312, 0.438]
    """

    steps: float
    peak: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", in_range("steps", self.steps, "a finite number above 0", above_zero))
        object.__setattr__(self, "peak", in_range("peak", self.peak, "in [0, 1]", lambda p: 0.0 <= p <= 1.0))

    def area(self, time: Scalar) -> Scalar:
        """The share of the triangle that lies before `time`."""
        share = choose(time < self.steps, time / self.steps, 1.0)
        left = 1.0 - share
        rising = share * share / max(self.peak, 1e-300)
        return choose(share < self.peak, rising, 1.0 - left * left / max(1.0 - self.peak, 1e-300))

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return 0.0 * elapsed

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        return 1.0, 0.0 * elapsed, self.area(time) - self.area(time - elapsed)
