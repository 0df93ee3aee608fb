"""`python -m benchmarks NAME`, one of BENCHMARKS: see each benchmark's module for what it measures."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = ("weights", "series", "gradients", "posthoc", "sharded", "cuda", "imports")


def main(arguments: list[str]) -> None:
    name, *rest = arguments or ["weights"]
    if name not in BENCHMARKS:
        raise SystemExit(f"no benchmark is called {name!r}; there are {', '.join(BENCHMARKS)}")
    importlib.import_module(f"benchmarks.{name}").main(rest)


main(sys.argv[1:])
