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

from ewma.kernels import Coefficient, Word
from ewma.kernels.layout import dense, flat
from ewma.kernels.noise import DROPPED, FIRST, GOLDEN, MASK, SECOND, SUBNORMAL, fits, lift_of

BLOCK = 1 << 20
CONVERTED_BLOCK = 1 << 19
PACKED = 1 << 15
ROUNDED_BLOCK = 1 << 16
CAREFUL = 1 << 14
"""In elements: the largest block read in place; the largest that is converted; below what tensors are packed; what is
rounded at a time; and how much at a time gets the care that non-finite elements need, which allocates."""


class Block:
    """Stretches of tensors that are updated together: a few large ones that are read where they are.

    Args:
        values: the stretches to average from, as vectors, on the averages' device and at least as wide.
        averages: for each of the K sets the stretches to write, as vectors.
        places: stream and first element of each stretch, for the random bits.
        together: all values again in as few vectors as possible, to be checked.
    """

    def __init__(
        self,
        values: list[Tensor],
        averages: list[list[Tensor]],
        places: list[tuple[int, int]],
        together: list[Tensor] | None = None,
    ) -> None:
        self.values, self.averages, self.places = values, averages, places
        self.together = together or values
        self.dtype = averages[0][0].dtype
        self.look()

    def look(self) -> None:
        """Note whether any average needs care: a NaN that has seen nothing yet, or a number near overflow."""
        self.calm = all(tame(averages, self.dtype) for averages in self.averages)

    def load(self) -> None:
        """Bring the values to where they are averaged from."""

    def tame(self) -> bool:
        """Whether nothing needs care. Only the CPU can be asked without waiting for it."""
        return self.calm and tame(self.together, self.dtype)


class Converted(Block):
    """One stretch of a value of another dtype or device, or a whole value of another layout."""

    def __init__(
        self, value: Tensor, into: Tensor, scratch: Tensor, averages: list[list[Tensor]], places: list[tuple[int, int]]
    ) -> None:
        super().__init__([scratch], averages, places)
        self.value, self.into = value, into

    def load(self) -> None:
        self.into.copy_(self.value)


class Packed(Block):
    """Many small values, laid end to end in the scratch space and so checked and converted in one go."""

    def __init__(
        self, values: list[Tensor], scratch: Tensor, averages: list[list[Tensor]], places: list[tuple[int, int]]
    ) -> None:
        super().__init__(list(scratch.split([value.numel() for value in values])), averages, places, [scratch])
        self.small, self.scratch = values, scratch

    def load(self) -> None:
        torch.cat(self.small, out=self.scratch)


class ForeachLerp:
    noted: Sequence[Tensor] = ()
    free = False

    def __init__(
        self, values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
    ) -> None:
        self.guard = guard
        self.skipped: Any = 0
        self.blocks = list(_blocks(values, averages, streams, guard))
        self.rounding: dict[torch.device, Rounding] = {}

    def __call__(self, coefficients: Sequence[Coefficient], words: Sequence[Word | None]) -> None:
        for block in self.blocks:
            block.load()
            careful = self.guard and not block.tame()
            if careful:
                for piece in (piece for values in block.together for piece in _pieces(values)):
                    self.skipped = self.skipped + (~fits(piece, block.dtype)).sum()
            values = block.values
            if values[0].dtype != block.dtype and None in words:
                values = [value.to(block.dtype) for value in values]
            for averages, coefficient, word in zip(block.averages, coefficients, words, strict=True):
                if word is not None:
                    self._round(averages, block.values, coefficient, word, block.places, careful)
                elif careful:
                    for average, value in zip(averages, values, strict=True):
                        for piece, new in zip(_pieces(average), _pieces(value), strict=True):
                            piece.copy_(carefully(piece, new, coefficient, block.dtype))
                elif isinstance(coefficient, Tensor):
                    coefficient = coefficient.to(averages[0])
                    for average, value in zip(averages, values, strict=True):
                        average.lerp_(value, coefficient)
                else:
                    torch._foreach_lerp_(averages, values, coefficient)
            if careful and block.values[0].is_cpu:
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
            self.rounding[device] = Rounding(min(largest, ROUNDED_BLOCK), device, self.guard)
        for average, value, (stream, first) in zip(averages, values, places, strict=True):
            pieces = zip(average.split(ROUNDED_BLOCK), value.split(ROUNDED_BLOCK), strict=True)
            for index, (piece, new) in enumerate(pieces):
                offset = word + stream + (first + index * ROUNDED_BLOCK) * GOLDEN
                self.rounding[device](piece, new, coefficient, offset, careful)


lerp = ForeachLerp


