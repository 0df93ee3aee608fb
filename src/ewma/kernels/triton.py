"""The update in one launch for a whole list of tensors, for CUDA: written in Triton.

A table on the device says where values and averages lie, another which block of which tensor each program takes. Both
are made once; tensors are held, so that nothing is freed, and one whose memory moves must be prepared anew. Nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ewma.kernels import Coefficient, Word
from ewma.kernels.addresses import divide
from ewma.kernels.triton_numbers import (
    Table,
    aligned,
    capturing,
    check,
    coded,
    count,
    fits,
    halves,
    launch,
    moved,
    number,
    pointer,
    read,
    rounded,
    word,
    write,
)

BLOCK = 2048
"""In elements: what one program averages."""


@triton.jit
def _moved(
    old,
    value,
    c,
    random,
    stream,
    elements,
    WIDE: tl.constexpr,
    AVERAGE: tl.constexpr,
    GUARD: tl.constexpr,
):
    """The new averages, rounded stochastically where there is a word for it."""
    new = moved(old.to(WIDE), value.to(WIDE), c)
    if GUARD:
        new = tl.where(old == old, new, value.to(WIDE))
    if random is None:
        return new
    else:
        return rounded(new, elements, word(random) + stream, AVERAGE)


@triton.jit
def _block(
    row,
    first,
    left,
    skipped,
    high,
    low,
    words,
    SETS: tl.constexpr,
    VALUE: tl.constexpr,
    AVERAGE: tl.constexpr,
    GUARD: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    NARROW: tl.constexpr = tl.float64 if AVERAGE == tl.float64 else tl.float32
    offsets = tl.arange(0, BLOCK)
    inside = offsets < left
    elements = first.to(tl.uint32) + offsets.to(tl.uint32)
    stream = tl.load(row + 2).to(tl.uint32)
    value = read(pointer(tl.load(row), first, VALUE, FULL), offsets, inside, VALUE, FULL)
    usable = fits(value.to(NARROW), AVERAGE)
    if GUARD:
        count(skipped, inside & ~usable)
    for k in tl.static_range(SETS):
        start = pointer(tl.load(row + 4 + k), first, AVERAGE, FULL)
        old = read(start, offsets, inside, AVERAGE, FULL)
        c = number(high[k], low[k])
        if words[k] is None:
            new = _moved(old, value, c, None, stream, elements, NARROW, AVERAGE, GUARD)
        else:
            new = _moved(old, value, c, words[k], stream, elements, tl.float64, AVERAGE, GUARD)
        if GUARD:
            new = tl.where(usable, new, old)
        write(start, offsets, inside, new, AVERAGE, FULL)


@triton.jit
def _lerp(
    rows,
    blocks,
    skipped,
    high,
    low,
    words,
    SETS: tl.constexpr,
    VALUE: tl.constexpr,
    AVERAGE: tl.constexpr,
    GUARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    here = blocks + 2 * tl.program_id(0).to(tl.int64)
    row = rows + (4 + SETS) * tl.load(here).to(tl.int64)
    first = BLOCK * tl.load(here + 1).to(tl.int64)
    left = tl.load(row + 1) - first
    if (left >= BLOCK) & aligned(row, SETS):
        _block(row, first, left, skipped, high, low, words, SETS, VALUE, AVERAGE, GUARD, BLOCK, True)
    else:
        _block(row, first, left, skipped, high, low, words, SETS, VALUE, AVERAGE, GUARD, BLOCK, False)


class TritonLerp:
    """What only torch can read, by dtype or layout, is left to foreach."""

    def __init__(
        self, values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool
    ) -> None:
        if capturing():
            raise RuntimeError(
                "expected the averages to be made before a CUDA graph is captured: run a few training steps, updates "
                "included, before the capture, as torch.cuda.graph asks for anyway"
            )
        check(values, averages)
        self.values, chosen, mine, self.rest = divide(values, averages, streams, guard)
        self.noted = [average for several in chosen for average in several]
        self.free = not self.rest.blocks
        self.guard = guard
        self.table = Table(self.values, chosen, mine, BLOCK)
        self.left_out: Any = 0
        if self.table.programs:
            self.left_out = torch.zeros((), dtype=torch.int64, device=self.table.device)

    @property
    def skipped(self) -> Any:
        return self.left_out + self.rest.skipped

    def __call__(self, coefficients: Sequence[Coefficient], words: Sequence[Word | None]) -> None:
        if self.table.programs:
            # Autograd refuses to go back through what was overwritten meanwhile; only torch's own operations tell it.
            increment_version(self.noted)
            high, low = zip(*(halves(each, self.table.device) for each in coefficients), strict=True)
            drawn = tuple(coded(each) if isinstance(each, int) else each for each in words)
            launch(_lerp, self.table, self.left_out, high, low, drawn, GUARD=self.guard)
        if not self.free:
            self.rest(coefficients, words)


lerp = TritonLerp
