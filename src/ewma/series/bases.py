"""What a recurrence is carried relative to, and scaled by, so that no digits are lost on the way."""

from __future__ import annotations

import math

import numpy

from ewma.arrays import Array, is_tensor, may_ask, module_of, wide


def fixed(x: Array) -> Array:
    """x without its gradient."""
    return x.detach() if is_tensor(x) else x


def base_of(x: Array) -> Array:
    """What the recurrence is carried relative to, for each series: its first value, where all are of one size.

    A constant comes to 0 then, and a large offset to what it varies by, without rounding: no value is more than twice
    another. Otherwise the base is 0, since a single spike would take the digits of all the values that follow. To the
    result the base makes no difference, so it has no gradient. (A few values stand for all of them.)
    """
    x, module = fixed(x), module_of(x)
    if x.shape[0] == x.shape[2] == 1 and not is_tensor(x):  # the same, without a dozen array operations
        listed = x[0, :: max(x.shape[1] // 16, 1), 0].tolist()
        low, high = min(listed), max(listed)
        return numpy.full((1, 1, 1), float(listed[0]) if 0.0 < high <= 2.0 * low or 2.0 * high <= low < 0.0 else 0.0)
    few = wide(x[:, :: max(x.shape[1] // 16, 1)])
    low, high = (few.amin(1), few.amax(1)) if is_tensor(x) else (few.min(1), few.max(1))
    alike = ((low > 0.0) & (high <= 2.0 * low)) | ((high < 0.0) & (2.0 * high <= low))
    return module.where(alike, few[:, 0], 0.0 * low)[:, None]


def matters(base: Array) -> bool:
    """Whether a base makes any difference."""
    return not may_ask(base) or bool(base.any())


def unit(arrays: list[Array], squared: bool) -> float:
    """The power of two by which to scale numbers that are too large to be subtracted or squared; usually 1."""
    largest = max((float(abs(x).max()) for x in arrays if math.prod(x.shape)), default=0.0)
    limit = 500 if squared else 960
    if not 2.0**limit < largest < math.inf:
        return 1.0
    return 2.0 ** -math.frexp(largest)[1]
