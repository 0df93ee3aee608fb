"""One filtering of a model's gradients: time beside an optimizer step, and beside what the memory allows; and memory.

Each contender is first checked against float64; a row whose result is wrong is not timed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

import ewma
from benchmarks import limit
from benchmarks.memory import peak_extra
from benchmarks.timing import compare
from benchmarks.weights import resnet50
from ewma import kernels

DECAY, RAW, SLOW = 0.98, 1.0, 2.0


class Contender:
    """A way to filter gradients in place.

    Args:
        call: filters once.
        gradient, average: one tensor to check, and its average; None for what filters nothing.
    """

    def __init__(
        self, call: Callable[[], object], gradient: Tensor | None = None, average: Tensor | None = None
    ) -> None:
        self.call, self.gradient, self.average = call, gradient, average

    def error(self, raw: float, slow: float) -> float:
        """The largest difference from float64 after one call, where gradients are some 1."""
        if self.gradient is None or self.average is None:
            self.call()
            return 0.0
        self.gradient.normal_()
        before = self.average.double()
        average = before + (1.0 - DECAY) * (self.gradient.double() - before)
        filtered = raw * self.gradient.double() + slow * average
        self.call()
        return max((self.average - average).abs().max().item(), (self.gradient - filtered).abs().max().item())


def parameters() -> list[nn.Parameter]:
    owners = [nn.Parameter(torch.randn(shape)) for shape in resnet50()]
    for owner in owners:
        owner.grad = torch.randn_like(owner)
    return owners


def ours(raw: float = RAW, slow: float = SLOW, kernel: str = "", **how: object) -> Contender:
    owners = parameters()
    optimizer = torch.optim.SGD(owners, lr=0.0)
    ema = ewma.GradientEMA(optimizer, decay=DECAY, debias=False, raw=raw, slow=slow, hook=False, **how)
    with mock.patch.dict(os.environ, {"EWMA_KERNEL": kernel} if kernel else {}):
        ema.apply()
    largest = max(range(len(owners)), key=lambda place: owners[place].numel())
    return Contender(ema.apply, owners[largest].grad, dict(ema.named_gradients())[f"0.{largest}"])


def elsewhere() -> Contender:
    """Each gradient but the one to check lies elsewhere at every step, as after zero_grad()."""
    owners = parameters()
    optimizer = torch.optim.SGD(owners, lr=0.0)
    ema = ewma.GradientEMA(optimizer, decay=DECAY, debias=False, raw=RAW, slow=SLOW, hook=False)
    ema.apply()
    others = [torch.randn_like(owner) for owner in owners]

    def call() -> None:
        for place, owner in enumerate(owners[:-2]):
            owner.grad, others[place] = others[place], owner.grad
        ema.apply()

    return Contender(call, owners[-2].grad, dict(ema.named_gradients())[f"0.{len(owners) - 2}"])


def foreach() -> Contender:
    gradients = [owner.grad for owner in parameters()]
    averages = [torch.randn_like(gradient) for gradient in gradients]

    def call() -> None:
        torch._foreach_lerp_(averages, gradients, 1.0 - DECAY)
        torch._foreach_add_(gradients, averages, alpha=SLOW)

    return Contender(call, gradients[-2], averages[-2])


def as_published() -> Contender:
    """A dictionary of averages, each made anew at every step, as the paper's own listing has it."""
    owners = dict(enumerate(parameters()))
    averages = {name: torch.randn_like(owner) for name, owner in owners.items()}
    watched = averages[159]

    def call() -> None:
        for name, owner in owners.items():
            averages[name] = averages[name] * DECAY + owner.grad * (1.0 - DECAY)
            owner.grad = owner.grad + averages[name] * SLOW
        owners[159].grad, gradient = gradient_of, owners[159].grad
        gradient_of.copy_(gradient)
        watched.copy_(averages[159])

    gradient_of = owners[159].grad
    return Contender(call, gradient_of, watched)


def step_of(kind: type[torch.optim.Optimizer], **how: object) -> Contender:
    optimizer = kind(parameters(), **how)
    return Contender(optimizer.step)


def memory_limit(raw: float = RAW, slow: float = SLOW) -> Contender:
    n = sum(torch.Size(shape).numel() for shape in resnet50())
    gradient, average = torch.randn(n), torch.randn(n)
    return Contender(limit.filter_limit(average, gradient, 1.0 - DECAY, raw, slow), gradient, average)


def table(title: str, contenders: dict[str, Contender], rounds: int, mixes: dict[str, tuple[float, float]]) -> None:
    """Time all that are right, beside the first of them."""
    right = {}
    for name, contender in contenders.items():
        error = contender.error(*mixes.get(name, (RAW, SLOW)))
        if error < 1e-5:
            right[name] = contender.call
        else:
            print(f"{name}: wrong by {error:.1g}, not timed")
    print(f"\n{title:62}{'ms':>8}{'ratio':>8}")
    for name, (milliseconds, ratio) in compare(right, next(iter(right)), rounds).items():
        print(f"{name:62}{milliseconds:8.2f}{ratio:8.2f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gradients", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--only", choices=["optimizer", "limit", "memory"], nargs="+", default=["optimizer", "limit", "memory"]
    )
    given = parser.parse_args(arguments)
    print(f"ResNet-50's gradients, {torch.get_num_threads()} threads, kernel {' '.join(kernels.choose('cpu'))}")
    if "optimizer" in given.only:
        contenders = {
            "torch.optim.AdamW(fused=True).step()": step_of(torch.optim.AdamW, fused=True),
            "torch.optim.AdamW(foreach=True).step()": step_of(torch.optim.AdamW, foreach=True),
            "GradientEMA(raw=1, slow=2)": ours(),
            "GradientEMA(raw=1, slow=2), gradients elsewhere each time": elsewhere(),
            "GradientEMA(raw=1, slow=2), EWMA_KERNEL=foreach": ours(kernel="foreach"),
            "_foreach_lerp_ and _foreach_add_": foreach(),
            "as published": as_published(),
        }
        table("beside an optimizer step", contenders, given.rounds, {})
    if "limit" in given.only:
        contenders = {
            "limit: a C loop, 16 bytes a number": memory_limit(),
            "GradientEMA(raw=1, slow=2)": ours(),
            'GradientEMA(raw=1, slow=2, nonfinite="propagate")': ours(nonfinite="propagate"),
            "GradientEMA(raw=0, slow=1), low-pass": ours(0.0, 1.0),
            "GradientEMA(raw=1, slow=0), only measured": ours(1.0, 0.0),
            "GradientEMA(raw=1, slow=2, squares=True)": ours(squares=True),
        }
        mixes = {
            "GradientEMA(raw=0, slow=1), low-pass": (0.0, 1.0),
            "GradientEMA(raw=1, slow=0), only measured": (1.0, 0.0),
        }
        table("beside the memory's limit", contenders, given.rounds, mixes)
    if "memory" in given.only:
        memory()


def memory() -> None:
    owners = parameters()
    size = sum(owner.nbytes for owner in owners)
    ema = ewma.GradientEMA(torch.optim.SGD(owners, lr=0.0), decay=DECAY, raw=RAW, slow=SLOW, hook=False)
    print(f"\n{'peak extra memory':62}{'MB':>8}{'of model':>10}")
    for name in ("first step (makes the averages)", "step"):
        extra = peak_extra(ema.apply)
        print(f"{name:62}{extra / 1e6:8.1f}{extra / size:10.1%}")
