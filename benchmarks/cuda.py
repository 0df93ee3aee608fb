"""Averages on CUDA: time beside a copy of as many bytes on the device, in the same run; launches; the host's time.

Each contender is first checked against float64; a row whose result is wrong is not printed as a figure.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import ewma
from benchmarks import gradients, weights
from benchmarks.device import Host, device_of, seconds
from benchmarks.report import Table, add_arguments, tell
from benchmarks.weights import Contender, Shapes
from ewma import kernels

ALPHA = 1e-3
CHECKED = 2_000
ASKED = {"weights": 0.85, "bfloat16": 0.80, "series": 0.70}
"""Which share of a copy's bandwidth each should reach at least."""

f32, bf16 = torch.float32, torch.bfloat16


class Bench:
    """One device, and how much of the sizes is measured."""

    def __init__(self, device: Host, rounds: int, share: float) -> None:
        self.device, self.rounds, self.share = device, rounds, share

    def billion(self) -> Shapes:
        """1,007 million numbers in 60 matrices, as a language model has them."""
        side = int(4096 * self.share**0.5)
        return 60 * [(side, side)]

    def small(self) -> Shapes:
        """2,000 tensors, 10.9 million numbers."""
        return weights.small()[: max(int(2_000 * self.share), 2)]

    def length(self, n: int) -> int:
        return max(int(n * self.share), CHECKED)

    def model(self, shapes: Shapes, dtype: torch.dtype = f32) -> nn.Module:
        with torch.device(self.device.type):
            return weights.model_of(shapes, dtype)

    def copy_of(self, size: int) -> Callable[[], object]:
        """A copy that moves so many bytes, half of them read and half written."""
        source, target = (torch.zeros(size // 8, dtype=f32, device=self.device.type) for _ in range(2))
        return lambda: target.copy_(source)

    def time(self, title: str, size: int, contenders: dict[str, Callable[[], object]], left_out: Any) -> Table:
        table = Table(title, "ms", left_out=dict(left_out))
        copy = {f"copy of as many bytes, {size / 1e9:.3g} GB": self.copy_of(size)}
        return table.time(copy | contenders, self.rounds, clock=self.device.seconds)


def right(contenders: dict[str, Contender]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What is right, and what is not."""
    errors = {name: contender.error() for name, contender in contenders.items()}
    wrong = {name: error for name, error in errors.items() if not error < weights.WRONG}
    good = {name: contender.update for name, contender in contenders.items() if name not in wrong}
    return good, {name: f"wrong by {error:.0%} of a step, not timed" for name, error in wrong.items()}


def one_billion(bench: Bench) -> Table:
    shapes = bench.billion()
    n = sum(torch.Size(shape).numel() for shape in shapes)
    model = bench.model(shapes)
    made, left_out = right({"ModelEMA": weights.ours(model), "torch._foreach_lerp_": weights.raw_foreach(model)})
    return bench.time(f"{n / 1e6:,.0f} M float32 weights", 12 * n, made, left_out)


def bfloat16(bench: Bench) -> Table:
    shapes = bench.billion()
    n = sum(torch.Size(shape).numel() for shape in shapes)
    made, left_out = right({"ModelEMA": weights.ours(bench.model(shapes, bf16))})
    return bench.time(f"{n / 1e6:,.0f} M bfloat16 weights into float32", 10 * n, made, left_out)


def rounded(bench: Bench) -> Table:
    shapes = bench.billion()
    n = sum(torch.Size(shape).numel() for shape in shapes)
    made, left_out = right({"ModelEMA(dtype=torch.bfloat16)": weights.ours(bench.model(shapes, bf16), dtype=bf16)})
    return bench.time(f"{n / 1e6:,.0f} M bfloat16 weights, rounded stochastically", 6 * n, made, left_out)


def small(bench: Bench) -> Table:
    shapes = bench.small()
    n, model = sum(torch.Size(shape).numel() for shape in shapes), bench.model(shapes)
    contenders = {"ModelEMA": weights.ours(model), "torch._foreach_lerp_": weights.raw_foreach(model)}
    made, left_out = right(contenders)
    for name, call in made.items():
        bench.device.wait()
        host = statistics.median(seconds(call) for _ in range(bench.rounds))
        launches = bench.device.launches(call)
        left_out[f"{name}: launches, the host's ms"] = (
            f"{'unknown' if launches is None else launches}, {1e3 * host:.3g}"
        )
    return bench.time(f"{len(shapes):,} small float32 tensors, {n / 1e6:.1f} M numbers", 12 * n, made, left_out)


def filtered(bench: Bench) -> Table:
    owners = list(bench.model(bench.billion()[:20]).parameters())
    for owner in owners:
        owner.grad = torch.randn_like(owner)
    optimizer = torch.optim.SGD(owners, lr=0.0)
    mix = {"raw": gradients.RAW, "slow": gradients.SLOW}
    ema = ewma.GradientEMA(optimizer, decay=gradients.DECAY, debias=False, hook=False, **mix)
    ema.apply()
    contender = gradients.Contender(ema.apply, owners[0].grad, dict(ema.named_gradients())["0.0"])
    made, left_out = {"GradientEMA(raw=1, slow=2)": ema.apply}, {}
    if not (error := contender.error(**mix)) < 1e-5:
        made, left_out = {}, dict.fromkeys(made, f"wrong by {error:.1g}, not timed")
    n = sum(owner.numel() for owner in owners)
    return bench.time(f"{n / 1e6:,.0f} M float32 gradients, filtered", 16 * n, made, left_out)


def series(bench: Bench) -> Table:
    return of_series(bench, bench.length(100_000_000), 1)


def columns(bench: Bench) -> Table:
    return of_series(bench, bench.length(1_000_000), 128)


def of_series(bench: Bench, n: int, lanes: int) -> Table:
    x = (1.0 + torch.randn(n, lanes, device=bench.device.type)).squeeze(1)
    out, learned = torch.empty_like(x), x.clone().requires_grad_()
    smoothed, dy = ewma.smooth(learned, alpha=ALPHA, axis=0), torch.ones_like(x)
    size = 8 * x.numel()
    contenders: dict[str, Callable[[], object]] = {
        "smooth(x, out=)": lambda: ewma.smooth(x, alpha=ALPHA, axis=0, out=out),
        "backward": lambda: torch.autograd.grad(smoothed, learned, dy, retain_graph=True),
    }
    left_out = {}
    if not (error := off(ewma.smooth(x, alpha=ALPHA, axis=0), x)) < 1.0:
        left_out["smooth(x, out=)"] = f"wrong by {error:.0f} roundings, not timed"
        contenders = {}
    return bench.time(f"{n:,} x {lanes} float32, along time, alpha={ALPHA:g}", size, contenders, left_out)


def off(made: Tensor, x: Tensor) -> float:
    """The largest error of the first steps, in roundings at the largest value."""
    mean, weight, worst = x[0].double().cpu(), 1.0, 0.0
    values, got = x[:CHECKED].double().cpu(), made[:CHECKED].double().cpu()
    for value, one in zip(values[1:], got[1:], strict=True):
        weight = (1.0 - ALPHA) * weight + 1.0
        mean = mean + (value - mean) / weight
        worst = max(worst, float((one - mean).abs().max()))
    return worst / (torch.finfo(made.dtype).eps * float(got.abs().max()))


TABLES: dict[str, Callable[[Bench], Table]] = {
    "weights": one_billion,
    "bfloat16": bfloat16,
    "rounded": rounded,
    "small": small,
    "filter": filtered,
    "series": series,
    "columns": columns,
}


def verdict(name: str, table: Table) -> str:
    """What share of a copy's bandwidth was reached, by the first after the copy; and what was asked for."""
    rows = list(table.rows.items())
    if len(rows) < 2:
        return f"{name}: nothing was timed"
    (_, _), (contender, (_, ratio)) = rows[:2]
    asked = f", {ASKED[name]:.0%} asked for" if name in ASKED else ""
    return f"{contender}: {1.0 / ratio:.0%} of a copy's bandwidth{asked}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks cuda", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="the CPU only tries the program")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--share", type=float, default=1.0, help="of the sizes; all takes 40 GB on the device")
    parser.add_argument("--only", choices=[*TABLES], nargs="+", default=[*TABLES])
    add_arguments(parser)
    given = parser.parse_args(arguments)
    device = device_of(given.device)
    print(f"{device}; torch {torch.__version__}, kernel {' '.join(kernels.choose(device.type))}")
    bench, tables = Bench(device, given.rounds, given.share), []
    for name in given.only:
        tables.append(TABLES[name](bench))
        print(f"{tables[-1]}\n{verdict(name, tables[-1])}")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    tell(tables, given)
