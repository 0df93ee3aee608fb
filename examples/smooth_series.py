"""Honest curves: what smoothing does to a training loss, and what the usual ways of doing it get wrong.

    python examples/smooth_series.py             # a second

A loss is made up whose truth is known: it falls, is noisy, and has a NaN and two spikes in it. Prints how far each way
of smoothing is from that truth, and draws it in out/series.png.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import ewma

HALF_LIFE = 30  # steps


def training_loss(steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The true loss and what was logged of it: noisy, with one NaN and two spikes."""
    generator = np.random.default_rng(seed)
    truth = 0.4 + 2.1 * np.exp(-np.arange(steps) / (steps / 6))
    logged = truth + 0.12 * generator.standard_normal(steps) * np.sqrt(truth)
    logged[steps // 3] = np.nan
    logged[[steps // 2, steps * 3 // 4]] += 1.2
    return truth, logged


def from_zero(x: np.ndarray, decay: float) -> np.ndarray:
    """The loop that is found in many training scripts: it begins at 0, and a NaN stays for ever."""
    mean, means = 0.0, []
    for value in x:
        mean = decay * mean + (1 - decay) * value
        means.append(mean)
    return np.array(means)


def distance(curve: np.ndarray, truth: np.ndarray) -> str:
    if np.isnan(curve).any():
        return f"NaN from step {int(np.isnan(curve).argmax())} on"
    return f"{np.sqrt(np.mean((curve - truth) ** 2)):.3f} from the truth"


def draw_curves(axes: Axes, truth: np.ndarray, logged: np.ndarray, curves: dict[str, np.ndarray]) -> None:
    axes.plot(logged, color="0.75", linewidth=0.7, label="logged")
    for (name, curve), color in zip(curves.items(), ("tab:red", "tab:blue", "tab:green"), strict=True):
        axes.plot(curve, color=color, linewidth=2, label=name)
    axes.plot(truth, color="black", linewidth=1, linestyle="--", label="truth")
    axes.set(title=f"One loss, half-life {HALF_LIFE} steps", xlabel="step", ylabel="loss", ylim=(0, 3.2))


def draw_bands(axes: Axes, logged: np.ndarray) -> None:
    statistics = ewma.ewm(logged, half_life=HALF_LIFE)
    bands, scores = statistics.bands(k=3), statistics.zscore()
    spikes = np.flatnonzero(np.abs(scores) > 3)
    axes.fill_between(np.arange(len(logged)), bands.lower, bands.upper, color="tab:blue", alpha=0.2, label="± 3 std")
    axes.plot(logged, color="0.6", linewidth=0.7)
    axes.plot(bands.mean, color="tab:blue", linewidth=2, label="mean")
    axes.plot(spikes, logged[spikes], "o", color="tab:red", label="more than 3 std from the mean before it")
    axes.set(title="Its running spread", xlabel="step", ylabel="loss", ylim=(0, 3.2))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="how long the run is (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/series.png"), help="picture to write (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.steps < 12:
        parser.error("--steps must be 12 or more")
    truth, logged = training_loss(options.steps)
    curves = {
        "from zero, as often found": from_zero(logged, decay=2 ** (-1 / HALF_LIFE)),
        "ewma.smooth": ewma.smooth(logged, half_life=HALF_LIFE),
        "ewma.smooth, two-sided": ewma.smooth(logged, half_life=HALF_LIFE / 2, two_sided=True),
    }
    for name, curve in curves.items():
        print(f"{name:<28}{distance(curve, truth)}")

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, truth, logged, curves)
    draw_bands(right, logged)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = options.out.with_suffix(".unfinished.png")
    figure.savefig(unfinished)
    os.replace(unfinished, options.out)  # nobody ever sees half a picture
    print(f"\nThe picture: {options.out}")


if __name__ == "__main__":
    main()
