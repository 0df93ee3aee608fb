"""What a series may come as, and go back as: lists, NumPy arrays, torch tensors, pandas' and polars' series and frames.

None of these libraries is imported here but NumPy, and only for lists and frames.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from ewma.arrays import Array, is_tensor, module_of, unmasked

FRAMES = ("Series", "DataFrame")


class Series(NamedTuple):
    """A series as an array.

    `pack` makes of an array of the same shape what the series came as. `floating` is the dtype of results.
    """

    array: Array
    axis: int
    pack: Callable[[Array], Any]
    floating: Any

    @property
    def kind(self) -> str:
        """What one value of it is: "number", "numpy" or "torch"."""
        return "torch" if is_tensor(self.array) else "number" if self.array.ndim == 1 else "numpy"

    @property
    def of_one(self) -> tuple[int, ...]:
        """The shape of one value."""
        return tuple(self.array.shape[: self.axis]) + tuple(self.array.shape[self.axis + 1 :])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(outer, n, inner): time in the middle."""
        sizes = tuple(self.array.shape)
        return math.prod(sizes[: self.axis]), sizes[self.axis], math.prod(sizes[self.axis + 1 :])


def unpack(where: str, x: Any, axis: int | None) -> Series:
    """A series of any supported kind as an array.

    Args:
        where: the call, for the error's text.
        axis: of time; None is the last one. Frames have their time along their rows.
    """
    library = type(x).__module__.partition(".")[0]
    if is_tensor(x):
        return _tensor(where, x, _axis(where, axis, x.ndim))
    if library in ("pandas", "polars") and type(x).__name__ in FRAMES:
        if axis not in (None, 0, *((-1,) if len(x.shape) == 1 else ())):
            raise ValueError(f"{where}: a frame's time runs along its rows, axis 0; got axis={axis}. Leave axis out.")
        return _pandas(where, x) if library == "pandas" else _polars(where, x)
    if isinstance(x, list | tuple):
        return _list(where, x, axis)
    if not hasattr(x, "__array__") or library in ("pandas", "polars"):
        raise TypeError(
            f"{where}: expected a list, a NumPy array, a torch tensor, or a pandas or polars series or frame; got "
            f"{type(x).__name__}. An iterator becomes a list with list(x)."
        )
    array = module_of(x).asarray(unmasked(x))
    floating = _floating(where, array)
    return Series(array, _axis(where, axis, array.ndim), lambda result: result, floating)


def _axis(where: str, axis: int | None, dimensions: int) -> int:
    if dimensions == 0:
        raise ValueError(f"{where}: expected a series; got a single number. One value at a time is ewma.EMA's update.")
    if axis is None:
        return dimensions - 1
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise TypeError(f"{where}: axis must be an integer; got {axis!r}")
    if not -dimensions <= axis < dimensions:
        raise ValueError(
            f"{where}: expected axis from {-dimensions} to {dimensions - 1}, x having {dimensions} of them; got "
            f"axis={axis}"
        )
    return operator.index(axis) % dimensions


def _floating(where: str, array: Any) -> Any:
    """The dtype of a NumPy array's results: its own, or float64 for integers."""
    if array.dtype.kind == "f" and array.dtype.itemsize <= 8:
        return array.dtype
    if array.dtype.kind in "iubf":
        return module_of(array).dtype("float64")
    hints = {
        "c": "Smooth x.real and x.imag.",
        "U": "Parse text first, for example with [float(text) for text in x].",
        "O": "Its values must be real numbers; None is a missing one.",
        "M": "Datetimes go to times=.",
        "m": "Durations are smoothed as numbers: x / numpy.timedelta64(1, 's').",
    }
    raise TypeError(
        f"{where}: expected real numbers; got an array of {array.dtype}. {hints.get(array.dtype.kind, '')}".rstrip()
    )


def _tensor(where: str, x: Any, axis: int) -> Series:
    import torch

    tiny = x.is_floating_point() and x.dtype.itemsize < 2  # torch computes nothing in 8 bits
    if tiny or x.is_complex() or x.layout != torch.strided or x.is_quantized:
        raise TypeError(
            f"{where}: expected a dense tensor of real numbers; got {x.dtype}, layout {x.layout}."
            f"{' Convert it first: x.float().' if tiny else ''}"
        )
    array = x.double() if x.dtype == torch.bool else x.resolve_neg()
    return Series(array, axis, lambda result: result, x.dtype if x.is_floating_point() else torch.float64)


