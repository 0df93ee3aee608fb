"""torch.save files, which are pickles: loaded as data, never run."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ewma.readers.base import Checkpoint, Entry
from ewma.readers.standins import BOOKKEEPING, refused, stood_in

DEEPEST = 100
"""How deep what a file holds may be nested."""


class Pickled(Checkpoint):
    """A torch.save file. Its tensors are mapped from the file, and read when they are used; those of the old format,
    from before torch 1.6, are in memory."""

    in_parts = True

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            mapped = file.read(2) == b"PK"
        self.content = load(path, path, mmap=mapped)
        """The whole of it as it was saved, nested."""
        self._tensors, self._others = _flat(path, self.content)
        super().__init__(path, {n: Entry(tuple(t.shape), t.dtype) for n, t in self._tensors.items()})

    def read(self, name: str) -> Tensor:
        self.entry(name)
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def into(self, name: str, out: Tensor) -> Callable[[int], object]:
        self.entry(name)
        flat = self._tensors[name].detach().reshape(-1)
        return lambda begin: out.copy_(flat[begin : begin + out.numel()])

    def others(self) -> dict[str, Any]:
        return dict(self._others)

    def parts(self) -> list[str]:
        nested = self.content if isinstance(self.content, dict) else {}
        keys = [str(key) for key, value in nested.items() if isinstance(value, dict | list | tuple)]
        return [key for key in keys if any(name.startswith(f"{key}.") for name in self.entries)]

    def close(self) -> None:
        self.content, self._tensors = None, {}


def load(path: Path, file: Any, mmap: bool = False) -> Any:
    try:
        return _load(file, mmap)
    except pickle.UnpicklingError as error:
        others = [name for name in refused(file) if not name.startswith(BOOKKEEPING)]
        told = f"it asks for {', '.join(others[:5])}." if others else _first_line(error)
        raise ValueError(
            f"{path}: expected tensors, numbers, strings and containers of these, which load without running any of "
            f"the file's code (weights_only=True); that refused it: {told} If you trust who wrote it, load it once "
            f"with torch.load(path, weights_only=False), and save the state dict in it."
        ) from error
    except (RuntimeError, EOFError, OSError, AssertionError) as error:  # the file itself has been opened before
        raise ValueError(f"{path}: the torch.save file is truncated or damaged ({error}). Save it again.") from error


def _load(file: Any, mmap: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        if hasattr(file, "seek"):
            file.seek(0)
        with stood_in(file):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def _first_line(error: Exception) -> str:
    return str(error).split("WeightsUnpickler error: ")[-1].splitlines()[0]


def _flat(path: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nested mappings and lists as two flat ones: tensors, and the rest."""
    tensors: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for name, value in _leaves(path, "", content):
        if name in tensors or name in others:
            raise ValueError(f"{path}: two values in it are called {name!r} once their keys are joined by dots")
        if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
            tensors[name] = value
        else:
            others[name] = value
    return tensors, others


def _leaves(path: Path, prefix: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > DEEPEST:
        raise ValueError(f"{path}: it is nested more than {DEEPEST} deep, or holds itself; no state of a model is")
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            yield from _leaves(path, f"{prefix}.{key}" if prefix else str(key), each, depth + 1)
    else:
        yield prefix, value
