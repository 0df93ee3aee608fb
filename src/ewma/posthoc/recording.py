"""One snapshot of one track, as a file."""

from __future__ import annotations

import json
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ewma import files, pieces
from ewma.pieces import Piece
from ewma.posthoc.manifest import Entry
from ewma.views import Readable


def save(path: Path | None, readable: Readable, entry: Entry) -> None:
    """One track's averaged model into a file; without a path, only take part in gathering it."""
    owner, track = readable._read()
    averaged = {named.name for named in owner.bind().averaged}
    sources = [(named, source) for named, source in readable._sources() if named.persistent]
    shards = pieces.split((_piece(named.name, source, averaged) for named, source in sources), inf)
    stream = (piece.read() for piece in shards[0])
    if path is None:
        for _ in stream:
            pass
        return
    told = {
        "format": files.FORMAT,
        "kind": "Snapshot",
        "run": owner.run,
        **{part: getattr(entry, part) for part in ("track", "profile", "time", "count")},
        "averaged": sorted(averaged),
        "aliases": {named.name: named.names[1:] for named, _ in sources if len(named.names) > 1},
    }
    plain = {"format": "pt", "profile": repr(track.profile), "time": str(entry.time), "count": str(entry.count)}
    pieces.write(path, shards, stream, {**plain, "ewma": json.dumps(told)})


def _piece(name: str, tensor: Any, averaged: set[str]) -> Piece:
    real = name in averaged and tensor.is_floating_point()
    dtype = torch.float32 if real else torch.complex64 if name in averaged else tensor.dtype
    return Piece(name, dtype, tuple(tensor.shape), partial(_finite if name in averaged else _whole, name, tensor))


def _whole(name: str, tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def _finite(name: str, tensor: Any) -> Tensor:
    whole = _whole(name, tensor)
    wrong = int((~whole.isfinite()).sum())
    if wrong:
        raise ValueError(
            f"{name}: its average holds NaN or infinity in {wrong} of {whole.numel()} elements; nothing was written. "
            f'ModelEMA(nonfinite="skip"), the default, keeps them out.'
        )
    return whole
