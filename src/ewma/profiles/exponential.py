"""A constant horizon: `Exponential`, and the five units its memory can be given in."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from ewma.profiles.base import LN2, Profile, Scalar, above_zero, change, in_range, log1p, plain

_known_change = functools.lru_cache(change)  # nearly every step elapses the same

KNOBS = ("half_life", "decay", "alpha", "span", "com")


@dataclass(frozen=True, init=False, repr=False)
class Exponential(Profile):
    """Weights that halve with every half-life: `keep = decay ** elapsed`, `gain = 1 - keep`.

    Give exactly one of five, by keyword; each is the same memory in another unit (a step is whatever `elapsed` counts):

        half_life  > 0       steps after which a value's weight has halved
        decay      [0, 1)    weight kept on the old average per step        decay = 2 ** (-1 / half_life)
        alpha      (0, 1]    weight of the newest value                     alpha = 1 - decay
        span       >= 1      pandas' span                                   alpha = 2 / (span + 1)
        com        >= 0      mean age of the weights, in steps              alpha = 1 / (1 + com)

    Landmarks: half_life=2000 is decay=.99965; about 7 % of the average is older than 7,700 steps. decay=.999 is a
    half-life of 693, .9999 of 6,931.

    Args:
        debias: True weighs only what was seen (pandas' `adjust`); False starts at the first value with weight 1.

    Errors: TypeError for none, several, or a positional number; ValueError outside the range above.

    `alpha` and `rate` (`-log(decay)`, per step) are kept to full precision; `decay` may round to 1. Beside it:
    `Power` has no horizon at all, its memory grows with the run; `Uniform` forgets nothing.

    >>> Exponential(half_life=1).alpha, Exponential(decay=0.75).alpha, Exponential(span=3).alpha
    (0.5, 0.25, 0.5)
    """

    rate: float
    alpha: float
    debias: bool
    knob: str = field(compare=False)
    value: float = field(compare=False)

    def __init__(
        self,
        *positional: float,
        half_life: float | None = None,
        decay: float | None = None,
        alpha: float | None = None,
        span: float | None = None,
        com: float | None = None,
        debias: bool = True,
    ) -> None:
        if positional:
            raise TypeError(bare_number("Exponential(", positional[0]))
        given = zip(KNOBS, (half_life, decay, alpha, span, com), strict=True)
        knob, value = _exactly_one({name: value for name, value in given if value is not None})
        rate, alpha = _rate_and_alpha(knob, value)
        value = float(value)
        for name, part in zip(
            ("rate", "alpha", "debias", "knob", "value"), (rate, alpha, bool(debias), knob, value), strict=True
        ):
            object.__setattr__(self, name, part)

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return self.rate * elapsed

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        return _known_change(self.rate * elapsed) if isinstance(elapsed, float) else super().change(time, elapsed)

    @property
    def decay(self) -> float:
        """Weight kept on the old average per step. Rounds to 1 beyond a half-life of 1e16: `alpha` does not."""
        if self.knob == "decay":
            return self.value
        return 1.0 - self.alpha if self.alpha < 0.5 else math.exp(-self.rate)

    @property
    def half_life(self) -> float:
        """Steps after which a value's weight has halved."""
        return LN2 / self.rate

    @property
    def com(self) -> float:
        """Centre of mass, `decay / alpha`: the mean age of the weights in steps, the newest value's age being 0."""
        return 1.0 / math.expm1(self.rate) if self.rate < 700.0 else math.exp(-self.rate)

    mean_age = com

    @property
    def span(self) -> float:
        """pandas' span, `2 / alpha - 1`: a plain moving average over `span` values has the same mean age."""
        return 1.0 / math.tanh(self.rate / 2.0)

    def scaled(self, k: float) -> Exponential:
        k = in_range("k", k, "a finite number above 0", above_zero)
        half_life = self.value if self.knob == "half_life" else self.half_life
        return Exponential(half_life=half_life / k, debias=self.debias) if half_life else self

    def _parts(self) -> dict[str, Any]:
        return {"kind": "Exponential", self.knob: self.value, "debias": self.debias}

    def __repr__(self) -> str:
        return f"Exponential({self.knob}={plain(self.value)}{'' if self.debias else ', debias=False'})"


def _exactly_one(given: dict[str, float]) -> tuple[str, float]:
    if len(given) == 1:
        return next(iter(given.items()))
    if not given:
        raise TypeError(
            f"expected exactly one of {', '.join(KNOBS)}; got none. For example half_life=2000: a step's weight halves "
            f"every 2,000 steps."
        )
    name, value = next(iter(given.items()))
    raise TypeError(
        f"expected exactly one of {', '.join(KNOBS)}: they are one memory in five units; got "
        f"{' and '.join(f'{name}={value}' for name, value in given.items())}. Keep one, for example {name}={value}."
    )


def _rate_and_alpha(knob: str, value: float) -> tuple[float, float]:
    """`rate = -log(decay)` and `alpha = 1 - decay`, each straight from what was given, never from the other rounded."""
    if knob == "half_life":
        hint = "It is in steps, or whatever `elapsed` counts; half_life=2000 halves a weight every 2,000 steps."
        half_life = in_range(knob, value, "a finite number above 0", above_zero, hint)
        rate = LN2 / half_life
        return rate, -math.expm1(-rate)
    if knob == "decay":
        hint = "decay=1 never moves; a number above 1 may have been meant as half_life=, in steps."
        decay = in_range(knob, value, "in [0, 1)", lambda d: 0.0 <= d < 1.0, hint)
        return (-log1p(decay - 1.0) if decay >= 0.5 or not decay else -math.log(decay)), 1.0 - decay
    if knob == "alpha":
        hint = "It is the weight of the newest value; a number above 1 may have been meant as span= or half_life=."
        alpha = in_range(knob, value, "in (0, 1]", lambda a: 0.0 < a <= 1.0, hint)
        return -log1p(-alpha), alpha
    if knob == "span":
        span = in_range(knob, value, "a finite number of at least 1", lambda s: 1.0 <= s < math.inf)
        return (math.log1p(2.0 / (span - 1.0)) if span > 1.0 else math.inf), 2.0 / (span + 1.0)
    com = in_range(knob, value, "a finite number of at least 0", lambda c: 0.0 <= c < math.inf)
    return (math.log1p(1.0 / com) if com > 0.0 else math.inf), 1.0 / (1.0 + com)


def bare_number(call: str, value: Any) -> str:
    """The text for a positional number, which could have meant two things.

    >>> bare_number("EMA(", 100)
    "EMA(100) could be read two ways. Write EMA(half_life=100) for steps in which a weight halves, or EMA(span=100) ...
    """
    if isinstance(value, Real) and not 0 <= float(value) <= 1:
        readings = (("half_life", "steps in which a weight halves"), ("span", "pandas' span"))
    else:
        readings = (("decay", "the weight kept on the old average"), ("alpha", "the weight of the newest value"))
    written = [f"{call}{name}={value}) for {meaning}" for name, meaning in readings]
    return f"{call}{value}) could be read two ways. Write {written[0]}, or {written[1]}."
