"""Safetensors files, read by offset; `safetensors` itself would map them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ewma.readers.base import Checkpoint, Entry

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls torch's types."""


class Safetensors(Checkpoint):
    """A safetensors file, read by offset: what was read before takes no memory, not even as mapped pages."""

    in_parts = True

    def __init__(self, path: Path) -> None:
        self._file: FileIO | None = None
        entries, self._begins, self.metadata = _header(path)
        super().__init__(path, entries)

    def read(self, name: str) -> Tensor:
        entry = self.entry(name)
        out = torch.empty(entry.numel, dtype=entry.dtype, device="cpu")
        self.into(name, out)(0)
        return out.reshape(entry.shape)

    def into(self, name: str, out: Tensor) -> Callable[[int], object]:
        begins, width, room = self._begins[name], out.element_size(), out.view(torch.uint8).numpy().data
        self._opened()

        def fill(begin: int) -> None:
            file = self._opened()
            where, buffer = begins + begin * width, room
            while got := os.preadv(file.fileno(), [buffer], where):
                where, buffer = where + got, buffer[got:]
                if not buffer:
                    return
            if buffer:
                raise ValueError(f"{self.path}: it has become shorter since it was opened; {name} cannot be read")

        return fill

    def _opened(self) -> FileIO:
        if self._file is None:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  (closed by `close`)
        return self._file

    def others(self) -> dict[str, Any]:
        return dict(self.metadata)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _header(path: Path) -> tuple[dict[str, Entry], dict[str, int], dict[str, str]]:
    """The tensors of a safetensors file, the byte at which each begins, and the metadata."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        try:
            if start > size:
                raise ValueError(f"its header alone takes {start} bytes")
            header = json.loads(file.read(length))
            metadata = dict(header.pop("__metadata__", {}))
            strange = {name: told["dtype"] for name, told in header.items() if told["dtype"] not in DTYPES}
            entries, begins, end = {}, {}, 0
            for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]) if not strange else ():
                entries[name] = Entry(_sizes(name, told["shape"]), DTYPES[told["dtype"]])
                begin, stop = told["data_offsets"]
                if begin != end or stop - begin != entries[name].numel * entries[name].dtype.itemsize:
                    raise ValueError(f"{name} takes other bytes than its shape and type need")
                begins[name], end = start + begin, stop
            if start + end != size and not strange:
                raise ValueError(f"its tensors take {start + end} bytes")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: expected a whole safetensors file; it has {size} bytes and is truncated or damaged "
                f"({error}). Copy or save it again."
            ) from error
    for name, dtype in strange.items():
        raise TypeError(f"{path}: {name} is of type {dtype}, which torch has no tensors of")
    return entries, begins, metadata


def _sizes(name: str, shape: Any) -> tuple[int, ...]:
    if not all(isinstance(size, int) and 0 <= size < 2**63 for size in shape):
        raise ValueError(f"the shape of {name} is {shape}")
    return tuple(shape)