def _list(where: str, x: Any, axis: int | None) -> Series:
    import numpy

    torch = sys.modules.get("torch")
    if torch is not None and any(issubclass(kind, torch.Tensor) for kind in set(map(type, x))):
        raise TypeError(f"{where}: expected numbers; got a list of tensors. Make them one: torch.stack(x)")
    try:
        array = numpy.asarray(x)
        if array.dtype.kind == "O" and not any(isinstance(each, str | bytes) for each in array.flat):
            array = array.astype(float)  # None among numbers is a missing one; integers may be too large for int64
    except (ValueError, TypeError, OverflowError) as error:
        said = str(error).removesuffix(".")
        raise ValueError(
            f"{where}: expected numbers, in lists of equal lengths; NumPy says: {said}. None is a missing value."
        ) from error
    if not array.size and array.dtype.kind == "f" and array.ndim == 1 and isinstance(x, tuple | list):
        return Series(array, 0, lambda result: result.tolist(), array.dtype)
    if array.dtype.kind in "UO":
        raise TypeError(f"{where}: expected real numbers; got text. Parse it first: [float(text) for text in x].")
    _floating(where, array)
    return Series(array, _axis(where, axis, array.ndim), lambda result: result.tolist(), numpy.dtype("float64"))


def _no_numbers(where: str, x: Any, wrong: list[Any], convert: str, select: str) -> str:
    if type(x).__name__ == "Series":
        return f"{where}: expected a series of real numbers; got one of {x.dtype}. Convert it first: {convert}."
    named = ", ".join(map(repr, wrong))
    return f"{where}: expected columns of real numbers; {named} are not. Select some, for example {select}."


def _pandas(where: str, x: Any) -> Series:
    import numpy

    kinds = [x.dtype] if x.ndim == 1 else list(x.dtypes)
    names = [x.name] if x.ndim == 1 else list(x.columns)
    wrong = [name for name, kind in zip(names, kinds, strict=True) if getattr(kind, "kind", "O") not in "iufb"]
    if wrong:
        raise TypeError(_no_numbers(where, x, wrong, "pandas.to_numeric(x)", 'x.select_dtypes("number")'))
    single = kinds and all(kind.kind == "f" and kind.itemsize == 4 for kind in kinds)
    floating = numpy.dtype("float32" if single else "float64")
    array = x.to_numpy(dtype=floating, na_value=numpy.nan)
    about = {"name": x.name} if x.ndim == 1 else {"columns": x.columns}
    maker = x._constructor
    return Series(array, 0, lambda result: maker(result, index=x.index, **about), floating)


def _polars(where: str, x: Any) -> Series:
    import numpy
    import polars

    columns = [x] if isinstance(x, polars.Series) else x.get_columns()
    wrong = [column.name for column in columns if not (column.dtype.is_numeric() or column.dtype == polars.Boolean)]
    if wrong:
        raise TypeError(_no_numbers(where, x, wrong, "x.cast(polars.Float64)", "x.select(polars.selectors.numeric())"))
    single = columns and all(column.dtype == polars.Float32 for column in columns)
    floating = numpy.dtype("float32" if single else "float64")
    kind = polars.Float32 if single else polars.Float64
    arrays = [column.cast(kind).fill_null(float("nan")).to_numpy() for column in columns]

    def pack(result: Any) -> Any:
        """What has no average yet is null, as missing values are in polars."""
        if isinstance(x, polars.Series):
            return polars.Series(x.name, result).fill_nan(None)
        return polars.DataFrame(
            [polars.Series(column.name, result[:, place]) for place, column in enumerate(columns)]
        ).fill_nan(None)

    if isinstance(x, polars.Series):
        return Series(arrays[0], 0, pack, floating)
    array = numpy.stack(arrays, axis=1) if arrays else numpy.empty((x.height, 0))
    return Series(array, 0, pack, floating)
