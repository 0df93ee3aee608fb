"""What is asked of a device that is measured: how long it took, how long the host did, how much it launched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

COPIES = ("Memcpy", "Memset")


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes on the host."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Host:
    """The CPU, in place of a device: to try a benchmark."""

    type = "cpu"

    def __str__(self) -> str:
        return f"CPU, {torch.get_num_threads()} threads: NOT a figure of CUDA"

    def wait(self) -> None:
        pass

    def seconds(self, call: Callable[[], object]) -> float:
        return seconds(call)

    def launches(self, call: Callable[[], object]) -> int | None:
        return None


class Cuda(Host):
    type = "cuda"

    def __str__(self) -> str:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"{torch.cuda.get_device_name()}, compute capability {capability}, CUDA {torch.version.cuda}"

    def wait(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object]) -> float:
        """How long the device takes; what is before it in the queue hides how long the host does."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def launches(self, call: Callable[[], object]) -> int | None:
        self.wait()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            self.wait()
        return launched(profile.events())


def launched(events: Iterable[Any]) -> int:
    """How many of a profile's events are kernels on the device."""
    on_device = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(COPIES) for name in on_device)


def device_of(name: str) -> Host:
    """The device to measure; an error where it is not there."""
    if name == "cpu":
        return Host()
    if not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device here. To try the program itself: python -m benchmarks cuda --device cpu "
            "--share 0.001 --rounds 1"
        )
    return Cuda()
