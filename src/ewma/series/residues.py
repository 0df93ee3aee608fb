"""What rounding leaves out of a running mean, for second moments of values that a large mean hides.

A value 1 away from a mean of 1e8 is known to eight digits only, once the mean is rounded to a float. The rounding of
every step can be told exactly, and sums up by the same recurrence as the mean itself.
"""

from __future__ import annotations

from collections.abc import Callable

from ewma.arrays import Array, before, may_ask, wide

HIDDEN = 1e3
SAMPLES = 64
"""From how many times its distance on a mean hides a value; and how many values stand for all."""


def hides(distance: Array, mean: Array) -> bool:
    """Whether in any of the series a quarter of the values lie too near to a large mean. Waits for no device."""
    if not may_ask(mean):
        return False
    few = slice(None, None, max(mean.shape[1] // SAMPLES, 1))
    hidden = wide(HIDDEN * abs(distance[:, few]) < abs(mean[:, few]))
    return bool((hidden.mean(1) > 0.25).any())


def left_out(
    x: Array, mean: Array, start: Array, share: float | Array, scan: Callable[[Array, float | Array, float], Array]
) -> Array:
    """What has to be added to `mean` to be the mean in twice as many digits; of shape (outer, n, inner) as all are.

    Args:
        x: the values, 0 where their share is.
        mean: the running mean as it was computed, from `start`.
        share: the coefficients, `mean[t] = mean[t-1] + share[t] * (x[t] - mean[t-1])`.
        scan: the recurrence along time.
    """
    ahead = before(mean, start)
    distance, rest = _sum(x, -ahead)
    step, rest_of_step = _product(distance, share)
    right, rest_of_right = _sum(ahead, step)
    missed = ((right - mean) + rest_of_right) + (rest_of_step + share * rest)
    return scan(missed, share, 0.0)


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b as a float, and exactly what that left out (Knuth)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _product(a: Array, b: float | Array) -> tuple[Array, Array]:
    """a * b as a float, and exactly what that left out (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(x: float | Array) -> tuple[float | Array, float | Array]:
    """x as two numbers of at most 26 bits each."""
    scaled = 134217729.0 * x  # 2 ** 27 + 1
    high = scaled - (scaled - x)
    return high, x - high
