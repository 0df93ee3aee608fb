"""One snapshot of one track, as a file."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ewma import files, pieces
from ewma.pieces import Piece
from ewma.posthoc.manifest import Entry
from ewma.shards import is_sharded
from ewma.weights.views import Readable


class Recording:
    """An averaged model about to be written: in float32, one tensor after the other.

    Of shards each is gathered when its turn comes: then every rank has to take part, by `write` or by `drain`.
    """

    def __init__(self, readable: Readable) -> None:
        owner, self.track = readable._read()
        averaged = {named.name for named in owner.bind().averaged}
        sources = [(named, source) for named, source in readable._sources() if named.persistent]
        self.sharded = any(is_sharded(source) for _, source in sources)
        self.shards = pieces.split((_piece(named.name, source, averaged) for named, source in sources), inf)
        self.stream = (piece.read() for piece in self.shards[0])
        self.told = {
            "format": files.FORMAT,
            "kind": "Snapshot",
            "run": owner.run,
            "averaged": sorted(averaged),
            "aliases": {named.name: named.names[1:] for named, _ in sources if len(named.names) > 1},
        }

    def write(self, folder: Path, entry: Entry) -> None:
        listed = {part: getattr(entry, part) for part in ("track", "profile", "time", "count")}
        plain = {"profile": repr(self.track.profile), "time": str(entry.time), "count": str(entry.count)}
        metadata = {"format": "pt", **plain, "ewma": json.dumps({**self.told, **listed})}
        pieces.write(folder / entry.file, self.shards, self.stream, metadata)

    def drain(self) -> None:
        """Take part in gathering what has not been read."""
        with contextlib.suppress(ValueError):  # that something is not finite is said by who writes
            for _ in self.stream:
                pass


def is_first_rank() -> bool:
    """Whether this is the rank that writes, or there are no others."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def shared(failure: Exception | None) -> Exception | None:
    """What went wrong on the first rank, on every rank."""
    said: list[Any] = [failure and f"{type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(said, src=0)
    if failure is None and said[0] is not None:
        return RuntimeError(f"archive.add failed on rank 0, which writes: {said[0]}")
    return failure


def _piece(name: str, tensor: Tensor, averaged: set[str]) -> Piece:
    if name not in averaged:
        return Piece(name, tensor.dtype, tuple(tensor.shape), partial(_whole, tensor))
    dtype = torch.float32 if tensor.is_floating_point() else torch.complex64
    return Piece(name, dtype, tuple(tensor.shape), partial(_finite, name, tensor))


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole.detach()


def _finite(name: str, tensor: Tensor) -> Tensor:
    whole = _whole(tensor)
    if wrong := int((~whole.isfinite()).sum()):
        raise ValueError(
            f"{name}: its average holds NaN or infinity in {wrong} of {whole.numel()} elements; nothing was written. "
            f'ModelEMA(nonfinite="skip"), the default, keeps them out.'
        )
    return whole
