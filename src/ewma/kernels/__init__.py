"""Pure array work behind one small interface; which kernel serves, and how to force one.

A kernel is a module with `lerp(values, averages, streams, guard)`: it prepares, once, the update of many averages from
many values, and returns a `Lerp` to be called at every step. Coefficients are floats; or 0-dim float64 tensors where
only the device knows them, and then nothing waits for it. `filter` is the same for gradients, which are written too.

    native      on the CPU, where it was compiled when the package was installed
    triton      on CUDA, where Triton is installed (it comes with torch's CUDA builds)
    foreach     everywhere else
    reference   the definition, for tests

`EWMA_KERNEL=foreach` (or another) forces one; `python -m ewma.kernels` tells which serves here and why. Nothing is
imported before it is needed: what works on NumPy arrays never brings torch.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from ewma.arrays import Array, is_tensor

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "KERNELS",
    "Coefficient",
    "Filter",
    "Lerp",
    "Word",
    "choose",
    "filter",
    "lerp",
    "missing",
    "missing_triton",
    "on_device",
    "scan",
]

KERNELS = ("reference", "foreach", "native", "triton")

INSTALL = "install a C compiler and then ewma again: pip install --force-reinstall --no-deps --no-cache-dir ."

Coefficient: TypeAlias = "float | Tensor"
Word: TypeAlias = "int | Tensor"


class Lerp(Protocol):
    """One prepared update: `average += c * (value - average)`, element by element, for every tensor it was made for."""

    skipped: Any
    """How many elements were left out so far, being non-finite: an int or a 0-dim tensor."""

    noted: Sequence[Tensor]
    """The averages that are found by their addresses: when one's memory moves, the update must be prepared anew. (When
    a value's does, always.)"""

    free: bool
    """Whether no torch operation runs, so that no mode (gradients, inference) needs to be entered for the call."""

    def __call__(self, coefficients: Sequence[Coefficient], words: Sequence[Word | None]) -> None:
        """Update all averages.

        Args:
            coefficients: one for each of the K sets of averages.
            words: for each set None, to round to nearest; or the word that, with the tensor's stream and the element's
                index, gives the random bits of stochastic rounding (see `ewma.kernels.noise`).
        """


class Filter(Protocol):
    """A prepared filter: each average takes its gradient in, which becomes `raw * gradient + slow * average`."""

    skipped: Any
    """How many elements were left out so far, being non-finite: an int or a 0-dim tensor."""

    def __call__(
        self,
        gradients: Sequence[Tensor],
        coefficient: Coefficient,
        raw: float,
        slow: float,
        scale: float | Tensor | None = None,
        taken: Tensor | None = None,
    ) -> None:
        """Update the averages, and filter the gradients in place.

        Args:
            gradients: of the averages' shapes, of one dtype; wherever they lie today.
            coefficient: of the update.
            raw, slow: what the filtered gradient has of the raw one and of its average. With raw = 0 the raw one has no
                part in it, even where it is NaN.
            scale: what the gradients are multiplied by (GradScaler's); the averages are of what they are without.
            taken: a 0-dim bool tensor; where it is False everything stays as it is.
        """


def lerp(
    values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool = True
) -> Lerp:
    """Prepare the update of K sets of averages from one list of values.

    Args:
        values: tensors of one floating dtype on one device, of any layout, read at every call.
        averages: K lists, each as long as values: dense float32, float64, bfloat16 or float16 tensors of the values'
            shapes, all of one dtype and on one device, laid out alike in all sets, written at every call.
        streams: an integer for each tensor that tells its random bits from the others'.
        guard: an element of a value that is not finite, or would not be as a number of the average's dtype, leaves its
            average alone and is counted. A NaN that is in an average now marks an element that has seen nothing finite
            yet: it takes the first finite value whole.
    """
    for several in zip(*averages, strict=True):
        if len({(average.dtype, average.device, average.stride()) for average in several}) > 1:
            raise ValueError("expected averages of one dtype, device and layout in all sets; got several")
    kernel = _chosen("", *values[:1], *averages[0][:1])
    return cast(Lerp, kernel.lerp(values, averages, streams, guard))


def filter(averages: Sequence[Tensor], squares: Sequence[Tensor] | None, guard: bool = True) -> Filter:
    """Prepare the filtering of gradients.

    Args:
        averages: dense float32 or float64 tensors of one dtype and device.
        squares: likewise, for the averages of the squared gradients; or None.
        guard: a non-finite element of a gradient leaves its averages alone and is counted. A NaN that is in an average
            now marks an element that has seen nothing: it takes its gradient whole, which stays as it is until then.
    """
    if kinds := sorted({str(average.dtype) for average in averages} - {"torch.float32", "torch.float64"}):
        raise ValueError(
            f"expected averages of gradients in float32 or float64; got {', '.join(kinds)}. Keep them wide: "
            f"average.float()"
        )
    return cast(Filter, _chosen("_filter", *averages[:1]).Filter(averages, squares, guard))


