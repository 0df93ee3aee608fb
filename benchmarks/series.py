"""Series and batches: time beside a plain copy into an existing array of the same size, in the same run.

Each contender is first checked against the recurrence in float64; a row whose result is wrong is not printed as a
figure. `--peers` adds those of pandas, polars and scipy that can be imported; they allocate their results.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy
import torch

import ewma
from benchmarks.timing import compare

ALPHA = 1e-3
LIMIT = "copy into existing, all threads"
CHECKED = 2_000

Contenders = dict[str, Callable[[], Any]]


def truth(x: Any, axis: int) -> Any:
    """The first steps' debiased mean, step by step in float64."""
    lanes = numpy.moveaxis(x, axis, 0)[:CHECKED].astype("float64")
    mean, weight, made = numpy.zeros(lanes.shape[1:]), 0.0, []
    for value in lanes:
        weight = (1.0 - ALPHA) * weight + 1.0
        mean = mean + (value - mean) / weight
        made.append(mean)
    return numpy.stack(made)


def wrong(made: Any, right: Any, axis: int) -> float:
    """The largest error, in roundings of the result's dtype at the largest value."""
    made = numpy.asarray(made)
    if made.shape[axis] < CHECKED and made.shape[axis] != right.shape[0]:
        return numpy.inf
    error = abs(numpy.moveaxis(made, axis, 0)[:CHECKED].astype("float64") - right).max()
    return float(error / (numpy.finfo(made.dtype).eps * abs(right).max()))


def ours(x: Any, axis: int) -> Contenders:
    out, tensor = numpy.empty_like(x), torch.from_numpy(x)
    series = ewma.ewm(x, alpha=ALPHA, axis=axis)
    return {
        "smooth, out=": lambda: ewma.smooth(x, alpha=ALPHA, axis=axis, out=out),
        "smooth": lambda: ewma.smooth(x, alpha=ALPHA, axis=axis),
        "smooth, tensor": lambda: ewma.smooth(tensor, alpha=ALPHA, dim=axis),
        "ewm.bands (mean and deviation)": lambda: series.bands()[1],
    }


def peers(x: Any, axis: int) -> Contenders:
    found: Contenders = {}
    if importlib.util.find_spec("pandas") and (x.ndim == 1 or axis == 0):
        import pandas

        frame = pandas.Series(x) if x.ndim == 1 else pandas.DataFrame(x)
        found["pandas ewm.mean"] = lambda: frame.ewm(alpha=ALPHA).mean().to_numpy()
    if importlib.util.find_spec("polars") and x.ndim == 1:
        import polars

        column = polars.Series(x)
        found["polars ewm_mean"] = lambda: column.ewm_mean(alpha=ALPHA).to_numpy()
    if importlib.util.find_spec("scipy"):
        from scipy.signal import lfilter

        taps, poles = numpy.array([ALPHA], x.dtype), numpy.array([1.0, ALPHA - 1.0], x.dtype)
        found["scipy lfilter (not debiased)"] = lambda: lfilter(taps, poles, x, axis=axis)
    return found


def table(title: str, x: Any, axis: int, rounds: int, with_peers: bool) -> None:
    existing, source = torch.empty(x.shape, dtype=torch.from_numpy(x).dtype), torch.from_numpy(x)
    contenders: Contenders = {LIMIT: lambda: existing.copy_(source), "x.copy()": x.copy, **ours(x, axis)}
    if with_peers:
        contenders |= peers(x, axis)
    right, unlike = truth(x, axis), {LIMIT, "x.copy()", "scipy lfilter (not debiased)"}
    for name in [name for name in contenders if name not in unlike]:
        error = wrong(contenders[name](), right, axis)
        if not error < 16.0:
            print(f"{name}: wrong by {error:.0f} roundings, not timed")
            del contenders[name]
    print(f"\n{title:42}{'ms':>9}{'ratio':>8}")
    for name, (milliseconds, ratio) in compare(contenders, LIMIT, rounds).items():
        print(f"{name:42}{milliseconds:9.3f}{ratio:8.2f}")


def gradient(n: int, rounds: int) -> None:
    x, dy = torch.randn(n, requires_grad=True), torch.randn(n)
    smoothed = ewma.smooth(x, alpha=ALPHA)
    contenders: Contenders = {
        "forward": lambda: ewma.smooth(x, alpha=ALPHA),
        "backward": lambda: torch.autograd.grad(smoothed, x, dy, retain_graph=True),
    }
    print(f"\n{f'gradient of {n:,} float32':42}{'ms':>9}{'ratio':>8}")
    for name, (milliseconds, ratio) in compare(contenders, "forward", rounds).items():
        print(f"{name:42}{milliseconds:9.3f}{ratio:8.2f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks series", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peers", action="store_true")
    asked = parser.parse_args(arguments)
    print(f"alpha={ALPHA}, {torch.get_num_threads()} threads")
    rng = numpy.random.default_rng(0)
    for shape, dtype, axis in (
        ((1_000,), "float64", 0),
        ((100_000,), "float32", 0),
        ((10_000_000,), "float32", 0),
        ((10_000_000,), "float64", 0),
        ((100_000, 128), "float32", 0),
        ((100_000, 128), "float32", 1),
    ):
        x = (1.0 + rng.standard_normal(shape)).astype(dtype)
        title = f"{' x '.join(map('{:,}'.format, shape))} {dtype}, along axis {axis}"
        table(title, x, axis, asked.rounds, asked.peers)
    gradient(10_000_000, asked.rounds)
