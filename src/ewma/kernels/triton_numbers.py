"""What the kernels in Triton share: numbers and their bits, as native.h and noise.py have them.

bfloat16 is read and written by its bits, so that it is rounded as C rounds it, in Triton's interpreter too. Scalars
come as two halves of a float64 (Triton would hand a Python float on as a float32), or by the address of one.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ewma.kernels import Coefficient, addresses, noise

WARPS = 8

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

GOLDEN, FIRST, SECOND = (tl.constexpr(factor) for factor in (noise.GOLDEN, noise.FIRST, noise.SECOND))
ROUNDED = torch.float32, torch.bfloat16, torch.float16
DROPPED_FLOAT32, DROPPED_BFLOAT16, DROPPED_FLOAT16 = (tl.constexpr(noise.DROPPED[each]) for each in ROUNDED)
LARGEST_FLOAT32, LARGEST_BFLOAT16, LARGEST_FLOAT16 = (tl.constexpr(torch.finfo(each).max) for each in ROUNDED)
SUBNORMAL_FLOAT16 = tl.constexpr(noise.SUBNORMAL[torch.float16])
SIZE = tl.constexpr((1 << 63) - 1)
INFINITY = tl.constexpr(float("inf"))
INFINITE_BFLOAT16, INFINITE_FLOAT16 = tl.constexpr(2.0**128 - 2.0**119), tl.constexpr(65520.0)
"""What is rounded to infinity, from there on."""


@triton.jit
def word(given):
    """32 bits that came as `coded`; or the last ones of the integer that lies there."""
    if given.dtype.is_ptr():
        return tl.load(given).to(tl.uint32)
    else:
        return (given >> 1).to(tl.uint32)


@triton.jit
def number(high, low):
    """A float64 whose two halves came as `coded`; or the number that lies there."""
    if high.dtype.is_ptr():
        return tl.load(high).to(tl.float64)
    else:
        return ((word(high).to(tl.int64) << 32) | word(low).to(tl.int64)).to(tl.float64, bitcast=True)


@triton.jit
def aligned(row, SETS: tl.constexpr):
    """Whether a value and its averages can be read 16 bytes at a time. (A view may begin anywhere.)"""
    places = tl.load(row)
    for k in tl.static_range(SETS):
        places |= tl.load(row + 4 + k)
    return places % 16 == 0


@triton.jit
def pointer(address, first, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """To the element `first` of what lies at an address; to its bits, where it is bfloat16."""
    if DTYPE == tl.bfloat16:
        start = address.to(tl.pointer_type(tl.uint16))
    else:
        start = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start + first


@triton.jit
def read(start, offsets, inside, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Numbers as float32, or as float64 where they are."""
    if FULL:
        given = tl.load(start + offsets)
    else:
        given = tl.load(start + offsets, mask=inside, other=0)
    if DTYPE == tl.bfloat16:
        return (given.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:
        return given.to(tl.float32)
    else:
        return given


@triton.jit
def write(start, offsets, inside, numbers, DTYPE: tl.constexpr, FULL: tl.constexpr):
    """Numbers rounded to nearest, ties to even."""
    if DTYPE == tl.bfloat16:
        narrow = numbers.to(tl.float32)
        bits = narrow.to(tl.uint32, bitcast=True)
        bits = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False) >> 16
        given = tl.where(narrow == narrow, bits, 0x7FC0).to(tl.uint16)
    elif DTYPE == tl.float16:
        given = numbers.to(tl.float32).to(tl.float16)
    else:
        given = numbers.to(DTYPE)
    if FULL:
        tl.store(start + offsets, given)
    else:
        tl.store(start + offsets, given, mask=inside)


@triton.jit
def finite(x):
    return tl.abs(x) < INFINITY


@triton.jit
def fits(x, DTYPE: tl.constexpr):
    """`noise.fits`, of float32; or of float64 for averages in float64."""
    wide: tl.constexpr = INFINITE_BFLOAT16 if DTYPE == tl.bfloat16 else INFINITY
    limit: tl.constexpr = INFINITE_FLOAT16 if DTYPE == tl.float16 else wide
    return tl.abs(x) < limit


@triton.jit
def count(total, which):
    """Add how many there are to an int64, which few programs ever touch."""
    several = tl.sum(which.to(tl.int32), 0)
    if several > 0:
        tl.atomic_add(total, several.to(tl.int64), sem="relaxed")


@triton.jit
def moved(old, value, c):
    """The update in the dtype of old, as blocks.h has it; in two parts where the difference is too large."""
    near = c >= 0.5
    factor = tl.where(near, c - 1.0, c).to(old.dtype)
    difference = value - old
    step = tl.where(near, value, old) + factor * difference
    kept = tl.where(old == old, tl.where(c == 1.0, 0.0, (1.0 - c).to(old.dtype) * old), old)
    return tl.where(finite(difference), step, kept + c.to(old.dtype) * value)


