"""The running moments of NumPy arrays or torch tensors, element by element."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ewma import recurrence
from ewma.arrays import Array, empty, full, is_tensor, like, may_ask, module_of, wide
from ewma.series.cells.terms import Terms, raise_for_missing

if TYPE_CHECKING:
    from ewma.series.averaging import Pair
    from ewma.series.moments import Moments
    from ewma.series.values import Series

VARIANCE: tuple[Pair, ...] = ((0, 0),)
JOINT: tuple[Pair, ...] = ((0, 0), (0, 1), (1, 1))
COMMON = ("time", "weight", "residue", "pairs", "count", "seen")
"""The numbers that tell what values weigh: the same for all elements, until one of them is missing."""


class Arrays:
    """The running moments of arrays, element by element; of one array, or of two that belong together.

    Args:
        kind: "numpy" or "torch".
        wanted: which second moments to keep.
    """

    def __init__(self, terms: Terms, kind: str, wanted: tuple[Pair, ...]) -> None:
        from ewma.series.moments import Moments

        self.terms, self.kind = terms, kind
        self.moments: Moments = Moments(terms.rule, wanted)
        assert terms.rule.profile is not None
        self.common = recurrence.Moments(terms.rule.profile, terms.rule.weigh, terms.rule.debias)
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
            raise_for_missing(where, x)
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

    def update(self, x: Array, elapsed: float, timed: bool, *others: Array) -> None:
        """Take in one value, and what belongs to it; `timed` where the times of values are known."""
        self.begin(x, tuple(x.shape))
        if not others and self._step(x, elapsed, timed):
            return
        passed = None
        if elapsed != 1.0:
            from ewma import columns

            passed = columns.ones(1) * elapsed
        self._take([wide(one).reshape(1, 1, -1) for one in (x, *others)], passed, timed, [])

    def _step(self, x: Array, elapsed: float, timed: bool) -> bool:
        """Take in one value as a float is, where all elements weigh the same; False where they do not, or would not."""
        from ewma.series.sweep import quietly

        moments, common = self.moments, self.common
        numbers = [getattr(moments, name) for name in COMMON]
        begun = moments.means and (moments.begun or moments.count > 0.0)
        if not (all(isinstance(number, float) for number in numbers) and begun and may_ask(x)):
            return False
        for name, number in zip(COMMON, numbers, strict=True):
            setattr(common, name, number)
        common.timed = timed
        share, past = common.step(elapsed)
        with self._normal(), quietly(x):
            x, mean = wide(x).reshape(1, 1, -1), moments.means[0]
            distance = x - mean
            spread = past * (moments.spreads[0, 0] + share * (distance * distance))
            if not math.isfinite(spread.sum()):
                return False
            mean = x - past * distance if share > recurrence.NEAR else mean + share * distance
            moments.means, moments.spreads = (mean,), {(0, 0): spread}
        for name in COMMON:
            setattr(moments, name, getattr(common, name))
        return True

    def extend(self, series: Series, elapsed: Any, timed: bool, *others: Array) -> Array:
        """Take in a chunk; its running mean."""
        outer, n, inner = series.shape
        x = series.array
        self.begin(x, series.of_one)
        with self._normal():
            made = empty(series.array, series.floating)
        if n:
            arrays = [one.reshape(outer, n, inner) for one in (x, *others)]
            self.moments.reshape(outer, inner)
            self._take(arrays, elapsed, timed, [made.reshape(outer, n, inner)])
            self.moments.reshape(1, outer * inner)
        return made

    def _take(self, arrays: list[Array], elapsed: Any, timed: bool, outputs: list[Array]) -> None:
        from ewma.series.sweep import follow, quietly

        module = module_of(arrays[0])
        if timed:
            self.moments.rule = self.moments.rule.with_times()
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
        from ewma.series.sweep import quietly

        with quietly(self.moments.means[0]):
            return self._give(self.moments.second(pair, unbiased))

    def correlation(self) -> Array:
        from ewma.series.ratios import correlated

        return self._give(correlated(self.moments.spreads))

    def deviation(self, unbiased: bool) -> Array:
        from ewma.series.ratios import root
        from ewma.series.sweep import quietly

        variance = self.moments.second((0, 0), unbiased)
        with quietly(variance):
            return self._give(root(variance))

    def score(self, x: Array, unbiased: bool) -> Array:
        from ewma.series.ratios import standardized
        from ewma.series.sweep import quietly

        moments = self.moments
        with quietly(x):
            variance = moments.second((0, 0), unbiased)
            scores = standardized(wide(x).reshape(1, 1, -1), moments.means[0], variance, moments.pairs + 0.0 * variance)
            return self._give(scores, coming=1.0)

    def merge(self, later: Any) -> None:
        from ewma.series.merging import merge
        from ewma.series.sweep import quietly

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
