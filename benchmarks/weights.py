"""One update of a model's averages: time as a multiple of what the memory allows in the same minute; and memory.

Each contender is first checked against float64; a row whose result is wrong is not printed as a figure.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ewma
from benchmarks import limit
from benchmarks.memory import peak_extra
from benchmarks.report import NAME, Table, add_arguments, tell
from ewma import kernels
from ewma.shards import local

HALF_LIFE = 2_000
ALPHA = ewma.Exponential(half_life=HALF_LIFE).alpha
WRONG = 0.05
"""From which share of a step on a contender is not timed."""
MANY = 1_000
"""How many updates of a tiny model are timed in one go."""

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """The 161 parameters of a ResNet-50, 25.6 million numbers."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += [(width, width_in, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, width_in, 1, 1), (4 * width,), (4 * width,)]
            width_in = 4 * width
    return [*shapes, (1000, width_in), (1000,)]


def gpt2() -> Shapes:
    """The 148 parameters of a GPT-2, 124 million numbers."""
    d = 768
    block: Shapes = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(12 * block), (d,), (d,)]


def small() -> Shapes:
    """2,000 tensors, 10.9 million numbers."""
    return 1_000 * [(100, 108), (100,)]


def tiny() -> Shapes:
    """6 tensors, 9,000 numbers."""
    return [(64, 64), (64,), (64, 64), (64,), (10, 64), (10,)]


