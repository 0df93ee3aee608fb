"""Averages in host memory of weights on an accelerator: they take none of its memory, and it does not wait for them.

An update copies the weights into pinned memory on a stream of its own, bucket by bucket, while the training goes on; a
thread averages each bucket once it has arrived. What keeps that right:

    fork      the copies begin after all that the training stream was given before
    hold      what changes the weights next waits for the copies: on the device, the host goes on
    arrived   the thread reads a bucket when its copy is complete
    settle    the host waits for the thread before it reads averages, and before it copies again

What a forward pass may change, such as BatchNorm's statistics, is copied on the training stream itself.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ewma import kernels
from ewma.kernels import Coefficient, Lerp, Word
from ewma.kernels.foreach import packs
from ewma.kernels.layout import dense, flat
from ewma.shards import local

BUCKET = 1 << 24
"""In bytes: smaller weights are laid end to end on the device, up to this much, and cross as one."""

POLL = 5e-4
"""In seconds: how often the thread asks for a copy. To wait for it outright would keep a processor busy all along."""


class Mark(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the device has come past it."""


class Lane(Protocol):
    """The stream that copies are made on."""

    pinned: bool
    """Whether copies into pinned memory run by themselves."""

    def fork(self) -> None:
        """Let what comes here wait for what the training stream has been given so far."""

    def run(self, copy: Callable[[], object]) -> Mark:
        """Enqueue a copy, and mark its end."""

    def hold(self, mark: Mark) -> None:
        """Let what comes on the training stream wait for what was enqueued before the mark."""


class DeviceLane:
    """A stream of an accelerator: one beside the training stream; or, with aside=False, the training stream itself."""

    pinned = True

    def __init__(self, device: torch.device, aside: bool) -> None:
        self.device = device
        self.side = torch.Stream(device) if aside else None

    def training(self) -> Any:
        return torch.accelerator.current_stream(self.device)

    def fork(self) -> None:
        if self.side is not None:
            self.side.wait_stream(self.training())

    def run(self, copy: Callable[[], object]) -> Mark:
        with self.side or nullcontext():
            copy()
        mark: Mark = (self.side or self.training()).record_event()
        return mark

    def hold(self, mark: Mark) -> None:
        self.training().wait_event(mark)


class HostLane:
    """Where there are no streams, every copy is complete when the call returns."""

    pinned = False

    def fork(self) -> None:
        pass

    def run(self, copy: Callable[[], object]) -> Mark:
        copy()
        return Complete()

    def hold(self, mark: Mark) -> None:
        pass


class Complete:
    def query(self) -> bool:
        return True


def lane(device: torch.device, aside: bool) -> Lane:
    return DeviceLane(device, aside) if _streams(device) else HostLane()


def _streams(device: torch.device) -> bool:
    return device.type in ("cuda", "xpu")


def offloaded(tensor: Tensor, device: torch.device | None) -> bool:
    """Whether averages on `device` are in host memory while the tensor is not."""
    return device is not None and device.type == "cpu" and tensor.device.type != "cpu"


def room(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None = None) -> Tensor:
    """Memory on `device` for what a tensor holds: pinned, where it is offloaded to there."""
    pinned = offloaded(tensor, device) and _streams(tensor.device)
    return torch.empty_like(tensor, dtype=dtype, device=device or tensor.device, requires_grad=False, pin_memory=pinned)


def placed(average: Tensor, tensor: Tensor, device: torch.device | None) -> Tensor:
    """An average where it belongs, itself if it is there."""
    if not (offloaded(tensor, device) and _streams(tensor.device)):
        return average.to(device or tensor.device)
    if local(average).is_pinned():
        return average
    pinned = torch.empty_like(average, device="cpu", pin_memory=True)
    local(pinned).copy_(local(average))
    return pinned


def lerp(
    values: Sequence[Tensor], averages: Sequence[Sequence[Tensor]], streams: Sequence[int], guard: bool, aside: bool
) -> Lerp:
    """`kernels.lerp` of values that must be copied to where their averages are.

    Args:
        aside: nothing but an optimizer's step changes the values.
    """
    return cast(Lerp, OffloadedLerp(values, averages, streams, guard, lane(values[0].device, aside)))


