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
from numbers import Real
from typing import Any

from ewma.profiles.base import Profile, Scalar, carry, check_profile, choose, scaled
from ewma.profiles.exponential import KNOBS, Exponential, bare_number
from ewma.profiles.growing import Power, Uniform
from ewma.profiles.phases import after, from_lr_decay, triangular
from ewma.profiles.schedules import cosine, fraction, inverse_gamma, linear, mean_teacher, ramp, tensorflow

__all__ = [
    "KNOBS",
    "PROFILES",
    "Exponential",
    "Power",
    "Profile",
    "Scalar",
    "Uniform",
    "after",
    "bare_number",
    "carry",
    "check_profile",
    "choose",
    "cosine",
    "fraction",
    "from_json",
    "from_lr_decay",
    "inverse_gamma",
    "linear",
    "mean_teacher",
    "ramp",
    "resolve",
    "scaled",
    "tensorflow",
    "triangular",
]

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
        triangular,
        scaled,
    )
}


def from_json(text: str) -> Profile:
    """The profile that `to_json` wrote.

    >>> from_json('{"kind": "Power", "sigma_rel": 0.1}')
    Power(sigma_rel=0.1)
    """
    try:
        return _from_parts(json.loads(text))
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"expected a profile as Profile.to_json writes it; got {text!r}") from error


def _from_parts(parts: dict[str, Any]) -> Profile:
    arguments = {name: _from_parts(part) if isinstance(part, dict) else part for name, part in parts.items()}
    kind = arguments.pop("kind", None)
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
    check_profile(profile)
    if not debias:
        raise TypeError("debias= belongs to the profile: Exponential(half_life=..., debias=False)")
    given = [name for name, value in knobs.items() if value is not None]
    if given:
        raise TypeError(f"got {profile!r} and {given[0]}=: keep one of them, for example {call}{profile!r})")
    return check_profile(profile)
