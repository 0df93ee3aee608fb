"""From a model's tensors to a prepared update: what is averaged, copied, left raw, and whether any of it has moved."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ewma import kernels
from ewma.kernels.layout import parts_of
from ewma.kernels.noise import GOLDEN, MASK, word
from ewma.names import Named, named_tensors
from ewma.profiles import Exponential
from ewma.recurrence import Recurrence
from ewma.shards import first_element, is_sharded, local, placed_like
from ewma.tracks import Track, refuse_capture
from ewma.weights import offload
from ewma.weights.places import watch

Only: TypeAlias = Sequence[str] | Callable[[str, Tensor], bool] | None

ROUNDED_BELOW = 2.0**-12
"""A float32 loses steps below 6e-8 of itself: under this coefficient an average is rounded stochastically."""


@dataclass(frozen=True)
class Policy:
    """What to do with which tensor; the arguments of ModelEMA."""

    dtype: torch.dtype | Literal["auto"]
    device: torch.device | None
    buffers: Literal["copy", "average", "leave"]
    only: Only
    guard: bool
    capturable: bool
    selected: set[str] = field(default_factory=set, compare=False)
    """What a function as only= has selected: it stays so, for what is frozen is still averaged."""

    def told(self) -> dict[str, Any]:
        """What all ranks must have in common. (A function as only= cannot be compared.)"""
        only = self.only if isinstance(self.only, Sequence) else None
        return {"dtype": str(self.dtype), "buffers": self.buffers, "only": only, "guard": self.guard}

    def role(self, named: Named) -> Literal["averaged", "copied", "raw"]:
        real = named.tensor.is_floating_point() or named.tensor.is_complex()
        if named.is_parameter:
            return "raw" if not self.selects(named) else "averaged" if real else "copied"
        if self.buffers == "leave" and (real or named.tensor.layout != torch.strided):
            return "raw"
        constant = not named.persistent  # what is not saved is a constant or a cache
        return "copied" if not real or self.buffers == "copy" or constant else "averaged"

    def selects(self, named: Named) -> bool:
        if self.only is None:
            return True
        if callable(self.only):
            if any(self.only(name, named.tensor) for name in named.names):
                self.selected.add(named.name)
            return named.name in self.selected
        return any(fnmatchcase(name, pattern) for name in named.names for pattern in self.only)

    def new_average(self, tensor: Tensor) -> Tensor:
        """Room for the average of a tensor, holding its values; NaN where they are not finite, for "nothing yet"."""
        average = offload.room(tensor, self.device, self.average_dtype(tensor))
        self.fill(average, tensor)
        return average

    def fill(self, average: Tensor, tensor: Tensor) -> None:
        """Begin an average at a tensor's values."""
        average = local(average)
        average.copy_(local(tensor))
        if self.guard:
            parts_of(average).nan_to_num_(nan=math.nan, posinf=math.nan, neginf=math.nan)

    def average_dtype(self, tensor: Tensor) -> torch.dtype:
        if self.dtype != "auto" and not tensor.is_complex():
            return self.dtype
        if tensor.dtype.itemsize == 1:  # float8 is promoted to nothing
            return torch.float32
        return torch.promote_types(tensor.dtype, torch.float32)


