"""One update of a ResNet-50-sized model: time beside `torch._foreach_lerp_` on the same tensors, and memory.

Each contender is first checked against float64; a row whose result is wrong is not printed as a figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ewma
from benchmarks.memory import peak_extra
from benchmarks.timing import compare

HALF_LIFE = 2_000
LIMIT = "torch._foreach_lerp_"


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The 161 parameters of a ResNet-50, 25.6 million numbers."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += [(width, width_in, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, width_in, 1, 1), (4 * width,), (4 * width,)]
            width_in = 4 * width
    return [*shapes, (1000, width_in), (1000,)]


def model_of(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    model.weights = nn.ParameterList([nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes])
    return model


class Contender:
    """A way to average a model: how to update, and how to read the averages."""

    def __init__(self, model: nn.Module, update: Callable[[], object], averages: Callable[[], list[Tensor]]) -> None:
        self.model, self.update, self.averages = model, update, averages

    def error(self, coefficient: float) -> float:
        """How far one update of the largest tensor is from float64, as a share of the step it should have taken."""
        index = max(range(len(self.averages())), key=lambda index: self.averages()[index].numel())
        before = self.averages()[index].double()
        value = list(self.model.parameters())[index].double()
        self.update()
        step = coefficient * (value - before)
        after = self.averages()[index].double()
        return ((after - before - step).mean().abs() / step.abs().mean()).item()


def ours(model: nn.Module, half_life: float = HALF_LIFE, **arguments: object) -> Contender:
    ema = ewma.ModelEMA(model, half_life=half_life, debias=False, **arguments)  # constant coefficient from the start
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Contender(model, ema.update, lambda: [average for _, average in ema.named_parameters()])


def raw_foreach(model: nn.Module, alpha: float) -> Contender:
    values = [parameter.detach() for parameter in model.parameters()]
    averages = [value + 0.1 * torch.randn_like(value) for value in values]
    return Contender(model, lambda: torch._foreach_lerp_(averages, values, alpha), lambda: averages)


def averaged_model(model: nn.Module, decay: float) -> Contender:
    swa = torch.optim.swa_utils
    peer = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(decay))
    peer.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    averages = [parameter.detach() for parameter in peer.module.parameters()]
    return Contender(model, lambda: peer.update_parameters(model), lambda: averages)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks weights", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args(arguments).rounds

    shapes, alpha = resnet50_shapes(), ewma.Exponential(half_life=HALF_LIFE).alpha
    bf16 = torch.bfloat16
    contenders = {
        LIMIT: (raw_foreach(model_of(shapes), alpha), alpha),
        "ModelEMA": (ours(model_of(shapes)), alpha),
        'ModelEMA(nonfinite="propagate")': (ours(model_of(shapes), nonfinite="propagate"), alpha),
        "torch AveragedModel, multi_avg": (averaged_model(model_of(shapes), 1 - alpha), alpha),
        "ModelEMA, bfloat16 weights": (ours(model_of(shapes, bf16)), alpha),
        "ModelEMA(half_life=20_000), rounded": (ours(model_of(shapes), 20_000), alpha / 10),
        "ModelEMA(dtype=bfloat16), rounded": (ours(model_of(shapes, bf16), dtype=bf16), alpha),
    }
    threads = torch.get_num_threads()
    print(f"one update, {len(shapes)} tensors, {sum(map(_numel, shapes)) / 1e6:.1f} M numbers, {threads} threads\n")
    right = {}
    for name, (contender, coefficient) in contenders.items():
        error = contender.error(coefficient)
        if error < 0.02:
            right[name] = contender.update
        else:
            print(f"{name}: wrong by {error:.0%} of a step, not timed")
    print(f"{'':38}{'ms':>8}{'ratio':>8}")
    for name, (milliseconds, ratio) in compare(right, LIMIT, rounds).items():
        print(f"{name:38}{milliseconds:8.2f}{ratio:8.2f}")
    _memory(shapes)


def _memory(shapes: list[tuple[int, ...]]) -> None:
    model = model_of(shapes)
    size = sum(parameter.nbytes for parameter in model.parameters())
    ema = ewma.ModelEMA(model, half_life=HALF_LIFE)
    rows = {"first update (makes the averages)": peak_extra(ema.update), "update": peak_extra(ema.update)}

    def swap() -> None:
        with ema.swapped():
            pass

    rows["swapped()"] = peak_extra(swap)
    narrow = model_of(shapes, torch.bfloat16)
    narrow_size = sum(parameter.nbytes for parameter in narrow.parameters())
    narrow_ema = ewma.ModelEMA(narrow, half_life=HALF_LIFE)
    narrow_ema.update()
    rows_narrow = {"update, bfloat16 weights": peak_extra(narrow_ema.update)}
    print(f"\n{'peak extra memory':38}{'MB':>8}{'of model':>10}")
    for name, extra in rows.items():
        print(f"{name:38}{extra / 1e6:8.1f}{extra / size:10.1%}")
    for name, extra in rows_narrow.items():
        print(f"{name:38}{extra / 1e6:8.1f}{extra / narrow_size:10.1%}")


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