class OffloadedLerp:
    """An update that returns before it is done: `settle` waits for it, `hold` keeps the weights for it."""

    free = False

    def __init__(
        self,
        values: Sequence[Tensor],
        averages: Sequence[Sequence[Tensor]],
        streams: Sequence[int],
        guard: bool,
        lane: Lane,
    ) -> None:
        self.lane = lane
        self.buckets: list[tuple[Bucket, Lerp]] = []
        for chosen, bucket in _buckets(values, lane.pinned):
            mine = [[several[n] for n in chosen] for several in averages]
            self.buckets.append((bucket, kernels.lerp(bucket.copies, mine, [streams[n] for n in chosen], guard)))
        self.noted: Sequence[Tensor] = [average for _, update in self.buckets for average in update.noted]
        self.pending: Future[None] | None = None
        self.last: Mark | None = None

    @property
    def skipped(self) -> Any:
        self.settle()
        return sum((update.skipped for _, update in self.buckets), start=0)

    def __call__(self, coefficients: Sequence[Coefficient], words: Sequence[Word | None]) -> None:
        self.settle()
        # Made by the training stream, in memory that it may use again at once: it copies them itself, before the fork.
        numbers = [self._on_host(number) for number in coefficients], [self._on_host(number) for number in words]
        self.lane.fork()
        marks = [self.lane.run(bucket.copy) for bucket, _ in self.buckets]
        self.last = marks[-1]
        self.pending = _thread().submit(self._average, marks, *numbers)

    def hold(self) -> None:
        """Let the training stream change the weights only after they were copied."""
        if self.last is not None:
            self.lane.hold(self.last)
            self.last = None

    def settle(self) -> None:
        """Wait until the averages hold the last update; what went wrong in it is raised here."""
        if self.pending is not None:
            wait([self.pending])
            pending, self.pending = self.pending, None
            pending.result()

    def _average(self, marks: list[Mark], coefficients: list[Any], words: list[Any]) -> None:
        with torch.no_grad():
            for mark, (_, update) in zip(marks, self.buckets, strict=True):
                arrived(mark)
                update(coefficients, words)

    def _on_host(self, number: Any) -> Any:
        if not isinstance(number, Tensor) or number.is_cpu:
            return number
        pinned = self.lane.pinned
        return torch.empty_like(number, device="cpu", pin_memory=pinned).copy_(number, non_blocking=pinned)


class Copies:
    """Tensors copied as they are, by the training stream itself: what a forward pass may change next."""

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self.groups: dict[torch.device, tuple[Lane, list[Tensor], list[Tensor]]] = {}
        for target, source in zip(targets, sources, strict=True):
            one = lane(source.device, aside=False) if offloaded(source, target.device) else HostLane()
            _, into, froms = self.groups.setdefault(source.device, (one, [], []))
            into.append(target)
            froms.append(source)
        self.marks: list[Mark] = []

    def __call__(self) -> None:
        self.marks = [
            one.run(functools.partial(torch._foreach_copy_, into, froms, non_blocking=one.pinned))
            for one, into, froms in self.groups.values()
        ]

    def settle(self) -> None:
        """Wait until the copies are complete."""
        for mark in self.marks:
            arrived(mark)
        self.marks = []


class Bucket:
    """Values that cross together.

    Args:
        values: several dense ones, or a single one of any layout.
        scratch: room on the device to lay several end to end.
    """

    def __init__(self, values: list[Tensor], scratch: Tensor | None, pinned: bool) -> None:
        self.pinned = pinned
        if scratch is None:
            self.parts: list[Tensor] = []
            self.source = values[0]
            self.target = torch.empty_like(self.source, device="cpu", pin_memory=pinned)
            self.copies = [self.target]
        else:
            sizes = [value.numel() for value in values]
            self.parts = [flat(value) for value in values]
            self.source = scratch[: sum(sizes)]
            self.target = torch.empty(sum(sizes), dtype=scratch.dtype, device="cpu", pin_memory=pinned)
            pieces = zip(self.target.split(sizes), values, strict=True)
            self.copies = [piece.as_strided(value.shape, value.stride()) for piece, value in pieces]

    def copy(self) -> None:
        if self.parts:
            torch.cat(self.parts, out=self.source)
        self.target.copy_(self.source, non_blocking=self.pinned)


def _buckets(values: Sequence[Tensor], pinned: bool) -> Iterator[tuple[list[int], Bucket]]:
    """The places in `values` of each bucket, and the bucket."""
    small = [n for n, value in enumerate(values) if value.nbytes < BUCKET and dense(value)]
    chosen = [[small[n] for n in pack] for pack in packs([values[n].nbytes for n in small], BUCKET)]
    together = [pack for pack in chosen if len(pack) > 1]
    packed = {n for pack in together for n in pack}
    if together:
        largest = max(sum(values[n].numel() for n in pack) for pack in together)
        scratch = values[0].new_empty(largest)
        yield from ((pack, Bucket([values[n] for n in pack], scratch, pinned)) for pack in together)
    yield from (([n], Bucket([value], None, pinned)) for n, value in enumerate(values) if n not in packed)


def arrived(mark: Mark) -> None:
    """Return when the device has come past the mark."""
    while not mark.query():
        time.sleep(POLL)


@functools.cache
def _thread() -> ThreadPoolExecutor:
    """The one thread that averages what arrives, for all: more would only wait for the same memory."""
    return ThreadPoolExecutor(1, thread_name_prefix="ewma-offload")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_thread.cache_clear)
