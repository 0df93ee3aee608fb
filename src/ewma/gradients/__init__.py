"""Job 3: one filter of gradients for any optimizer, and what an average of gradients can tell."""

from __future__ import annotations

from ewma.gradients.ema import GradientEMA
from ewma.gradients.guard import SpikeGuard
from ewma.gradients.noise import NoiseScale

__all__ = ["GradientEMA", "NoiseScale", "SpikeGuard"]
