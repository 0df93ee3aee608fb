"""The compiled module: native.c, where a C compiler was there when the package was installed."""

from array import array
from collections.abc import Sequence

from ewma.kernels import Coefficient, Word

def lerp(
    table: array[int],
    coefficients: Sequence[Coefficient],
    words: Sequence[Word | None],
    threads: int,
    start: int = 0,
    stop: int = ...,
) -> int:
    """Update what `native._table` lists, on at most so many threads; gives how many elements were left out.

    `start` and `stop` choose among the elements of all tensors, one after the other.
    """

def instruction_sets() -> list[str]:
    """What this processor can run, the best first: that one is used."""

def use(name: str) -> None:
    """Use another of them, from here on."""
