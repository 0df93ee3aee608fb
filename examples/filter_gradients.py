"""Filtered gradients on real data: what each filter is worth on handwritten digits, beside a plain control.

The same small network is trained by plain SGD on the same batches, with and without filters of its gradients. A filter
changes how large a step is, too: a constant gradient comes out `raw + slow` times as large. So Grokfast has a control,
without a filter, at three times the learning rate; and the low-pass has SGD's own momentum beside it, which it is. Then
2 % of the batches are corrupted, and a SpikeGuard watches.

    python examples/filter_gradients.py              # a quarter of a minute on two idle cores

Prints two tables, and writes a picture to out/gradients.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import ewma

BATCH, LEARNING_RATE, GOAL = 64, 0.2, 90.0

Watch = Callable[[torch.optim.Optimizer], Any]


def filtering(raw: float, slow: float, decay: float = 0.98) -> Watch:
    return lambda optimizer: ewma.GradientEMA(optimizer, decay=decay, raw=raw, slow=slow)


class Way(NamedTuple):
    watch: Watch  # is given the optimizer before the first step
    rate: float = 1.0  # times the learning rate
    corrupt: float = 0.0  # share of the batches
    momentum: float = 0.0


FILTERS = {
    "no filter": Way(lambda optimizer: None),
    "low-pass (raw 0, slow 1, decay .9)": Way(filtering(0.0, 1.0, 0.9)),
    "no filter, SGD's momentum .9": Way(lambda optimizer: None, rate=0.1, momentum=0.9),
    "Grokfast (raw 1, slow 2)": Way(filtering(1.0, 2.0)),
    "no filter, learning rate x 3": Way(lambda optimizer: None, rate=3.0),
    "high-pass (raw 1, slow -1)": Way(filtering(1.0, -1.0)),
}
GUARDS = {
    "clean batches, no guard": Way(lambda optimizer: None),
    "clean batches, SpikeGuard": Way(lambda optimizer: ewma.gradients.SpikeGuard().attach(optimizer)),
    "2 % corrupted, no guard": Way(lambda optimizer: None, corrupt=0.02),
    "2 % corrupted, SpikeGuard": Way(lambda optimizer: ewma.gradients.SpikeGuard().attach(optimizer), corrupt=0.02),
    "2 % corrupted, SpikeGuard, skip=True": Way(
        lambda optimizer: ewma.gradients.SpikeGuard().attach(optimizer, skip=True), corrupt=0.02
    ),
}


class Run(NamedTuple):
    losses: list[float]  # of each step
    curve: list[float]  # accuracy on digits never seen, in percent, every 10 steps
    cut: int  # steps that the guard has cut or skipped
    corrupted: int


def train(way: Way, seed: int, steps: int) -> Run:
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order].float() / 16, labels[order]
    torch.manual_seed(seed)  # the same first weights and the same batches in every way
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE * way.rate, momentum=way.momentum)
    watching = way.watch(optimizer)
    batches, faults = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    losses, curve, corrupted = [], [], 0
    for step in range(steps):
        chosen = torch.randint(0, 1400, (BATCH,), generator=batches)
        seen = pixels[chosen]
        if step >= 25 and torch.rand((), generator=faults) < way.corrupt:  # a guard has to know what is usual first
            seen, corrupted = 1000 * seen * torch.randn(seen.shape, generator=faults), corrupted + 1
        loss = nn.functional.cross_entropy(model(seen), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            with torch.no_grad():
                right = model(pixels[1400:]).argmax(dim=1) == labels[1400:]
            curve.append(100 * right.double().mean().item())
    return Run(losses, curve, getattr(watching, "clipped", 0), corrupted)


def reached(run: Run) -> float:
    """The first step at which the goal was met; infinite where it never was."""
    return next((10.0 * (place + 1) for place, accuracy in enumerate(run.curve) if accuracy >= GOAL), np.inf)


def filters_table(runs: dict[str, list[Run]]) -> str:
    lines = [f"{'filter':<38}{'accuracy (%)':>16}{f'steps to {GOAL:.0f} %':>16}"]
    for name, several in runs.items():
        last = np.array([run.curve[-1] for run in several])
        steps = np.median([reached(run) for run in several])
        told = f"{steps:.0f}" if np.isfinite(steps) else "never"
        lines.append(f"{name:<38}{last.mean():>9.1f} ± {last.std():<4.1f}{told:>16}")
    return "\n".join(lines)


def guards_table(runs: dict[str, list[Run]]) -> str:
    lines = [f"{'batches':<38}{'accuracy (%)':>16}{'corrupted':>11}{'cut':>6}"]
    for name, several in runs.items():
        last = np.array([run.curve[-1] for run in several])
        corrupted, cut = sum(run.corrupted for run in several), sum(run.cut for run in several)
        lines.append(f"{name:<38}{last.mean():>9.1f} ± {last.std():<4.1f}{corrupted:>11}{cut:>6}")
    return "\n".join(lines)


def draw(path: Path, filters: dict[str, list[Run]], guards: dict[str, list[Run]]) -> None:
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, runs in ((left, filters), (right, guards)):
        for number, (name, several) in enumerate(runs.items()):
            curves = np.array([run.curve for run in several])
            steps = 10 * np.arange(1, curves.shape[1] + 1)
            dashed = "--" if "x 3" in name or "clean batches, SpikeGuard" in name else "-"
            axes.plot(steps, curves.mean(axis=0), dashed, color=f"C{number}", linewidth=1.8, label=name)
        axes.set(xlabel="step", ylabel="digits recognised (%), mean over seeds", ylim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
    left.set(title="Filters, beside what they do to the learning rate", ylim=(50, 100))
    left.legend(frameon=False, loc="lower right")
    right.set(title="Corrupted batches, and a guard")
    right.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.7))
    unfinished = path.with_suffix(".unfinished.png")
    figure.savefig(unfinished)
    os.replace(unfinished, path)  # nobody ever sees half a picture


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many trainings to compare (default %(default)s)")
    parser.add_argument("--steps", type=int, default=600, help="how long each of them is (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/gradients"), help="folder (default %(default)s)")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < 10:
        parser.error("--seeds must be 1 or more, and --steps 10 or more")
    torch.set_num_threads(1)  # for a network this small a second thread only waits
    options.out.mkdir(parents=True, exist_ok=True)
    filters: dict[str, list[Run]] = {name: [] for name in FILTERS}
    guards: dict[str, list[Run]] = {name: [] for name in GUARDS}
    with tqdm(total=options.seeds * (len(FILTERS) + len(GUARDS)), desc="digits", unit="run") as bar:
        for ways, runs in ((FILTERS, filters), (GUARDS, guards)):
            for name, way in ways.items():
                for seed in range(options.seeds):
                    runs[name].append(train(way, seed, options.steps))
                    bar.update()
    print(f"\nDigits; seeds: {options.seeds}; steps: {options.steps} of {BATCH} images each\n")
    print(filters_table(filters), guards_table(guards), sep="\n\n")
    picture = options.out / "gradients.png"
    draw(picture, filters, guards)
    print(f"\nThe picture: {picture}")


if __name__ == "__main__":
    main()
