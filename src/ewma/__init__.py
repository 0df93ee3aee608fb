"""Exponential moving averages for deep learning: of weights, of gradients, of series."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ewma import checkpoints, gradients, nn, posthoc, profiles
    from ewma.gradients import GradientEMA
    from ewma.profiles import Exponential, Power, Uniform
    from ewma.series import EMA, ewm, smooth
    from ewma.weights import ModelEMA

__all__ = [
    "EMA",
    "Exponential",
    "GradientEMA",
    "ModelEMA",
    "Power",
    "Uniform",
    "checkpoints",
    "ewm",
    "gradients",
    "nn",
    "posthoc",
    "profiles",
    "smooth",
]

_HOME = {
    "EMA": "ewma.series",
    "Exponential": "ewma.profiles",
    "GradientEMA": "ewma.gradients",
    "ModelEMA": "ewma.weights",
    "Power": "ewma.profiles",
    "Uniform": "ewma.profiles",
    "ewm": "ewma.series",
    "smooth": "ewma.series",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)  # found at once from then on
        return value
    if name in __all__:
        return importlib.import_module(f"ewma.{name}")
    raise AttributeError(f"module 'ewma' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
