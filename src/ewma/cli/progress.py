"""A progress bar where there is somebody to see it, and tqdm to draw it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """What to call with every number of elements that is done. Without tqdm, or without a terminal, nothing shows."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        yield abs
        return
    with tqdm(total=total, desc=what, unit="", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as shown:
        yield shown.update
