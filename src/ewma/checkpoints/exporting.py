"""Averages as the model's own file: safetensors that any tool loads, one or several with an index."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ewma import pieces
from ewma.checkpoints.averages import Averages
from ewma.pieces import Piece
from ewma.weights.views import Readable

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export(
    averages: Readable | Averages | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | None = None,
    done: Callable[[int], object] = abs,
) -> list[Path]:
    """Write averaged weights as a plain model file, tensor by tensor; gives the paths of what was written.

    What is written is the averaged model's whole state dict under canonical names, tied weights under each of theirs.
    It needs a few megabytes of memory beside the averages; of sharded ones, that of one whole tensor. The files appear
    together, whole, or not at all.

    Args:
        averages: a ModelEMA or a view of one, what `checkpoints.read` gives, or a dict of tensors.
        path: a folder, which then holds "model.safetensors" as `from_pretrained` looks for it; or the file itself,
            "ema.safetensors". An earlier export there is replaced.
        max_shard_size: of one file, in bytes or as text ("5GB", "500MB", "2GiB"). Where it does not suffice, there are
            several, "model-00001-of-00003.safetensors", and an index, "model.safetensors.index.json".
        dtype: of the floating tensors written, such as torch.bfloat16; by default as they are.
        done: is called with the number of elements of each tensor that has been written; for progress bars.

    With sharded averages (DTensor) it is collective: call it on every rank. Each tensor is gathered in turn, rank 0
    writes, and what goes wrong there is raised on every rank. Plain averages are written by whoever calls.

    Beside it: `ema.save` writes one file from which `ema.load` resumes; these files are for using the averages.

    >>> import tempfile
    >>> ema = ModelEMA(torch.nn.Linear(2, 1), half_life=10)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in export(ema, folder)]
    ['model.safetensors']
    """
    pieces.check_dtype(dtype)
    tensors = _tensors(averages)
    shards = pieces.split((_piece(*each, dtype) for each in tensors.items()), _in_bytes(max_shard_size))
    metadata = {"format": "pt", **_told(averages)}
    stream = _stream(shards, done)
    if any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        return _together(path, shards, stream, metadata)
    return pieces.write(_place(path), shards, stream, metadata)


def _tensors(averages: Any) -> Mapping[str, Tensor]:
    if isinstance(averages, Averages):
        return averages.weights
    if isinstance(averages, Readable):
        return averages.tensors()
    if isinstance(averages, Mapping):
        return averages
    raise TypeError(
        f"export writes a ModelEMA, what checkpoints.read gives, or a dict of tensors; got {type(averages).__name__}"
    )


def _piece(name: str, tensor: Any, dtype: torch.dtype | None) -> Piece:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(tensor).__name__}")
    chosen = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype

    def read() -> Tensor:
        whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return whole

    return Piece(name, chosen, tuple(tensor.shape), read)


def _stream(shards: list[list[Piece]], done: Callable[[int], object]) -> Iterator[Tensor]:
    for shard in shards:
        for piece in shard:
            yield piece.read()
            done(prod(piece.shape))


def _told(averages: Any) -> dict[str, str]:
    """What people and other tools may read in the files' heads."""
    told = {"profile": averages.profile, "count": averages.count} if not isinstance(averages, Mapping) else {}
    return {name: str(value) for name, value in told.items() if value is not None}


def _together(
    path: str | os.PathLike[str], shards: list[list[Piece]], stream: Iterator[Tensor], metadata: Mapping[str, str]
) -> list[Path]:
    """Rank 0 writes; the others take part in gathering each tensor, to the end, even where writing fails."""
    import torch.distributed as dist

    failure: Exception | None = None
    written: list[Path] = []
    if dist.get_rank() == 0:
        try:
            written = pieces.write(_place(path), shards, stream, metadata)
        except Exception as error:
            failure = error
    deque(stream, maxlen=0)  # a loop would hold each tensor while the next is gathered
    outcome: list[Any] = [written, failure and f"{type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RuntimeError(f"export failed on rank 0, which writes: {outcome[1]}")
    return list(outcome[0])


def _place(path: str | os.PathLike[str]) -> Path:
    """The path of the file, or of the one that the parts are named after."""
    place = Path(path)
    if place.suffix == ".safetensors" and not place.is_dir():
        folder, place = place.parent, place
    elif place.suffix and not place.is_dir():
        raise ValueError(f'{place}: expected a folder, or a file that ends in ".safetensors"; got "{place.suffix}"')
    else:
        folder, place = place, place / "model.safetensors"
        if folder.parent.is_dir():
            folder.mkdir(exist_ok=True)
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: the folder {folder} does not exist; make it first")
    return place


def _in_bytes(size: int | str) -> int:
    """A size in bytes, or as text: decimal for KB, MB, GB, as Hugging Face's libraries have it; binary for KiB ...

    >>> _in_bytes("1.5MB"), _in_bytes("2GiB")
    (1500000, 2147483648)
    """
    if isinstance(size, str):
        parts = re.fullmatch(r"([0-9.]+) *([KMG]i?B)", size.strip(), re.IGNORECASE)
        if parts:
            size = round(float(parts[1]) * _UNITS[parts[2].upper()])
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f'max_shard_size must be a number of bytes or text such as "5GB", "500MB"; got {size!r}')
    return size
