"""Checkpoints of every usual format, opened without being read: names and shapes first, then tensor by tensor."""

from __future__ import annotations

from ewma.readers.base import Checkpoint, Entry, beside
from ewma.readers.opening import open_checkpoint

__all__ = ["Checkpoint", "Entry", "beside", "open_checkpoint"]
