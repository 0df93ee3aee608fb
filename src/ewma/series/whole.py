"""Whole series whose steps are all alike: a mean or a spread in one compiled pass. On the CPU all values are finite.

What cannot be done so, the caller does chunk by chunk (moments.py). Series begin with nothing; or, by a rule that is
not debiased, at a given mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy

from ewma import columns, kernels
from ewma.arrays import Array, empty
from ewma.series.weighting import LEAST_KEPT, Rule, Terms

LEAST = 1 << 12
MOST = 1 << 17
"""How many steps at a time at least and at most, while the weights still change from step to step."""


class Stretch(NamedTuple):
    """Steps that lose the same; and what each value is of all so far, if it differs as a NumPy array."""

    part: slice
    lost: float
    share: Any


def mean(rule: Rule, start: Array | None, x: Array, out: Array, untouched: bool, needed: int = 1) -> bool:
    """Write the running mean. Where this cannot be, False, and what was written has no meaning.

    Args:
        start: of shape (outer, 1, inner); or None.
        x: of shape (outer, n, inner), of real numbers, time in the middle.
        out: of the same shape, sharing no memory with x.
        untouched: whether out is new memory.
        needed: how many values must have been observed. (Where all are finite, the caller sees to that.)
    """
    kernel, terms = kernels.compiled(), rule.unit
    if terms is None or not x.shape[1]:
        return False
    given = x, out, start, _held(rule, terms), terms.lost, rule.debias
    made: bool | None = None if kernel is None else kernel.mean(*given, untouched)
    if made is None and rule.missing != "decay" and (kernel := kernels.on_device(x, out, start)):
        made = kernel.tells(needed, terms.lost)
        if made:
            kernel.mean(*given, skips=rule.missing != "propagate", needed=needed)
    return bool(made)


def spread(
    rule: Rule, start: Array | None, x: Array, outs: Sequence[Array], kind: int, k: float, unbiased: bool
) -> bool:
    """Write the running variances, deviations or bands, as `mean` does the mean.

    Args:
        kind, k: see `ewma.kernels.compiled_scan.spread`.
    """
    kernel, terms = kernels.compiled(), rule.unit
    if kernel is None or terms is None or not (x.shape[1] and terms.keep >= LEAST_KEPT):
        return False
    return bool(kernel.spread(x, outs, start, _held(rule, terms), terms, rule.debias, kind, k, unbiased))


def remembering(rule: Rule, start: Array | None, x: Any) -> Any:
    """The mean as a new tensor that autograd can go back through to x; None where this cannot be."""
    terms = rule.unit
    if terms is None or not (rule.debias or start is not None):  # else the first value weighs more than its step says
        return None
    from ewma.kernels import differentiable

    if kernel := kernels.on_device(x, start):
        about = _held(rule, terms), terms.lost, rule.debias
        made = kernel.remembering(x, start, *about)
        return None if made is None else differentiable.remembering(x, made, partial(kernel.linear, *about))
    if kernels.compiled() is None or not mean(rule, start, x, out := empty(x, x.dtype), untouched=True):
        return None
    return differentiable.remembering(x, out, partial(differentiable.linear, list(_cut(rule, terms, x.shape[1]))))


def _held(rule: Rule, terms: Terms) -> Any:
    """What the mean that a series begins with weighs, in steps."""
    return 0.0 if rule.debias else 1.0 / terms.gain


def _cut(rule: Rule, terms: Terms, n: int) -> Iterator[Stretch]:
    """The series, cut where what a value is of all so far no longer changes."""
    weight, begin, settled = 0.0 if rule.debias else 1.0, 0, max(columns.settled(terms.lost), LEAST)
    while begin < n:
        steps = int(min(n - begin, MOST, settled - begin)) if begin < settled else n - begin
        share, weight = rule.shares(terms, steps, weight, numpy.zeros(1))
        yield Stretch(slice(begin, begin + steps), terms.lost, share)
        begin += steps
