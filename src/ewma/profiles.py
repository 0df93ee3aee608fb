"""How the past is weighted, as a value.

A profile answers one question: of an update that comes after `elapsed` more steps (or samples, or seconds), what
share of the past survives, `keep`, and how much does the new value bring, `gain`?

    weight' = keep * weight + gain
    mean'   = mean + (gain / weight') * (x - mean)

Only scalar arithmetic happens here. Times are floats; or 0-dim float64 tensors where only the device knows how many
steps were taken, for which nothing needs to be imported: a tensor brings its own functions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, TypeAlias

Scalar: TypeAlias = Any  # a float, or a 0-dim float64 tensor

LN2 = math.log(2.0)
KNOBS = ("half_life", "decay", "alpha", "span", "com")
LANDMARKS = ("half_life", "decay", "alpha", "span", "com", "mean_age")


def choose(condition: Any, then: Scalar, otherwise: Scalar) -> Scalar:
    """`then if condition else otherwise`, on the device where the condition is a tensor."""
    if not hasattr(condition, "where"):
        return then if condition else otherwise
    if isinstance(otherwise, float):
        otherwise = condition.double() * 0.0 + otherwise
    return otherwise.where(~condition, then)


def _call(function: str, x: Scalar) -> Scalar:
    return getattr(math, function)(x) if isinstance(x, float) else getattr(x, function)()


def _log1p(x: Scalar) -> Scalar:
    return -math.inf if isinstance(x, float) and x == -1.0 else _call("log1p", x)


def _largest(x: Scalar, floor: float) -> Scalar:
    return choose(x > floor, x, floor)


def _plain(number: float) -> str:
    return repr(float(number)).removesuffix(".0")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r} ({type(value).__name__})")
    return float(value)


def _in_range(name: str, value: Any, domain: str, inside: Any, hint: str = "") -> float:
    number = _number(name, value)
    if not inside(number):
        raise ValueError(f"{name} must be {domain}; got {name}={_plain(number)}.{' ' + hint if hint else ''}")
    return number


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

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar]:
        """`(1 - keep, gain)`, both to full precision however close to 1 `keep` comes."""
        lost = -_call("expm1", -self.forgetting(time, elapsed))
        return lost, lost

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
        time, elapsed = float(time), float(elapsed)
        return math.exp(-self.forgetting(time, elapsed)), self.change(time, elapsed)[1]

    def weights(self, n: int) -> list[float]:
        """The weight that each of n unit steps has in the average after the last of them, oldest first; they sum to 1.

        >>> Uniform().weights(4)
        [0.25, 0.25, 0.25, 0.25]
        """
        weight, coefficients = 0.0, []
        for step in range(1, n + 1):
            lost, gain = self.change(float(step), 1.0)
            if step == 1 and not self.debias:
                gain = 1.0
            weight += gain - lost * weight
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
        return {"profile": type(self).__name__, **parts}

    def __getattr__(self, name: str) -> Any:
        if name in LANDMARKS:
            raise AttributeError(
                f"{self!r} has no {name}: its memory is not one constant. {type(self).__name__}.weights(n) gives the "
                f"weight of each of n steps."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


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
        for name, part in zip(
            ("rate", "alpha", "debias", "knob", "value"), (rate, alpha, bool(debias), knob, value), strict=True
        ):
            object.__setattr__(self, name, part)

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return self.rate * elapsed

    @property
    def decay(self) -> float:
        """Weight kept on the old average per step. Rounds to 1 beyond a half-life of 1e16: `alpha` does not."""
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
        k = _in_range("k", k, "a finite number above 0", _above_zero)
        half_life = self.value if self.knob == "half_life" else self.half_life
        return Exponential(half_life=half_life / k, debias=self.debias) if half_life else self

    def _parts(self) -> dict[str, Any]:
        return {"profile": "Exponential", self.knob: self.value, "debias": self.debias}

    def __repr__(self) -> str:
        return f"Exponential({self.knob}={_plain(self.value)}{'' if self.debias else ', debias=False'})"


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
        hint = "It is in steps (or whatever `elapsed` counts); a number just below 1 may have been meant as decay="
        half_life = _in_range(knob, value, "a finite number above 0", _above_zero, hint + f"{value}.")
        rate = LN2 / half_life
        return rate, -math.expm1(-rate)
    if knob == "decay":
        hint = "decay=1 never moves; a number above 1 may have been meant as half_life=, in steps."
        decay = _in_range(knob, value, "in [0, 1)", lambda d: 0.0 <= d < 1.0, hint)
        return -_log1p(decay - 1.0), 1.0 - decay
    if knob == "alpha":
        hint = "It is the weight of the newest value; a number above 1 may have been meant as span= or half_life=."
        alpha = _in_range(knob, value, "in (0, 1]", lambda a: 0.0 < a <= 1.0, hint)
        return -_log1p(-alpha), alpha
    if knob == "span":
        span = _in_range(knob, value, "a finite number of at least 1", lambda s: 1.0 <= s < math.inf)
        return (math.log1p(2.0 / (span - 1.0)) if span > 1.0 else math.inf), 2.0 / (span + 1.0)
    com = _in_range(knob, value, "a finite number of at least 0", lambda c: 0.0 <= c < math.inf)
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
        width = _in_range("sigma_rel", sigma_rel, "in (0, 0.3003]", lambda s: 0.0 < s <= 0.3003, hint)
        object.__setattr__(self, "sigma_rel", width)
        object.__setattr__(self, "gamma", _gamma(width))

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return -(self.gamma + 1.0) * _log1p(-(elapsed / time))

    def scaled(self, k: float) -> Power:
        return self

    def __repr__(self) -> str:
        return f"Power(sigma_rel={_plain(self.sigma_rel)})"


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

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar]:
        return 0.0 * elapsed, elapsed

    def scaled(self, k: float) -> Uniform:
        return self


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
                object.__setattr__(self, each.name, _in_range(each.name, value, domain, inside))

    def alpha_at(self, n: Scalar) -> Scalar:
        raise NotImplementedError

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return -_log1p(-self.alpha_at(time - elapsed)) * elapsed


def _above_zero(x: float) -> bool:
    return 0.0 < x < math.inf


def _a_decay(x: float) -> bool:
    return 0.0 <= x <= 1.0


_DOMAINS: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("decay", "first", "last"), ("in [0, 1]", _a_decay)),
    **dict.fromkeys(("gamma", "power", "tau", "steps", "share"), ("a finite number above 0", _above_zero)),
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
        return _largest((1.0 + n / self.gamma) ** -self.power, 1.0 - self.decay)


@dataclass(frozen=True, kw_only=True)
class tensorflow(Schedule):
    """`d(n) = min(decay, (1 + n) / (10 + n))` (tf.train.ExponentialMovingAverage with num_updates; torch_ema).

    It overrides your decay until n = 9 / (1 - decay): for .9999 the first 90,000 steps.
    """

    decay: float = 0.9999

    def alpha_at(self, n: Scalar) -> Scalar:
        return _largest(9.0 / (10.0 + n), 1.0 - self.decay)


@dataclass(frozen=True, kw_only=True)
class cosine(Schedule):
    """`d(n) = 1 - (1 - first) (1 + cos(pi n / steps)) / 2`: from `first` to 1 over the run (BYOL, arXiv 2006.07733;
    DINO). After `steps` the average stands still."""

    first: float = 0.996
    steps: float

    def alpha_at(self, n: Scalar) -> Scalar:
        share = choose(n < self.steps, n / self.steps, 1.0)
        return (1.0 - self.first) * (1.0 + _call("cos", math.pi * share)) / 2.0


@dataclass(frozen=True, kw_only=True)
class ramp(Schedule):
    """`d(n) = decay (1 - exp(-n / tau))` (YOLOv5's ModelEMA; tau in steps)."""

    decay: float = 0.9999
    tau: float = 2000.0

    def alpha_at(self, n: Scalar) -> Scalar:
        return 1.0 - self.decay + self.decay * _call("exp", -n / self.tau)


@dataclass(frozen=True, kw_only=True)
class mean_teacher(Schedule):
    """`d(n) = min(decay, 1 - 1 / (n + 1))`: the plain mean until the decay takes over (arXiv 1703.01780)."""

    decay: float = 0.999

    def alpha_at(self, n: Scalar) -> Scalar:
        return _largest(1.0 / (n + 1.0), 1.0 - self.decay)


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
        return LN2 * elapsed / _largest(self.share * (time - elapsed), 1e-300)


@dataclass(frozen=True, kw_only=True)
class after(Profile):
    """Follow the newest value until `start` (in steps), then begin `profile` there, as if all before had not been.

    `after(start=75_000, profile=Uniform())` is SWA; with `Exponential` it is the usual "update_after_step".
    """

    start: float
    profile: Profile

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _in_range("start", self.start, "at least 0", lambda s: 0.0 <= s < math.inf))
        if not isinstance(self.profile, Profile):
            raise TypeError(f"profile must be a profile, such as Uniform(); got {self.profile!r}")

    def _within(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar]:
        """The inner profile's time and elapsed; of an update that ends before `start`, as if it were its first."""
        begun = time > self.start
        inner_time = choose(begun, time - self.start, elapsed)
        return inner_time, choose(elapsed < inner_time, elapsed, inner_time)

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        begun_before = time - elapsed > self.start
        inner = self.profile.forgetting(*self._within(time, elapsed))
        return inner if begun_before is True else choose(begun_before, inner, math.inf)

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar]:
        begun_before = time - elapsed > self.start
        lost, gain = self.profile.change(*self._within(time, elapsed))
        fresh = gain if self.profile.debias else 1.0
        gain = choose(begun_before, gain, choose(time > self.start, fresh, 1.0))
        return choose(begun_before, lost, 1.0), gain


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
        object.__setattr__(self, "steps", _in_range("steps", self.steps, "a finite number above 0", _above_zero))
        if self.shape not in self.SHAPES:
            raise ValueError(f"shape must be one of {', '.join(self.SHAPES)}; got {self.shape!r}")

    def multiplier(self, time: Scalar) -> Scalar:
        """What the learning rate would be multiplied by at `time`: 1 at the start, 0 from `steps` on."""
        share = choose(time < self.steps, time / self.steps, 1.0)
        if self.shape == "cosine":
            return (1.0 + _call("cos", math.pi * share)) / 2.0
        return 1.0 - (share if self.shape == "linear" else share**0.5)

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return 0.0 * elapsed

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar]:
        return 0.0 * elapsed, self.multiplier(time - elapsed) - self.multiplier(time)


