"""What averages one series as it comes: plain floats, NumPy arrays or torch tensors, value by value or chunk by chunk.

Nothing but what the value itself needs is imported: floats need no array library, NumPy arrays no torch.
"""

from __future__ import annotations

from numbers import Real
from typing import Any, TypeAlias

from ewma.series.cells.arrays import JOINT, VARIANCE, Arrays
from ewma.series.cells.number import Number
from ewma.series.cells.terms import Terms, own_initial

__all__ = ["JOINT", "Arrays", "Cell", "Number", "Terms", "kind_of", "new_cell", "own_initial"]

Cell: TypeAlias = Number | Arrays


def new_cell(kind: str, terms: Terms) -> Cell:
    return Number(terms) if kind == "number" else Arrays(terms, kind, VARIANCE)


def kind_of(where: str, x: Any) -> str:
    if isinstance(x, Real):
        return "number"
    if hasattr(x, "detach"):
        if not x.is_complex():
            return "torch"
    elif hasattr(x, "to_numpy"):
        raise TypeError(
            f"{where}: expected a real number, a NumPy array or a torch tensor, or a dict of these; got "
            f"{type(x).__module__.partition('.')[0]}'s {type(x).__name__}. As one value it is x.to_numpy(); values "
            f"along time are taken in by ema.extend(x)."
        )
    elif hasattr(x, "__array__") and getattr(getattr(x, "dtype", None), "kind", "O") in "fiub":
        return "numpy" if hasattr(x, "__setitem__") else "number"  # NumPy's scalars, of which not all are Real
    raise TypeError(
        f"{where}: expected a real number, a NumPy array or a torch tensor, or a dict of these; got {type(x).__name__}"
        f"{'' if not hasattr(x, 'dtype') else f' of {x.dtype}'}. A list becomes an array with numpy.asarray(x), values "
        f"along time are taken in by ema.extend(x), and what is missing (None) is left out of a dict."
    )
