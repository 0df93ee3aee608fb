"""Safetensors files written tensor by tensor: one file, or several with an index, all of them or none."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ewma import files
from ewma.readers.safetensors import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""What safetensors calls torch's types."""

BLOCK = 2**20
"""Elements that are converted, or fetched from a device, at a time."""


@dataclass(frozen=True)
class Piece:
    """One tensor to write: as what, and how to get it when its turn has come, in whatever dtype it then has."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype in which averages could not be written: not a floating one, or none that the file knows."""
    if dtype is not None and not (dtype in NAMES and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating one, such as torch.bfloat16; got {dtype}")


def split(pieces: Iterable[Piece], most: float) -> list[list[Piece]]:
    """The pieces in files of at most `most` bytes each; a larger one has a file of its own."""
    shards: list[list[Piece]] = [[]]
    room = most
    for piece in pieces:
        if shards[-1] and piece.size > room:
            shards.append([])
            room = most
        shards[-1].append(piece)
        room -= piece.size
    return [_aligned(shard) for shard in shards]


def write(
    path: Path, shards: Sequence[Sequence[Piece]], tensors: Iterator[Tensor], metadata: Mapping[str, str]
) -> list[Path]:
    """Write files that appear together, and the paths of all of them, an index last.

    A single one is `path` itself, "model.safetensors"; several are "model-00001-of-00003.safetensors" and so on, with
    "model.safetensors.index.json" (the layout of Hugging Face's libraries). What an earlier call left at `path` is
    replaced: up to the moment when all is written, it is still there whole.

    Args:
        shards: as `split` gives them.
        tensors: the shards' tensors, one after the other; each is let go before the next is asked for.
        metadata: text that stands in the head of each file.
    """
    names = [path.name]
    if len(shards) > 1:
        names = [f"{path.stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    written: dict[Path, str] = {}
    room = torch.empty(8 * BLOCK, dtype=torch.uint8, device="cpu")
    try:
        for name, shard in zip(names, shards, strict=True):
            written[path.with_name(name)] = temporary = _temporary(path.with_name(name))
            with open(temporary, "wb") as file:
                file.write(_head(shard, metadata))
                for piece in shard:
                    file.writelines(_bytes(piece, next(tensors), room))
        if len(shards) > 1:
            index = path.with_name(f"{path.name}.index.json")
            written[index] = temporary = _temporary(index)
            Path(temporary).write_text(_index(names, shards))
        for temporary in written.values():
            files.settle(temporary)
        _put_in_place(path, written)
    except BaseException:
        for temporary in written.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise
    return list(written)


def _put_in_place(path: Path, written: Mapping[Path, str]) -> None:
    """Each file into its place, the index last, and then away with what it replaces.

    Where parts take the places of older ones, the older index goes first: whoever reads in between finds nothing,
    never a mix.
    """
    index = path.with_name(f"{path.name}.index.json")
    earlier = _earlier(path, index)
    if index in written and earlier & (written.keys() - {index}):
        index.unlink()
    for final, temporary in written.items():
        os.replace(temporary, final)
    for each in earlier - written.keys():
        each.unlink(missing_ok=True)


def _earlier(path: Path, index: Path) -> set[Path]:
    """What an earlier call has left: the single file, or the index and the parts that it lists."""
    found = {each for each in (path, index) if each.exists()}
    if index.exists():
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            listed = set(json.loads(index.read_text())["weight_map"].values())
            numbered = re.compile(rf"{re.escape(path.stem)}-\d{{5}}-of-\d{{5}}\.safetensors")
            found |= {path.with_name(name) for name in listed if numbered.fullmatch(name)}
    return found


def _aligned(pieces: list[Piece]) -> list[Piece]:
    """Wider dtypes first: then each tensor begins at a multiple of its own width, as readers that map files need."""
    return sorted(pieces, key=lambda piece: -piece.dtype.itemsize)


def _head(pieces: Sequence[Piece], metadata: Mapping[str, str]) -> bytes:
    head: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for piece in pieces:
        if piece.dtype not in NAMES:
            raise TypeError(f"{piece.name}: a safetensors file cannot hold {piece.dtype}; leave it out or convert it")
        span = [begin, begin + piece.size]
        head[piece.name] = {"dtype": NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": span}
        begin += piece.size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(piece: Piece, tensor: Tensor, room: Tensor) -> Iterator[Any]:
    """The tensor's bytes in the piece's dtype, block by block in the same `room`: to convert a tensor, or to fetch it
    from a device, takes no memory of its size."""
    if tuple(tensor.shape) != piece.shape:
        raise RuntimeError(
            f"{piece.name}: expected shape {list(piece.shape)}, as it was when writing began; it has become "
            f"{list(tensor.shape)}"
        )
    for block in tensor.detach().reshape(-1).split(BLOCK):
        part = room[: block.numel() * piece.dtype.itemsize].view(piece.dtype).copy_(block)
        yield part.view(torch.uint8).numpy()


def _index(names: Sequence[str], shards: Sequence[Sequence[Piece]]) -> str:
    where = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
    total = sum(piece.size for shard in shards for piece in shard)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"


def _temporary(path: Path) -> str:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    return temporary