class Binding:
    """A model's tensors as last seen, and the prepared update of every average.

    Made anew when `moved()` says that a tensor was added, removed, replaced or given other storage.
    """

    def __init__(self, model: nn.Module, policy: Policy, tracks: Sequence[Track], copies: dict[str, Tensor]) -> None:
        self.policy, self.tracks, self.copies = policy, tracks, copies
        self.roles: dict[str, list[Named]] = {"averaged": [], "copied": [], "raw": []}
        for named in named_tensors(model):
            if not is_lazy(named.tensor):
                role = policy.role(named)
                if role != "raw":
                    _check(named)
                self.roles[role].append(named)
        self._check_selection()
        self._adopt()
        self._copy_in(copies)
        self.clocks = [track.clock for track in tracks]
        self.updates = list(self._updates())
        self.on_cuda = any(named.tensor.is_cuda for named in self.averaged)
        self.offloaded = [update for update, _, _ in self.updates if isinstance(update, offload.OffloadedLerp)]
        mine = [average for update, _, _ in self.updates for average in update.noted]
        self.moved = watch(model, [*(named.tensor for named in self.averaged + self.copied), *mine])
        if callable(policy.only):
            self.moved = _or_unfrozen(self.moved, [named.tensor for named in self.raw])
        """Whether any of the tensors has changed since: complete, and cheap enough for every step."""
        self.free = not (policy.capturable or self.copies_from) and all(update.free for update, _, _ in self.updates)
        """Whether a float's worth of elapsed runs no torch operation, so that no mode needs to be entered for it."""
        self.begun = all(track.updated for track in tracks)
        """Whether all tracks have averaged something. What `fill` writes until then may need care: the first update is
        prepared for what is there."""

    @property
    def averaged(self) -> list[Named]:
        return self.roles["averaged"]

    @property
    def copied(self) -> list[Named]:
        return self.roles["copied"]

    @property
    def raw(self) -> list[Named]:
        return self.roles["raw"]

    def buffers(self) -> list[Tensor]:
        """What was averaged or copied of buffers that change in training; others are constants or caches."""
        averaged, copied = (
            [named.name for named in several if not named.is_parameter and named.persistent]
            for several in (self.averaged, self.copied)
        )
        averages = [track.averages[name] for track in self.tracks for name in averaged]
        return averages + [self.copies[name] for name in copied]

    def _check_selection(self) -> None:
        if self.averaged:
            return
        if self.policy.only is None:
            raise ValueError("the model has no floating parameters yet; a lazy layer gets its own in its first forward")
        known = ", ".join(named.name for named in self.raw[:5])
        raise ValueError(f"only={self.policy.only!r} selects none of the model's parameters; some of them: {known}")

    def run(self, elapsed: Any, at_most: float, seed: int) -> None:
        """Update every average and copy.

        Args:
            elapsed: a float, or a tensor that only the device knows.
            at_most: what elapsed is if every step was taken.
            seed: of the random bits of stochastic rounding.
        """
        if self.on_cuda:
            refuse_capture(self.clocks, "ModelEMA")
        counts = [track.clock.count + 0.0 for track in self.tracks]  # of updates before this one
        coefficients = [clock.advance(elapsed) for clock in self.clocks]
        if not self.begun:
            self.begun = True
            for track in self.tracks:
                track.updated = True
        for update, used, dtype in self.updates:
            words = [
                word(seed, counts[place])
                if _stalls(dtype, coefficients[number], self.clocks[number], at_most)
                else None
                for place, number in enumerate(used)
            ]
            update([coefficients[number] for number in used], words)
        if self.copies_from:
            self.copy_over()

    def hold(self) -> None:
        """Let what the device does next change the weights only after they were copied."""
        for update in self.offloaded:
            update.hold()

    def settle(self) -> None:
        """Wait until averages and copies in host memory hold the last update."""
        for update in self.offloaded:
            update.settle()
        self.copy_over.settle()

    def skipped(self) -> Any:
        """How many non-finite elements were left out, as an int or a tensor."""
        return sum((update.skipped for update, _, _ in self.updates), start=0)

    def _adopt(self) -> None:
        """Give every tensor that has none an average, and every average the place and the clock it needs."""
        for track in self.tracks:
            new: dict[str, Tensor] = {}
            for named in self.averaged:
                average = track.averages.get(named.name)
                if average is None or (average.shape != named.tensor.shape and not track.updated):
                    new[named.name] = self.policy.new_average(named.tensor)
                elif average.shape != named.tensor.shape:
                    raise ValueError(
                        f"{named.name}: expected shape {list(average.shape)}, as it was averaged so far; the parameter "
                        f"now has shape {list(named.tensor.shape)}. If that is meant, call ema.reset() to begin anew."
                    )
                else:
                    track.averages[named.name] = self._placed(named, average)
            track.begin(new)
            track.stop({named.name for named in self.averaged})
            if self.policy.capturable:
                self._refuse_offloaded()
                for clock in (track.clock, *track.clocks.values()):
                    clock.on_device(local(next(iter(track.averages.values()))).new_empty((), dtype=torch.float64))
        self._align()

    def _placed(self, named: Named, average: Tensor) -> Tensor:
        """An average that is there already, moved to where its parameter lies by now, as precise as that one."""
        if is_sharded(average) and not is_sharded(named.tensor):
            raise RuntimeError(
                f"{named.name} was sharded at the last update, and now it is whole. If this ModelEMA averages a part "
                f"of what fully_shard was called on, a forward without a backward has left that part unsharded: call "
                f"reshard() on the module that was sharded first, or average that one with only=."
            )
        if is_sharded(named.tensor):
            average = placed_like(average, named.tensor)
        average = average.to(torch.promote_types(average.dtype, self.policy.average_dtype(named.tensor)))
        return offload.placed(average, named.tensor, self.policy.device)

    def _refuse_offloaded(self) -> None:
        for named in self.averaged:
            if offload.offloaded(named.tensor, self.policy.device):
                raise ValueError(
                    f'{named.name} is on {named.tensor.device}: device="cpu" averages on the host, which a CUDA graph '
                    f"cannot hold. Leave out capturable=True, and update outside of the graph; or leave out device=."
                )

    def _align(self) -> None:
        """One dtype and layout for a tensor's averages in all tracks; loading one of them may have changed its own."""
        for named in self.averaged:
            several = [track.averages[named.name] for track in self.tracks]
            if len({(average.dtype, average.stride()) for average in several}) > 1:
                dtype = reduce(torch.promote_types, (average.dtype for average in several))
                for track in self.tracks:
                    aligned = torch.empty_like(several[0], dtype=dtype)
                    local(aligned).copy_(local(track.averages[named.name]))
                    track.averages[named.name] = aligned

    def _copy_in(self, copies: dict[str, Tensor]) -> None:
        for named in self.copied:
            mine = copies.get(named.name)
            device = self.policy.device or named.tensor.device
            if mine is None or (mine.shape, mine.dtype, mine.device) != (
                named.tensor.shape,
                named.tensor.dtype,
                device,
            ):
                copies[named.name] = offload.room(named.tensor, device)
                local(copies[named.name]).copy_(local(named.tensor))
        self.copies_to = [local(copies[named.name]) for named in self.copied]
        self.copies_from = [local(named.tensor) for named in self.copied]
        self.copy_over = offload.Copies(self.copies_to, self.copies_from)

    def _updates(self) -> Any:
        """One prepared update for all tensors that share clocks (by their numbers), dtypes and devices."""
        groups: dict[Any, list[Named]] = {}
        for named in self.averaged:
            average = self.tracks[0].averages[named.name]
            clocks = tuple(self._number(track.clock_of(named.name)) for track in self.tracks)
            away = offload.offloaded(named.tensor, self.policy.device)
            steady = away and named.is_parameter
            kind = (named.tensor.dtype, named.tensor.device, average.dtype, average.device, away, steady)
            groups.setdefault((clocks, kind), []).append(named)
        for (clocks, (*_, away, steady)), group in groups.items():
            averages = [[parts_of(local(track.averages[named.name])) for named in group] for track in self.tracks]
            values = [parts_of(local(named.tensor)) for named in group]
            streams = [_stream(named) for named in group]
            update: kernels.Lerp
            if away:
                update = offload.lerp(values, averages, streams, self.policy.guard, aside=steady)
            else:
                update = kernels.lerp(values, averages, streams, self.policy.guard)
            yield update, clocks, averages[0][0].dtype

    def _number(self, clock: Recurrence) -> int:
        """The place of a clock in the list of all, at its end if it is new."""
        for number, known in enumerate(self.clocks):
            if known is clock:
                return number
        self.clocks.append(clock)
        return len(self.clocks) - 1


