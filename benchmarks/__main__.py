"""`python -m benchmarks weights|series|gradients|sharded`: see each benchmark's module for what it measures."""

from __future__ import annotations

import sys

from benchmarks import gradients, series, sharded, weights

BENCHMARKS = {"weights": weights.main, "series": series.main, "gradients": gradients.main, "sharded": sharded.main}


def main(arguments: list[str]) -> None:
    name, *rest = arguments or ["weights"]
    if name not in BENCHMARKS:
        raise SystemExit(f"no benchmark is called {name!r}; there are {', '.join(BENCHMARKS)}")
    BENCHMARKS[name](rest)


main(sys.argv[1:])
