"""Folders of torch.distributed.checkpoint, read by one process alone."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ewma.readers.base import Checkpoint, Entry, beside
from ewma.readers.pickled import load


class Distributed(Checkpoint):
    """A folder that torch.distributed.checkpoint wrote, from any number of ranks. Nothing is asked of other ranks."""

    def __init__(self, path: Path) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        try:
            self.metadata = _Metadata(io.BytesIO((path / ".metadata").read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ModuleNotFoundError) as error:
            raise ValueError(
                f"{path / '.metadata'}: expected what torch.distributed.checkpoint writes; it is damaged, or holds "
                f"other things ({error})"
            ) from error
        told = self.metadata.state_dict_metadata
        self._tensors = {name: each for name, each in told.items() if isinstance(each, TensorStorageMetadata)}
        self._bytes = [name for name in told if name not in self._tensors]
        stored = self.metadata.storage_data.items()
        self._places = {(index.fqn, tuple(index.offset or ())): info for index, info in stored}
        super().__init__(path, {n: Entry(tuple(t.size), t.properties.dtype) for n, t in self._tensors.items()})
        self._check_files()

    def read(self, name: str) -> Tensor:
        entry = self.entry(name)
        out = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        for chunk in self._tensors[name].chunks:
            window = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            out[window] = self._item(self._places[name, tuple(chunk.offsets)])
        return out

    def others(self) -> dict[str, Any]:
        return {name: self.other(name) for name in self._bytes}

    def other(self, name: str) -> Any:
        """One of the entries that are no tensors."""
        return self._item(self._places[name, ()])

    def paths(self) -> dict[str, tuple[Any, ...]]:
        """Where in the nested state each entry was, by its name."""
        return dict(self.metadata.planner_data or {})

    def parts(self) -> list[str]:
        paths = self.metadata.planner_data or {}
        return list(dict.fromkeys(str(paths[name][0]) for name in self.entries if len(paths.get(name, ())) > 1))

    def _item(self, info: Any) -> Any:
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{self.path}: its parts are compressed; read it with torch.distributed.checkpoint.load")
        path = beside(self.path / ".metadata", info.relative_path)
        with open(path, "rb") as file:
            file.seek(info.offset)
            return load(path, io.BytesIO(file.read(info.length)))

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for info in self.metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for file, end in ends.items():
            path = beside(self.path / ".metadata", file)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: missing; .metadata lists it")
            if path.stat().st_size < end:
                raise ValueError(f"{path}: truncated: {path.stat().st_size} bytes, of which .metadata needs {end}")


CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""What a .metadata file is made of, beside types and paths."""


class _Metadata(pickle.Unpickler):
    """Unpickles what a .metadata file is made of, and nothing else: torch's own reader would run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name.endswith("Path"):
            return os.path.join
        if name in CLASSES.get(module, ()) or (module == "torch" and isinstance(vars(torch).get(name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