def model_of(shapes: Shapes, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A module for every two tensors, as in most models."""
    layers = [nn.Module() for _ in range(0, len(shapes), 2)]
    for number, shape in enumerate(shapes):
        parameter = nn.Parameter(torch.randn(shape).to(dtype))
        layers[number // 2].register_parameter("bias" if number % 2 else "weight", parameter)
    return nn.ModuleList(layers)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for part in map(local, model.parameters()):
            part += 0.1 * torch.randn_like(part)


class Contender:
    """A way to average values.

    Args:
        update: updates all averages.
        watched: some values and averages to check, each with the coefficient that it is averaged by.
    """

    def __init__(self, update: Callable[[], object], watched: Iterable[tuple[Tensor, Tensor, float]]) -> None:
        self.update, self.watched = update, list(watched)

    def error(self) -> float:
        """How far one update is from float64, as a share of the step it should have taken: the worst case.

        Noise that stochastic rounding adds does not count; a bias does, and a step that is too short or long.
        """
        steps = [coefficient * (value.double() - average.double()) for value, average, coefficient in self.watched]
        before = [average.double() for _, average, _ in self.watched]
        self.update()
        errors = []
        for (_, average, _), old, step in zip(self.watched, before, steps, strict=True):
            taken = average.double() - old
            errors.append(abs((taken - step).mean() / step.abs().mean()).item())
            errors.append(abs((taken * step).sum() / step.square().sum() - 1.0).item())
        return max(errors)


def largest(values: Iterable[Tensor], averages: Iterable[Tensor], coefficient: float) -> tuple[Tensor, Tensor, float]:
    value, average = max(zip(values, averages, strict=True), key=lambda pair: pair[0].numel())
    return value.detach(), average.detach(), coefficient


def memory_limit(shapes: Shapes, dtype: torch.dtype = torch.float32, into: torch.dtype = torch.float32) -> Contender:
    n = sum(torch.Size(shape).numel() for shape in shapes)
    value, average = torch.randn(n).to(dtype), torch.randn(n).to(into)
    coefficient = 0.25 if into == torch.bfloat16 else ALPHA  # rounded to nearest, a smaller one would not move it
    return Contender(limit.limit(average, value, coefficient), [(value, average, coefficient)])


def ours(model: nn.Module, half_life: float = HALF_LIFE, kernel: str = "", **arguments: object) -> Contender:
    ema = ewma.ModelEMA(model, half_life=half_life, debias=False, **arguments)  # constant coefficient from the start
    with mock.patch.dict(os.environ, {"EWMA_KERNEL": kernel} if kernel else {}):
        ema.update()
    move(model)
    averages = (average for _, average in ema.named_parameters())
    return Contender(ema.update, [largest(model.parameters(), averages, ewma.Exponential(half_life=half_life).alpha)])


def several(model: nn.Module, profiles: dict[str, ewma.Exponential]) -> Contender:
    ema = ewma.ModelEMA(model, profiles)
    ema.update()
    move(model)
    watched = []
    for name, profile in profiles.items():
        averages = (average for _, average in ema[name].named_parameters())
        watched.append(largest(model.parameters(), averages, profile.alpha))
    return Contender(ema.update, watched)


def one_after_the_other(model: nn.Module, profiles: dict[str, ewma.Exponential]) -> Contender:
    each = [several(model, {name: profile}) for name, profile in profiles.items()]
    return Contender(lambda: [one.update() for one in each], [pair for one in each for pair in one.watched])


def raw_foreach(model: nn.Module) -> Contender:
    values = [parameter.detach() for parameter in model.parameters()]
    averages = [value + 0.1 * torch.randn_like(value) for value in values]
    return Contender(lambda: torch._foreach_lerp_(averages, values, ALPHA), [largest(values, averages, ALPHA)])


def many_times(contender: Contender, times: int = MANY) -> Contender:
    def update() -> None:
        for _ in range(times):
            contender.update()

    timed = Contender(update, contender.watched)
    timed.error = contender.error  # type: ignore[method-assign]  # of one update
    return timed


def table(
    title: str,
    contenders: dict[str, Contender],
    rounds: int,
    others: tuple[dict[str, Contender], dict[str, str]] = ({}, {}),
    unit: str = "ms",
    times: int = 1,
) -> Table:
    """Time all that are right, beside the first of them.

    Args:
        others: other libraries', and why some of them cannot.
        times: how many updates to time in one go.
    """
    found = Table(title, unit, left_out=dict(others[1]))
    right = {}
    for name, contender in {**contenders, **others[0]}.items():
        error = contender.error()
        if error < WRONG:
            right[name] = many_times(contender, times).update
        else:
            found.left_out[name] = f"wrong by {error:.0%} of a step, not timed"
    if next(iter(contenders)) in right:
        found.time(right, rounds, (1e3 if unit == "µs" else 1.0) / times)
    return found


def _others(asked: bool, *model: Any) -> tuple[dict[str, Contender], dict[str, str]]:
    from benchmarks.weights_peers import peers

    return peers(*model) if asked else ({}, {})


def _resnet50(rounds: int, peers: bool) -> Table:
    shapes = resnet50()
    contenders = {
        limit.name(): memory_limit(shapes),
        "ModelEMA": ours(model_of(shapes)),
        'ModelEMA(nonfinite="propagate")': ours(model_of(shapes), nonfinite="propagate"),
        "ModelEMA(half_life=20_000), rounded stochastically": ours(model_of(shapes), 20_000),
        "ModelEMA, EWMA_KERNEL=foreach": ours(model_of(shapes), kernel="foreach"),
        "torch._foreach_lerp_": raw_foreach(model_of(shapes)),
    }
    return table("ResNet-50: 161 tensors, 25.6 M numbers, float32", contenders, rounds, _others(peers, shapes))


def _small(rounds: int, peers: bool) -> Table:
    contenders = {
        limit.name(): memory_limit(small()),
        "ModelEMA": ours(model_of(small())),
        "ModelEMA, EWMA_KERNEL=foreach": ours(model_of(small()), kernel="foreach"),
        "torch._foreach_lerp_": raw_foreach(model_of(small())),
    }
    return table("small layers: 2,000 tensors, 10.9 M numbers, float32", contenders, rounds, _others(peers, small()))


def _gpt2(rounds: int, peers: bool) -> Table:
    title = "GPT-2: 148 tensors, 124 M numbers, bfloat16 into float32"
    if limit.compiled() is None:
        return Table(title, "ms", left_out={"all": "its limit needs a C compiler"})
    bf16 = torch.bfloat16
    contenders = {
        limit.name(): memory_limit(gpt2(), bf16),
        "ModelEMA": ours(model_of(gpt2(), bf16)),
        "ModelEMA, EWMA_KERNEL=foreach": ours(model_of(gpt2(), bf16), kernel="foreach"),
    }
    return table(title, contenders, rounds, _others(peers, gpt2(), bf16, torch.float32))


def _bfloat16(rounds: int, peers: bool) -> Table:
    title = "ResNet-50, bfloat16 averages of bfloat16 weights; float16, as many bytes"
    bf16, f16 = torch.bfloat16, torch.float16
    if limit.compiled() is None:
        return Table(title, "ms", left_out={"all": "its limit needs a C compiler"})
    contenders = {
        f"{limit.name()}, rounded to nearest": memory_limit(resnet50(), bf16, bf16),
        "ModelEMA(dtype=torch.bfloat16)": ours(model_of(resnet50(), bf16), dtype=bf16),
        "ModelEMA(dtype=torch.bfloat16), EWMA_KERNEL=foreach": ours(
            model_of(resnet50(), bf16), dtype=bf16, kernel="foreach"
        ),
        "ModelEMA(dtype=torch.float16)": ours(model_of(resnet50(), f16), dtype=f16),
    }
    return table(title, contenders, rounds, _others(peers, resnet50(), bf16))


def _four(rounds: int, peers: bool) -> Table:
    four = {f"{k}": ewma.Exponential(half_life=HALF_LIFE // k, debias=False) for k in (1, 2, 4, 8)}
    contenders = {
        "four ModelEMAs": one_after_the_other(model_of(resnet50()), four),
        "one ModelEMA with four profiles": several(model_of(resnet50()), four),
    }
    return table("ResNet-50, float32, four averages", contenders, rounds)


def _tiny(rounds: int, peers: bool) -> Table:
    contenders = {
        "torch._foreach_lerp_": raw_foreach(model_of(tiny())),
        "ModelEMA": ours(model_of(tiny())),
        "ModelEMA, EWMA_KERNEL=foreach": ours(model_of(tiny()), kernel="foreach"),
    }
    title = "a tiny model: 6 tensors, 9,000 numbers"
    return table(title, contenders, rounds, _others(peers, tiny()), "µs", MANY)


TABLES: dict[str, Callable[[int, bool], Table]] = {
    "resnet50": _resnet50,
    "small": _small,
    "gpt2": _gpt2,
    "bfloat16": _bfloat16,
    "four": _four,
    "tiny": _tiny,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks weights", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", choices=[*TABLES, "memory"], nargs="+", default=[*TABLES, "memory"])
    add_arguments(parser)
    given = parser.parse_args(arguments)
    print(f"one update, {torch.get_num_threads()} threads, kernel {' '.join(kernels.choose('cpu'))}")
    tables = []
    for name in given.only:
        if name == "memory":
            _memory(given.peers)
        else:
            tables.append(TABLES[name](given.rounds, given.peers))
            print(tables[-1])
        gc.collect()
    tell(tables, given)


def _memory(peers: bool) -> None:
    """Bytes at the peak of a call, beyond what was there before it; of the model's size."""

    def row(name: str, call: Callable[[], object], model: nn.Module) -> None:
        size = sum(parameter.nbytes for parameter in model.parameters())
        extra = peak_extra(call)
        print(f"{name:{NAME}}{extra / 1e6:9.1f}{extra / size:8.1%}")

    def swap() -> None:
        with ema.swapped():
            pass

    print(f"\n{'ResNet-50, peak extra memory':{NAME}}{'MB':>9}{'of it':>8}")
    model = model_of(resnet50())
    ema = ewma.ModelEMA(model, half_life=HALF_LIFE)
    row("ModelEMA, first update (makes the averages)", ema.update, model)
    row("ModelEMA, update", ema.update, model)
    row("ModelEMA, swapped()", swap, model)
    narrow = model_of(resnet50(), torch.bfloat16)
    ema = ewma.ModelEMA(narrow, half_life=HALF_LIFE)
    ema.update()
    row("ModelEMA, update, bfloat16 weights", ema.update, narrow)
    if peers:
        from benchmarks.weights_peers import PEERS

        for name, make in PEERS.items():
            for into, weights, kind in ((None, model, ""), (torch.float32, narrow, ", bfloat16 weights")):
                try:
                    row(f"{name}, update{kind}", make(weights, into).update, weights)
                except Exception as error:
                    print(f"{name}, update{kind}: left out, {type(error).__name__}")
