"""Averaged weights in files: of other tools, read and continued; of ours, written for other tools."""

from __future__ import annotations

from ewma.checkpoints.averages import Averages
from ewma.checkpoints.exporting import export
from ewma.checkpoints.reading import read
from ewma.checkpoints.resuming import resume

__all__ = ["Averages", "export", "read", "resume"]
