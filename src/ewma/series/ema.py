"""Job 1: the running mean of a series, as its values come.

Plain floats need no array library, NumPy arrays no torch.
"""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Callable, Mapping
from typing import Any

from ewma import files, profiles
from ewma.arrays import unmasked
from ewma.profiles import Profile
from ewma.recurrence import Recurrence, Weigh, check_elapsed, weighing
from ewma.series.cells import JOINT, Arrays, Cell, Number, Terms, kind_of, new_cell, own_initial
from ewma.series.weighting import Missing, Rule, check_min_periods, check_missing


class EMA:
    """Running mean, variance and more of floats, NumPy arrays, torch tensors, or dicts of these, as they come.

        weight' = keep * weight + gain          keep = decay ** elapsed, gain = 1
        mean'   = mean + (gain / weight') * (x - mean)

    Args:
        profile: how the past is weighted, where it is not exponential: `Power(sigma_rel=.1)`, `Uniform()`.
        half_life, decay, alpha, span, com: instead, exactly one by keyword; see `Exponential`.
        debias: True is the true weighted mean of what was seen (pandas' adjust=True), False starts at the first value.
        weigh: "value": each value counts once, whatever time it stands for (pandas; the default where the profile has
            it); "time": a value counts for what elapsed. With equal steps both give the same mean.
        nan: what a NaN or infinite element does: "skip", its step does not count; "decay", the past goes on being
            forgotten; "propagate", all is NaN from there on; "raise". All but "raise" count it in `skipped`.
        min_periods: `get` gives NaN until so many values were observed.
        initial: the mean before the first value, as if it had always been there; a number, or of the values' shape.

    All arithmetic is in float64; `get` gives the first value's type, shape and dtype back (integers give float64,
    NumPy's scalars Python's float). Nothing waits for the device.

    Beside it: `ewma.smooth` and `ewma.ewm` take a whole series at once, with the same results; `ewma.nn.EMA` is the
    form inside a network, ModelEMA the one for weights. An often copied class starts at 0 and divides by
    `1 - alpha ** count`; right is `1 - (1 - alpha) ** count`, the weight that has been seen.

    >>> ema = EMA(alpha=0.5)
    >>> for x in (1.0, 2.0, 3.0):
    ...     ema.update(x)
    >>> round(ema.get(), 4), ema.count
    (2.4286, 3)
    >>> [round(mean, 4) for mean in ema.extend([4.0, 5.0])], ema.count
    ([3.2667, 4.1613], 5)
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
        nan: Missing = "skip",
        min_periods: int = 1,
        initial: Any = None,
    ) -> None:
        knobs = {"half_life": half_life, "decay": decay, "alpha": alpha, "span": span, "com": com}
        knobs = {name: _in_seconds(knob) for name, knob in knobs.items()}
        self.profile = profiles.resolve("EMA(", profile, debias, **knobs)
        self.weigh: Weigh = weighing(self.profile, weigh)
        rule = Rule(self.profile, self.profile.debias, self.weigh, check_missing(nan))
        needed = check_min_periods(min_periods)
        if initial is None:
            self._terms = Terms(rule, max(needed, 1), None)
        else:
            self._terms = Terms(rule.begun(), needed, own_initial(initial))
        self.reset()

    def __repr__(self) -> str:
        return f"EMA({self.profile!r}, weigh={self.weigh!r}, count={self.count})"

    def __copy__(self) -> EMA:
        """As `copy.deepcopy`: two that share half of what they know would both be wrong after an update."""
        return copy.deepcopy(self)

    def reset(self) -> None:
        """Forget everything: the next update is the first."""
        self.count = 0
        self._named: bool | None = None
        self._cells: dict[str, Cell] = {}
        self._joint: dict[str, Arrays] = {}
        self._last: Any = None
        self._quick: Callable[[float, float], None] | None = None  # takes in a float, where there is nothing else to do

    @property
    def skipped(self) -> int:
        """How many elements were left out so far, being NaN or infinite. Waits for the device."""
        return sum(int(cell.skipped) for cell in self._cells.values())

    def update(self, x: Any, elapsed: float = 1.0, *, y: Any = None) -> None:
        """Take in one observation.

        Args:
            x: a number, an array or a tensor of any shape, or a dict of these by name; always of one kind and
                shape. A name that is missing from a dict keeps its average.
            elapsed: what has passed since the last update, in the half-life's unit; a timedelta counts in seconds.
            y: of the same kind and shape, where the covariance of x with it is wanted: with every update, or with none.

        The value is read, never kept: changing x in place afterwards changes nothing here.
        """
        if type(x) is float and self._quick is not None and elapsed == 1.0 and y is None and -math.inf < x < math.inf:
            self._quick(x, 1.0)
            self.count += 1
            return
        elapsed, timed = check_elapsed(_in_seconds(elapsed)), self._last is not None
        values, ys = self._by_name("EMA.update", x), self._companions(x, y)
        cells = {name: self._cell(name, value) for name, value in values.items()}
        joint = {name: self._joint_cell(name, values[name], other) for name, other in ys.items()}
        for name, cell in cells.items():
            cell.update(values[name], elapsed, timed)
        for name, pair in joint.items():
            pair.update(_array(values[name]), elapsed, timed, _array(ys[name]))
        self._adopt(cells, joint, isinstance(x, Mapping))
        if timed:
            from ewma.series.stamps import later

            self._last = later(self._last, elapsed)
        self.count += 1

    def extend(self, x: Any, times: Any = None, *, y: Any = None, axis: int | None = None) -> Any:
        """Take in a chunk of observations along time; gives its running mean, as `smooth` of the whole series would.

        Args:
            x: as `smooth` takes it, or a dict of such chunks, all of one length. A plain list stands for numbers.
            times: when each value was observed; they go on from the last chunk's. Without them one unit passes each
                time.
            y: of the same kind and shape, where the covariance of x with it is wanted.
            axis: of time: the last by default. Without it a value has the shape that `update` would get.
        """
        from ewma.series.stamps import later, stamps
        from ewma.series.values import unpack

        chunks = {name: unpack("x", chunk, axis) for name, chunk in self._by_name("EMA.extend", x).items()}
        others = {name: unpack("y", chunk, axis) for name, chunk in self._companions(x, y).items()}
        n = next((chunk.shape[1] for chunk in chunks.values()), 0)
        for name, chunk in [*chunks.items(), *others.items()]:
            if chunk.shape[1] != n or chunk.array.shape != chunks[name].array.shape:
                raise ValueError(f"EMA.extend: expected chunks of one length and shape; {name!r} has another")
        passed, last = (None, self._last) if times is None else stamps(times, n, self._last)[:2]
        timed = last is not None
        if times is None and timed:
            last = later(last, float(n))
        cells = {name: self._cell(name, chunk, "EMA.extend") for name, chunk in chunks.items()}
        joint = {name: self._joint_cell(name, chunks[name], other) for name, other in others.items()}
        smoothed = {}
        for name, cell in cells.items():
            smoothed[name] = chunks[name].pack(cell.extend(chunks[name], passed, timed))
        for name, pair in joint.items():
            pair.extend(chunks[name], passed, timed, others[name].array)
        self._last, self.count = last, self.count + n
        if n:
            self._adopt(cells, joint, isinstance(x, Mapping))
        return smoothed if isinstance(x, Mapping) else smoothed[""]

    def get(self) -> Any:
        """The mean of all that was seen: a new value, which no later update changes. NaN where all was skipped."""
        return self._read("get", lambda cell: cell.get())

    def var(self, *, unbiased: bool = True) -> Any:
        """The variance of all that was seen, weighted as the mean is; unbiased, NaN until two values were seen."""
        return self._read("var", lambda cell: cell.second(unbiased))

    def std(self, *, unbiased: bool = True) -> Any:
        """The standard deviation, the variance's root."""
        return self._read("std", lambda cell: cell.deviation(unbiased))

    def zscore(self, x: Any, *, unbiased: bool = True) -> Any:
        """How far x lies from the mean of what was seen, in its standard deviations. Ask before `update(x)`."""
        self._must_have_begun("zscore")
        values = self._by_name("EMA.zscore", x)
        unknown = [name for name in values if name not in self._cells]
        if unknown:
            raise KeyError(f"EMA.zscore: nothing was seen yet of {', '.join(map(repr, unknown))}; update first")
        scores = {name: self._cell(name, x, "EMA.zscore").score(x, unbiased) for name, x in values.items()}
        return scores if self._named else scores[""]

    def cov(self, *, unbiased: bool = True) -> Any:
        """The covariance of x and y, as given to `update(x, y=y)`. Where one of them was missing, both are."""
        return self._read_joint("cov", lambda pair: pair.second(unbiased, (0, 1)))

    def corr(self) -> Any:
        """The correlation of x and y, as given to `update(x, y=y)`; NaN while one of them is constant."""
        return self._read_joint("corr", lambda pair: pair.correlation())

    def merge(self, later: EMA) -> None:
        """Take in another EMA, of values that came after those seen here: then it is as if all had come here.

            mean = (K w1 m1 + w2 m2) / (K w1 + w2)          K: what survives of the first over the second's time

        For Exponential and Uniform profiles, debiased; otherwise an error, since K would not be known. With times, the
        second's first value counts as one unit after the first's last.
        """
        if not isinstance(later, EMA):
            raise TypeError(
                f"merge takes another EMA; got {type(later).__name__}. One value is taken in by ema.update(x)."
            )
        if later._terms.initial is not None or self._terms.initial is not None:
            begun = self if later._terms.initial is None else later
            raise ValueError(
                f"cannot merge {later!r} into {self!r}: {'the first' if begun is self else 'the second'} began at "
                f"initial=, not debiased. Leave initial= out of it."
            )
        if (self.profile, self.weigh, self._terms.rule) != (later.profile, later.weigh, later._terms.rule):
            raise ValueError(
                f"cannot merge {later!r} into {self!r}: make both with the same profile and weigh=, and nan="
            )
        if self._named not in (None, later._named) and later._named is not None:
            raise TypeError(f"cannot merge {later!r} into {self!r}: one averages a dict, the other a single value")
        if None not in (self._named, later._named) and bool(self._joint) != bool(later._joint):
            raise TypeError(
                f"cannot merge {later!r} into {self!r}: only one of them has seen a y; a covariance needs every pair"
            )
        Recurrence(later.profile, later.weigh).kept()  # an error for profiles that cannot be merged
        last = self._last_after(later)
        merged = {name: self._cell(name, cell.get(), "EMA.merge") for name, cell in later._cells.items()}
        joint = {
            name: self._joint.get(name) or Arrays(self._terms, pair.kind, JOINT) for name, pair in later._joint.items()
        }
        for name, cell in merged.items():
            cell.merge(later._cells[name])
        for name, pair in joint.items():
            pair.merge(later._joint[name])
        self._last = last
        if later._named is not None:
            self._adopt(merged, joint, later._named)
        self.count += later.count

    def state_dict(self) -> dict[str, Any]:
        """All there is to save: tensors, numbers and strings only. NumPy arrays become lists of floats."""
        last = []
        if self._last is not None:
            from ewma.series import stamps

            last = stamps.to_json(self._last)
        return {
            "format": files.FORMAT,
            "kind": "EMA",
            "profile": self.profile.to_json(),
            "weigh": self.weigh,
            "initial": self._terms.initial is not None,
            "count": self.count,
            "named": self._named,
            "last": last,
            "cells": {name: cell.state() for name, cell in self._cells.items()},
            "joint": {name: pair.state() for name, pair in self._joint.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` gave, bit for bit."""
        files.check_format("EMA.load_state_dict", state, "EMA")
        mine = self.profile, self.weigh, self._terms.initial is not None
        saved = profiles.from_json(state["profile"]), state["weigh"], state.get("initial", mine[2])
        if saved != mine:
            theirs, ours = (f"{p!r} by {w}{' from initial=' if begun else ''}" for p, w, begun in (saved, mine))
            raise ValueError(
                f"the state was saved with {theirs}, but this EMA has {ours}. Make it with the saved ones to go on."
            )
        cells = {name: new_cell(part["kind"], self._terms) for name, part in state["cells"].items()}
        for name, cell in cells.items():
            cell.load(state["cells"][name])
        joint = {name: Arrays(self._terms, part["kind"], JOINT) for name, part in state["joint"].items()}
        for name, pair in joint.items():
            pair.load(state["joint"][name])
        self.reset()
        self.count = state["count"]
        if state["last"] != []:
            from ewma.series import stamps

            self._last = stamps.from_json(state["last"])
        if state["named"] is not None:
            self._adopt(cells, joint, state["named"])

    def _last_after(self, later: EMA) -> Any:
        """The newest stamp, once the values of another have come after those seen here."""
        if self._last is None or not later.count:
            return self._last if later._last is None else later._last
        from ewma.series import stamps

        if later._last is None:
            return stamps.later(self._last, max((cell.moments.time for cell in later._cells.values()), default=0.0))
        stamps.check_order(self._last, later._last)
        return later._last

    def _by_name(self, call: str, x: Any) -> Mapping[str, Any]:
        named = isinstance(x, Mapping)
        if self._named is not None and self._named != named:
            raise TypeError(
                f"{call}: expected {'a dict' if self._named else 'a single value'}, as at the first update; got "
                f"{type(x).__name__}. Use one EMA for each, or call ema.reset()."
            )
        return {name: unmasked(part) for name, part in x.items()} if named else {"": unmasked(x)}

    def _companions(self, x: Any, y: Any) -> Mapping[str, Any]:
        """What y has for every name of x; nothing where there is no y at all."""
        if (y is None) == bool(self._joint) and self._named is not None:
            raise TypeError(
                f"expected {'a y' if self._joint else 'no y'}, as at the first update: a covariance needs every pair"
            )
        if y is None:
            return {}
        if isinstance(x, Mapping) != isinstance(y, Mapping) or (isinstance(x, Mapping) and set(x) != set(y)):
            raise TypeError("expected y as x is: of the same kind, and as a dict with the same names")
        return {name: unmasked(part) for name, part in y.items()} if isinstance(y, Mapping) else {"": unmasked(y)}

    def _cell(self, name: str, x: Any, call: str = "EMA.update") -> Cell:
        """The cell that averages x, a value or a chunk, checked to fit; new where there is none yet."""
        from ewma.series.values import Series

        if not isinstance(name, str):
            raise TypeError(f"{call}: a dict's names must be strings; got {name!r}")
        where = f"{call}, {name!r}" if name else call
        cell = self._cells.get(name)
        kind = x.kind if isinstance(x, Series) else kind_of(where, x)
        if cell is None:
            cell = new_cell(kind, self._terms)
        elif cell.kind != kind:
            came = f"a chunk of {kind} values" if isinstance(x, Series) else type(x).__name__
            raise TypeError(
                f"{where}: expected a {cell.kind} value, as at the first update; got {came}. Use one EMA for each, or "
                f"call ema.reset()."
            )
        if isinstance(x, Series):
            cell.check_chunk(where, x)
        else:
            cell.check(where, x)
        return cell

    def _joint_cell(self, name: str, x: Any, y: Any) -> Arrays:
        chunk = hasattr(x, "kind")
        kind, other = (x.kind, y.kind) if chunk else (kind_of("x", x), kind_of("y", y))
        shapes = [tuple(one.array.shape if chunk else getattr(one, "shape", ())) for one in (x, y)]
        if kind != other or shapes[0] != shapes[1]:
            raise ValueError(
                f"expected y of x's kind and shape: {kind}, {list(shapes[0])}; got {other}, {list(shapes[1])}"
            )
        devices = [getattr(one.array if chunk else one, "device", None) for one in (x, y)]
        if kind == "torch" and devices[0] != devices[1]:
            raise ValueError(f"expected y on x's device, {devices[0]}; got y on device {devices[1]}. Move it there.")
        pair = self._joint.get(name) or Arrays(self._terms, "torch" if kind == "torch" else "numpy", JOINT)
        if chunk:
            pair.check_chunk("y", y)
        else:
            pair.check("y", _array(y))
        return pair

    def _adopt(self, cells: Mapping[str, Cell], joint: Mapping[str, Arrays], named: bool) -> None:
        self._cells.update(cells)
        self._joint.update(joint)
        self._named = named
        only = self._cells.get("")
        self._quick = None
        if isinstance(only, Number) and not named and not joint and self._last is None:
            self._quick = only.moments.update

    def _read(self, what: str, read: Callable[[Cell], Any]) -> Any:
        self._must_have_begun(what)
        results = {name: read(cell) for name, cell in self._cells.items()}
        return results if self._named else results[""]

    def _must_have_begun(self, what: str) -> None:
        if self._named is None:
            raise RuntimeError(f"EMA.{what}: there is no average before the first update; call ema.update(x) first")

    def _read_joint(self, what: str, read: Callable[[Arrays], Any]) -> Any:
        if not self._joint:
            raise RuntimeError(f"EMA.{what}: nothing is known of a second series; give it with ema.update(x, y=y)")
        results = {}
        for name, pair in self._joint.items():
            result = read(pair)
            results[name] = float(result) if isinstance(self._cells[name], Number) else result
        return results if self._named else results[""]


def _array(x: Any) -> Any:
    if hasattr(x, "reshape") and hasattr(x, "shape"):
        return x
    import numpy

    return numpy.asarray(x, dtype=float)


def _in_seconds(knob: Any) -> Any:
    if isinstance(knob, datetime.timedelta):
        return knob.total_seconds()
    if getattr(getattr(knob, "dtype", None), "kind", "") == "m":  # NumPy's
        return float(knob / type(knob)(1, "s"))
    return knob
