"""What is made of second moments: deviations, correlations, and how far values lie from a mean."""

from __future__ import annotations

import math
from typing import Any

from ewma.arrays import Array, module_of


def debiased(biased: Array, total: Any, pairs: Any) -> Array:
    """`biased * total ** 2 / pairs`; NaN where the pairs have no weight."""
    if isinstance(pairs, float):
        return biased * (total * total / pairs if pairs > 0.0 else math.nan)
    module, some = module_of(biased), pairs > 0.0
    return module.where(some, biased * (total * total / module.where(some, pairs, 1.0)), math.nan)


def root(x: Array) -> Array:
    """The square root, with a gradient of 0 at 0."""
    module, some = module_of(x), x > 0.0
    return module.where(some, module.where(some, x, 1.0) ** 0.5, 0.0 * x)


def correlated(spreads: dict[tuple[int, int], Array]) -> Array:
    """The correlation of two series; NaN where one of them is constant."""
    product = root(spreads[0, 0]) * root(spreads[1, 1])
    module, vary = module_of(product), product > 0.0
    return module.where(vary, spreads[0, 1] / module.where(vary, product, 1.0), math.nan)


def standardized(x: Array, mean: Array, variance: Array, pairs: Array) -> Array:
    """How far values lie from a mean, in standard deviations; NaN where missing, and until two were seen before."""
    module = module_of(x)
    several = (pairs > 0.0) & module.isfinite(x)
    return module.where(several, (x - mean) / root(module.where(several, variance, 1.0)), math.nan)
