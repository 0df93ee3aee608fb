"""The update by torch's own list operations: any device, no compiler.

Tensors are cut into blocks that fit the processor's shared cache. A block is read once from memory, checked and
converted while it is there, and then averaged into each of the K sets: nothing is ever as large as the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ewma.kernels import Coefficient, Word, dense, flat
from ewma.kernels.noise import DROPPED, FIRST, GOLDEN, MASK, SECOND

BLOCK = 1 << 20
CONVERTED_BLOCK = 1 << 19
PACKED = 1 << 15
ROUNDED_BLOCK = 1 << 16
CAREFUL = 1 << 14
"""In elements: the largest block read in place; the largest that is converted; below what tensors are packed; what is
rounded at a time; and how much at a time gets the care that non-finite elements need, which allocates."""


class Block:
    """Stretches of several tensors, or one stretch of one, that are updated together.

    Args:
        averages: for each of the K sets the stretches to write, as vectors.
        places: stream and first element of each stretch, for the random bits.
    """

    def __init__(self, averages: list[list[Tensor]], places: list[tuple[int, int]]) -> None:
        self.averages, self.places = averages, places
        self.look()

    def look(self) -> None:
        """Note whether any average needs care: a NaN that has seen nothing yet, or a number near overflow."""
        every = [average for averages in self.averages for average in averages]
        self.tame = all(average.is_cpu and _tame(average, average.dtype) for average in every)

    def load(self) -> tuple[list[Tensor], Tensor]:
        """The values on the averages' device and at least as wide, and all of them again as one vector."""
        raise NotImplementedError


class InPlace(Block):
    """One stretch of a value that needs no conversion."""

    def __init__(self, value: Tensor, averages: list[list[Tensor]], places: list[tuple[int, int]]) -> None:
        super().__init__(averages, places)
        self.loaded = [value], value

    def load(self) -> tuple[list[Tensor], Tensor]:
        return self.loaded


class Converted(Block):
    """One stretch of a value of another dtype or device, or a whole value of another layout."""

    def __init__(
        self, value: Tensor, into: Tensor, scratch: Tensor, averages: list[list[Tensor]], places: list[tuple[int, int]]
    ) -> None:
        super().__init__(averages, places)
        self.value, self.into = value, into
        self.loaded = [scratch], scratch

    def load(self) -> tuple[list[Tensor], Tensor]:
        self.into.copy_(self.value)
        return self.loaded


class Packed(Block):
    """Many small values, laid end to end in the scratch space and so checked and converted in one go."""

    def __init__(
        self, values: list[Tensor], scratch: Tensor, averages: list[list[Tensor]], places: list[tuple[int, int]]
    ) -> None:
        super().__init__(averages, places)
        self.values = values
        self.loaded = list(scratch.split([value.numel() for value in values])), scratch

    def load(self) -> tuple[list[Tensor], Tensor]:
        torch.cat(self.values, out=self.loaded[1])
        return self.loaded


