"""Pure array work behind one small interface; which kernel serves, and how to force one.

A kernel is a module with `lerp(values, averages, streams, guard)`: it prepares, once, the update of many averages from
many values, and returns a `Lerp` to be called at every step. Coefficients are floats; or 0-dim float64 tensors where
only the device knows them, and then nothing waits for it. `EWMA_KERNEL=reference` (or `foreach`) forces one.

Nothing is imported before it is needed: what works on NumPy arrays never brings torch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from ewma.arrays import Array

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KERNELS", "Coefficient", "Lerp", "Word", "lerp", "scan"]

KERNELS = ("reference", "foreach")

Coefficient: TypeAlias = "float | Tensor"
Word: TypeAlias = "int | Tensor"


class Lerp(Protocol):
    """One prepared update: `average += c * (value - average)`, element by element, for every tensor it was made for."""

    skipped: Any
    """How many elements were left out so far, being non-finite: an int or a 0-dim tensor."""

    def __call__(self, coefficients: Sequence[Coefficient], words: Sequence[Word | None]) -> None:
        """Update all averages.

        Args:
            coefficients: one for each of the K sets of averages.
            words: for each set None, to round to nearest; or the word that, with the tensor's stream and the element's
                index, gives the random bits of stochastic rounding (see `ewma.kernels.noise`).
        """


def lerp(
    values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool = True
) -> Lerp:
    """Prepare the update of K sets of averages from one list of values.

    Args:
        values: tensors of one floating dtype on one device, of any layout, read at every call.
        averages: K lists, each as long as values: dense float32, float64 or bfloat16 tensors of the values' shapes, all
            of one dtype and on one device, laid out alike in all sets, written at every call.
        streams: an integer for each tensor that tells its random bits from the others'.
        guard: a non-finite element of a value leaves its average alone and is counted. A NaN that is in an average now
            marks an element that has seen nothing finite yet: it takes the first finite value whole.
    """
    for several in zip(*averages, strict=True):
        if len({(average.dtype, average.device, average.stride()) for average in several}) > 1:
            raise ValueError("expected averages of one dtype, device and layout in all sets; got several")
    kernel = importlib.import_module(f"ewma.kernels.{_forced() or 'foreach'}")
    return cast(Lerp, kernel.lerp(values, averages, streams, guard))


def scan(u: Array, lost: float | Array, initial: Array, out: Array, kept: Array | None = None) -> None:
    """One recurrence along time for many series at once: `y[t] = y[t-1] + (u[t] - lost[t] * y[t-1])`.

    With u = c * x and lost = c it is an average; with lost alone a decaying sum, as are weights and gradients.

    Args:
        u: float64 array or tensor of shape (outer, n, inner), time in the middle; used up where lost is a float.
        lost: what each step takes from what was, from 0 to 1: a float where it is constant; or a float64 array of
            three dimensions that broadcasts to u.
        initial: y before the first step, of shape (outer, 1, inner).
        out: float64, of u's shape; written.
        kept: 1 - lost to full precision, of lost's shape, for where next to nothing is left after a step, but counts.
    """
    name = _forced()
    module = "blocked" if name in (None, "foreach") else name
    importlib.import_module(f"ewma.kernels.{module}").scan(u, lost, initial, out, kept)


def _forced() -> str | None:
    """The kernel that the environment asks for, if any."""
    name = os.environ.get("EWMA_KERNEL")
    if name is not None and name not in KERNELS:
        raise ValueError(f"EWMA_KERNEL={name}: no kernel has that name; there are {', '.join(KERNELS)}")
    return name
