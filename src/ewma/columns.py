"""Profiles and their weights for many steps at once, as NumPy vectors."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import numpy
from numpy.typing import NDArray

from ewma.profiles import Profile

Vector: TypeAlias = NDArray[numpy.float64]


class Column(numpy.ndarray[Any, Any]):
    """A vector with the methods that a profile's arithmetic asks of what is not a float: those that tensors have."""

    def exp(self) -> Any:
        return numpy.exp(self)

    def expm1(self) -> Any:
        return numpy.expm1(self)

    def log1p(self) -> Any:
        return numpy.log1p(self)

    def cos(self) -> Any:
        return numpy.cos(self)

    def double(self) -> Any:
        return self.astype(numpy.float64)

    def where(self, condition: Any, other: Any) -> Column:
        return numpy.where(condition, self, other).view(Column)


def ones(n: int) -> Vector:
    return numpy.ones(n)


def change(profile: Profile, time: float, elapsed: Vector) -> tuple[Vector, ...]:
    """`Profile.change` of many steps: (keep, 1 - keep, gain), each a vector.

    Args:
        time: what had passed before the first step.
        elapsed: what passes before each.
    """
    passed = elapsed.view(Column)
    with numpy.errstate(all="ignore"):
        terms = profile.change(time + passed.cumsum(), passed)
    # Where no time passes nothing is lost; an infinite rate would say NaN.
    return tuple(
        numpy.where(elapsed > 0.0, term, nothing).view(numpy.ndarray)
        for term, nothing in zip(terms, (1.0, 0.0, 0.0), strict=True)
    )


@functools.lru_cache(maxsize=8)
def steps(n: int) -> Vector:
    """1 to n, of shape (1, n, 1)."""
    return numpy.arange(1.0, n + 1)[None, :, None]


@functools.lru_cache(maxsize=8)
def ramp(lost: float, n: int) -> tuple[Vector, Vector]:
    """The sum of `(1 - lost) ** k` over k < t, and `(1 - lost) ** t`, for t = 1 .. n, of shape (1, n, 1)."""
    if lost == 0.0:
        return steps(n), numpy.ones((1, n, 1))
    if lost >= 1.0:
        return numpy.ones((1, n, 1)), numpy.zeros((1, n, 1))
    rise = -numpy.expm1(steps(n) * math.log1p(-lost)) / lost
    return rise, powers(lost, n)[None, 1:, None]


@functools.lru_cache(maxsize=64)
def settled(lost: float) -> float:
    """After how many steps a debiased weight does not change any more: what is left of the past is below 2 ** -54."""
    return math.inf if lost == 0.0 else 1 if lost >= 1.0 else math.ceil(54.0 * math.log(2.0) / -math.log1p(-lost))


@functools.lru_cache(maxsize=8)
def shares(lost: float, n: int) -> Vector:
    """What each of the first n values is of all so far, where all came with the same gain: of shape (1, n, 1)."""
    share: Vector = 1.0 / ramp(lost, n)[0]
    share.flags.writeable = False
    return share


@functools.lru_cache(maxsize=64)
def powers(lost: float, n: int) -> Vector:
    """`(1 - lost) ** k` for k = 0 .. n, right to the last bits however small `lost` is."""
    if lost >= 1.0:
        return numpy.array([1.0] + [0.0] * n)
    kept: Vector = numpy.exp(numpy.arange(n + 1.0) * math.log1p(-lost))
    kept[kept < 1e-290] = 0.0  # arithmetic on subnormal numbers is many times slower
    return kept
