"""Two runs of moments become one, as if the values of both had come one after the other."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ewma.arrays import full, module_of, wide
from ewma.profiles import Exponential

if TYPE_CHECKING:
    from ewma.series.moments import Moments


def merge(moments: Moments, later: Moments) -> None:
    """Take in the moments of values that came after these, by the same rule: debiased, of a profile that merges.

    mean = (K w1 m1 + w2 m2) / (K w1 + w2)          K: what survives of the first over the second's time
    """
    if not later.means:
        return
    module = module_of(later.means[0])
    kept: Any = 1.0
    if isinstance(moments.rule.profile, Exponential):
        rate = moments.rule.profile.rate
        seen = later.seen + 0.0 * later.count + full(later.means[0], (1, 1, 1), 0.0)
        nothing = wide(seen == 0.0)
        # An infinite rate keeps nothing; but of nothing that came later, all.
        kept = nothing + (1.0 - nothing) * module.exp(-rate * (seen + nothing))
    if not moments.means:
        moments.means = tuple(0.0 * mean for mean in later.means)
        moments.spreads = {pair: 0.0 * spread for pair, spread in later.spreads.items()}
    mine = kept * moments.weight
    total = mine + later.weight
    nothing = total == 0.0  # of neither is anything left: the newest is all there is
    share = later.weight / (total + nothing) + nothing * (later.count > 0.0)
    steps = [theirs - ours for ours, theirs in zip(moments.means, later.means, strict=True)]
    for pair in moments.wanted:
        rise = later.spreads[pair] - moments.spreads[pair]
        between = math.prod(steps[k] for k in pair)
        moments.spreads[pair] = moments.spreads[pair] + share * (rise + (1.0 - share) * between)
    moments.means = tuple(
        module.where(module.isfinite(step), ours + share * step, (1.0 - share) * ours + share * theirs)
        for ours, step, theirs in zip(moments.means, steps, later.means, strict=True)
    )
    moments.pairs = kept * kept * moments.pairs + later.pairs + 2.0 * mine * later.weight
    moments.weight, moments.count = total, moments.count + later.count
    moments.seen, moments.time = moments.seen + later.seen, moments.time + later.time
