"""After training: any average, from a few snapshots of others or from ordinary checkpoints."""

from __future__ import annotations

from ewma.posthoc.archive import Archive, Reconstruction
from ewma.posthoc.fit import FarFromTarget, Fit, fit
from ewma.posthoc.folders import Average, Checkpoints
from ewma.posthoc.planning import plan, snapshot_steps
from ewma.posthoc.step_weights import RAW, Snapshot

__all__ = [
    "RAW",
    "Archive",
    "Average",
    "Checkpoints",
    "FarFromTarget",
    "Fit",
    "Reconstruction",
    "Snapshot",
    "fit",
    "plan",
    "snapshot_steps",
]
