"""Interleaved timing: every contender runs once a round, in random order, and is compared within the round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

from tqdm import tqdm

from benchmarks.device import seconds


def compare(
    contenders: dict[str, Callable[[], object]],
    limit: str,
    rounds: int,
    together: Callable[[], object] | None = None,
    clock: Callable[[Callable[[], object]], float] = seconds,
) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each contender, and the median of its ratio to `limit` in the same round.

    What a machine can do drifts by tens of percent within a minute; a ratio within a round does not.

    Args:
        together: waits for other processes that do the same, before each timing.
        clock: how many seconds a call takes.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), desc="rounds", leave=False, disable=together is not None):
        for name in random.sample(sorted(contenders), len(contenders)):
            contenders[name]()  # brings its own data and code back into the caches
            if together is not None:
                together()
            found[name].append(clock(contenders[name]))
    return {
        name: (
            1e3 * statistics.median(taken),
            statistics.median(mine / base for mine, base in zip(taken, found[limit], strict=True)),
        )
        for name, taken in found.items()
    }
