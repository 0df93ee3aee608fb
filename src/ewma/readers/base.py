"""What every opened checkpoint can tell, and how its tensors are read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class Entry(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def beside(listing: Path, name: str) -> Path:
    """A file that a list names, in the list's folder or further down; an error where it leads out of there."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(
            f"{listing}: it lists {name!r}, which lies outside of its folder; what is there is not touched"
        )
    return listing.parent / name


class Checkpoint(ABC):
    """A checkpoint that has been opened: what is in it, and each tensor when it is asked for.

    Nested states are flat here, their keys joined by dots: {"model": {"a.weight": t}} holds "model.a.weight".

    >>> import tempfile
    >>> from ewma import readers
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"model": {"weight": torch.ones(2, 3)}, "step": 7}, f"{folder}/last.pt")
    ...     with readers.open_checkpoint(f"{folder}/last.pt") as checkpoint:
    ...         checkpoint.names(), checkpoint.shape("model.weight"), checkpoint.others()
    (['model.weight'], (2, 3), {'step': 7})
    """

    in_parts = False
    """Whether a part of a tensor can be read without the rest of it."""

    def __init__(self, path: Path, entries: dict[str, Entry]) -> None:
        self.path, self.entries = path, entries

    def names(self) -> list[str]:
        """The names of all tensors, in the checkpoint's order."""
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.entry(name).dtype

    def entry(self, name: str) -> Entry:
        if name not in self.entries:
            near = get_close_matches(name, self.entries, 3) or self.names()[:3]
            raise KeyError(f"{self.path} holds no tensor {name!r}; it has {', '.join(near)} among {len(self.entries)}")
        return self.entries[name]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own, on the CPU."""

    def into(self, name: str, out: Tensor) -> Callable[[int], object]:
        """What fills `out`, a contiguous vector of the tensor's dtype, with its elements from a given one on, counted
        flat: prepared once, for many blocks."""
        return lambda begin: out.copy_(self.read(name).reshape(-1)[begin : begin + out.numel()])

    def others(self) -> dict[str, Any]:
        """What is not a tensor, by flat name: steps, decays, strings."""
        return {}

    def parts(self) -> list[str]:
        """The keys of a nested state that hold tensors further down; none of a flat one."""
        return []

    def close(self) -> None:  # noqa: B027  (some have nothing to let go of)
        """Let go of the file. Tensors that were read stay."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self.entries)} tensors)"
