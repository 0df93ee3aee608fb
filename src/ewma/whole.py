"""Whole series whose steps are all alike, and whose values all finite: a mean or a spread in one compiled pass.

What cannot be done so, the caller does chunk by chunk (moments.py). The moments from which a series begins stay as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy

from ewma import columns, kernels, passes
from ewma.arrays import Array, empty
from ewma.moments import Moments
from ewma.weighting import Terms

LEAST = 1 << 12
MOST = 1 << 17
"""How many steps at a time at least and at most, while the weights still change from step to step."""


class Stretch(NamedTuple):
    """Steps that lose the same; and what each value is of all so far, if it differs as a NumPy array."""

    part: slice
    lost: float
    share: Any


def mean(moments: Moments, x: Array, out: Array) -> bool:
    """Write the running mean. Where this cannot be, False, and what was written has no meaning.

    Args:
        x: of shape (outer, n, inner), of real numbers, time in the middle.
        out: of the same shape, sharing no memory with x.
    """
    terms = _equal_terms(moments, x)
    if terms is None:
        return False
    start = moments.means[0] if moments.means else None
    return bool(passes.mean(x, out, start, moments.held(terms), terms.lost, moments.rule.debias))


def spread(moments: Moments, x: Array, outs: Sequence[Array], kind: int, k: float, unbiased: bool) -> bool:
    """Write the running variances, deviations or bands, as `mean` does the mean.

    Args:
        kind, k: see `ewma.kernels.compiled_scan.spread`.
    """
    kernel, terms = kernels.compiled(), _equal_terms(moments, x)
    fresh = moments.weight == 0.0 or not moments.rule.debias
    if kernel is None or terms is None or not (fresh and terms.keep > 0.0):
        return False
    start = kernel.lend(moments.means[0]) if moments.means else None
    start = None if start is None else numpy.ascontiguousarray(start)
    return bool(kernel.spread(x, outs, start, moments.held(terms), terms, moments.rule.debias, kind, k, unbiased))


def remembering(moments: Moments, x: Any) -> Any:
    """The mean as a new tensor that autograd can go back through to x; None where this cannot be."""
    if kernels.compiled() is None or (terms := _equal_terms(moments, x)) is None:
        return None
    if not moments.rule.debias and moments.weight == 0.0:  # the first value weighs more than its step says
        return None
    out = empty(x, x.dtype)
    if not mean(moments, x, out):
        return None
    from ewma.kernels import differentiable

    return differentiable.remembering(x, out, list(_cut(moments, terms, x.shape[1])))


def _equal_terms(moments: Moments, x: Array) -> Terms | None:
    """The terms of the series' steps, where they are alike; else None."""
    weight, rule = moments.weight, moments.rule
    if not (x.shape[1] and isinstance(weight, float) and (rule.debias or weight in (0.0, 1.0))):
        return None
    terms = rule.terms(x, moments.time, None, 0, x.shape[1])
    return terms if terms.constant else None


def _cut(moments: Moments, terms: Terms, n: int) -> Iterator[Stretch]:
    """The series, cut where what a value is of all so far no longer changes."""
    weight, begin, settled = moments.weight, 0, max(columns.settled(terms.lost), LEAST)
    while begin < n:
        steps = int(min(n - begin, MOST, settled - begin)) if begin < settled else n - begin
        share, weight = moments.rule.shares(terms, steps, weight, numpy.zeros(1))
        yield Stretch(slice(begin, begin + steps), terms.lost, share)
        begin += steps
