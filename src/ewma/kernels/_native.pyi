"""The compiled module: c/native.c and its companions, where a C compiler was there when the package was installed."""

from array import array
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ewma.kernels import Coefficient, Word

def lerp(
    table: array[int],
    coefficients: Sequence[Coefficient],
    words: Sequence[Word | None],
    threads: int,
    start: int = 0,
    stop: int = ...,
    raw: float = ...,
    slow: float = ...,
) -> int:
    """Update what `native.table` lists, on at most so many threads; gives how many elements were left out.

    `start` and `stop` choose among the elements of all tensors, one after the other. With `raw` and `slow` the values
    are filtered: each becomes `raw * value + slow * average`, and a second set averages their squares.
    """

def mean(
    x: Any, out: Any, start: Any, held: float, lost: float, debias: bool, threads: int, untouched: bool = False
) -> bool:
    """See `ewma.kernels.compiled_scan.mean`; of NumPy arrays (outer, n, inner), bfloat16 as int16."""

def spread(
    x: Any,
    outs: tuple[Any, ...],
    start: Any,
    held: float,
    lost: float,
    keep: float,
    debias: bool,
    kind: int,
    k: float,
    unbiased: bool,
    threads: int,
) -> bool:
    """See `ewma.kernels.compiled_scan.spread`; of NumPy arrays (outer, n, inner), bfloat16 as int16."""

def scan(
    x: Any, out: Any, base: Any, sums: Any, lost: float, pre: Any, post: Any, threads: int, untouched: bool = False
) -> bool:
    """See `ewma.kernels.compiled_scan.run`; of NumPy arrays (outer, n, inner), bfloat16 as int16, and vectors."""

def scan_elements(u: Any, lost: Any, kept: Any, out: Any, sums: Any, threads: int) -> None:
    """See `ewma.kernels.compiled_scan.scan`; of float64 NumPy arrays (outer, n, inner), kept may be None."""

def weigh(
    xs: tuple[Any, ...],
    terms: tuple[Any, ...],
    results: tuple[Any, ...],
    state: Any,
    debias: bool,
    decays: bool,
    propagates: bool,
    timed: bool,
) -> None:
    """What each step weighs, by the rules of `ewma.series.weighting`; arrays of one shape (outer, n, inner).

    `terms` are float64: keep, lost, gain, and what elapsed. `results` are float64, written: share, kept, weight, pairs
    and count. `state` is a float64 vector, read and left as after the last step: for each series its weight; then what
    gaps have taken of a weight of 1; then the weight of pairs, the count, and what has passed.
    """

def average(
    xs: tuple[Any, ...],
    shares: tuple[Any, Any],
    means: tuple[Any, ...],
    spreads: tuple[Any, ...],
    pairs: bytes,
    state: Any,
    exact: bool,
) -> tuple[bool, bool, float]:
    """The means of one or two series, and spreads of pairs of them, by float64 `shares`: what steps weigh; the rest.

    `state` is a float64 vector, read and left as after the last step: for each series its bases, its means relative to
    them, what is too small for these, and 0; then the spreads. Gives whether all stayed finite, whether a value was
    not, and of which part of the values a mean hides most of the digits; `exact` keeps them.
    """

def instruction_sets() -> list[str]:
    """What this processor can run, the best first: that one is used."""

def use(name: str) -> str:
    """Use another of them from here on; gives the one before."""

def places(tensors: list[Tensor], exchange: object) -> tuple[bytes, bytes]:
    """Device, dtype, shape and strides of each; and each one's address, in 8 bytes.

    `exchange` is `torch.Tensor.__dlpack_c_exchange_api__`. An error where there is a tensor that torch lends to nobody.
    """

def moved(
    tables: list[dict[str, Any]],
    members: list[Any],
    tensors: list[Tensor],
    parts: array[int],
    exchange: object,
    layouts: bytes,
    addresses: bytes,
) -> bool:
    """Whether the tables hold other members, or the tensors' `places` are others.

    `parts` are two addresses for each tensor, of memory that torch reads to tell where it is.
    """
