"""What all series of one EMA have in common, and where they start."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

from ewma.arrays import Array, is_real, is_tensor, may_ask, module_of
from ewma.series.weighting import Rule


class Terms(NamedTuple):
    """What all series of one EMA have in common: how they are weighted, how many values a result needs, the start."""

    rule: Rule
    needed: int
    initial: Any

    def start(self, where: str, shape: tuple[int, ...]) -> Any:
        """The mean to start from, for values of a shape; None where there is none."""
        own = tuple(getattr(self.initial, "shape", ()))
        fits = len(own) <= len(shape) and all(
            size in (1, full) for size, full in zip(own[::-1], shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"{where}: expected initial of a shape that broadcasts to the values', {list(shape)}; got {list(own)}"
            )
        return self.initial


def own_initial(initial: Any) -> Any:
    """What was given as `initial`, checked, in memory of its own: a float, an array or a tensor."""
    if isinstance(initial, Real):
        own: Any = float(initial)
    elif is_tensor(initial):
        own = initial.detach().clone()
    elif isinstance(initial, list) or hasattr(initial, "__array__"):
        own = _array_of(initial)
    else:
        raise TypeError(f"initial must be a number, or an array of numbers; got {initial!r}")
    if not (isinstance(own, float) or is_real(own)):
        raise TypeError(f"initial must be a number, or an array of numbers; got {initial!r}")
    finite = math.isfinite(own) if isinstance(own, float) else not may_ask(own) or module_of(own).isfinite(own).all()
    if not finite:
        raise ValueError(f"expected initial to be finite; got {initial}")
    return own


def _array_of(initial: Any) -> Any:
    import numpy

    return numpy.array(initial)


def raise_for_missing(where: str, x: Array) -> None:
    if not bool(module_of(x).isfinite(x).all()):
        raise ValueError(f'{where}: expected finite values only, by nan="raise"; got some that are not')
