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

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KERNELS", "Coefficient", "Lerp", "Word", "lerp"]

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
    name = os.environ.get("EWMA_KERNEL", "foreach")
    if name not in KERNELS:
        raise ValueError(f"EWMA_KERNEL={name}: no kernel has that name; there are {', '.join(KERNELS)}")
    return cast(Lerp, importlib.import_module(f"ewma.kernels.{name}").lerp(values, averages, streams, guard))
