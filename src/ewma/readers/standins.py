"""Classes of other tools' bookkeeping, read as inert records: nothing of theirs is imported, and nothing is run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

BOOKKEEPING = (
    "argparse.Namespace",  # timm's arguments
    "builtins.getattr",  # how a pickle names a method: mmengine's log buffers hold some
    "lightning.",
    "mmengine.",
    "numpy.",
    "omegaconf.",  # NeMo's configuration
    "pathlib.",
    "pytorch_lightning.",
    "typing.Any",
)
"""What training tools put beside the weights. An entry that ends in a dot stands for all that is in the package."""


class StandIn:
    """In place of an object of a class that is not loaded: what the file says of it is kept in `state`."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def stood_in(file: Any) -> AbstractContextManager[None]:
    """While it is entered, torch.load(weights_only=True) takes stand-ins for the bookkeeping in `file`, which it would
    refuse. To all else it stays as strict as ever."""
    known: list[Any] = [(StandIn, name) for name in refused(file) if name.startswith(BOOKKEEPING)]
    allowed: AbstractContextManager[None] = torch.serialization.safe_globals(known)
    return allowed


def refused(file: Any) -> list[str]:
    """The classes and functions that a torch.save file asks for and weights_only=True does not allow: as far as can be
    told, which of a file of the old format, or a damaged one, it cannot."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except (ValueError, RuntimeError):
        return []
    finally:
        if hasattr(file, "seek"):
            file.seek(0)
