"""Compiles the kernels in Triton for a GPU that is not here, so that all but running them is tested without one.

For a fresh interpreter: Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import os
import re
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ewma.kernels import triton_numbers


class Absent:
    """A GPU of which Triton need know no more than this to compile for it."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


made: list[Any] = []
"""What each launch would have run."""


def compile_for(capability: int) -> None:
    """From here on compile what is launched, for such a GPU, instead of running it."""
    run, driver._active = JITFunction.run, Absent(capability)

    def ahead(self: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made.append(run(self, *given, grid=grid, warmup=True, **options))

    JITFunction.run = ahead
    triton_numbers.interpreted = lambda: True  # so that tensors on the CPU are taken


def count(pattern: str) -> int:
    """How often it occurs in the last one's code."""
    return len(re.findall(pattern, made[-1].asm["ptx"]))
