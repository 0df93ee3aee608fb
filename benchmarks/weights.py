"""One update of a model's averages: time as a multiple of what the memory allows in the same minute; and memory.

Each contender is first checked against float64; a row whose result is wrong is not printed as a figure.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Callable, Iterable
from unittest import mock

import torch
from torch import Tensor, nn

import ewma
from benchmarks import limit
from benchmarks.memory import peak_extra
from benchmarks.timing import compare
from ewma import kernels
from ewma.shards import local

HALF_LIFE = 2_000
ALPHA = ewma.Exponential(half_life=HALF_LIFE).alpha
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
        """How far one update is from float64, as a share of the step it should have taken: the worst case."""
        steps = [coefficient * (value.double() - average.double()) for value, average, coefficient in self.watched]
        before = [average.double() for _, average, _ in self.watched]
        self.update()
        return max(
            ((average.double() - old - step).mean().abs() / step.abs().mean()).item()
            for (_, average, _), old, step in zip(self.watched, before, steps, strict=True)
        )


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
    with mock.patch.dict(os.environ, {"EWMA_KERNEL": kernel}):
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


def averaged_model(model: nn.Module) -> Contender:
    swa = torch.optim.swa_utils
    peer = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(1 - ALPHA))
    peer.update_parameters(model)
    move(model)
    return Contender(
        lambda: peer.update_parameters(model), [largest(model.parameters(), peer.module.parameters(), ALPHA)]
    )


def many_times(contender: Contender, times: int = MANY) -> Contender:
    def update() -> None:
        for _ in range(times):
            contender.update()

    timed = Contender(update, contender.watched)
    timed.error = contender.error  # type: ignore[method-assign]  # of one update
    return timed


def table(title: str, contenders: dict[str, Contender], rounds: int, unit: str = "ms", scale: float = 1.0) -> None:
    """Time all that are right, beside the first of them."""
    right = {}
    for name, contender in contenders.items():
        error = contender.error()
        if error < 0.02:
            right[name] = contender.update
        else:
            print(f"{name}: wrong by {error:.0%} of a step, not timed")
    base = next(iter(contenders))
    if base not in right:
        return
    print(f"\n{title:58}{unit:>8}{'ratio':>8}")
    for name, (milliseconds, ratio) in compare(right, base, rounds).items():
        print(f"{name:58}{milliseconds * scale:8.2f}{ratio:8.2f}")


def _resnet50(rounds: int) -> None:
    shapes = resnet50()
    contenders = {
        limit.name(): memory_limit(shapes),
        "ModelEMA": ours(model_of(shapes)),
        'ModelEMA(nonfinite="propagate")': ours(model_of(shapes), nonfinite="propagate"),
        "ModelEMA(half_life=20_000), rounded stochastically": ours(model_of(shapes), 20_000),
        "ModelEMA, EWMA_KERNEL=foreach": ours(model_of(shapes), kernel="foreach"),
        "torch._foreach_lerp_": raw_foreach(model_of(shapes)),
        "torch AveragedModel, multi_avg": averaged_model(model_of(shapes)),
    }
    table("ResNet-50: 161 tensors, 25.6 M numbers, float32", contenders, rounds)


def _small(rounds: int) -> None:
    contenders = {
        limit.name(): memory_limit(small()),
        "ModelEMA": ours(model_of(small())),
        "ModelEMA, EWMA_KERNEL=foreach": ours(model_of(small()), kernel="foreach"),
        "torch._foreach_lerp_": raw_foreach(model_of(small())),
        "torch AveragedModel, multi_avg": averaged_model(model_of(small())),
    }
    table("small layers: 2,000 tensors, 10.9 M numbers, float32", contenders, rounds)


def _gpt2(rounds: int) -> None:
    if limit.compiled() is None:
        print("\nGPT-2, bfloat16 into float32: left out, since its limit needs a C compiler")
        return
    bf16 = torch.bfloat16
    contenders = {
        limit.name(): memory_limit(gpt2(), bf16),
        "ModelEMA": ours(model_of(gpt2(), bf16)),
        "ModelEMA, EWMA_KERNEL=foreach": ours(model_of(gpt2(), bf16), kernel="foreach"),
    }
    table("GPT-2: 148 tensors, 124 M numbers, bfloat16 into float32", contenders, rounds)


def _bfloat16(rounds: int) -> None:
    bf16 = torch.bfloat16
    contenders = {
        limit.name(): memory_limit(resnet50(), bf16, bf16),
        "ModelEMA(dtype=torch.bfloat16)": ours(model_of(resnet50(), bf16), dtype=bf16),
        "ModelEMA(dtype=torch.bfloat16), EWMA_KERNEL=foreach": ours(
            model_of(resnet50(), bf16), dtype=bf16, kernel="foreach"
        ),
    }
    table("ResNet-50, bfloat16 averages, rounded stochastically", contenders, rounds)


def _four(rounds: int) -> None:
    four = {f"{k}": ewma.Exponential(half_life=HALF_LIFE // k, debias=False) for k in (1, 2, 4, 8)}
    contenders = {
        "four ModelEMAs": one_after_the_other(model_of(resnet50()), four),
        "one ModelEMA with four profiles": several(model_of(resnet50()), four),
    }
    table("ResNet-50, float32, four averages", contenders, rounds)


def _tiny(rounds: int) -> None:
    contenders = {
        "torch._foreach_lerp_": many_times(raw_foreach(model_of(tiny()))),
        "ModelEMA": many_times(ours(model_of(tiny()))),
        "ModelEMA, EWMA_KERNEL=foreach": many_times(ours(model_of(tiny()), kernel="foreach")),
        "torch AveragedModel, multi_avg": many_times(averaged_model(model_of(tiny()))),
    }
    table("a tiny model: 6 tensors, 9,000 numbers", contenders, rounds, "µs", 1e3 / MANY)


TABLES: dict[str, Callable[[int], None]] = {
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
    given = parser.parse_args(arguments)
    print(f"one update, {torch.get_num_threads()} threads, kernel {' '.join(kernels.choose('cpu'))}")
    for name in given.only:
        TABLES.get(name, _memory)(given.rounds)
        gc.collect()


def _memory(rounds: int) -> None:
    model = model_of(resnet50())
    size = sum(parameter.nbytes for parameter in model.parameters())
    ema = ewma.ModelEMA(model, half_life=HALF_LIFE)
    rows = {"first update (makes the averages)": peak_extra(ema.update), "update": peak_extra(ema.update)}

    def swap() -> None:
        with ema.swapped():
            pass

    rows["swapped()"] = peak_extra(swap)
    narrow = model_of(resnet50(), torch.bfloat16)
    narrow_size = sum(parameter.nbytes for parameter in narrow.parameters())
    narrow_ema = ewma.ModelEMA(narrow, half_life=HALF_LIFE)
    narrow_ema.update()
    rows_narrow = {"update, bfloat16 weights": peak_extra(narrow_ema.update)}
    print(f"\n{'ResNet-50, peak extra memory':58}{'MB':>8}{'of model':>10}")
    for name, extra in rows.items():
        print(f"{name:58}{extra / 1e6:8.1f}{extra / size:10.1%}")
    for name, extra in rows_narrow.items():
        print(f"{name:58}{extra / 1e6:8.1f}{extra / narrow_size:10.1%}")
