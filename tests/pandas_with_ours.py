"""A pytest plugin, for pandas' own tests: its two inner functions of ewm are replaced by ours.

With EWMA_RESULTS=path it writes what became of every test, and how often ours were called. With EWMA_REPLACE=0 pandas
stays as it is.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest
from pandas.core.window import ewm as inner

import ewma

CALLS: collections.Counter[str] = collections.Counter()
OUTCOMES: dict[str, str] = {}


def rule(com: float, adjust: bool, ignore_na: bool, minp: int) -> dict[str, Any]:
    return {"com": com, "debias": adjust, "nan": "skip" if ignore_na else "decay", "min_periods": max(int(minp), 1)}


def windows(start: np.ndarray, end: np.ndarray) -> list[slice]:
    """One for the whole series; several for the groups of a groupby, laid end to end."""
    return [slice(int(first), int(last)) for first, last in zip(start, end, strict=True)]


def mean_or_sum(
    vals: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    minp: int,
    com: float,
    adjust: bool,
    ignore_na: bool,
    deltas: np.ndarray | None = None,
    normalize: bool = True,
) -> np.ndarray:
    CALLS["mean" if normalize else "sum"] += 1
    out = np.empty(len(vals))
    for window in windows(start, end):
        # Their deltas are what elapsed, in half-lives: with com = 1, decay ** delta.
        times = (
            None if deltas is None else np.cumsum([0.0, *deltas[window.start : window.stop - 1]])[: len(vals[window])]
        )
        series = ewma.ewm(vals[window], times=times, **rule(com, adjust, ignore_na, minp))
        out[window] = series.mean() if normalize else series.sum()
    return out


def covariance(
    input_x: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    minp: int,
    input_y: np.ndarray,
    com: float,
    adjust: bool,
    ignore_na: bool,
    bias: bool,
) -> np.ndarray:
    CALLS["cov"] += 1
    if len(input_x) != len(input_y):
        raise ValueError(f"arrays are of different lengths ({len(input_x)} and {len(input_y)})")
    out = np.empty(len(input_x))
    for window in windows(start, end):
        series = ewma.ewm(input_x[window], **rule(com, adjust, ignore_na, minp))
        out[window] = series.cov(input_y[window], unbiased=not bias)
    return out


if os.environ.get("EWMA_REPLACE", "1") != "0":
    inner.window_aggregations.ewm = mean_or_sum
    inner.window_aggregations.ewmcov = covariance


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        OUTCOMES[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    if path := os.environ.get("EWMA_RESULTS"):
        pathlib.Path(path).write_text(json.dumps({"calls": CALLS, "outcomes": OUTCOMES}))
