"""Memory that grows with the run: `Power`, and `Uniform`, which forgets nothing."""

from __future__ import annotations

from dataclasses import dataclass

from ewma.profiles.base import Profile, Scalar, above_zero, in_range, log1p, plain


@dataclass(frozen=True, init=False, repr=False)
class Power(Profile):
    """Memory that grows with the run: `keep = (1 - elapsed / time) ** (gamma + 1)`, `gain = 1 - keep`.

    At time t the value of time s weighs `(gamma + 1) s ** gamma / t ** (gamma + 1)`, so the average always looks back
    over the same share of the run: its mean position is `(gamma + 1) / (gamma + 2)` of it, its width `sigma_rel`.

    Args:
        sigma_rel: relative width, standard deviation over run length, in (0, .3003]. .05 and .10 are the paper's;
            .288675 is the uniform mean; wider still weighs the oldest values most.

    Landmarks: sigma_rel=.10 is gamma=6.94, the mean lies at 89 % of the run; .05 is gamma=16.97, 95 %.

    Source: Karras et al. 2024, arXiv 2312.02696, equations 123 and 126. Beside it: `Exponential` looks back over a
    constant number of steps, whatever the length of the run.

    >>> round(Power(sigma_rel=0.1).gamma, 2)
    6.94
    """

    sigma_rel: float

    def __init__(self, *positional: float, sigma_rel: float | None = None) -> None:
        if positional or sigma_rel is None:
            value = positional[0] if positional else 0.1
            raise TypeError(f"expected the width by name; write Power(sigma_rel={value})")
        hint = "It is the width as a share of the run; for an exponential's half-life write Exponential(half_life=...)."
        width = in_range("sigma_rel", sigma_rel, "in (0, 0.3003]", lambda s: 1e-100 < s <= 0.3003, hint)
        object.__setattr__(self, "sigma_rel", width)
        object.__setattr__(self, "gamma", _gamma(width))

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return -(self.gamma + 1.0) * log1p(-(elapsed / time))

    def scaled(self, k: float) -> Power:
        in_range("k", k, "a finite number above 0", above_zero)
        return self

    def __repr__(self) -> str:
        return f"Power(sigma_rel={plain(self.sigma_rel)})"


def _gamma(sigma_rel: float) -> float:
    """The largest real root of `g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2)`, by Newton's method from its right."""
    inverse = sigma_rel**-2
    gamma = 1.0 / sigma_rel
    while True:
        value = ((gamma + 7.0) * gamma + (16.0 - inverse)) * gamma + (12.0 - inverse)
        slope = (3.0 * gamma + 14.0) * gamma + (16.0 - inverse)
        # The two largest roots meet at the widest profile; there rounding may leave no root, and no slope, at all.
        if value <= 0.0 or slope <= 0.0 or gamma - value / slope >= gamma:
            return gamma
        gamma -= value / slope


@dataclass(frozen=True)
class Uniform(Profile):
    """The plain mean of all that was seen: `keep = 1`, `gain = elapsed`.

    `SWA` and Polyak-Ruppert averaging. By value (the series' default) every value counts once, by time it counts for
    what has elapsed. Beside it: `Power(sigma_rel=.288675)` is the same mean told by time.

    >>> Uniform().weights(2)
    [0.5, 0.5]
    """

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return 0.0 * elapsed

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        return 1.0, 0.0 * elapsed, elapsed

    def scaled(self, k: float) -> Uniform:
        in_range("k", k, "a finite number above 0", above_zero)
        return self
