"""The limit that ratios are to: the same number of bytes moved by the plainest loop over two contiguous buffers."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def compiled() -> ctypes.CDLL | None:
    """limit.c, compiled for this machine; None without a compiler that knows OpenMP."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limit.so"
        compiler = os.environ.get("CC", "cc")
        options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        try:
            command = [compiler, *options, str(Path(__file__).with_name("limit.c")), "-o", str(library)]
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return ctypes.CDLL(str(library))


def name() -> str:
    return "limit: a C loop, two buffers" if compiled() else "limit: lerp_, two buffers"


def limit(average: Tensor, value: Tensor, coefficient: float) -> Callable[[], object]:
    """One update of a contiguous average from a contiguous value, as fast as memory allows.

    Without a compiler that is torch's own lerp_, on one dtype only: what else is asked for is an error.
    """
    library = compiled()
    if library is None:
        if value.dtype != average.dtype:
            raise RuntimeError("without a C compiler there is no limit to compare mixed dtypes with")
        return lambda: average.lerp_(value, coefficient)
    function = getattr(
        library,
        {
            (torch.float32, torch.float32): "float32",
            (torch.float32, torch.bfloat16): "bfloat16_into_float32",
            (torch.bfloat16, torch.bfloat16): "bfloat16",
        }[average.dtype, value.dtype],
    )
    addresses = ctypes.c_void_p(average.data_ptr()), ctypes.c_void_p(value.data_ptr())
    rest = ctypes.c_long(average.numel()), ctypes.c_float(coefficient), ctypes.c_int(torch.get_num_threads())
    return lambda: function(*addresses, *rest)


def filter_limit(
    average: Tensor, gradient: Tensor, coefficient: float, raw: float, slow: float
) -> Callable[[], object]:
    """One filtering of a contiguous float32 gradient: two buffers are read, and both are written."""
    library = compiled()
    if library is None:
        raise RuntimeError("without a C compiler there is no limit to compare the filter with")
    addresses = ctypes.c_void_p(average.data_ptr()), ctypes.c_void_p(gradient.data_ptr())
    numbers = [ctypes.c_float(number) for number in (coefficient, raw, slow)]
    threads = ctypes.c_int(torch.get_num_threads())
    return lambda: library.filter(*addresses, ctypes.c_long(average.numel()), *numbers, threads)