def _or_unfrozen(moved: Callable[[], bool], raw: list[Tensor]) -> Callable[[], bool]:
    """Also whether any was unfrozen that was not selected: a function often selects by that."""
    frozen = [tensor for tensor in raw if not tensor.requires_grad]
    return lambda: moved() or any(tensor.requires_grad for tensor in frozen)


def _stream(named: Named) -> int:
    """What tells a tensor's random bits from others'. A shard's begin where they would in the whole tensor, so that
    sharding along the first dimension changes nothing."""
    whole = 2 if named.tensor.is_complex() else 1
    return (zlib.crc32(named.name.encode()) + whole * first_element(named.tensor) * GOLDEN) & MASK


def _stalls(dtype: torch.dtype, coefficient: Any, clock: Recurrence, at_most: float) -> bool:
    """Whether an average of this dtype would stall at this coefficient, were it rounded to nearest."""
    if dtype != torch.float32:
        return dtype in (torch.bfloat16, torch.float16)
    if isinstance(coefficient, float):
        return coefficient < ROUNDED_BELOW
    # Only the device knows the coefficient: go by the smallest that it can come to.
    profile = clock.profile
    return not isinstance(profile, Exponential) or -math.expm1(-profile.rate * at_most) < ROUNDED_BELOW


def _check(named: Named) -> None:
    tensor = named.tensor
    if tensor.is_meta:
        raise RuntimeError(
            f"{named.name} is still on the meta device and has no values to average. Give the model its weights "
            f"(model.to_empty(device=...), then initialise or load) before the first update."
        )
    if tensor.layout != torch.strided:
        out = "only=" if named.is_parameter else 'buffers="leave"'
        raise TypeError(f"{named.name}: expected a dense tensor; got layout {tensor.layout}. Leave it out with {out}.")
