"""What averages one series as it comes: plain floats, NumPy arrays or torch tensors, value by value or chunk by chunk.

Nothing but what the value itself needs is imported: floats need no array library, NumPy arrays no torch.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ewma import recurrence
from ewma.arrays import Array, empty, full, is_real, is_tensor, like, may_ask, module_of, wide
from ewma.weighting import Rule

if TYPE_CHECKING:
    from ewma.averaging import Pair
    from ewma.moments import Moments
    from ewma.values import Series

VARIANCE: tuple[Pair, ...] = ((0, 0),)
JOINT: tuple[Pair, ...] = ((0, 0), (0, 1), (1, 1))


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


def kind_of(where: str, x: Any) -> str:
    if isinstance(x, Real):
        return "number"
    if hasattr(x, "detach"):
        if not x.is_complex():
            return "torch"
    elif hasattr(x, "__array__") and getattr(getattr(x, "dtype", None), "kind", "O") in "fiub":
        return "numpy" if hasattr(x, "__setitem__") else "number"  # NumPy's scalars, of which not all are Real
    raise TypeError(
        f"{where}: expected a real number, a NumPy array or a torch tensor, or a dict of these; got {type(x).__name__}"
        f"{'' if not hasattr(x, 'dtype') else f' of {x.dtype}'}. A list becomes an array with numpy.asarray(x), values "
        f"along time are taken in by ema.extend(x), and what is missing (None) is left out of a dict."
    )


class Number:
    """The running mean and variance of plain floats."""

    kind = "number"

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.missing = terms.rule.missing
        assert terms.rule.profile is not None
        self.moments = recurrence.Moments(terms.rule.profile, terms.rule.weigh, terms.rule.debias)
        self.skipped = 0
        if terms.initial is not None:
            self.moments.mean, self.moments.weight = float(terms.start("EMA", ())), 1.0

    def check(self, where: str, x: Any) -> None:
        try:
            number = float(x)
        except OverflowError as error:
            raise ValueError(f"{where}: expected a number that a float can hold; got one too large") from error
        if self.missing == "raise" and not math.isfinite(number):
            raise ValueError(f'{where}: expected finite values only, by nan="raise"; got {number}')

    def check_chunk(self, where: str, series: Series) -> None:
        if self.missing == "raise":
            _raise_for_missing(where, series.array)

    def update(self, x: Any, elapsed: float) -> None:
        x = float(x)
        if -math.inf < x < math.inf:
            self.moments.update(x, elapsed)
        else:
            self.skipped += 1
            self.moments.miss(elapsed, decay=self.missing == "decay")
            if self.missing == "propagate":
                self.moments.count = math.nan  # never enough

    def extend(self, series: Series, elapsed: Any, timed: bool) -> Array:
        """Take in a chunk; its running mean."""
        if not series.shape[1]:
            return series.array.astype(series.floating)
        whole = Arrays(self.terms, "numpy", VARIANCE)
        whole.begin(series.array[:1], ())
        moments, mine = whole.moments, self.moments
        if mine.count or mine.weight or mine.mean:
            moments.means, moments.spreads = ((like(series.array, [[[mine.mean]]])),), {}
            moments.spreads[0, 0] = like(series.array, [[[mine.biased]]])
        if not mine.debias:  # else a residue is part of the weight, which arrays do without
            moments.residue = mine.residue
        for name in ("time", "weight", "pairs", "count", "seen"):
            setattr(moments, name, getattr(mine, name))
        result = whole.extend(series, elapsed, timed)
        for name in ("time", "weight", "pairs", "count", "seen"):
            setattr(mine, name, float(getattr(moments, name)))
        mine.mean, mine.biased = (float(x.reshape(())) for x in (moments.means[0], moments.spreads[0, 0]))
        mine.residue = float(moments.residue)
        self.skipped += int(whole.skipped)
        return result

    @property
    def shown(self) -> bool:
        return bool(self.moments.count >= self.terms.needed)

    def get(self) -> float:
        return self.moments.mean if self.shown else math.nan

    def second(self, unbiased: bool) -> float:
        return self.moments.variance(unbiased) if self.shown else math.nan

    def deviation(self, unbiased: bool) -> float:
        return math.sqrt(self.second(unbiased))

    def score(self, x: Any, unbiased: bool) -> float:
        moments = self.moments
        if not (math.isfinite(x) and moments.pairs > 0.0 and moments.count + 1.0 >= self.terms.needed):
            return math.nan
        distance, deviation = float(x) - moments.mean, math.sqrt(moments.variance(unbiased))
        if deviation:
            return distance / deviation
        return math.copysign(math.inf, distance) if distance else math.nan

    def merge(self, later: Any) -> None:
        self.moments.merge(later.moments)
        self.skipped += later.skipped

    def state(self) -> dict[str, Any]:
        numbers = {name: getattr(self.moments, name) for name in self.moments.NUMBERS}
        return {"kind": self.kind, "skipped": self.skipped, **numbers}

    def load(self, state: Mapping[str, Any]) -> None:
        self.skipped = state["skipped"]
        for name in self.moments.NUMBERS:
            setattr(self.moments, name, state[name])


class Arrays:
    """The running moments of arrays, element by element; of one array, or of two that belong together.

    Args:
        kind: "numpy" or "torch".
        wanted: which second moments to keep.
    """

    def __init__(self, terms: Terms, kind: str, wanted: tuple[Pair, ...]) -> None:
        from ewma.moments import Moments

        self.terms, self.kind = terms, kind
        self.moments: Moments = Moments(terms.rule, wanted)
        self.shape: tuple[int, ...] | None = None
        self.dtype: Any = None
        self.device: Any = None
        self.skipped: Any = 0

    def begin(self, x: Array, shape: tuple[int, ...]) -> None:
        """Get ready for values like x, each of the given shape."""
        if self.shape is not None:
            return
        self.shape, self.dtype, self.device = shape, x.dtype, getattr(x, "device", None)
        if self.terms.initial is not None:
            start = module_of(x).broadcast_to(wide(like(x, self.terms.initial)), shape).reshape(1, 1, -1)
            self.moments.begin_at((start,) * (1 + max(max(pair) for pair in self.moments.wanted)))

    def check_chunk(self, where: str, series: Series) -> None:
        self.check(where, series.array, series.of_one)

    def check(self, where: str, x: Array, shape: tuple[int, ...] | None = None) -> None:
        shape = tuple(x.shape) if shape is None else shape
        if self.terms.rule.missing == "raise":
            _raise_for_missing(where, x)
        if self.shape is None:
            self.terms.start(where, shape)
            return
        if shape != self.shape:
            raise ValueError(
                f"{where}: expected shape {list(self.shape)}, as at the first update; got {list(shape)}. Use one EMA "
                f"for each shape, or call ema.reset()."
            )
        if is_tensor(x) and x.device != self.device:
            raise ValueError(
                f"{where}: expected a tensor on device {self.device}, as at the first update; got one on {x.device}. "
                f"Move it there, or call ema.reset()."
            )

    def update(self, x: Array, elapsed: float, *others: Array) -> None:
        """Take in one value, and what belongs to it."""
        self.begin(x, tuple(x.shape))
        passed = None
        if elapsed != 1.0:
            from ewma import columns

            passed = columns.ones(1) * elapsed
        self._take([wide(one).reshape(1, 1, -1) for one in (x, *others)], passed, [])

    def extend(self, series: Series, elapsed: Any, timed: bool, *others: Array) -> Array:
        """Take in a chunk; its running mean."""
        outer, n, inner = series.shape
        x = series.array
        self.begin(x, series.of_one)
        if timed:
            self.moments.rule = self.moments.rule.with_times()
        with self._normal():
            made = empty(series.array, series.floating)
        if n:
            arrays = [one.reshape(outer, n, inner) for one in (x, *others)]
            self.moments.reshape(outer, inner)
            self._take(arrays, elapsed, [made.reshape(outer, n, inner)])
            self.moments.reshape(1, outer * inner)
        return made

    def _take(self, arrays: list[Array], elapsed: Any, outputs: list[Array]) -> None:
        from ewma.sweep import follow, quietly

        module = module_of(arrays[0])
        with self._normal(), quietly(arrays[0]):
            arrays = [one.detach() if self.kind == "torch" else one for one in arrays]
            for one in arrays:
                self.skipped = self.skipped + (~module.isfinite(one)).sum()
            follow(
                self.moments, arrays, elapsed, self.terms.needed, lambda chunk, *_: chunk.means[: len(outputs)], outputs
            )

    def _normal(self) -> Any:
        """What is made in inference mode could not be written outside of it."""
        if self.kind != "torch":
            return contextlib.nullcontext()
        return importlib.import_module("torch").inference_mode(False)

    def get(self) -> Array:
        return self._give(self.moments.means[0])

    def second(self, unbiased: bool, pair: Pair = (0, 0)) -> Array:
        return self._give(self.moments.second(pair, unbiased))

    def correlation(self) -> Array:
        from ewma.ratios import correlated

        return self._give(correlated(self.moments.spreads))

    def deviation(self, unbiased: bool) -> Array:
        from ewma.ratios import root
        from ewma.sweep import quietly

        variance = self.moments.second((0, 0), unbiased)
        with quietly(variance):
            return self._give(root(variance))

    def score(self, x: Array, unbiased: bool) -> Array:
        from ewma.ratios import standardized
        from ewma.sweep import quietly

        moments = self.moments
        with quietly(x):
            variance = moments.second((0, 0), unbiased)
            scores = standardized(wide(x).reshape(1, 1, -1), moments.means[0], variance, moments.pairs + 0.0 * variance)
            return self._give(scores, coming=1.0)

    def merge(self, later: Any) -> None:
        from ewma.merging import merge
        from ewma.sweep import quietly

        self.begin(later.get(), later.shape)
        self.dtype = later.dtype if not self.moments.means else self.dtype
        with quietly(later.get()):
            merge(self.moments, later.moments)
        self.skipped = self.skipped + later.skipped

    def state(self) -> dict[str, Any]:
        dtype = self.dtype.str if self.kind == "numpy" else str(self.dtype).removeprefix("torch.")
        about = {"kind": self.kind, "dtype": dtype, "shape": list(self.shape or ()), "skipped": int(self.skipped)}
        numbers = {name: self._save(getattr(self.moments, name)) for name in ("time", *self.moments.NUMBERS)}
        several = {"mean": self.moments.means, "spread": tuple(self.moments.spreads.values())}
        return {**about, **numbers, **{name: self._save(self._together(parts)) for name, parts in several.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        module = importlib.import_module(self.kind)
        self.dtype = module.dtype(state["dtype"]) if self.kind == "numpy" else getattr(module, state["dtype"])
        self.shape, self.skipped = tuple(state["shape"]), state["skipped"]
        for name in ("time", *self.moments.NUMBERS):
            setattr(self.moments, name, self._load(state[name]))
        spreads = self._apart(self._load(state["spread"]), len(self.moments.wanted))
        self.moments.means = self._apart(
            self._load(state["mean"]), len({k for pair in self.moments.wanted for k in pair})
        )
        self.moments.spreads = dict(zip(self.moments.wanted, spreads, strict=True))
        self.device = getattr(self.moments.means[0], "device", None)
        self.moments.begun = self.terms.initial is not None

    def _together(self, parts: tuple[Array, ...]) -> Array:
        return parts[0] if len(parts) == 1 else module_of(parts[0]).concatenate(parts, 2)

    def _apart(self, parts: Array, count: int) -> tuple[Array, ...]:
        size = parts.shape[2] // count
        return tuple(parts[:, :, place * size : (place + 1) * size] for place in range(count))

    def _save(self, x: Any) -> Any:
        if not hasattr(x, "shape"):
            return float(x)
        return x.clone() if self.kind == "torch" else x.ravel().tolist()

    def _load(self, saved: Any) -> Any:
        if isinstance(saved, list):
            import numpy

            return numpy.array(saved).reshape(1, 1, -1)
        return saved.clone() if hasattr(saved, "clone") else saved

    def _give(self, x: Array, coming: float = 0.0) -> Array:
        """Of the first value's shape and dtype, in memory of its own; NaN where too few values were observed, counting
        those just coming."""
        module = module_of(x)
        shown = full(x, (1, 1, 1), coming) + self.moments.count >= self.terms.needed
        x = module.where(shown, x, math.nan) + full(x, (1, 1, 1), 0.0)
        assert self.shape is not None
        if is_tensor(x):
            dtype = self.dtype if self.dtype.is_floating_point else module.float64
            return x.reshape(self.shape).to(dtype)
        dtype = self.dtype if self.dtype.kind == "f" and self.dtype.itemsize <= 8 else module.float64
        return x.reshape(self.shape).astype(dtype)


def _raise_for_missing(where: str, x: Array) -> None:
    if not bool(module_of(x).isfinite(x).all()):
        raise ValueError(f'{where}: expected finite values only, by nan="raise"; got some that are not')


Cell: TypeAlias = Number | Arrays


def new_cell(kind: str, terms: Terms) -> Cell:
    return Number(terms) if kind == "number" else Arrays(terms, kind, VARIANCE)
