"""The `ewma` command."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence

from ewma.cli import average, convert, plan, reconstruct

COMMANDS = (reconstruct, plan, average, convert)
"""Each has `add(commands)`, which adds its parser, and `run(given)`. None imports torch before it runs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; what is wrong with its input is said in one line, and the exit status is then 1."""
    parser = argparse.ArgumentParser(prog="ewma", description="Averages of weights, after training.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    given = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _say  # put back on the way out
        warnings.simplefilter("always")
        try:
            given.run(given)
        except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
            told = error.args[0] if isinstance(error, KeyError) else error
            raise SystemExit(f"ewma: {_as_options(str(told))}") from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None  # as shells have it


def _say(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    print(f"ewma: warning: {_as_options(str(message))}", file=sys.stderr)


OPTIONS = (
    (r"\bmax_residual=(\d\S*)", r"--max-residual \1"),
    (r"\bmax_residual=", "--max-residual"),
    (r"\bpart='([^']*)'", r"--part \1"),
    (r"\b(part|at)= ", r"--\1 "),
    (
        r"Pass them in order, with steps=range\(1, \d+\) or their true steps",
        "Number them, as in step-100.pt, step-200.pt",
    ),
)
"""What errors say of Python's arguments, and what one would type here."""


def _as_options(told: str) -> str:
    for python, option in OPTIONS:
        told = re.sub(python, option, told)
    return told
