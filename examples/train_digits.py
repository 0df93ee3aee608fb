"""Averaged weights on real data: handwritten digits, where 20 % of the training labels are wrong.

A small network is trained with a constant learning rate, so its weights never come to rest, and wrong labels jolt them
further. One line attaches a ModelEMA, which averages them along the way, with several half-lives at once. The rival is
the usual way to let weights settle: a learning rate that falls to 0 along a cosine.

    python examples/train_digits.py              # half a minute on two idle cores
    python examples/train_digits.py --clean      # right labels only, where no gain is to be expected

Prints a table, and writes a picture and the averaged weights of the first seed to out/digits.
"""

from __future__ import annotations

import argparse
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import ewma

BATCH, LEARNING_RATE = 16, 0.03
RAW, COSINE = "raw", "raw, cosine learning rate"
# In steps, of which there are 855 by default: from too short to smooth much, to longer than the whole training.
PROFILES = {f"averaged, half-life {steps}": ewma.Exponential(half_life=steps) for steps in (10, 50, 200, 1000)}
PROFILES["averaged, power .2"] = ewma.Power(sigma_rel=0.2)  # remembers a share of the training, however long that is
AVERAGED = "averaged, half-life 200"  # for verdict, picture and file; fixed, since the best of each table would flatter


class Digits(NamedTuple):
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Run(NamedTuple):
    ema: ewma.ModelEMA
    losses: list[float]  # of each step
    curves: dict[str, list[float]]  # accuracy after each epoch, by the name of the weights


def read_digits(seed: int, share_wrong: float) -> Digits:
    """Scikit-learn's 1797 digits, a random half to train on; a share of its labels is replaced by another digit."""
    torch.manual_seed(seed)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8) / 16
    train, test = torch.randperm(len(labels)).tensor_split(2)
    given = labels[train]
    wrong = torch.randperm(len(given))[: round(share_wrong * len(given))]
    given[wrong] = (given[wrong] + torch.randint(1, 10, wrong.shape)) % 10
    return Digits(images[train], given, images[test], labels[test])


def network() -> nn.Module:
    narrow, wide = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(narrow, nn.ReLU(), wide, nn.ReLU(), head)


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """How many of the test digits the model recognises, in percent."""
    return 100 * (model(digits.test_images).argmax(dim=1) == digits.test_labels).double().mean().item()


def train(digits: Digits, seed: int, epochs: int, bar: tqdm, cosine: bool) -> Run:
    torch.manual_seed(seed)  # with either learning rate the same first weights and the same batches
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    ema = ewma.ModelEMA(model, PROFILES).attach(optimizer)  # this line is all that averaging takes
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(digits.labels) / BATCH))
    losses, curves = [], {name: [] for name in ([COSINE] if cosine else [RAW, *PROFILES])}
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.labels)).split(BATCH):
            loss = nn.functional.cross_entropy(model(digits.images[batch]), digits.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if cosine:
                schedule.step()
            losses.append(loss.item())
        for name, curve in curves.items():
            with ema[name].swapped() if name in PROFILES else nullcontext():  # the raw weights are back afterwards
                curve.append(accuracy(model, digits))
        bar.update()
    return Run(ema, losses, curves)


def table(curves: dict[str, np.ndarray]) -> str:
    lines = [f"{'test accuracy (%)':<28}{'mean':>8}{'spread over seeds':>20}"]
    for name, curve in curves.items():
        last = curve[:, -1]
        spread = f"± {last.std(ddof=1):.2f}" if len(last) > 1 else "one seed"
        lines.append(f"{name:<28}{last.mean():>8.2f}{spread:>20}")
    return "\n".join(lines)


def verdict(other: str, curves: dict[str, np.ndarray]) -> str:
    """What the differences seed by seed say: a gain or a loss only where three seeds or more all agree."""
    differences = curves[AVERAGED][:, -1] - curves[other][:, -1]
    better, worse, seeds = (differences > 0).sum(), (differences < 0).sum(), len(differences)
    told = "a gain" if better == seeds >= 3 else "a loss" if worse == seeds >= 3 else "no clear difference"
    return f"- {other}: {differences.mean():+.2f} points, better with {better} of {seeds} seeds: {told}"


def draw(path: Path, losses: list[float], curves: dict[str, np.ndarray], labels: str) -> None:
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(losses, color="tab:blue", alpha=0.35, linewidth=0.8, label="raw")
    left.plot(ewma.smooth(losses, half_life=20), color="tab:blue", linewidth=2, label="smoothed, half-life 20 steps")
    left.set(title=f"Training loss with {labels}, first seed", xlabel="step", ylabel="cross-entropy (nats)")
    for name, color in {AVERAGED: "tab:red", COSINE: "tab:gray", RAW: "tab:blue"}.items():
        epochs = range(1, curves[name].shape[1] + 1)
        right.plot(epochs, curves[name].mean(axis=0), color=color, linewidth=2, label=name)
        right.fill_between(epochs, curves[name].min(axis=0), curves[name].max(axis=0), color=color, alpha=0.12)
    right.set(title="Test accuracy, mean and range over seeds", xlabel="epoch", ylabel="recognised (%)")
    right.set_ylim(min(curve[:, -12:].min() for curve in curves.values()) - 1, 100)  # leaves out the first climb
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    unfinished = path.with_suffix(".unfinished.png")
    figure.savefig(unfinished)
    os.replace(unfinished, path)  # nobody ever sees half a picture


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clean", action="store_true", help="train on right labels only")
    parser.add_argument("--seeds", type=int, default=5, help="how many trainings to compare (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=15, help="how long each of them is (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="folder to write to (default %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.epochs) < 1:
        parser.error("--seeds and --epochs must be 1 or more")
    torch.set_num_threads(1)  # for a network this small a second thread only waits, above all on a busy machine
    options.out.mkdir(parents=True, exist_ok=True)
    labels, share_wrong = ("clean labels", 0.0) if options.clean else ("20 % wrong labels", 0.2)

    runs = []
    with tqdm(total=2 * options.seeds * options.epochs, desc=labels, unit="epoch") as bar:
        for seed in range(options.seeds):
            digits = read_digits(seed, share_wrong)
            runs += [train(digits, seed, options.epochs, bar, cosine) for cosine in (False, True)]
    names, first = (RAW, *PROFILES, COSINE), runs[0]
    curves = {name: np.array([run.curves[name] for run in runs if name in run.curves]) for name in names}
    print(f"\nDigits with {labels}; seeds: {options.seeds}; steps: {len(first.losses)} of {BATCH} images each\n")
    print(table(curves))
    if options.clean:
        print("\nWith clean labels no gain from averaging is to be expected.")
    print(f"\n'{AVERAGED}' against", verdict(RAW, curves), verdict(COSINE, curves), sep="\n")

    picture, weights = options.out / "digits.png", options.out / "averaged.safetensors"
    draw(picture, first.losses, curves, labels)
    first.ema[AVERAGED].save(weights)
    fresh, score = network(), first.curves[AVERAGED][-1]
    fresh.load_state_dict(load_file(weights))  # any tool reads the file, without ewma
    if (found := accuracy(fresh, read_digits(0, share_wrong))) != score:
        raise RuntimeError(f"{weights}: a new model scores {found} % with these weights, not {score} %")
    print(f"\nThe picture: {picture}")
    print(f"The averaged weights of the first seed: {weights}; loaded into a new model they score {score:.2f} % again")


if __name__ == "__main__":
    main()
