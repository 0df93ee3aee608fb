"""Averages put together after a run: how near they are, how quickly, and with how much memory.

A table is printed only of what is right: a run whose parameters are farther from the truly tracked averages than the
documented bound ends the benchmark.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import ewma
from benchmarks.memory import peak_extra
from benchmarks.timing import compare
from ewma import posthoc, profiles
from ewma.profiles import Profile

TRACKS = {"narrow": ewma.Power(sigma_rel=0.05), "wide": ewma.Power(sigma_rel=0.10)}
SNAPSHOTS = 16
EPOCHS, BATCH, LEARNING_RATE = 30, 16, 0.03
BOUND, TIGHT = 1.5e-3, 5e-4
"""Relative error of the parameters: of powers, and of uniform tails and exponentials."""


def network() -> nn.Module:
    narrow, wide = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(narrow, nn.ReLU(), wide, nn.ReLU(), head)


def targets(steps: int) -> dict[str, tuple[Profile, float]]:
    """What is put together, each with its bound."""
    powers = {f"power, sigma_rel {s:.2f}": (ewma.Power(sigma_rel=s), BOUND) for s in (0.03, 0.07, 0.12, 0.15, 0.20)}
    tails = {f"mean of the last {share:.0%}": round(steps * (1 - share)) for share in (0.1, 0.25, 0.5)}
    return {
        **powers,
        **{name: (profiles.after(start=start, profile=ewma.Uniform()), TIGHT) for name, start in tails.items()},
        **{f"exponential, decay {d}": (ewma.Exponential(decay=d), TIGHT) for d in (0.995, 0.997, 0.998)},
    }


Save = Callable[[int, nn.Module, ewma.ModelEMA], None]


def train(steps: int, wanted: dict[str, Profile], save: Save, seed: int) -> dict[str, dict[str, Tensor]]:
    """Train on the digits, call `save` after every step, and give the averages that were truly tracked, in float64."""
    torch.manual_seed(seed)
    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
    images, labels = pixels[:912].float().view(-1, 1, 8, 8) / 16, labels[:912]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    ema = ewma.ModelEMA(model, TRACKS).attach(optimizer)
    true = ewma.ModelEMA(model, wanted, dtype=torch.float64).attach(optimizer)
    batches: list[Tensor] = []
    for step in tqdm(range(1, steps + 1), desc="digits", leave=False):
        batches = batches or list(torch.randperm(len(labels)).split(BATCH))
        batch = batches.pop()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        save(step, model, ema)
    return {name: {key: each.clone() for key, each in true[name].named_parameters()} for name in wanted}


def error(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Relative, over all parameters."""
    off = sum((found[name].double() - true[name]).square().sum() for name in true)
    return (off / sum(tensor.square().sum() for tensor in true.values())).sqrt().item()


def accuracy(seed: int) -> None:
    steps = EPOCHS * 57
    asked = targets(steps)
    evenly = [round(steps * k / SNAPSHOTS) for k in range(1, SNAPSHOTS + 1)]
    taken = posthoc.snapshot_steps(steps, SNAPSHOTS)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        bent, even = posthoc.Archive(place / "bent"), posthoc.Archive(place / "even")
        (place / "raw").mkdir()

        def save(step: int, model: nn.Module, ema: ewma.ModelEMA) -> None:
            for archive, when in ((bent, taken), (even, evenly)):
                if step in when:
                    archive.add(ema)
            if step in evenly:
                torch.save(model.state_dict(), place / "raw" / f"{step}.pt")

        true = train(steps, {name: profile for name, (profile, _) in asked.items()}, save, seed)
        print(
            f"\ndigits, {steps} steps, {len(TRACKS)} tracks of {SNAPSHOTS} snapshots; relative error of the parameters"
        )
        print(f"{'':28}{'residual':>10}{'of steps':>10}{'error':>10}{'evenly':>10}{'raw':>10}")
        for name, (profile, bound) in asked.items():
            found = bent.reconstruct(profile, max_residual=1.0)
            others = (even, posthoc.Checkpoints(place / "raw"))
            measured = error(found.weights, true[name])
            if measured > bound:
                raise SystemExit(f"{name}: error {measured:.1e}, above the bound of {bound:.1e}")
            rest = [error(other.reconstruct(profile, max_residual=1.0).weights, true[name]) for other in others]
            figures = (found.residual, found.step_residual, measured, *rest)
            print(f"{name:28}{''.join(f'{figure:10.1e}' for figure in figures)}")


