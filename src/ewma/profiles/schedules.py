"""The decays that people change along a run, each one line with its source."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ewma.profiles.base import LN2, Profile, Scalar, above_zero, at_least, call, choose, in_range, log1p


@dataclass(frozen=True, kw_only=True)
class Schedule(Profile):
    """A decay that changes along the run: `keep = (1 - alpha(n)) ** elapsed`, `gain = 1 - keep`.

    n is what had elapsed before the update, 0 at the first: it counts steps (or samples, or seconds), not calls, so
    that updating every k-th step does not stretch the schedule.
    """

    debias: bool = True

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name in _DOMAINS:
                domain, inside = _DOMAINS[each.name]
                object.__setattr__(self, each.name, in_range(each.name, value, domain, inside))

    def alpha_at(self, n: Scalar) -> Scalar:
        raise NotImplementedError

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return -log1p(-self.alpha_at(time - elapsed)) * elapsed


def _a_decay(x: float) -> bool:
    return 0.0 <= x <= 1.0


_DOMAINS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("decay", "first", "last"), ("in [0, 1]", _a_decay)),
    **dict.fromkeys(("gamma", "power", "tau", "steps", "share"), ("a finite number above 0", above_zero)),
}


@dataclass(frozen=True, kw_only=True)
class inverse_gamma(Schedule):
    """`d(n) = min(decay, 1 - (1 + n / gamma) ** -power)`: long runs forget slowly (k-diffusion's EMAWarmup).

    gamma is in steps; power=2/3 reaches .999 at 31,600 steps and .9999 at a million, 3/4 at 10,000 and 215,000.
    """

    gamma: float = 1.0
    power: float = 2.0 / 3.0
    decay: float = 1.0

    def alpha_at(self, n: Scalar) -> Scalar:
        return at_least((1.0 + n / self.gamma) ** -self.power, 1.0 - self.decay)


@dataclass(frozen=True, kw_only=True)
class tensorflow(Schedule):
    """`d(n) = min(decay, (1 + n) / (10 + n))` (tf.train.ExponentialMovingAverage with num_updates; torch_ema).

    It overrides your decay until n = 9 / (1 - decay): for .9999 the first 90,000 steps.
    """

    decay: float = 0.9999

    def alpha_at(self, n: Scalar) -> Scalar:
        return at_least(9.0 / (10.0 + n), 1.0 - self.decay)


@dataclass(frozen=True, kw_only=True)
class cosine(Schedule):
    """`d(n) = 1 - (1 - first) (1 + cos(pi n / steps)) / 2`: from `first` to 1 over the run (BYOL, arXiv 2006.07733;
    DINO). After `steps` the average stands still."""

    first: float = 0.996
    steps: float

    def alpha_at(self, n: Scalar) -> Scalar:
        share = choose(n < self.steps, n / self.steps, 1.0)
        return (1.0 - self.first) * (1.0 + call("cos", math.pi * share)) / 2.0


@dataclass(frozen=True, kw_only=True)
class ramp(Schedule):
    """`d(n) = decay (1 - exp(-n / tau))` (YOLOv5's ModelEMA; tau in steps)."""

    decay: float = 0.9999
    tau: float = 2000.0

    def alpha_at(self, n: Scalar) -> Scalar:
        return 1.0 - self.decay + self.decay * call("exp", -n / self.tau)


@dataclass(frozen=True, kw_only=True)
class mean_teacher(Schedule):
    """`d(n) = min(decay, 1 - 1 / (n + 1))`: the plain mean until the decay takes over (arXiv 1703.01780)."""

    decay: float = 0.999

    def alpha_at(self, n: Scalar) -> Scalar:
        return at_least(1.0 / (n + 1.0), 1.0 - self.decay)


@dataclass(frozen=True, kw_only=True)
class linear(Schedule):
    """`d(n)` in a straight line from `first` to `last` over `steps`, then `last`."""

    first: float
    last: float
    steps: float

    def alpha_at(self, n: Scalar) -> Scalar:
        share = choose(n < self.steps, n / self.steps, 1.0)
        return (1.0 - self.first) * (1.0 - share) + (1.0 - self.last) * share


@dataclass(frozen=True, kw_only=True)
class fraction(Schedule):
    """`d(n) = 2 ** (-1 / (share n))`: the half-life is a share of the run so far (torchtitan's half_life_fraction)."""

    share: float

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return LN2 * elapsed / at_least(self.share * (time - elapsed), 1e-300)
