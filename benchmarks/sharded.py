"""One update of a sharded model's averages, on ranks that run side by side: beside the same tensors without DTensor.

Each contender is first checked against float64, and its communication counted; a row whose result is wrong is not
printed as a figure. Of the ranks' figures the worst is.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.timing import compare
from benchmarks.weights import ALPHA, WRONG, Contender, Shapes, largest, many_times, model_of, move, ours
from ewma.shards import local

WIDTHS = {32: 50, 128: 5, 512: 1}
"""Of the layers, and how many updates of such a model are timed in one go."""

LIMIT = "ModelEMA of the same tensors without DTensor"


def transformer(width: int, layers: int = 10) -> Shapes:
    """12 parameters a layer."""
    d = width
    layer: Shapes = [(3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (d,), (d,)]
    return layers * layer


def sharded(shapes: Shapes) -> nn.Module:
    model = model_of(shapes)
    for layer in model.children():
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def shards(shapes: Shapes) -> nn.Module:
    """This rank's part of the model as plain tensors."""
    return model_of([tuple(local(parameter).shape) for parameter in sharded(shapes).parameters()])


def one_by_one(model: nn.Module) -> Contender:
    """What the update is in torch alone: lerp_ of each DTensor."""
    values = [parameter.detach() for parameter in model.parameters()]
    averages = [value.clone() for value in values]
    move(model)

    def update() -> None:
        for average, value in zip(averages, values, strict=True):
            average.lerp_(value, ALPHA)

    return Contender(update, [largest(map(local, values), map(local, averages), ALPHA)])


def of_shards(model: nn.Module) -> Contender:
    contender = ours(model)
    contender.watched = [tuple(map(local, pair[:2])) + pair[2:] for pair in contender.watched]  # type: ignore[misc]
    return contender


def calls(contender: Contender) -> int:
    """How many times an update communicates."""
    with CommDebugMode() as communication:
        contender.update()
    return communication.get_total_counts()


def table(shapes: Shapes, times: int, rounds: int) -> None:
    contenders = {
        LIMIT: ours(shards(shapes)),
        "ModelEMA of FSDP2 shards": of_shards(sharded(shapes)),
        "DTensor.lerp_, one by one": one_by_one(sharded(shapes)),
    }
    communicated = {name: calls(contender) for name, contender in contenders.items()}
    errors = {name: contender.error() for name, contender in contenders.items()}
    right = {
        name: many_times(contender, times).update
        for name, contender in contenders.items()
        if _worst(errors[name]) < WRONG
    }
    figures = compare(right, LIMIT, rounds, together=dist.barrier)
    rows = {name: (_worst(milliseconds), _worst(ratio)) for name, (milliseconds, ratio) in figures.items()}
    if dist.get_rank() == 0:
        numbers = sum(torch.Size(shape).numel() for shape in shapes)
        title = f"{len(shapes)} parameters, {numbers / 1e6:,.1f} M numbers, float32"
        print(f"\n{title:58}{'ms':>8}{'ratio':>8}{'calls':>7}")
        for name, (milliseconds, ratio) in rows.items():
            print(f"{name:58}{milliseconds / times:8.3f}{ratio:8.2f}{communicated[name]:7}")
        for name in errors.keys() - right.keys():
            print(f"{name}: wrong by {errors[name]:.0%} of a step, not timed")


def _worst(figure: float) -> float:
    told = torch.tensor(figure, dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.item()


def _rank(rank: int, ranks: int, threads: int, rounds: int, meeting: str) -> None:
    torch.set_num_threads(threads)
    random.seed(0)  # all ranks time the same contender at the same time
    dist.init_process_group("gloo", meeting, rank=rank, world_size=ranks)
    for width, times in WIDTHS.items():
        table(transformer(width), times, rounds)
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sharded", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--ranks", type=int, default=2)
    given = parser.parse_args(arguments)
    threads = max(1, torch.get_num_threads() // given.ranks)
    print(f"one update, {given.ranks} ranks of {threads} threads")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        processes = [
            context.Process(target=_rank, args=(rank, given.ranks, threads, given.rounds, meeting))
            for rank in range(given.ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed; see above")
