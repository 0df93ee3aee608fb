"""Job 1: smoothed series, whole or value by value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ewma.series.ema import EMA

if TYPE_CHECKING:
    from ewma.series.smoothing import ewm, smooth

__all__ = ["EMA", "ewm", "smooth"]


def __getattr__(name: str) -> Any:
    """What brings NumPy is imported when it is asked for: values one by one need none."""
    if name in __all__:
        from ewma.series import smoothing

        return getattr(smoothing, name)
    raise AttributeError(f"module 'ewma.series' has no attribute {name!r}; it has {', '.join(__all__)}")
