"""`ewma average`: the mean of ordinary checkpoints."""

from __future__ import annotations

import argparse
from typing import Any

from ewma.cli import plotting, targets
from ewma.cli.progress import bar


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "average",
        help="the average of ordinary checkpoints",
        description="Average checkpoints of one run: safetensors, torch.save files, sharded ones with an index, "
        "torch.distributed.checkpoint folders. Their order and time are the last numbers in their names.",
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="paths, or one folder that holds them")
    parser.add_argument("--last", type=int, metavar="K", help="only the last K; alone, their plain mean")
    targets.add(parser, sweep=False, required=False)
    targets.add_output(parser)
    parser.add_argument("--part", metavar="NAME", help='where in each checkpoint the model lies, such as "state_dict"')
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    from ewma.posthoc import Checkpoints
    from ewma.posthoc.fit import begun_late

    plotting.check(given.plot)
    asked = targets.named(given)
    if not asked and given.last is None:
        raise ValueError("say which average: --last 10 for the plain mean of the last ten, or --half-life STEPS, ...")
    paths = given.checkpoints[0] if len(given.checkpoints) == 1 else given.checkpoints
    checkpoints = Checkpoints(paths, part=given.part)
    profile = None
    if asked:
        _, profile, window = asked[0]
        profile = begun_late(profile, window, checkpoints.steps[-1])
    with bar("average", checkpoints.elements()) as done:
        kind = targets.dtype(given)
        shares = checkpoints.average_to(given.out, profile, last=given.last, dtype=kind, done=done)
    used = [each for each in zip(checkpoints.paths[-len(shares) :], shares, strict=True) if each[1]]
    print(
        f"{given.out}: {len(used)} checkpoints, {used[0][0].name} ({used[0][1]:.2g}) to {used[-1][0].name} "
        f"({used[-1][1]:.2g})"
    )
    plotting.draw_shares(given.plot, checkpoints.steps[-len(shares) :], shares)
