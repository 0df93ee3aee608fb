"""`ewma plan`: how near averages will be, before the run."""

from __future__ import annotations

import argparse
from typing import Any

from ewma.cli import plotting, targets
from ewma.profiles import Power


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="the residuals that an archive will give, before training",
        description="Tell how near an average will be that is put together from snapshots: .001 is good, .01 is poor.",
    )
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="of the whole run")
    parser.add_argument("--snapshots", default="16", metavar="N|STEP,...", help="how many, or when (default: 16)")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="update interval, in steps (default: 1)")
    tracks = parser.add_mutually_exclusive_group()
    tracks.add_argument("--tracks", default=".05,.10", metavar="S,...", help="sigma_rel of each (default: .05,.10)")
    tracks.add_argument("--raw", action="store_true", help="of ordinary checkpoints instead")
    targets.add(parser)
    parser.add_argument("--plot", metavar="PNG", help="draw the weights over the run; needs matplotlib")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from ewma import posthoc

    plotting.check(given.plot)
    times = [targets.number(step, f"--snapshots={given.snapshots}", "16") for step in given.snapshots.split(",")]
    if any(time != int(time) for time in times):
        raise ValueError(f"--snapshots={given.snapshots}: expected whole numbers, such as 16 or 250,500,1000")
    snapshots = int(times[0]) if len(times) == 1 else [int(time) for time in times]
    widths = [targets.number(width, f"--tracks={given.tracks}", ".05,.10") for width in given.tracks.split(",")]
    tracks = [posthoc.RAW] if given.raw else [Power(sigma_rel=width) for width in widths]
    fits = [
        posthoc.plan(given.steps, snapshots, tracks, profile, every=given.every, last=last)
        for _, profile, last in targets.named(given)
    ]
    taken = sorted({round(snapshot.time) for snapshot in fits[0].snapshots})
    wide = max(56, *(len(repr(fit.target)) for fit in fits))
    print(f"snapshots at {', '.join(map(str, taken))}\n\n{'target':{wide}}{'residual':>10}{'of steps':>10}")
    for fit in fits:
        print(f"{fit.target!r:{wide}}{fit.residual:10.2g}{fit.step_residual:10.2g}")
    plotting.draw(given.plot, fits)
