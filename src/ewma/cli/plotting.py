"""Pictures of what an average is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ewma.posthoc import Fit

POINTS = 4000
"""Of a curve; more than a picture has pixels."""


def check(path: str | None) -> None:
    """Before any work is done: whether the picture can be drawn."""
    if path is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ImportError('--plot needs matplotlib: pip install "ewma[cli]", or leave it out') from None
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"--plot: the folder {Path(path).parent} does not exist; make it first")
    known, kind = FigureCanvasBase.get_supported_filetypes(), Path(path).suffix[1:].lower()
    if kind and kind not in known:
        raise ValueError(f"--plot: expected a picture's name, such as weights.png; got .{kind}")


def draw(path: str | None, fits: Sequence[Fit]) -> None:
    """The weights of every step and the shares of every change, as wanted and as reached."""
    if path is None:
        return
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    curves = [fit.curves() for fit in fits]
    for number, (fit, (times, wanted, reached)) in enumerate(zip(fits, curves, strict=True)):
        color = colormaps["viridis"](0.85 * number / max(1, len(fits) - 1))
        label = (
            f"{fit.target!r}, residual {fit.residual:.1g}" if len(fits) <= 6 or number in (0, len(fits) - 1) else None
        )
        some = slice(None, None, -(-len(times) // POINTS))
        for axes, kind in ((left, "weights"), (right, "shares")):
            aim, got = (each if kind == "weights" else each.flip(0).cumsum(0).flip(0) for each in (wanted, reached))
            axes.plot(times[some], aim[some], color=color, linewidth=5, alpha=0.3)
            axes.plot(times[some], got[some], color=color, linewidth=1.2, label=label)
    # Room for what is wanted: the few steps that checkpoints hold would dwarf it.
    highest, tallest, lowest = (float(each) for each in _extremes(curves))
    left.set_ylim(max(1.1 * min(0.0, lowest), -0.5 * highest), min(1.1 * max(highest, tallest), 1.6 * highest))
    marks = sorted({snapshot.time for snapshot in fits[0].snapshots})
    for axes in (left, right):
        at_the_bottom = axes.get_xaxis_transform()
        axes.plot(marks, [0.02] * len(marks), "|", color="black", markersize=9, transform=at_the_bottom)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step (marks: snapshots)")
    left.set_title("Weight of each step: wanted (wide), reached (narrow)")
    right.set_title("Share of each step's change")
    right.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0.0, 0.06))
    figure.savefig(path)


def draw_shares(path: str | None, steps: Sequence[float], shares: Sequence[float]) -> None:
    """What each checkpoint counts."""
    if path is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.vlines(steps, 0.0, shares, color="tab:blue")
    axes.plot(steps, shares, "o", color="tab:blue")
    axes.set(title="Share of each checkpoint", xlabel="step", ylim=(0.0, 1.1 * max(shares)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _extremes(curves: Sequence[tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    """The highest weight wanted, the highest reached, and the lowest."""
    return (
        max(wanted.max() for _, wanted, _ in curves),
        max(reached.max() for _, _, reached in curves),
        min(reached.min() for _, _, reached in curves),
    )
