"""How a scan along time goes through its series: tiles of steps and series, and segments of time where there are few.

A program goes through its series a tile at a time: a parallel scan within, a carry from one tile to the next. What
steps do to y is put together as (lost, kept, gained), so that nothing is lost where next to nothing is lost or kept.
Where there are few series, time is cut into segments: once for what each does, then for what comes into each from those
before it, which is the same scan over the segments, and then for all that is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ewma.kernels.triton_numbers import read, write

TILE = 1024
LANES = 32
WARPS = 4
PROGRAMS = 1024
SEGMENT = 4
"""Steps times series in a tile; the most series side by side in it, where there are steps enough; how many warps work
on it, few, so that of several tiles on a multiprocessor some are read while others are computed; how many programs keep
a GPU busy; and how many tiles a segment has at least."""


@triton.jit
def then(lost, kept, gained, more_lost, more_kept, more_gained):
    """What the one does and then the other."""
    little = gained + (more_gained - more_lost * gained)
    most = more_kept * gained + more_gained
    return lost + more_lost * kept, kept * more_kept, tl.where(more_lost <= 0.5, little, most)


@triton.jit
def roughly_then(lost, kept, gained, more_lost, more_kept, more_gained):
    """`then` to a hundred roundings of float64, in half of the operations: within a tile, for narrower results."""
    return lost + more_lost * kept, kept * more_kept, more_kept * gained + more_gained


@triton.jit
def at(start, lane, inner, t, strides):
    """Where the elements of these series at these times are."""
    series = (lane // inner) * strides[0] + (lane % inner) * strides[2]
    return start + (series[None, :] + (t * strides[1])[:, None])


@triton.jit
def read_tile(places, inside, whole, DTYPE: tl.constexpr):
    """A tile's numbers in float64; without a mask where it is whole, so that many bytes go at a time."""
    if whole:
        given = read(places, 0, inside, DTYPE, True)
    else:
        given = read(places, 0, inside, DTYPE, False)
    return given.to(tl.float64)


@triton.jit
def write_tile(places, inside, whole, numbers, DTYPE: tl.constexpr):
    if whole:
        write(places, 0, inside, numbers, DTYPE, True)
    else:
        write(places, 0, inside, numbers, DTYPE, False)


@triton.jit
def last(x, TIME: tl.constexpr):
    """The last row of a tile."""
    return tl.sum(tl.where((tl.arange(0, TIME) == TIME - 1)[:, None], x, 0.0), 0)


class Plan(NamedTuple):
    """How many steps and series a tile has, how many programs stand side by side, and how time is cut."""

    time: int
    width: int
    abreast: int
    segments: int
    length: int


def plan(x: Tensor) -> Plan:
    """For series of shape (outer, n, inner), none of them 0."""
    n, lanes = x.shape[1], x.shape[0] * x.shape[2]
    width = triton.next_power_of_2(lanes)
    if x.stride(1) == 1 or lanes == 1:
        time = min(TILE, triton.next_power_of_2(n))
        width = min(width, TILE // time)
    else:
        time = min(TILE // min(width, LANES), triton.next_power_of_2(n))
        width = min(width, TILE // time)
    abreast = triton.cdiv(lanes, width)
    segments = max(min(PROGRAMS // abreast, n // (SEGMENT * time)), 1)
    length = triton.cdiv(triton.cdiv(n, segments), time) * time
    return Plan(time, width, abreast, triton.cdiv(n, length), length)


def known(x: Tensor, reverse: bool = False) -> tuple[Tensor, tuple[int, ...]]:
    """Where to begin, and how far to go to the next of each dimension, 0 where there is none, which keeps what is read
    at a time aligned. bfloat16 is known by its bits."""
    bits = x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
    outer, step, inner = (0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
    return (bits[:, -1:], (outer, -step, inner)) if reverse else (bits, (outer, step, inner))


def room_for(x: Tensor, plan: Plan, several: int) -> Any:
    """float64 for each series and segment."""
    return x.new_empty((several, x.shape[0], plan.segments, x.shape[2]), dtype=torch.float64)
