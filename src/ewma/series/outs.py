"""Where results go: to `out`, where that can be written in place; else to new memory first."""

from __future__ import annotations

from typing import Any

from ewma.arrays import Array, empty, is_tensor, module_of
from ewma.series.values import Series


def refuse(out: Any) -> None:
    if out is not None:
        raise ValueError("out= cannot be written where autograd has to remember: leave it out, or use no_grad()")


def check(series: Series, out: Any) -> Array:
    """Where to write: `out` itself, or room of its own where out is not one stretch of memory or shares some of x's."""
    x, tensor = series.array, is_tensor(series.array)
    if not (is_tensor(out) if tensor else isinstance(out, module_of(x).ndarray)):
        raise TypeError(f"expected out to be an array or a tensor, as x is; got {type(out).__name__}")
    if out.shape != x.shape:
        raise ValueError(f"expected out of x's shape, {list(x.shape)}; got {list(out.shape)}")
    simple = _simple_tensor(x, out) if tensor else _simple_array(x, out)
    return out if simple else empty(x, series.floating)


def _simple_array(x: Any, out: Any) -> bool:
    if out.dtype.kind != "f":
        raise TypeError(f"expected out of a floating dtype; got {out.dtype}")
    flags = out.flags
    if not flags.writeable:
        raise ValueError("expected out to be writeable; got a read-only array")
    return bool(flags.c_contiguous and (out is x or not module_of(x).may_share_memory(out, x)))


def _simple_tensor(x: Any, out: Any) -> bool:
    if not out.is_floating_point() or out.device != x.device:
        raise TypeError(f"expected out of a floating dtype on {x.device}; got {out.dtype} on {out.device}")
    if out.requires_grad:
        raise ValueError("out needs a gradient, and cannot be written in place: give out.detach()")
    if not out.is_contiguous() or out._is_view():
        return False
    return out is x or bool(out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr())


def give(series: Series, made: Array, out: Any) -> Any:
    """The result as the series came, or in `out`."""
    if out is None:
        return series.pack(made)
    if made is not out:
        out[...] = made
    return out
