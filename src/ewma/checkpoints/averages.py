"""What reading a checkpoint gives: averaged weights by name, and what is known of how they came about."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ewma.profiles import Profile


@dataclass(frozen=True)
class Averages:
    """Averaged weights out of a checkpoint. What the tool did not write down is None.

    Args:
        weights: the averaged model's state dict: parameters, and the buffers that the checkpoint holds; read with a
            model, all that `model.load_state_dict(weights)` asks for.
        source: the tool whose layout it is, such as "torch AveragedModel".
        at: where in the checkpoint it lies, "" for the whole of it.
        count: how many updates the tool has made.
        decay: the weight kept on the old average per step of the tool's; of a schedule, its upper limit.
        profile: how the tool weighs the past, where the checkpoint tells; `checkpoints.resume` goes on with it.
        time: what `profile` has to take for the steps so far, where that is not `count`.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    source: str
    at: str = ""
    count: int | None = None
    decay: float | None = None
    profile: Profile | None = None
    time: float | None = None

    def save(self, path: str | os.PathLike[str], **how: Any) -> list[Path]:
        """Write a plain model file, or several with an index, as `checkpoints.export` does with the same arguments."""
        from ewma.checkpoints.exporting import export

        return export(self, path, **how)
