"""Other libraries' running means of a series or a batch. They allocate their results."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy

Peer = Callable[[Any, int, float], Callable[[], Any]]


class NotThisOne(Exception):
    """What a library does not do."""


def pandas(x: Any, axis: int, alpha: float) -> Callable[[], Any]:
    import pandas

    if x.ndim > 1 and axis:
        raise NotThisOne("has frames along their rows only")
    frame = pandas.Series(x) if x.ndim == 1 else pandas.DataFrame(x)
    return lambda: frame.ewm(alpha=alpha).mean().to_numpy()


def polars(x: Any, axis: int, alpha: float) -> Callable[[], Any]:
    import polars

    if x.ndim > 1 and axis:
        raise NotThisOne("has frames along their rows only")
    if x.ndim == 1:
        column = polars.Series(x)
        return lambda: column.ewm_mean(alpha=alpha).to_numpy()
    frame = polars.DataFrame(x)
    return lambda: frame.select(polars.all().ewm_mean(alpha=alpha)).to_numpy()


def numbagg(x: Any, axis: int, alpha: float) -> Callable[[], Any]:
    import numbagg

    return lambda: numbagg.move_exp_nanmean(x, alpha=alpha, axis=axis)


def scipy(x: Any, axis: int, alpha: float) -> Callable[[], Any]:
    from scipy.signal import lfilter

    taps, poles = numpy.array([alpha], x.dtype), numpy.array([1.0, alpha - 1.0], x.dtype)
    return lambda: lfilter(taps, poles, x, axis=axis)


NOT_DEBIASED = "scipy lfilter (not debiased)"
PEERS: dict[str, Peer] = {
    "pandas ewm.mean": pandas,
    "polars ewm_mean": polars,
    "numbagg move_exp_nanmean": numbagg,
    NOT_DEBIASED: scipy,
}


def peers(x: Any, axis: int, alpha: float) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Those that can be made for such an array, and why the others cannot."""
    made, left_out = {}, {}
    for name, make in PEERS.items():
        try:
            importlib.import_module(name.split()[0])
            made[name] = make(x, axis, alpha)
        except (ImportError, NotThisOne) as error:
            left_out[name] = f"not installed: {error}" if isinstance(error, ImportError) else str(error)
    return made, left_out