def solving(steps: int = 1_000_000, snapshots: int = 20) -> None:
    """The coefficients alone, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        fit = posthoc.plan(steps, snapshots, TRACKS, ewma.Power(sigma_rel=0.15))
        taken.append(time.perf_counter() - begin)
    torch.set_num_threads(threads)
    if abs(sum(fit.coefficients) - 1.0) > 1e-9:
        raise SystemExit("the coefficients do not sum to 1")
    print(f"\n{steps:,} steps, {len(fit.snapshots)} snapshots: coefficients in {min(taken):.2f} s on one core")


def speed(millions: int, snapshots: int, rounds: int) -> None:
    """Reading the files and nothing else is the limit: `cat` to /dev/null, the files in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < 5e6 * millions * snapshots:
            raise SystemExit(f"{folder}: not enough room for {4e6 * millions * snapshots / 1e9:.1f} GB of snapshots")
        model = nn.ParameterList(torch.randn(1_000, 1_000) for _ in range(millions))
        archive, ema = posthoc.Archive(folder), ewma.ModelEMA(model, TRACKS)
        for _ in tqdm(range(snapshots // len(TRACKS)), desc="snapshots", leave=False):
            with torch.no_grad():
                for parameter in model:
                    parameter += 0.01
            ema.update()
            archive.add(ema)
        del ema
        files = sorted(map(str, Path(folder).glob("*.safetensors")))
        target = ewma.Power(sigma_rel=0.07)
        _check(archive, target, model)
        extra = peak_extra(lambda: archive.reconstruct(target))
        contenders = {"cat to /dev/null": lambda: _cat(files), "reconstruct": lambda: archive.reconstruct(target)}
        figures = compare(contenders, "cat to /dev/null", rounds)
        gigabytes = sum(Path(file).stat().st_size for file in files) / 1e9
        print(f"\n{millions} M parameters, {len(files)} snapshots{'s':>32}{'GB/s':>8}{'of cat':>8}")
        for name, (milliseconds, ratio) in figures.items():
            seconds = milliseconds / 1e3
            print(f"{name:56}{seconds:8.2f}{gigabytes / seconds:8.1f}{1 / ratio:8.0%}")
        print(f"peak memory beyond what was there: {extra / 1e6:.0f} MB, of which the result is {4 * millions} MB")


def _check(archive: posthoc.Archive, target: Profile, model: nn.ParameterList) -> None:
    """The weights rise in a straight line, so their average lies where that of the steps does."""
    count = archive.snapshots[-1].count
    lag = 0.01 * (count - sum(weight * step for step, weight in enumerate(target.weights(count), start=1)))
    found = archive.reconstruct(target).weights["0"]
    if not torch.allclose(found, model[0] - lag, rtol=0, atol=2e-5):
        raise SystemExit(f"reconstruct is wrong by {(found - model[0] + lag).abs().max():.1e}")


def _cat(files: Sequence[str]) -> None:
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks posthoc", description=__doc__)
    parser.add_argument("--only", choices=["accuracy", "solving", "speed"], nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--millions", type=int, default=20, help="of parameters (default %(default)s)")
    parser.add_argument("--snapshots", type=int, default=32, help="to reconstruct from (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    chosen = given.only or ["accuracy", "solving", "speed"]
    if "accuracy" in chosen:
        accuracy(given.seed)
    if "solving" in chosen:
        solving()
    if "speed" in chosen:
        speed(given.millions, given.snapshots, given.rounds)
