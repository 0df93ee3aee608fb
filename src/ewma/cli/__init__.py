"""The `ewma` command."""

from __future__ import annotations

import argparse
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
            raise SystemExit(f"ewma: {told}") from None


def _say(message: Warning | str, category: type[Warning], *where: object, **more: object) -> None:
    print(f"ewma: warning: {message}", file=sys.stderr)
