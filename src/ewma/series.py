"""Job 1: the running mean of a series, one value at a time.

Plain floats and NumPy arrays are averaged without torch being imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeAlias

from ewma import files, profiles
from ewma.profiles import Exponential, Profile, carry
from ewma.recurrence import Recurrence, Weigh, check_elapsed, toward, weighing

Array: TypeAlias = Any  # a NumPy array or a torch tensor


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
        self._cells: dict[str, _Number | _Array] = {}

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
        cells = {name: self._kind(part["kind"])(self.profile, self.weigh) for name, part in state["cells"].items()}
        for name, cell in cells.items():
            cell.load(state["cells"][name])
        self._cells, self._named, self.count = cells, state["named"], state["count"]

    def _cell(self, name: str, x: Any, call: str = "EMA.update") -> _Number | _Array:
        """The cell that averages x, checked to fit; new where there is none yet."""
        if not isinstance(name, str):
            raise TypeError(f"{call}: a dict's names must be strings; got {name!r}")
        where = f"{call}, {name!r}" if name else call
        cell = self._cells.get(name)
        kind = self._kind(_kind_of(where, x))
        if cell is None:
            cell = kind(self.profile, self.weigh)
        elif type(cell) is not kind:
            raise TypeError(
                f"{where}: expected a {cell.kind} value, as at the first update; got {type(x).__name__}. Use one EMA "
                f"for each, or call ema.reset()."
            )
        cell.check(where, x)
        return cell

    @staticmethod
    def _kind(kind: str) -> type[_Number | _Array]:
        kinds: dict[str, type[_Number | _Array]] = {"number": _Number, "numpy": _NumpyArray, "torch": _TorchArray}
        return kinds[kind]


def _kind_of(where: str, x: Any) -> str:
    if isinstance(x, Real):
        return "number"
    if hasattr(x, "detach"):
        if not x.is_complex():
            return "torch"
    elif hasattr(x, "__array__") and x.dtype.kind in "fiub":
        return "numpy" if hasattr(x, "__setitem__") else "number"  # NumPy's scalars, of which not all are Real
    raise TypeError(
        f"{where}: expected a real number, a NumPy array or a torch tensor, or a dict of these; got {type(x).__name__}"
        f"{'' if not hasattr(x, 'dtype') else f' of {x.dtype}'}. A list becomes an array "
        f"with numpy.asarray(x); what is missing (None) is left out of a dict."
    )


class _Number:
    """The running mean of plain floats."""

    kind = "number"

    def __init__(self, profile: Profile, weigh: Weigh) -> None:
        self.recurrence = Recurrence(profile, weigh)
        self.mean = 0.0
        self.skipped = 0

    def check(self, where: str, x: Any) -> None:
        try:
            float(x)
        except OverflowError as error:
            raise ValueError(f"{where}: expected a number that a float can hold; got one too large") from error

    def update(self, x: float, elapsed: float) -> None:
        x = float(x)
        if math.isfinite(x):
            self.mean = toward(self.mean, x, self.recurrence.advance(elapsed))
        else:
            self.recurrence.miss(elapsed)
            self.skipped += 1

    def get(self) -> float:
        return self.mean if self.recurrence.count else math.nan

    def merge(self, later: Any) -> None:
        self.mean = toward(self.mean, later.mean, self.recurrence.merge(later.recurrence))
        self.skipped += later.skipped

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "mean": self.mean, "skipped": self.skipped, **self.recurrence.numbers()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.mean, self.skipped = state["mean"], state["skipped"]
        self.recurrence.load(dict(state))


class _Array:
    """The running mean of arrays: mean and weight for each element, since each may miss other values.

    Written once for NumPy and torch, whose `where` and `isfinite` agree.
    """

    kind: str

    def __init__(self, profile: Profile, weigh: Weigh) -> None:
        self.recurrence = Recurrence(profile, weigh)
        self.dtype: Any = None
        self.mean: Array = None
        self.weight: Array = None
        self.seen: Array = None  # what elapsed over the values that were not skipped: what merging needs
        self.skipped: Any = 0

    @property
    def module(self) -> Any:
        """numpy or torch."""
        raise NotImplementedError

    def wide(self, x: Array) -> Array:
        """x in float64 and without gradient."""
        raise NotImplementedError

    def narrow(self, x: Array) -> Array:
        """x in the dtype of the first value, in memory of its own."""
        raise NotImplementedError

    def begin(self, x: Array) -> None:
        self.mean, self.weight, self.seen = (self.module.zeros_like(self.wide(x)) for _ in range(3))
        self.dtype = x.dtype

    def check(self, where: str, x: Array) -> None:
        if self.mean is None:
            return
        if tuple(x.shape) != tuple(self.mean.shape):
            raise ValueError(
                f"{where}: expected shape {list(self.mean.shape)}, as at the first update; got {list(x.shape)}. Use "
                f"one EMA for each shape, or call ema.reset()."
            )

    def update(self, x: Array, elapsed: float) -> None:
        if self.mean is None:
            self.begin(x)
        recurrence, where = self.recurrence, self.module.where
        recurrence.time += elapsed
        keep, lost, gain = recurrence.terms(recurrence.time, elapsed)
        x = self.wide(x)
        finite = self.module.isfinite(x)
        counted = self.wide(finite)  # 1 or 0: a bool times a float would be a float32
        if not recurrence.profile.debias:
            gain = gain + self.wide(self.seen == 0) * (1.0 - gain)
        self.weight = where(finite, carry(self.weight, keep, lost, gain), self.weight)
        self.seen = self.seen + counted * elapsed
        self.mean = self._toward(where(finite, x, self.mean), counted * self._share(gain))
        self.skipped = self.skipped + (~finite).sum()

    def get(self) -> Array:
        return self.narrow(self.module.where(self.seen == 0, math.nan, self.mean))

    def merge(self, later: Any) -> None:
        if self.mean is None:
            self.begin(later.get())
        profile, seen = self.recurrence.profile, later.seen + self.wide(later.seen == 0)
        kept = self.module.exp(-profile.rate * seen) if isinstance(profile, Exponential) else 1.0
        kept = self.module.where(later.seen == 0, self.wide(later.seen == 0), kept)  # 1, of nothing that came later
        self.weight = kept * self.weight + later.weight
        self.mean = self._toward(later.mean, self.wide(later.seen > 0) * self._share(later.weight))
        self.recurrence.time += later.recurrence.time
        self.seen = self.seen + later.seen
        self.skipped = self.skipped + later.skipped

    def state(self) -> dict[str, Any]:
        raise NotImplementedError

    def load(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _share(self, gain: Array) -> Array:
        """`gain / weight`; all of it where nothing has had weight so far."""
        nothing = self.wide(self.weight == 0)
        return nothing + gain / (self.weight + nothing)

    def _toward(self, x: Array, coefficient: Array) -> Array:
        difference = x - self.mean
        moved = self.mean + coefficient * difference
        return self.module.where(
            self.module.isfinite(difference), moved, (1.0 - coefficient) * self.mean + coefficient * x
        )


class _NumpyArray(_Array):
    kind = "numpy"

    @property
    def module(self) -> Any:
        import numpy

        return numpy

    def wide(self, x: Array) -> Array:
        return self.module.asarray(x, dtype=self.module.float64)

    def narrow(self, x: Array) -> Array:
        return self.module.array(x, dtype=self.dtype if self.dtype.kind == "f" else self.module.float64)

    def update(self, x: Array, elapsed: float) -> None:
        with self.module.errstate(all="ignore"):  # what overflows on the way is computed otherwise, or left out
            super().update(x, elapsed)

    def merge(self, later: Any) -> None:
        with self.module.errstate(all="ignore"):
            super().merge(later)

    def state(self) -> dict[str, Any]:
        lists = {name: getattr(self, name).ravel().tolist() for name in ("mean", "weight", "seen")}
        about = {
            "kind": self.kind,
            "dtype": self.dtype.str,
            "shape": list(self.mean.shape),
            "skipped": int(self.skipped),
        }
        return {**about, **lists, "time": self.recurrence.time}

    def load(self, state: Mapping[str, Any]) -> None:
        self.dtype, self.skipped = self.module.dtype(state["dtype"]), state["skipped"]
        self.recurrence.time = state["time"]
        for name in ("mean", "weight", "seen"):
            setattr(self, name, self.module.array(state[name], dtype=float).reshape(state["shape"]))


class _TorchArray(_Array):
    kind = "torch"

    @property
    def module(self) -> Any:
        import torch

        return torch

    def wide(self, x: Array) -> Array:
        return x.detach().to(self.module.float64)

    def narrow(self, x: Array) -> Array:
        return x.to(self.dtype if self.dtype.is_floating_point else self.module.float64)

    def update(self, x: Array, elapsed: float) -> None:
        with self.module.inference_mode(False), self.module.no_grad():
            super().update(x, elapsed)

    def state(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name).clone() for name in ("mean", "weight", "seen")}
        about = {"kind": self.kind, "dtype": str(self.dtype).removeprefix("torch."), "skipped": int(self.skipped)}
        return {**about, **tensors, "time": self.recurrence.time}

    def check(self, where: str, x: Array) -> None:
        super().check(where, x)
        if self.mean is not None and x.device != self.mean.device:
            raise ValueError(
                f"{where}: expected a tensor on device {self.mean.device}, as at the first update; got one on "
                f"{x.device}. Move it there, or call ema.reset()."
            )

    def load(self, state: Mapping[str, Any]) -> None:
        self.dtype, self.skipped = getattr(self.module, state["dtype"]), state["skipped"]
        self.recurrence.time = state["time"]
        for name in ("mean", "weight", "seen"):
            setattr(self, name, state[name].clone())