def tame(several: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether all is known to be finite, and so far from overflow that differences are too.

    Only the CPU can be asked without waiting for it. The extremes cost what a sum does, one pass at the memory's speed;
    MKL's dot product waits for milliseconds where other processes keep the cores busy.
    """
    limit = torch.finfo(dtype).max / 4
    for values in several:
        if not values.is_cpu:
            return False
        if values.numel():
            low, high = torch.aminmax(values)
            if not (-limit < low.item() and high.item() < limit):
                return False
    return True


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Parts for which careful work may allocate; larger on a device, where every part is a launch."""
    parts: tuple[Tensor, ...] = tensor.split(CAREFUL if tensor.is_cpu else CONVERTED_BLOCK)
    return parts


def carefully(average: Tensor, value: Tensor, coefficient: Coefficient, dtype: torch.dtype) -> Tensor:
    """The update where a value may be no finite number of the dtype: it is left out, an unseen one takes the value."""
    if isinstance(coefficient, Tensor):
        coefficient = coefficient.to(average)
    value = torch.where(fits(value, dtype), value, average)
    average = torch.where(torch.isnan(average), value, average)
    moved = torch.lerp(average, value, coefficient)
    split = average.mul_(1 - coefficient).add_(value.mul_(coefficient))  # where the difference is too large
    return torch.where(torch.isfinite(moved), moved, split)


def _blocks(
    values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
) -> Iterator[Block]:
    scratch: dict[torch.device, Tensor] = {}
    wide = _wide(values[0].dtype, averages[0][0].dtype) if values else None

    def room(n: int, like: Tensor) -> Tensor:
        """The first n elements of the scratch space, which all blocks share: each is used up before the next."""
        if like.device not in scratch or scratch[like.device].numel() < n:
            scratch[like.device] = torch.empty(n, dtype=wide, device=like.device)
        return scratch[like.device][:n]

    small: list[int] = []
    stretches: list[tuple[Tensor, list[Tensor], tuple[int, int]]] = []
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
        elif value.device == average.device and value.numel() < PACKED and (guard or not in_place):
            small.append(index)
        else:
            size = _even(value.numel(), BLOCK if in_place else CONVERTED_BLOCK)
            pieces = zip(flat(value).split(size), *(a.split(size) for a in whole), strict=True)
            for number, (piece, *rest) in enumerate(pieces):
                if in_place:
                    stretches.append((piece, rest, (stream, number * size)))
                else:
                    into = room(piece.numel(), rest[0])
                    yield Converted(piece, into, into, [[a] for a in rest], [(stream, number * size)])
    for chosen in packs([piece.numel() for piece, _, _ in stretches], BLOCK):
        several, into_averages, places = zip(*(stretches[number] for number in chosen), strict=True)
        yield Block(list(several), [list(each) for each in zip(*into_averages, strict=True)], list(places))
    for chosen in packs([values[index].numel() for index in small], CONVERTED_BLOCK):
        indices = [small[number] for number in chosen]
        yield Packed(
            [flat(values[index]) for index in indices],
            room(sum(values[index].numel() for index in indices), averages[0][indices[0]]),
            [[flat(each[index]) for index in indices] for each in averages],
            [(streams[index], 0) for index in indices],
        )


def _wide(value: torch.dtype, average: torch.dtype) -> torch.dtype:
    """A dtype that holds both without loss."""
    return value if value == average else max(torch.float32, value, average, key=lambda dtype: dtype.itemsize)


def _even(n: int, most: int) -> int:
    """The size of equal pieces of n elements, none larger than `most`."""
    return max(1, math.ceil(n / math.ceil(n / most))) if n else 1


def packs(sizes: list[int], most: int) -> Iterator[list[int]]:
    """Neighbours that together are no larger than `most`."""
    pack: list[int] = []
    total = 0
    for number, size in enumerate(sizes):
        if pack and total + size > most:
            yield pack
            pack, total = [], 0
        pack.append(number)
        total += size
    if pack:
        yield pack


class Rounding:
    """Stochastic rounding in one block's worth of reused space; `noise.py` defines the bits and the rounding."""

    def __init__(self, size: int, device: torch.device, guard: bool) -> None:
        self.guard = guard
        self.ramp = (torch.arange(size, device=device) * GOLDEN).to(torch.int32)
        self.mixed, self.shifted = torch.empty_like(self.ramp), torch.empty_like(self.ramp)
        self.exact = torch.empty(size, dtype=torch.float64, device=device)
        self.new = torch.empty_like(self.exact)

    def __call__(self, average: Tensor, value: Tensor, coefficient: Coefficient, offset: Word, careful: bool) -> None:
        n = average.numel()
        exact, new = self.exact[:n].copy_(average), self.new[:n].copy_(value)
        if careful:
            for part, fresh in zip(_pieces(exact), _pieces(new), strict=True):
                part.copy_(carefully(part, fresh, coefficient, average.dtype))
        else:
            exact.lerp_(new, coefficient)
        dtype, dropped = average.dtype, DROPPED[average.dtype]
        unrounded = exact.clone() if careful or not self.guard else None
        lift = lift_of(exact, dtype) if dtype in SUBNORMAL else None
        if lift is not None:
            exact.add_(lift)
        bits, integers = self._bits(n, offset), exact.view(torch.int64)
        if dropped < 32:
            integers.add_(_shift_right(bits, 32 - dropped, self.shifted[:n]))
        else:
            # bits * 2**13, the sign bit of the 32 bits being worth 2**31 rather than -2**31
            noise = self.new[:n].view(torch.int64).copy_(bits).bitwise_and_(MASK)
            integers.add_(noise.bitwise_left_shift_(dropped - 32))
        integers.bitwise_right_shift_(dropped).bitwise_left_shift_(dropped)
        if lift is not None:
            exact.sub_(lift).copysign_(lift)
        if unrounded is not None:  # what is beyond the largest number is rounded to the nearest
            exact = torch.where(unrounded.abs() <= torch.finfo(dtype).max, exact, unrounded)
        average.copy_(exact)

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
