"""Job 2: averaged weights of a model, updated after every optimizer step."""

from __future__ import annotations

from ewma.weights.ema import ModelEMA

__all__ = ["ModelEMA"]
