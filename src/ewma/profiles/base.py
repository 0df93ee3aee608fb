"""What a profile is, and the scalar arithmetic that all of them share, on floats and on 0-dim tensors alike."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, TypeAlias

Scalar: TypeAlias = Any  # a float, or a 0-dim float64 tensor

LN2 = math.log(2.0)
LANDMARKS = ("half_life", "decay", "alpha", "span", "com", "mean_age")


def choose(condition: Any, then: Scalar, otherwise: Scalar) -> Scalar:
    """`then if condition else otherwise`, on the device where the condition is a tensor."""
    if not hasattr(condition, "where"):
        return then if condition else otherwise
    if isinstance(otherwise, float):
        otherwise = condition.double() * 0.0 + otherwise
    return otherwise.where(~condition, then)


def call(function: str, x: Scalar) -> Scalar:
    return getattr(math, function)(x) if isinstance(x, float) else getattr(x, function)()


def log1p(x: Scalar) -> Scalar:
    return -math.inf if isinstance(x, float) and x == -1.0 else call("log1p", x)


def at_least(x: Scalar, floor: float) -> Scalar:
    return choose(x > floor, x, floor)


def plain(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r} ({type(value).__name__})")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]  # a Real is an int here


def in_range(name: str, value: Any, domain: str, inside: Any, hint: str = "") -> float:
    number = _number(name, value)
    if not inside(number):
        raise ValueError(f"{name} must be {domain}; got {name}={plain(number)}.{' ' + hint if hint else ''}")
    return number


def above_zero(x: float) -> bool:
    return 0.0 < x < math.inf


def carry(weight: Scalar, keep: Scalar, lost: Scalar, gain: Scalar) -> Scalar:
    """`keep * weight + gain`, in the form that loses nothing: near keep = 1 it is `lost` that is exact."""
    return choose(lost > 0.5, keep * weight + gain, weight + (gain - lost * weight))


def change(forgetting: Scalar) -> tuple[Scalar, Scalar, Scalar]:
    """`(keep, 1 - keep, gain)` of an update that forgets so much, by time."""
    lost = -call("expm1", -forgetting)
    return call("exp", -forgetting), lost, lost


def check_profile(profile: Any) -> Profile:
    if not isinstance(profile, Profile):
        raise TypeError(f"profile must be a profile, such as Power(sigma_rel=0.1); got {profile!r}")
    return profile


class Profile:
    """What every profile offers. Profiles are immutable, compare and hash by value, and print as the call that makes
    them.

    `debias=True` starts the weight at 0, so that the mean is right from the first value on; `debias=False` starts at
    the first value with weight 1, as if it had always been there.
    """

    debias: bool = True

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        """`-log(keep)` of the update that ends at `time`: 0 keeps all of the past, infinity none of it."""
        raise NotImplementedError

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """`(keep, lost, gain)` with `lost = 1 - keep`: both to full precision, whichever of them is the small one."""
        return change(self.forgetting(time, elapsed))

    def step(self, time: float, elapsed: float = 1.0) -> tuple[float, float]:
        """`(keep, gain)` of the update that ends at `time`, `elapsed` after the one before.

        Args:
            time: what has passed since the start, this update included; the same unit as the half-life's.
            elapsed: what has passed since the last update, 0 < elapsed <= time.

        >>> Uniform().step(time=10.0, elapsed=2.0)
        (1.0, 2.0)
        """
        if not 0.0 < elapsed <= time:
            raise ValueError(
                f"step needs 0 < elapsed <= time, `time` counting this update too; got time={time}, elapsed={elapsed}. "
                f"The first update is step(time=1, elapsed=1)."
            )
        keep, _, gain = self.change(float(time), float(elapsed))
        return keep, gain

    def weights(self, n: int) -> list[float]:
        """The weight that each of n unit steps has in the average after the last of them, oldest first; they sum to 1.

        >>> Uniform().weights(4)
        [0.25, 0.25, 0.25, 0.25]
        """
        weight, coefficients = 0.0, []
        for step in range(1, n + 1):
            keep, lost, gain = self.change(float(step), 1.0)
            if step == 1 and not self.debias:
                gain = 1.0
            weight = carry(weight, keep, lost, gain)
            coefficients.append(gain / weight if weight else 1.0)
        left, newest_first = 1.0, []
        for coefficient in reversed(coefficients):
            newest_first.append(left * coefficient)
            left *= 1.0 - coefficient
        return newest_first[::-1]

    def scaled(self, k: float) -> Profile:
        """The same memory counted in a unit k times as long: for updates that each stand for k of the old steps.

        With k times the batch, or updating only every k-th step, `decay` becomes `decay ** k` (arXiv 2307.13813).

        >>> Exponential(half_life=2000).scaled(4)
        Exponential(half_life=500)
        """
        return scaled(profile=self, k=k)

    def to_json(self) -> str:
        """One line of JSON that `profiles.from_json` turns back into an equal profile."""
        return json.dumps(self._parts())

    def _parts(self) -> dict[str, Any]:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # all are dataclasses
        parts = {name: value._parts() if isinstance(value, Profile) else value for name, value in parts.items()}
        return {"kind": type(self).__name__, **parts}

    def __getattr__(self, name: str) -> Any:
        if name in LANDMARKS:
            raise AttributeError(
                f"{self!r} has no {name}: its memory is not one constant. {type(self).__name__}.weights(n) gives the "
                f"weight of each of n steps."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class scaled(Profile):
    """`profile` counted in a unit k times as long; `Profile.scaled(k)` makes it where no simpler form exists."""

    profile: Profile
    k: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", in_range("k", self.k, "a finite number above 0", above_zero))
        object.__setattr__(self, "debias", check_profile(self.profile).debias)

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return self.profile.forgetting(self.k * time, self.k * elapsed)

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        return self.profile.change(self.k * time, self.k * elapsed)
