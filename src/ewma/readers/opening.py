"""From a path to an opened checkpoint, by what is in the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ewma.readers.base import Checkpoint, beside
from ewma.readers.distributed import Distributed
from ewma.readers.pickled import Pickled
from ewma.readers.safetensors import Safetensors


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint by what is in it, whatever it is called.

    Args:
        path: a safetensors file; a torch.save file; an index of sharded files, or the folder it is in; a folder that
            torch.distributed.checkpoint wrote; a folder with one file of the first two kinds.

    Nothing in it is run: pickles are loaded with weights_only=True, and what that refuses is an error that says so.
    Beside it: `files.read` reads whole files that `ModelEMA.save` wrote.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return Sharded(path)
    with open(path, "rb") as file:
        start = file.read(16)
    if start[8:9] == b"{":
        return Safetensors(path)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return Pickled(path)
    raise ValueError(
        f"{path}: expected a checkpoint: safetensors, a torch.save file, a *.index.json of shards, or a "
        f"torch.distributed.checkpoint folder; this file is {'empty' if not start else 'none of these, or damaged'}"
    )


def _open_folder(path: Path) -> Checkpoint:
    if (path / ".metadata").is_file():
        return Distributed(path)
    for pattern in ("*.safetensors.index.json", "*.index.json", "*.safetensors", "*.pt", "*.pth", "*.bin", "*.ckpt"):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise ValueError(
                f"{path}: holds {len(found)} files {pattern}, and which is meant is not told: pass one of them, such "
                f"as {found[-1]}"
            )
        if found:
            return open_checkpoint(found[0])
    raise FileNotFoundError(
        f"{path}: the folder holds no checkpoint: no .metadata (torch.distributed.checkpoint), *.index.json (shards), "
        f"*.safetensors, *.pt, *.pth, *.bin or *.ckpt"
    )


class Sharded(Checkpoint):
    """Files that an index tells apart, as `save_pretrained` writes large models; one of them is open at a time."""

    in_parts = True

    def __init__(self, path: Path) -> None:
        try:
            places: dict[str, str] = json.loads(path.read_text())["weight_map"]
            shards = {shard: self._shard(path, shard) for shard in dict.fromkeys(places.values())}
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f'{path}: expected an index of shards, {{"weight_map": {{name: file}}}}') from error
        self._shards = {name: shards[shard] for name, shard in places.items()}
        self._last: Checkpoint | None = None
        absent = [name for name, shard in self._shards.items() if name not in shard.entries]
        if absent:
            raise ValueError(
                f"{path}: the index and the shards are not of one checkpoint: {absent[0]} is not in "
                f"{places[absent[0]]}{f', and {len(absent) - 1} more like that' if absent[1:] else ''}"
            )
        super().__init__(path, {name: shard.entries[name] for name, shard in self._shards.items()})
        self.in_parts = all(shard.in_parts for shard in shards.values())

    @staticmethod
    def _shard(index: Path, shard: str) -> Checkpoint:
        path = beside(index, shard)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the shard is missing; {index.name} lists it")
        if path.name.endswith(".index.json"):
            raise ValueError(f"{index}: expected an index of shards; it lists {shard}, another index")
        return open_checkpoint(path)

    def read(self, name: str) -> Tensor:
        return self._at(name).read(name)

    def into(self, name: str, out: Tensor) -> Callable[[int], object]:
        return self._at(name).into(name, out)

    def _at(self, name: str) -> Checkpoint:
        self.entry(name)
        if self._last is not self._shards[name]:
            if isinstance(self._last, Safetensors):  # it opens again when it is asked
                self._last.close()
            self._last = self._shards[name]
        return self._last

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()
