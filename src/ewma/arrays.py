"""NumPy and torch as one: the few places where their arrays differ, so that a formula is written once for both.

Neither is imported before an array of it comes along.
"""

from __future__ import annotations

import math
import sys
from typing import Any, TypeAlias

Array: TypeAlias = Any  # a NumPy array or a torch tensor


def is_tensor(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def module_of(x: Array) -> Any:
    """numpy or torch: what has the functions for x."""
    return sys.modules["torch" if is_tensor(x) else "numpy"]


def is_real(x: Array) -> bool:
    """Whether x holds real numbers: not text, complex numbers or objects."""
    return not x.is_complex() if is_tensor(x) else x.dtype.kind in "iubf"


def unmasked(x: Any) -> Any:
    """A masked array of NumPy's as a plain one, what is masked being NaN; anything else as it is."""
    if not hasattr(x, "filled"):
        return x
    return (x if x.dtype.kind == "f" else x.astype(float)).filled(math.nan)


def wide(x: Array) -> Array:
    """x in float64; itself where it is so already."""
    return x.double() if is_tensor(x) else x.astype("float64", copy=False)


def like(x: Array, values: Any) -> Array:
    """Float64 values as an array of x's kind, on its device."""
    if is_tensor(x):
        return x.new_tensor(values, dtype=module_of(x).float64) if not is_tensor(values) else values.to(x.device)
    return module_of(x).asarray(values, dtype="float64")


HUGE = 1 << 22


def empty(x: Array, dtype: Any) -> Array:
    """Room for a result of x's shape and kind.

    A large tensor on the CPU gets its memory from NumPy, which asks for huge pages: to touch fresh small ones takes the
    kernel several times as long as writing what is on them.
    """
    if not is_tensor(x):
        return sys.modules["numpy"].empty(x.shape, dtype)
    torch = sys.modules["torch"]
    if not torch.compiler.is_compiling() and x.numel() * dtype.itemsize >= HUGE and x.is_cpu:
        narrow = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16"}.get(dtype)
        if narrow and type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
            import numpy

            return torch.from_numpy(numpy.empty(tuple(x.shape), narrow))
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def full(x: Array, shape: tuple[int, ...], value: float) -> Array:
    """A float64 array of x's kind, on its device, filled with one value."""
    if is_tensor(x):
        return x.new_full(shape, value, dtype=module_of(x).float64)
    return module_of(x).full(shape, value)


def needs_gradient(*arrays: Any) -> bool:
    """Whether any of these is a tensor that autograd is to see."""
    for x in arrays:
        if is_tensor(x) and x.requires_grad:
            return bool(sys.modules["torch"].is_grad_enabled())
    return False


def may_ask(x: Array) -> bool:
    """Whether a question about the values costs no wait for a device."""
    return not is_tensor(x) or x.is_cpu


def before(after: Array, start: Any) -> Array:
    """What held before each step, given what held after it: shifted by one along the middle axis, from `start`."""
    module = module_of(after)
    if not hasattr(start, "shape"):
        start = full(after, (1, 1, 1), start)
    first = module.broadcast_to(start, (after.shape[0], 1, after.shape[2]))
    return module.concatenate((first, after[:, :-1]), 1)
