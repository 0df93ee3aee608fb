"""Series and batches: time beside a plain copy into an existing array of the same size, in the same run.

Each contender is first checked against the recurrence in float64; a row whose result is wrong is not printed as a
figure. `--peers` adds other libraries; they allocate their results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy
import torch

import ewma
from benchmarks.memory import peak_extra
from benchmarks.report import NAME, Table, add_arguments, tell
from benchmarks.series_peers import NOT_DEBIASED, peers

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
    out, tensor = x.copy(), torch.from_numpy(x)
    series = ewma.ewm(x, alpha=ALPHA, axis=axis)
    return {
        "smooth, out=": lambda: ewma.smooth(x, alpha=ALPHA, axis=axis, out=out),
        "smooth": lambda: ewma.smooth(x, alpha=ALPHA, axis=axis),
        "smooth, tensor": lambda: ewma.smooth(tensor, alpha=ALPHA, dim=axis),
        "ewm.bands (mean and deviation)": lambda: series.bands()[1],
    }


def error(name: str, made: Any, right: Any, axis: int) -> float:
    """As a share of what is allowed. (lfilter goes on in x's own dtype, and does not divide by the weight.)"""
    if name != NOT_DEBIASED:
        return wrong(made, right, axis) / 16.0
    weights = -numpy.expm1(numpy.arange(1, len(right) + 1) * numpy.log1p(-ALPHA))
    return wrong(made, right * weights.reshape(-1, *[1] * (right.ndim - 1)), axis) / 500.0


def table(title: str, x: Any, axis: int, rounds: int, with_peers: bool) -> Table:
    existing, source = torch.empty(x.shape, dtype=torch.from_numpy(x).dtype), torch.from_numpy(x)
    copies: Contenders = {LIMIT: lambda: existing.copy_(source), "x.copy()": x.copy}
    others, left_out = peers(x, axis, ALPHA) if with_peers else ({}, {})
    found, right, contenders = Table(title, "ms", left_out=left_out), truth(x, axis), copies
    for name, contender in {**ours(x, axis), **others}.items():
        share = error(name, contender(), right, axis)
        if share < 1.0:
            contenders[name] = contender
        else:
            found.left_out[name] = f"wrong by {share:.0f} times what is allowed, not timed"
    return found.time(contenders, rounds)


def gradient(n: int, rounds: int) -> Table:
    x, dy = torch.randn(n, requires_grad=True), torch.randn(n)
    smoothed = ewma.smooth(x, alpha=ALPHA)
    contenders: Contenders = {
        "forward": lambda: ewma.smooth(x, alpha=ALPHA),
        "backward": lambda: torch.autograd.grad(smoothed, x, dy, retain_graph=True),
    }
    return Table(f"gradient of {n:,} float32", "ms").time(contenders, rounds)


CASES: dict[str, tuple[tuple[int, ...], str, int]] = {
    "short": ((1_000,), "float64", 0),
    "middle": ((100_000,), "float32", 0),
    "long": ((10_000_000,), "float32", 0),
    "double": ((10_000_000,), "float64", 0),
    "columns": ((100_000, 128), "float32", 0),
    "rows": ((128, 100_000), "float32", 1),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks series", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=[*CASES, "gradient", "memory"], nargs="+")
    add_arguments(parser)
    asked = parser.parse_args(arguments)
    print(f"alpha={ALPHA}, {torch.get_num_threads()} threads")
    rng = numpy.random.default_rng(0)
    tables = []
    for name in asked.only or [*CASES, "gradient", "memory"]:
        if name == "memory":
            memory(asked.peers)
            continue
        if name == "gradient":
            tables.append(gradient(10_000_000, asked.rounds))
        else:
            shape, dtype, axis = CASES[name]
            x = (1.0 + rng.standard_normal(shape)).astype(dtype)
            title = f"{' x '.join(map('{:,}'.format, shape))} {dtype}, along axis {axis}"
            tables.append(table(title, x, axis, asked.rounds, asked.peers))
        print(tables[-1])
    tell(tables, asked)


def memory(with_peers: bool) -> None:
    """Bytes at the peak of a call, beyond what was there before it."""
    x = numpy.random.default_rng(0).standard_normal(10_000_000).astype("float32")

    def contenders(x: Any) -> Contenders:
        return ours(x, 0) | (peers(x, 0, ALPHA)[0] if with_peers else {})

    for contender in contenders(x[:1_000]).values():
        contender()  # imports and compiles
    print(f"\n{'10,000,000 float32, peak extra memory':{NAME}}{'MB':>9}{'of it':>8}")
    for name, contender in contenders(x).items():
        extra = peak_extra(contender)
        print(f"{name:{NAME}}{extra / 1e6:9.1f}{extra / x.nbytes:8.0%}")
