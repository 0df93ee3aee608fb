"""Job 1: the running mean of a series, one value at a time.

Plain floats and NumPy arrays are averaged without torch being imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ewma import files, profiles
from ewma.cells import CELLS, Cell, kind_of
from ewma.profiles import Profile
from ewma.recurrence import Recurrence, Weigh, check_elapsed, weighing


class EMA:
    """Running mean of floats, NumPy arrays, torch tensors, or dicts of these, debiased from the first value on.

        weight' = keep * weight + gain          keep = decay ** elapsed, gain = 1
        mean'   = mean + (gain / weight') * (x - mean)

    Args:
        profile: how the past is weighted, where it is not exponential: `Power(sigma_rel=.1)`, `Uniform()`.
        half_life, decay, alpha, span, com: instead, exactly one by keyword; see `Exponential`.
        debias: True is the true weighted mean of what was seen (pandas' adjust=True), False starts at the first value.
        weigh: "value": each value counts once, whatever time it stands for (pandas; the default where the profile has
            it); "time": a value counts for what elapsed. With equal steps both give the same mean.

    All arithmetic is in float64; `get` gives the first value's type, shape and dtype back (integers give float64,
    NumPy's scalars Python's float). NaN and infinite elements are left out and counted in `skipped`. Nothing waits for
    the device.

    Beside it: `ewma.nn.EMA` is the form inside a network, ModelEMA the one for weights. An often copied class starts at
    0 and divides by `1 - alpha ** count`; right is `1 - (1 - alpha) ** count`, the weight that has been seen.

    >>> ema = EMA(alpha=0.5)
    >>> for x in (1.0, 2.0, 3.0):
    ...     ema.update(x)
    >>> round(ema.get(), 4), ema.count
    (2.4286, 3)
    """

    def __init__(
        self,
        profile: Profile | None = None,
        *,
        half_life: float | None = None,
        decay: float | None = None,
        alpha: float | None = None,
        span: float | None = None,
        com: float | None = None,
        debias: bool = True,
        weigh: Weigh | None = None,
    ) -> None:
        knobs = {"half_life": half_life, "decay": decay, "alpha": alpha, "span": span, "com": com}
        self.profile = profiles.resolve("EMA(", profile, debias, **knobs)
        self.weigh: Weigh = weighing(self.profile, weigh)
        self.reset()

    def __repr__(self) -> str:
        return f"EMA({self.profile!r}, weigh={self.weigh!r}, count={self.count})"

    def reset(self) -> None:
        """Forget everything: the next update is the first."""
        self.count = 0
        self._named: bool | None = None
        self._cells: dict[str, Cell] = {}

    @property
    def skipped(self) -> int:
        """How many elements were left out so far, being NaN or infinite. Waits for the device."""
        return sum(int(cell.skipped) for cell in self._cells.values())

    def update(self, x: Any, elapsed: float = 1.0) -> None:
        """Take in one observation.

        Args:
            x: a number, an array or a tensor of any shape, or a dict of these by name; always of one kind and
                shape. A name that is missing from a dict keeps its average.
            elapsed: what has passed since the last update, in the half-life's unit.

        The value is read, never kept: changing x in place afterwards changes nothing here.
        """
        elapsed = check_elapsed(elapsed)
        named = isinstance(x, Mapping)
        if self._named is not None and self._named != named:
            raise TypeError(
                f"EMA.update: expected {'a dict' if self._named else 'a single value'}, as at the first update; got "
                f"{type(x).__name__}. Use one EMA for each, or call ema.reset()."
            )
        values = x if named else {"": x}
        checked = {name: self._cell(name, value) for name, value in values.items()}
        for name, cell in checked.items():
            cell.update(values[name], elapsed)
        self._cells.update(checked)
        self._named = named
        self.count += 1

    def get(self) -> Any:
        """The mean of all that was seen: a new value, which no later update changes. NaN where all was skipped."""
        if self._named is None:
            raise RuntimeError("EMA.get: there is no average before the first update; call ema.update(x) first")
        means = {name: cell.get() for name, cell in self._cells.items()}
        return means if self._named else means[""]

    def merge(self, later: EMA) -> None:
        """Take in another EMA, of values that came after those seen here: then it is as if all had come here.

            mean = (K w1 m1 + w2 m2) / (K w1 + w2)          K: what survives of the first over the second's time

        For Exponential and Uniform profiles, debiased; otherwise an error, since K would not be known.
        """
        if not isinstance(later, EMA):
            raise TypeError(
                f"merge takes another EMA; got {type(later).__name__}. One value is taken in by ema.update(x)."
            )
        if (self.profile, self.weigh) != (later.profile, later.weigh):
            raise ValueError(f"cannot merge {later!r} into {self!r}: make both with the same profile and weigh=")
        if self._named not in (None, later._named) and later._named is not None:
            raise TypeError(f"cannot merge {later!r} into {self!r}: one averages a dict, the other a single value")
        Recurrence(later.profile, later.weigh).kept()  # an error for profiles that cannot be merged
        merged = {name: self._cell(name, cell.get(), "EMA.merge") for name, cell in later._cells.items()}
        for name, cell in merged.items():
            cell.merge(later._cells[name])
        self._cells.update(merged)
        self._named = later._named if self._named is None else self._named
        self.count += later.count

    def state_dict(self) -> dict[str, Any]:
        """All there is to save: tensors, numbers and strings only. NumPy arrays become lists of floats."""
        return {
            "format": files.FORMAT,
            "kind": "EMA",
            "profile": self.profile.to_json(),
            "weigh": self.weigh,
            "count": self.count,
            "named": self._named,
            "cells": {name: cell.state() for name, cell in self._cells.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` gave, bit for bit."""
        files.check_format("EMA.load_state_dict", state, "EMA")
        saved = profiles.from_json(state["profile"])
        if (saved, state["weigh"]) != (self.profile, self.weigh):
            raise ValueError(
                f"the state was saved with {saved!r} by {state['weigh']}, but this EMA has {self.profile!r} by "
                f"{self.weigh}. Make it with the saved ones to go on."
            )
        cells = {name: CELLS[part["kind"]](self.profile, self.weigh) for name, part in state["cells"].items()}
        for name, cell in cells.items():
            cell.load(state["cells"][name])
        self._cells, self._named, self.count = cells, state["named"], state["count"]

    def _cell(self, name: str, x: Any, call: str = "EMA.update") -> Cell:
        """The cell that averages x, checked to fit; new where there is none yet."""
        if not isinstance(name, str):
            raise TypeError(f"{call}: a dict's names must be strings; got {name!r}")
        where = f"{call}, {name!r}" if name else call
        cell = self._cells.get(name)
        kind = CELLS[kind_of(where, x)]
        if cell is None:
            cell = kind(self.profile, self.weigh)
        elif type(cell) is not kind:
            raise TypeError(
                f"{where}: expected a {cell.kind} value, as at the first update; got {type(x).__name__}. Use one EMA "
                f"for each, or call ema.reset()."
            )
        cell.check(where, x)
        return cell
