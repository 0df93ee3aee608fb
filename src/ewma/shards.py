"""The part of a tensor that lies here: all of a plain one, this rank's shard of a DTensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with the tensor. Communicates nothing."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def summed(part: Tensor, like: Tensor) -> Tensor:
    """What every rank has summed over its own part of `like`, summed over all ranks that hold a part: collective where
    `like` is a DTensor."""
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate

    held: Any = like
    placements = [Replicate() if placement.is_replicate() else Partial() for placement in held.placements]
    whole: Tensor = DTensor.from_local(part, held.device_mesh, placements, run_check=False).full_tensor()
    return whole