@triton.jit
def mix(x):
    """`noise.mix`: here multiplication wraps around by itself."""
    x = tl.mul(x ^ (x >> 16), FIRST, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), SECOND, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def rounded(exact, elements, offset, DTYPE: tl.constexpr):
    """`noise.round_stochastically`, by the bits of these elements."""
    random = mix(tl.add(tl.mul(elements, GOLDEN, sanitize_overflow=False), offset, sanitize_overflow=False))
    narrow: tl.constexpr = DROPPED_BFLOAT16 if DTYPE == tl.bfloat16 else DROPPED_FLOAT16
    dropped: tl.constexpr = DROPPED_FLOAT32 if DTYPE == tl.float32 else narrow
    if dropped < 32:
        drawn = (random >> (32 - dropped)).to(tl.int64)
    else:
        drawn = random.to(tl.int64) << (dropped - 32)
    bits = exact.to(tl.int64, bitcast=True)
    size = (bits & SIZE).to(tl.float64, bitcast=True)
    if DTYPE == tl.float16:
        lift = tl.where(size < SUBNORMAL_FLOAT16, SUBNORMAL_FLOAT16, 0.0).to(tl.float64)
        lifted = (((size + lift).to(tl.int64, bitcast=True) + drawn) >> dropped) << dropped
        cut = (lifted.to(tl.float64, bitcast=True) - lift).to(tl.int64, bitcast=True) | (bits & ~SIZE)
    else:
        cut = ((bits + drawn) >> dropped) << dropped
    wide: tl.constexpr = LARGEST_BFLOAT16 if DTYPE == tl.bfloat16 else LARGEST_FLOAT32
    largest: tl.constexpr = LARGEST_FLOAT16 if DTYPE == tl.float16 else wide
    return tl.where(size <= largest, cut, bits).to(tl.float64, bitcast=True).to(tl.float32)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return not isinstance(mix, triton.JITFunction)


def check(values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]]) -> None:
    """Raise where the tensors are not for Triton."""
    addresses.check(values, averages, "triton", "cpu" if interpreted() else "cuda")


def coded(bits: int) -> int:
    """32 bits as an integer that Triton compiles nothing of its own for: odd, and always one of 64 bits."""
    return 1 << 34 | (bits & noise.MASK) << 1 | 1


def halves(given: Coefficient, device: torch.device) -> tuple[Any, int]:
    """How a number goes to a kernel: as its high and its low half; or as the tensor that holds it."""
    if isinstance(given, Tensor):
        return given.to(device), 0
    low, high = struct.unpack("<II", struct.pack("<d", given))
    return coded(high), coded(low)


def capturing() -> bool:
    """Whether a CUDA graph is being captured, which notes what is to be done and does nothing of it yet."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_kept: dict[int, Any] = {}
"""What captured graphs read whenever they run, which nobody else may hold any more."""


def _keep(thing: Any) -> None:
    _kept[id(thing)] = thing


def _uploaded(table: Tensor, device: torch.device) -> Tensor:
    """A table on its device, without waiting for what the device does."""
    if device.type != "cuda":
        return table
    table = table.pin_memory()
    if capturing():
        _keep(table)
    return table.to(device, non_blocking=True)


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class Table:
    """On the device: where tensors lie, and which block of which tensor each program of a launch takes.

    Args:
        values, averages, streams: of plain tensors on one device, as `addresses.rows` lists them.
        block: how many elements a program takes.
        last: a table made before: of tensors of the same sizes the same programs take the same blocks.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        averages: Sequence[Sequence[Tensor]],
        streams: Sequence[int],
        block: int,
        last: Table | None = None,
    ) -> None:
        self.sizes = block, [value.numel() for value in values]
        counts = torch.tensor([-(-size // block) for size in self.sizes[1]], dtype=torch.int64)
        self.programs = int(counts.sum())
        if not self.programs:
            return
        self.device, self.captured = values[0].device, capturing()
        rows = torch.tensor(list(addresses.rows(values, averages, [stream & noise.MASK for stream in streams])))
        self.rows, self.rows_on = _uploaded(rows, self.device), _stream(self.device)
        self.blocks: Tensor
        self.blocks_on: Any
        if last and last.programs and not last.captured and (last.sizes, last.device) == (self.sizes, self.device):
            self.blocks, self.blocks_on = last.blocks, last.blocks_on
        else:
            tensor = torch.repeat_interleave(torch.arange(len(values)), counts)
            place = torch.arange(self.programs) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
            self.blocks = _uploaded(torch.stack((tensor, place), 1).to(torch.int32), self.device)
            self.blocks_on = self.rows_on
        self.constants = {
            "SETS": len(averages),
            "VALUE": DTYPES[values[0].dtype],
            "AVERAGE": DTYPES[averages[0][0].dtype],
            "BLOCK": block,
        }

    def used(self, counter: Tensor) -> None:
        """Make sure that what a launch reads now stays until that is done: on whatever stream, in whatever graph."""
        now, parts = _stream(self.device), ((self.rows, self.rows_on), (self.blocks, self.blocks_on))
        for tensor, made_on in (*parts, (counter, self.rows_on)):
            if capturing():
                _keep(tensor)
            if made_on != now:
                tensor.record_stream(now)


def run(kernel: Any, grid: tuple[int, ...], device: torch.device, *given: Any, **constants: Any) -> None:
    """Run a kernel on its tensors' device."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*given, **{"num_warps": WARPS} | constants)


def launch(kernel: Any, table: Table, *given: Any, **constants: Any) -> None:
    """Run a kernel on all blocks of a table. No operations are fused: the bits are those of every other kernel.

    Args:
        given: what the kernel takes, first of all where it counts what it leaves out.
    """
    table.used(given[0])
    constants |= table.constants | {"enable_fp_fusion": False}
    run(kernel, (table.programs,), table.device, table.rows, table.blocks, *given, **constants)
