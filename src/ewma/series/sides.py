"""Looking ahead as well as back: a mean without lag, for finished series."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import numpy

from ewma.arrays import empty, module_of, needs_gradient, wide
from ewma.series import outs
from ewma.series.moments import Moments
from ewma.series.sweep import Course, quietly, raise_for_missing
from ewma.series.values import Series


def both_sides(course: Course, series: Series, out: Any) -> Any:
    """The mean of the values on both sides of each, weighted by their distance, the value itself counted once.

    (before * weight before + after * weight after - x) / (weight before + weight after - 1)
    """
    rule, start, elapsed, needed = course
    if start is not None or not rule.debias:
        raise ValueError("two_sided weighs by distance alone: leave out debias=False and initial=")
    outer, n, inner = series.shape
    x = wide(series.array.reshape(outer, n, inner))
    learns = needs_gradient(x, rule.alpha)
    if learns:
        outs.refuse(out)
    if rule.missing == "raise":
        raise_for_missing(x)
    target = empty(series.array, series.floating) if out is None else outs.check(series, out)
    if not math.prod(x.shape):
        return series.pack(series.array.to(series.floating) if learns else target)
    module = module_of(x)
    rule = replace(rule, weigh="value")
    back = None if elapsed is None else numpy.concatenate(([1.0], elapsed[:0:-1]))
    with contextlib.nullcontext() if learns else quietly(x):
        ahead = Moments(rule).advance((x,), elapsed)
        behind = Moments(rule.reversed()).advance((module.flip(x, (1,)),), back)
        mean, weight, count = (module.flip(part, (1,)) for part in (behind.means[0], behind.total, behind.count))
        finite = module.isfinite(x)
        own, middle = wide(finite), module.where(ahead.count > 0, ahead.means[0], mean)
        # Written as a change of what lies before, a constant stays exactly what it is.
        change = (mean - middle) * weight - own * (module.where(finite, x, 0.0) - middle)
        total = ahead.total + weight - own
        result = middle + change / module.where(total > 0.0, total, 1.0)
        result = module.where(ahead.count + count - own >= needed, result, math.nan)
        if learns:
            return series.pack(result.reshape(series.array.shape).to(series.floating))
        target.reshape(outer, n, inner)[...] = result
        return outs.give(series, target, out)