def scan(u: Array, lost: float | Array, initial: Array, out: Array, kept: Array | None = None) -> None:
    """One recurrence along time for many series at once: `y[t] = y[t-1] + (u[t] - lost[t] * y[t-1])`.

    With u = c * x and lost = c it is an average; with lost alone a decaying sum, as are weights and gradients.

    Args:
        u: float64 array or tensor of shape (outer, n, inner), time in the middle; used up where lost is a float.
        lost: what each step takes from what was, from 0 to 1: a float where it is constant; or a float64 array of
            three dimensions that broadcasts to u.
        initial: y before the first step, of shape (outer, 1, inner).
        out: float64, of u's shape; written.
        kept: 1 - lost to full precision, of lost's shape, for where next to nothing is left after a step, but counts.
    """
    kernel = compiled()
    if kernel is not None and kernel.scan(u, lost, initial, out, kept):
        return
    name, _ = choose(*([str(u.device)] if is_tensor(u) else []))
    if name == "triton":
        kernel = importlib.import_module("ewma.kernels.triton_scan")
        if kernel.serves(u, initial, out, *(part for part in (lost, kept) if not isinstance(part, float | None))):
            kernel.scan(u, lost, initial, out, kept)
            return
    module = "reference" if name == "reference" else "blocked"
    importlib.import_module(f"ewma.kernels.{module}").scan(u, lost, initial, out, kept)


def on_device(x: Array, *others: Array | None) -> Any:
    """`ewma.kernels.triton_mean`, where that smooths whole series like x; else None."""
    if not is_tensor(x) or choose(str(x.device))[0] != "triton":
        return None
    kernel = importlib.import_module("ewma.kernels.triton_mean")
    return kernel if kernel.serves(x, *(other for other in others if other is not None)) else None


def compiled() -> Any:
    """`ewma.kernels.compiled_scan`, where that is what scans along time on the CPU; else None."""
    return _compiled_scan() if _forced() is None or choose()[0] == "native" else None


@functools.cache
def _compiled_scan() -> Any:
    return None if missing() else importlib.import_module("ewma.kernels.compiled_scan")


def choose(*devices: str) -> tuple[str, str]:
    """Which kernel averages tensors on these devices, and why that one."""
    forced = _forced()
    if forced is None:
        types = {device.partition(":")[0] for device in devices}
        if types <= {"cpu"}:
            problem = missing()
            return ("foreach", problem) if problem else ("native", "compiled")
        if types != {"cuda"} or len(set(devices)) > 1:
            return "foreach", "torch's list operations"
        problem = missing_triton()
        return ("foreach", f"torch's list operations, since {problem}") if problem else ("triton", "one launch for all")
    if forced not in KERNELS:
        raise ValueError(f"EWMA_KERNEL={forced}: no kernel has that name; there are {', '.join(KERNELS)}")
    problem, cure = None, INSTALL
    if forced == "native":
        problem = missing()
    elif forced == "triton":
        problem, cure = missing_triton(), "pip install ewma[triton]"
    if problem:
        raise ImportError(f"EWMA_KERNEL={forced}: {problem}. Unset EWMA_KERNEL, or {cure}")
    return forced, f"EWMA_KERNEL={forced}"


def _chosen(kind: str, *tensors: Tensor) -> Any:
    """The module of the kernel that serves these tensors."""
    devices = {str(tensor.device) for tensor in tensors}
    name, why = choose(*devices)
    if name == "foreach" and devices <= {"cpu"} and not _forced():
        _warn_once(why)
    return importlib.import_module(f"ewma.kernels.{name}{kind}")


def missing() -> str | None:
    """Why the compiled kernel is not there; None where it is."""
    try:
        importlib.import_module("ewma.kernels._native")
    except ModuleNotFoundError:
        return "the compiled kernel was not built"
    except ImportError as error:
        return f"the compiled kernel does not load ({error})"
    return None


@functools.cache
def missing_triton() -> str | None:
    """Why the kernels in Triton are not to be had; None where they are."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return "Triton is not installed"
    except ImportError as error:
        return f"Triton does not load ({error})"
    import torch

    if torch.cuda.is_available():
        from triton import knobs
        from triton.runtime import driver

        if knobs.runtime.interpret:  # where tables of addresses are of the wrong memory
            return "TRITON_INTERPRET is set"

        try:
            driver.active.get_current_target()
        except Exception as error:  # no C compiler, no headers of Python, a GPU too old: each fails in its own way
            return f"Triton does not work here ({error})"
    return None


def _forced() -> str | None:
    return os.environ.get("EWMA_KERNEL") or None


_warned = False


def _warn_once(problem: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{problem}, so torch operations average instead: as right, but slower, most of all where it rounds "
            f"stochastically. To be fast, {INSTALL}; or set EWMA_KERNEL=foreach to be content with this.",
            RuntimeWarning,
            stacklevel=4,
        )
