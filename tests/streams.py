"""Streams of values of every kind for EMA, and what is asked of it after them."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from ewma import EMA

NAN, INF = math.nan, math.inf

DATA = [5.0, 2.0, 8.5, -1.25, 3.0, 9.75]
ELAPSED = [1.0, 0.5, 3.0, 1.0, 0.125, 7.0]
GAPPY = [NAN, 2.0, INF, -1.25, NAN, 9.75]

KINDS = {"float": float, "numpy": np.asarray, "torch": functools.partial(torch.tensor, dtype=torch.float64)}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_array = pytest.mark.parametrize("kind", [KINDS["numpy"], KINDS["torch"]], ids=["numpy", "torch"])
each_weigh = pytest.mark.parametrize("weigh", ["value", "time"])


def fed(ema: EMA, values, elapsed=None) -> EMA:
    """The EMA after all the values."""
    for x, passed in zip(values, elapsed or [1.0] * len(values), strict=True):
        ema.update(x, passed)
    return ema


def double(x) -> np.ndarray:
    """A number, array or tensor as a float64 array."""
    return (x.double() if isinstance(x, torch.Tensor) else np.asarray(x, dtype=np.float64)).__array__()


def map_kind(kind, values) -> list:
    return [kind(x) for x in values]


def unchanged(ema: EMA, before: dict) -> None:
    """What was refused left everything as it was."""
    after_it = ema.state_dict()
    assert {name: after_it[name] for name in ("count", "named")} == {name: before[name] for name in ("count", "named")}
    assert list(after_it["cells"]) == list(before["cells"])
    for name, cell in before["cells"].items():
        assert list(cell) == list(after_it["cells"][name])
        for part, value in cell.items():
            now = after_it["cells"][name][part]
            assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value


def random_values(kind, shape: tuple[int, ...] = (2, 3)) -> list:
    rng = np.random.default_rng(4)
    values = rng.normal(size=(8, *shape))
    values[rng.random(values.shape) < 0.2] = NAN
    return [kind(x) for x in values]


STREAMS = {
    "float": random_values(float, ()),
    "numpy": random_values(np.float32),
    "numpy 0-d": random_values(np.asarray, ()),
    "numpy empty": random_values(np.asarray, (0,)),
    "numpy transposed": random_values(np.transpose),
    "numpy int": [np.arange(6).reshape(2, 3) * step for step in range(8)],
    "torch": random_values(torch.tensor),
    "torch bfloat16": random_values(functools.partial(torch.tensor, dtype=torch.bfloat16), ()),
    "torch int": [torch.arange(6) * step for step in range(8)],
}
STREAMS["dict of numpy"] = [{"a": a, "b": b} for a, b in zip(STREAMS["float"], STREAMS["numpy"], strict=True)]
STREAMS["dict"] = [{**a, "c": c} for a, c in zip(STREAMS["dict of numpy"], STREAMS["torch"], strict=True)]
