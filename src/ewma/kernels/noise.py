"""Random bits that are a pure function of (seed, count, tensor, element), the same in every kernel.

    bits(element) = mix(element * GOLDEN + word(seed, count) + stream(tensor))      modulo 2**32

With them a float64 is rounded stochastically: up or down by chance, so that the expectation is exact and steps far
smaller than the target's spacing still arrive, on average. Nothing needs to be saved but seed and count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
GOLDEN = 0x9E3779B9
FIRST, SECOND = 0x7FEB352D, 0x846CA68B

DROPPED = {torch.float32: 29, torch.bfloat16: 45, torch.float16: 42}
"""How many of float64's 52 mantissa bits each dtype has no room for."""

SUBNORMAL = {torch.float16: 2.0**-14}
"""Below what a dtype's numbers are subnormal, where that is not too small to matter."""


def mix(x: Any) -> Any:
    """A 32-bit integer spread over all 32 bits: multiply and xor-shift, two rounds. Integers or int64 tensors.

    The constants are Chris Wellons' (lowbias32), found by search for the lowest bias.
    """
    x = ((x ^ (x >> 16)) * FIRST) & MASK
    x = ((x ^ (x >> 15)) * SECOND) & MASK
    return x ^ (x >> 16)


def word(seed: int, count: Any) -> Any:
    """What seed and update count contribute to the bits. `count` may be a float tensor that only the device knows."""
    count = count.to(torch.int64) if isinstance(count, Tensor) else int(count)
    return mix((mix(seed & MASK) + count) & MASK)


def bits(elements: Tensor, word: Any, stream: int) -> Tensor:
    """32 random bits for each element index, as int64."""
    shifted: Tensor = mix((elements * GOLDEN + (word + stream)) & MASK)
    return shifted


def round_stochastically(exact: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """float64 to `dtype`, up or down with the probability that keeps the expectation exact.

    The random bits are added below the last bit that `dtype` keeps, and what is below is cut off. What is beyond the
    largest number is rounded to nearest, so that nothing becomes infinite by chance; and so are subnormal float32 and
    bfloat16, below 1e-38.
    """
    dropped = DROPPED[dtype]
    noise = bits >> (32 - dropped) if dropped < 32 else bits << (dropped - 32)
    lift = lift_of(exact, dtype)
    cut = (((exact + lift).view(torch.int64) + noise >> dropped) << dropped).view(torch.float64)
    rounded = torch.copysign(cut - lift, exact)
    return torch.where(exact.abs() <= torch.finfo(dtype).max, rounded, exact).to(dtype)


def lift_of(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What brings subnormal numbers to among the smallest normal ones, which have the same spacing; else 0."""
    smallest = SUBNORMAL.get(dtype, 0.0)
    return torch.where(exact.abs() < smallest, smallest, 0.0).copysign(exact)


def fits(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Which elements are finite as numbers of `dtype`, rounded to nearest."""
    return torch.isfinite(value.to(dtype))
