"""What a benchmark found: as a table, kept in a file, and as a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.device import seconds
from benchmarks.timing import compare

LIBRARIES = ("torch A", "torch_ema", "timm", "ema", "diffusers", "pandas", "polars", "numbagg", "scipy")
NAME = 62
"""The width of the column that tells what was measured."""


@dataclass
class Table:
    """Times of several ways to do the same, beside the first of them.

    Args:
        rows: for each its time in `unit`, and the ratio.
        left_out: what was not timed, and why.
    """

    title: str
    unit: str
    rows: dict[str, tuple[float, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def time(
        self,
        contenders: dict[str, Callable[[], object]],
        rounds: int,
        scale: float = 1.0,
        clock: Callable[[Callable[[], object]], float] = seconds,
    ) -> Table:
        """Time what is right, in units of `scale` to a millisecond."""
        if contenders:
            found = compare(contenders, next(iter(contenders)), rounds, clock=clock)
            self.rows = {name: (milliseconds * scale, ratio) for name, (milliseconds, ratio) in found.items()}
        return self

    def __str__(self) -> str:
        lines = [f"\n{self.title:{NAME}}{self.unit:>9}{'ratio':>8}"]
        lines += [f"{name:{NAME}}{_short(value):>9}{ratio:8.2f}" for name, (value, ratio) in self.rows.items()]
        lines += [f"{name:{NAME}} {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", action="store_true", help="also other libraries, those that can be imported")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="JSON to add the tables to, in place of their last run"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the tables, with --keep all that FILE holds")


def tell(tables: list[Table], given: argparse.Namespace) -> None:
    """Keep and draw what was asked for; the tables were printed as they came."""
    if given.keep:
        kept = [Table(**each) for each in json.loads(given.keep.read_text())] if given.keep.exists() else []
        tables = list({table.title: table for table in [*kept, *tables]}.values())
        given.keep.write_text(json.dumps([asdict(table) for table in tables], indent=1))
    if given.picture:
        draw(tables, given.picture)


def draw(tables: list[Table], path: Path) -> None:
    """A panel for each table: how many times as long as the first row each one takes, on a logarithmic scale."""
    from matplotlib.figure import Figure

    tables = [table for table in tables if table.rows]
    heights = [len(table.rows) + 1.5 for table in tables]
    figure = Figure(figsize=(9, 0.22 * sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(tables), 1, height_ratios=heights, sharex=True, squeeze=False)[:, 0]
    every = [ratio for table in tables for _, ratio in table.rows.values()]
    for panel, table in zip(panels, tables, strict=True):
        rows = sorted(table.rows.items(), key=lambda row: row[1][1])
        ratios = [ratio for _, (_, ratio) in rows]
        colours = [_colour(name) for name, _ in rows]
        widths = [ratio - 1.0 for ratio in ratios]
        bars = panel.barh([name for name, _ in rows], widths, left=1.0, color=colours, height=0.72)
        panel.plot(ratios, range(len(rows)), "|", color="0.2", markersize=10)
        labels = [_short(ratio) for ratio in ratios]
        panel.bar_label(bars, labels, padding=5, fontsize=8)
        panel.invert_yaxis()
        panel.axvline(1.0, color="0.3", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_xlim(0.7 * min(every), 1.6 * max(every))
        panel.set_title(table.title, loc="left", fontsize=9, fontweight="bold")
        panel.tick_params(labelsize=8, labelbottom=True)
        panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("time, as a multiple of each panel's 1 (blue: ewma; orange: other libraries)", fontsize=9)
    figure.savefig(path, dpi=110)


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _colour(name: str) -> str:
    if name.startswith(("ModelEMA", "one ModelEMA", "smooth", "ewm", "import ewma", "backward")):
        return "tab:blue"
    return "tab:orange" if name.startswith(LIBRARIES) else "0.6"
