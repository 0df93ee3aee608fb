"""How much memory a call takes at its peak, beyond what was there before (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def peak_extra(call: Callable[[], object]) -> int:
    """Bytes of resident memory at the highest point of `call`, above those before it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the call would be served from what was freed before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")
