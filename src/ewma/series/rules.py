"""From what the caller asked for, as keywords, to the rule by which a series is weighted."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy

from ewma import profiles
from ewma.arrays import Array, is_real, is_tensor, like, may_ask, module_of, wide
from ewma.profiles import KNOBS, Profile
from ewma.recurrence import Weigh, weighing
from ewma.series import stamps
from ewma.series.values import Series
from ewma.series.weighting import Missing, Rule, check_missing

DOMAINS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "half_life": ("finite and above 0", lambda x: (x > 0.0) & (x < math.inf)),
    "decay": ("in [0, 1)", lambda x: (x >= 0.0) & (x < 1.0)),
    "alpha": ("in (0, 1]", lambda x: (x > 0.0) & (x <= 1.0)),
    "span": ("finite and at least 1", lambda x: (x >= 1.0) & (x < math.inf)),
    "com": ("finite and at least 0", lambda x: (x >= 0.0) & (x < math.inf)),
}


PLAIN = frozenset((int, float, bool, str, type(None)))


def rule_of(
    call: str,
    series: Series,
    profile: Profile | None,
    knobs: dict[str, Any],
    debias: bool,
    weigh: Weigh | None,
    missing: Missing,
    times: stamps.Stamps | None,
) -> Rule:
    """The rule for one series.

    Args:
        call: how the call begins, for errors' texts: "smooth(x, ".
        series: a knob that is an array broadcasts to it.
        times: what its stamps come to, if it has any.
    """
    plain = (call, debias, weigh, missing, *map(knobs.get, KNOBS))
    if profile is None and times is None and PLAIN.issuperset(map(type, plain)):
        return _plain(*plain)
    dated = times is not None and times.in_seconds
    knobs = {name: stamps.in_seconds(name, value, dated) for name, value in knobs.items()}
    name = next((name for name in KNOBS if is_array(knobs[name])), None)
    if name is None:
        profile = profiles.resolve(call, profile, debias, **knobs)
        return Rule(profile, profile.debias, weighing(profile, weigh), check_missing(missing), times is not None)
    if profile is not None:
        raise TypeError(f"got {profile!r} and {name}=: keep one of them, for example {call}{profile!r})")
    alpha = alphas(name, knobs, series.array, series.axis)
    weigh = weigh or ("value" if alpha.shape[1] == 1 else "time")
    if weigh not in ("time", "value"):
        raise ValueError(f'weigh must be "time" or "value"; got {weigh!r}')
    return Rule(None, debias, weigh, check_missing(missing), times is not None, alpha)


@functools.lru_cache(maxsize=64, typed=True)
def _plain(call: str, debias: bool, weigh: Weigh | None, missing: Missing, *knobs: float | None) -> Rule:
    """The rule of one knob that is a number: made once, since many series have the same."""
    exponential = profiles.resolve(call, None, debias, **dict(zip(KNOBS, knobs, strict=True)))
    return Rule(exponential, debias, weighing(exponential, weigh), check_missing(missing))


def is_array(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", None) is not None


def alphas(name: str, knobs: dict[str, Any], x: Array, axis: int) -> Array:
    """The weight of each newest value, in float64, of shape (outer or 1, n or 1, inner or 1).

    Args:
        name: the knob that is an array; it broadcasts to x. A tensor keeps its gradient.
    """
    others = [other for other in KNOBS if knobs[other] is not None and other != name]
    if others:
        raise TypeError(f"expected exactly one of {', '.join(KNOBS)}; got {name}= and {others[0]}=. Keep one.")
    value = numbers(name, knobs[name], x)
    if may_ask(value):
        domain, inside = DOMAINS[name]
        wrong = ~inside(value)
        if bool(wrong.any()):
            raise ValueError(f"{name} must be {domain}, everywhere; got {float(value[wrong].ravel()[0].item()):g}")
    return _in_three(name, alpha_of(name, value), tuple(x.shape), axis)


def numbers(name: str, value: Any, x: Array) -> Array:
    """What was given as an argument beside x, as float64 of x's kind, on its device. A tensor keeps its gradient."""
    if is_tensor(value) and not is_tensor(x):
        raise TypeError(f"{name} is a tensor, but x is not one: give both as tensors, or {name}.numpy()")
    try:
        array: Array = value if is_tensor(value) else numpy.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: expected numbers, in lists of equal lengths; NumPy says: {error}") from error
    if not is_real(array):
        raise TypeError(f"{name} must be a number, or an array of numbers; got {value!r}")
    return wide(array.to(x.device)) if is_tensor(array) else like(x, array)


def alpha_of(name: str, value: Array) -> Array:
    """The knob as alpha = 1 - decay."""
    if name == "half_life":
        return -module_of(value).expm1(-math.log(2.0) / value)
    if name == "decay":
        return 1.0 - value
    if name == "alpha":
        return value
    return 2.0 / (value + 1.0) if name == "span" else 1.0 / (1.0 + value)


def _in_three(name: str, value: Array, shape: tuple[int, ...], axis: int) -> Array:
    """An array that broadcasts to `shape` as (outer, n, inner), with 1 where it does not differ."""
    own = (1,) * (len(shape) - value.ndim) + tuple(value.shape)
    fits = len(own) == len(shape) and all(size in (1, full) for size, full in zip(own, shape, strict=True))
    if not fits:
        raise ValueError(
            f"expected {name} of a shape that broadcasts to x's, {list(shape)}; got {list(value.shape)}. One for "
            f"each step has size 1 along all axes but {axis}, one for each channel has size 1 along axis {axis}."
        )
    differs = any(size > 1 for place, size in enumerate(own) if place != axis)
    sizes = [full if differs else 1 for full in shape]
    sizes[axis] = own[axis]
    grown = module_of(value).broadcast_to(value.reshape(own), tuple(sizes))
    return grown.reshape(math.prod(sizes[:axis]), sizes[axis], math.prod(sizes[axis + 1 :]))