@dataclass(frozen=True, kw_only=True)
class scaled(Profile):
    """`profile` counted in a unit k times as long; `Profile.scaled(k)` makes it where no simpler form exists."""

    profile: Profile
    k: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _in_range("k", self.k, "a finite number above 0", _above_zero))
        object.__setattr__(self, "debias", self.profile.debias)

    def forgetting(self, time: Scalar, elapsed: Scalar) -> Scalar:
        return self.profile.forgetting(self.k * time, self.k * elapsed)

    def change(self, time: Scalar, elapsed: Scalar) -> tuple[Scalar, Scalar]:
        return self.profile.change(self.k * time, self.k * elapsed)


PROFILES: dict[str, type[Profile]] = {
    kind.__name__: kind
    for kind in (
        Exponential,
        Power,
        Uniform,
        inverse_gamma,
        tensorflow,
        cosine,
        ramp,
        mean_teacher,
        linear,
        fraction,
        after,
        from_lr_decay,
        scaled,
    )
}


def from_json(text: str) -> Profile:
    """The profile that `to_json` wrote.

    >>> from_json('{"profile": "Power", "sigma_rel": 0.1}')
    Power(sigma_rel=0.1)
    """
    try:
        return _from_parts(json.loads(text))
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"expected a profile as Profile.to_json writes it; got {text!r}") from error


def _from_parts(parts: dict[str, Any]) -> Profile:
    arguments = {name: _from_parts(part) if isinstance(part, dict) else part for name, part in parts.items()}
    kind = arguments.pop("profile", None)
    if kind not in PROFILES:
        raise ValueError(f"no profile is called {kind!r}; there are {', '.join(PROFILES)}")
    return PROFILES[kind](**arguments)


def resolve(call: str, profile: Any, debias: bool = True, **knobs: float | None) -> Profile:
    """The one profile that a constructor was given, as `profile=` or as one of the five knobs.

    Args:
        call: how the caller's call begins, for the error's text: "EMA(" or "ModelEMA(model, ".
    """
    if profile is None:
        return Exponential(**knobs, debias=debias)
    if isinstance(profile, Real):
        raise TypeError(bare_number(call, profile))
    if not isinstance(profile, Profile):
        raise TypeError(f"profile must be a profile, such as Power(sigma_rel=0.1); got {profile!r}")
    given = [name for name, value in knobs.items() if value is not None]
    if given:
        raise TypeError(f"got {profile!r} and {given[0]}=: keep one of them, for example {call}{profile!r})")
    return profile
