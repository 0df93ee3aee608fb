"""`ewma reconstruct`: any average of a run that is over."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ewma.cli import plotting, targets
from ewma.cli.progress import bar


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "reconstruct",
        help="any average of a run, from its archive",
        description="Put together the average that another profile would have tracked, from the snapshots that "
        "ewma.posthoc.Archive took during training; or, less near, from ordinary checkpoints.",
    )
    parser.add_argument("archive", metavar="ARCHIVE", help="folder of the snapshots, or of checkpoints")
    targets.add(parser)
    targets.add_output(parser)
    parser.add_argument("--at", type=float, metavar="STEP", help="stop there (default: at the last snapshot)")
    parser.add_argument("--max-residual", type=float, metavar="R", help="fail where the residual is above this")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from ewma.posthoc import Archive, Checkpoints

    wanted = targets.named(given)
    out = Path(given.out)
    plotting.check(given.plot)
    folder = Path(given.archive)
    if not folder.is_dir():
        came = "this is a file" if folder.exists() else "it does not exist"
        raise NotADirectoryError(f"{folder}: expected a folder of snapshots, or of checkpoints; {came}")
    if (folder / "manifest.json").is_file() or not any(folder.iterdir()):
        source: Any = Archive(given.archive)
    else:
        source = Checkpoints(given.archive)
    if given.at is not None and isinstance(source, Checkpoints):
        raise ValueError("--at is for archives; of checkpoints, pass only those up to there in a folder of their own")
    several = {"at": given.at} if isinstance(source, Archive) else {}
    fits = []
    with bar("reconstruct", len(wanted) * source.elements()) as done:
        for name, profile, last in wanted:
            path = out.with_name(f"{out.stem}-{name}{out.suffix}") if name else out
            kind = targets.dtype(given)
            limit = given.max_residual
            fits.append(
                source.reconstruct_to(path, profile, last=last, max_residual=limit, dtype=kind, done=done, **several)
            )
            print(f"{path}: {fits[-1].target!r}, residual {fits[-1].residual:.2g}")
    plotting.draw(given.plot, fits)