class ForeachLerp:
    def __init__(
        self, values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
    ) -> None:
        self.guard = guard
        self.skipped: Any = 0
        self.blocks = list(_blocks(values, averages, streams))
        self.rounding: dict[torch.device, Rounding] = {}

    def __call__(self, coefficients: Sequence[Coefficient], words: Sequence[Word | None]) -> None:
        for block in self.blocks:
            values, together = block.load()
            dtype = block.averages[0][0].dtype
            careful = self.guard and not (together.is_cpu and block.tame and _tame(together, dtype))
            if careful:
                self.skipped = self.skipped + sum((~torch.isfinite(piece)).sum() for piece in _pieces(together))
            narrow = values
            if together.dtype != dtype and None in words:
                narrow = [value.to(dtype) for value in values]
            for averages, coefficient, word in zip(block.averages, coefficients, words, strict=True):
                if word is not None:
                    self._round(averages, values, coefficient, word, block.places, careful)
                elif careful:
                    for average, value in zip(averages, narrow, strict=True):
                        for piece, new in zip(_pieces(average), _pieces(value), strict=True):
                            piece.copy_(_careful(piece, new, coefficient))
                elif isinstance(coefficient, Tensor):
                    coefficient = coefficient.to(averages[0])
                    for average, value in zip(averages, narrow, strict=True):
                        average.lerp_(value, coefficient)
                else:
                    torch._foreach_lerp_(averages, narrow, coefficient)
            if careful and together.is_cpu:
                block.look()

    def _round(
        self,
        averages: list[Tensor],
        values: list[Tensor],
        coefficient: Coefficient,
        word: Word,
        places: list[tuple[int, int]],
        careful: bool,
    ) -> None:
        device = averages[0].device
        if device not in self.rounding:
            largest = max(a.numel() for block in self.blocks for averages in block.averages for a in averages)
            self.rounding[device] = Rounding(min(largest, ROUNDED_BLOCK), device)
        for average, value, (stream, first) in zip(averages, values, places, strict=True):
            pieces = zip(average.split(ROUNDED_BLOCK), value.split(ROUNDED_BLOCK), strict=True)
            for index, (piece, new) in enumerate(pieces):
                offset = word + stream + (first + index * ROUNDED_BLOCK) * GOLDEN
                self.rounding[device](piece, new, coefficient, offset, careful)


lerp = ForeachLerp


def _tame(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether all is finite, and so far from overflow that differences are too.

    Only the CPU can be asked without waiting for it. The extremes cost what a sum does, one pass at the memory's speed;
    MKL's dot product waits for milliseconds where other processes keep the cores busy.
    """
    if not values.numel():
        return True
    low, high = (extreme.item() for extreme in torch.aminmax(values))
    limit = torch.finfo(dtype).max / 4
    return -limit < low and high < limit


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Parts for which careful work may allocate; larger on a device, where every part is a launch."""
    parts: tuple[Tensor, ...] = tensor.split(CAREFUL if tensor.is_cpu else CONVERTED_BLOCK)
    return parts


def _careful(average: Tensor, value: Tensor, coefficient: Coefficient) -> Tensor:
    """The update where something may be non-finite: such an element is left out, an unseen one takes the value."""
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(average)
    value = torch.where(torch.isfinite(value), value, average)
    average = torch.where(torch.isnan(average), value, average)
    moved = torch.lerp(average, value, coefficient)
    split = average.mul_(1 - coefficient).add_(value.mul_(coefficient))  # where the difference is too large
    return torch.where(torch.isfinite(moved), moved, split)


def _blocks(values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int]) -> Iterator[Block]:
    scratch: dict[torch.device, Tensor] = {}
    wide = _wide(values[0].dtype, averages[0][0].dtype) if values else None

    def room(n: int, like: Tensor) -> Tensor:
        """The first n elements of the scratch space, which all blocks share: each is used up before the next."""
        if like.device not in scratch or scratch[like.device].numel() < n:
            scratch[like.device] = torch.empty(n, dtype=wide, device=like.device)
        return scratch[like.device][:n]

    small: list[int] = []
    # The largest first, so that the scratch space is made once.
    for index in sorted(range(len(values)), key=lambda index: -values[index].numel()):
        value, average, stream = values[index], averages[0][index], streams[index]
        same_layout = dense(value) and value.stride() == average.stride()
        in_place = (value.dtype, value.device) == (wide, average.device)
        whole = [flat(each[index]) for each in averages]
        if not same_layout:
            scratch_space = room(value.numel(), average)
            into = scratch_space.as_strided(average.shape, average.stride())
            yield Converted(value, into, scratch_space, [[a] for a in whole], [(stream, 0)])
        elif value.device == average.device and value.numel() < PACKED:
            small.append(index)
        else:
            size = _even(value.numel(), BLOCK if in_place else CONVERTED_BLOCK)
            pieces = zip(flat(value).split(size), *(a.split(size) for a in whole), strict=True)
            for number, (piece, *rest) in enumerate(pieces):
                each, place = [[a] for a in rest], [(stream, number * size)]
                if in_place:
                    yield InPlace(piece, each, place)
                else:
                    into = room(piece.numel(), rest[0])
                    yield Converted(piece, into, into, each, place)
    for indices in _packs(small, values):
        together = room(sum(values[index].numel() for index in indices), averages[0][indices[0]])
        yield Packed(
            [flat(values[index]) for index in indices],
            together,
            [[flat(each[index]) for index in indices] for each in averages],
            [(streams[index], 0) for index in indices],
        )


