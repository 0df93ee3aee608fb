"""What averages one value of a series: a plain float, a NumPy array or a torch tensor, element by element.

Nothing but what the value itself needs is imported: floats and NumPy arrays are averaged without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeAlias

from ewma.profiles import Exponential, Profile, carry
from ewma.recurrence import Recurrence, Weigh, toward

Array: TypeAlias = Any  # a NumPy array or a torch tensor


def kind_of(where: str, x: Any) -> str:
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


class Number:
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


class ArrayCell:
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


class NumpyArray(ArrayCell):
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


class TorchArray(ArrayCell):
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


Cell: TypeAlias = Number | ArrayCell

CELLS: dict[str, type[Number] | type[ArrayCell]] = {
    "number": Number,
    "numpy": NumpyArray,
    "torch": TorchArray,
}
