"""Writes goldens/*.json: what pandas and polars, as installed, make of a handful of hard series.

    python tests/make_goldens.py

Run it again when a new version of one of them is out, and look at the difference. Where they are wrong nothing is
stored: pandas at alpha = .5 without adjust over a gap, both in unbiased moments after gaps that little is left after.
`test_exactness.py` has the definition there.
"""

from __future__ import annotations

import json
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import polars as pl

FOLDER = pathlib.Path(__file__).parent / "goldens"
NAN, INF = np.nan, np.inf


def noise(n: int, seed: int) -> list[float]:
    """Six digits: enough to be no round numbers, and short in a file."""
    return [float(x) for x in np.random.default_rng(seed).normal(size=n).round(6)]


SERIES: dict[str, list[float]] = {
    "noise": noise(16, 0),
    "missing": [NAN, NAN, *noise(4, 1), NAN, *noise(3, 2), NAN, NAN, NAN, *noise(3, 3), NAN],
    "infinities": [1.5, INF, 2.25, -INF, NAN, -4.0, 8.5, INF],
    "a gap of 60": [2.0, 3.5, *[NAN] * 60, -1.0, 0.25],
    "constant": [0.1, 0.1, NAN, 0.1, 0.1, 0.1],
    "offset": [1e8 + x for x in noise(10, 4)],
    "two": [3.0, -1.0],
    "one": [NAN, 3.0],
    "all missing": [NAN, NAN, NAN],
    "empty": [],
}
PARTNER = {
    name: [0.5 * x + y for x, y in zip(values, noise(len(values), 9), strict=True)] for name, values in SERIES.items()
}
SECONDS = {name: np.cumsum(np.random.default_rng(5).choice([0, 1, 30, 600], size=len(x))) for name, x in SERIES.items()}
RULES = [(True, "skip"), (True, "decay"), (False, "skip"), (False, "decay")]


def of_pandas(name: str) -> Iterator[dict[str, Any]]:
    x, y = pd.Series(SERIES[name], dtype=float), pd.Series(PARTNER[name], dtype=float)
    for debias, nan in RULES:
        options = {"adjust": debias, "ignore_na": nan == "skip"}
        rule = {"debias": debias, "nan": nan}
        source = x.ewm(alpha=0.3, **options)
        yield {"options": {"alpha": 0.3} | rule, "statistic": "mean", "result": source.mean()}
        late = x.ewm(span=20, min_periods=3, **options)
        yield {"options": {"span": 20, "min_periods": 3} | rule, "statistic": "mean", "result": late.mean()}
        if debias:
            yield {"options": {"alpha": 0.3} | rule, "statistic": "sum", "result": source.sum()}
        if name == "a gap of 60":
            continue
        second = {"alpha": 0.3} | rule
        yield {"options": second, "statistic": "var", "unbiased": False, "result": source.var(bias=True)}
        yield {"options": second, "statistic": "std", "unbiased": True, "result": source.std(bias=False)}
        if debias is (nan == "decay"):
            yield {"options": second, "statistic": "cov", "unbiased": True, "result": source.cov(y, bias=False)}
            yield {"options": second, "statistic": "corr", "result": source.corr(y)}
        if len(x):
            stamps = pd.Timestamp("2024-02-29").as_unit("s") + pd.to_timedelta(SECONDS[name], unit="s").as_unit("s")
            timed = x.ewm(halflife="90s", times=stamps, **options)
            yield {
                "options": {"half_life": 90, "times": "seconds"} | rule,
                "statistic": "mean",
                "result": timed.mean(),
            }


def of_polars(name: str) -> Iterator[dict[str, Any]]:
    x = pl.Series(SERIES[name], dtype=pl.Float64).fill_nan(None)
    if x.is_infinite().any():  # which poison all that follows, in polars
        return
    for debias, nan in RULES:
        options = {"half_life": 2.5, "adjust": debias, "ignore_nulls": nan == "skip"}
        ours = {"half_life": 2.5, "debias": debias, "nan": nan}
        yield {"options": ours, "statistic": "mean", "result": x.ewm_mean(**options)}
        if name == "a gap of 60":
            continue
        yield {"options": ours, "statistic": "var", "unbiased": True, "result": x.ewm_var(**options)}
        yield {"options": ours, "statistic": "std", "unbiased": False, "result": x.ewm_std(**options, bias=True)}
    by = pl.DataFrame({"x": x, "t": SECONDS[name].astype("int64")}).select(
        pl.col("x").ewm_mean_by("t", half_life="90i")
    )
    timed = {"half_life": 90, "times": "seconds", "debias": False, "nan": "decay"}
    yield {"options": timed, "statistic": "mean", "result": by["x"]}


def plain(value: Any) -> Any:
    """As JSON has it: null for what is missing, infinities as text."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray | pd.Series | pl.Series):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None if np.isnan(value) else str(value)
    return value


def golden(peer: Any, cases: Any) -> dict[str, Any]:
    versions = {peer.__name__: peer.__version__, "numpy": np.__version__, "python": platform.python_version()}
    made = [{"series": name} | case for name in SERIES for case in cases(name)]
    return {"made_with": versions, "series": SERIES, "partner": PARTNER, "seconds": SECONDS, "cases": made}


def main() -> None:
    for peer, cases in ((pd, of_pandas), (pl, of_polars)):
        content = plain(golden(peer, cases))
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in content.items() if name != "cases"]
        each = ",\n".join("    " + json.dumps(case) for case in content["cases"])
        text = "{\n" + ",\n".join([*lines, f'  "cases": [\n{each}\n  ]']) + "\n}\n"
        (FOLDER / f"{peer.__name__}.json").write_text(text)


if __name__ == "__main__":
    main()