def _wide(value: torch.dtype, average: torch.dtype) -> torch.dtype:
    """A dtype that holds both without loss."""
    return value if value == average else max(torch.float32, value, average, key=lambda dtype: dtype.itemsize)


def _even(n: int, most: int) -> int:
    """The size of equal pieces of n elements, none larger than `most`."""
    return max(1, math.ceil(n / math.ceil(n / most))) if n else 1


def _packs(indices: list[int], values: Sequence[Tensor]) -> Iterator[list[int]]:
    pack: list[int] = []
    room = CONVERTED_BLOCK
    for index in indices:
        if values[index].numel() > room and pack:
            yield pack
            pack, room = [], CONVERTED_BLOCK
        pack.append(index)
        room -= values[index].numel()
    if pack:
        yield pack


class Rounding:
    """Stochastic rounding in one block's worth of reused space; `noise.py` defines the bits and the rounding."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.ramp = (torch.arange(size, device=device) * GOLDEN).to(torch.int32)
        self.mixed, self.shifted = torch.empty_like(self.ramp), torch.empty_like(self.ramp)
        self.exact = torch.empty(size, dtype=torch.float64, device=device)
        self.new = torch.empty_like(self.exact)

    def __call__(self, average: Tensor, value: Tensor, coefficient: Coefficient, offset: Word, careful: bool) -> None:
        n = average.numel()
        exact, new = self.exact[:n].copy_(average), self.new[:n].copy_(value)
        if careful:
            for part, fresh in zip(_pieces(exact), _pieces(new), strict=True):
                part.copy_(_careful(part, fresh, coefficient))
        else:
            exact.lerp_(new, coefficient)
        dropped = DROPPED[average.dtype]
        bits, integers = self._bits(n, offset), exact.view(torch.int64)
        if dropped < 32:
            integers.add_(_shift_right(bits, 32 - dropped, self.shifted[:n]))
        else:
            # bits * 2**13, the sign bit of the 32 bits being worth 2**31 rather than -2**31
            noise = self.new[:n].view(torch.int64).copy_(bits).bitwise_and_(MASK)
            integers.add_(noise.bitwise_left_shift_(dropped - 32))
        average.copy_(integers.bitwise_right_shift_(dropped).bitwise_left_shift_(dropped).view(torch.float64))

    def _bits(self, n: int, offset: Word) -> Tensor:
        """`noise.bits` in int32, where multiplication wraps around by itself."""
        x, shifted = self.mixed[:n], self.shifted[:n]
        torch.add(self.ramp[:n], _wrap(offset), out=x)
        for shift, factor in ((16, FIRST), (15, SECOND)):
            x.bitwise_xor_(_shift_right(x, shift, shifted)).mul_(_wrap(factor))
        return x.bitwise_xor_(_shift_right(x, 16, shifted))


def _wrap(x: Word) -> Word:
    """An integer modulo 2**32 as an int32 holds it."""
    if isinstance(x, Tensor):
        return x.to(torch.int32)
    return ((x + 2**31) & MASK) - 2**31


def _shift_right(x: Tensor, places: int, out: Tensor) -> Tensor:
    """The shift that fills in zeros: on int32 torch's own fills in the sign."""
    return torch.bitwise_right_shift(x, places, out=out).bitwise_and_(MASK >> places)
