"""What one profile keeps of a model: the averages by name, and the clocks they go by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ewma.profiles import Profile
from ewma.recurrence import Recurrence
from ewma.shards import write


def capturing() -> bool:
    """Whether a CUDA graph is being captured: what the host does now, replays do not."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture(clocks: Iterable[Recurrence], call: str) -> None:
    """Raise where a CUDA graph is captured while the host keeps the clocks: every replay would repeat one update."""
    if capturing() and any(isinstance(clock.weight, float) for clock in clocks):
        raise RuntimeError(
            f"a CUDA graph is being captured, and time and weight are on the host, so that every replay would repeat "
            f"this one update. Write {call}(..., capturable=True), and run a few steps before the capture."
        )


@dataclass
class Track:
    """One profile's averages.

    Nearly all tensors go by the one `clock` that runs from the start. One that came late, or was absent for a while,
    has its own in `clocks`.
    """

    profile: Profile
    averages: dict[str, Tensor] = field(default_factory=dict)
    clocks: dict[str, Recurrence] = field(default_factory=dict)
    clock: Recurrence = field(init=False)
    updated: bool = False
    """Whether anything was averaged yet; before that, the averages stand for the weights as they are."""

    def __post_init__(self) -> None:
        self.clock = Recurrence(self.profile, weigh="time")

    def clock_of(self, name: str) -> Recurrence:
        return self.clocks.get(name, self.clock)

    def restart(self) -> None:
        """Forget all that was averaged. The storage stays, for those who share it."""
        self.clocks.clear()
        self.clock = Recurrence(self.profile, weigh="time")
        self.updated = False

    def begin(self, averages: Mapping[str, Tensor]) -> None:
        """Take up tensors. Those that come late have seen nothing yet, at the time it is by now."""
        late = self.clock.begin_now()
        for name, average in averages.items():
            self.averages[name] = average
            if self.updated:
                self.clocks[name] = late

    def stop(self, present: set[str]) -> None:
        """Stop the clocks of tensors that are not present; they go on from there, should the tensors come back."""
        stopped: dict[int, Recurrence] = {}
        for name in self.averages.keys() - present:
            clock = self.clock_of(name)
            if clock is self.clock or any(self.clock_of(other) is clock for other in present if other in self.averages):
                self.clocks[name] = stopped.setdefault(id(clock), clock.copy())

    def clock_state(self) -> dict[str, Any]:
        """All clocks as numbers, the main one first, and which of the others each tensor goes by.

        In tuples, which torch.distributed.checkpoint takes whole: it asks for the same entries when it loads as when it
        saved, and their number changes in the course of training.
        """
        others = list({id(clock): clock for clock in self.clocks.values()}.values())
        index = {id(clock): number for number, clock in enumerate(others, start=1)}
        return {
            "profile": self.profile.to_json(),
            "clocks": tuple(clock.numbers() for clock in (self.clock, *others)),
            "clock_of": tuple((name, index[id(clock)]) for name, clock in self.clocks.items()),
        }

    def load(self, averages: Mapping[str, Tensor], state: Mapping[str, Any], profile: Profile) -> None:
        """Take over averages and clocks. Storage that is there is written into, so that who shares it sees it."""
        self.profile = profile
        clocks = []
        for numbers in state["clocks"]:
            clocks.append(Recurrence(profile, weigh="time"))
            clocks[-1].load(numbers)
        self.clock = clocks[0]
        self.clocks = {name: clocks[number] for name, number in dict(state["clock_of"]).items() if name in averages}
        self.updated = bool(self.clock.count)
        for name in self.averages.keys() - averages.keys():
            del self.averages[name]
        for name, saved in averages.items():
            mine = self.averages.get(name)
            if mine is not None and (mine.shape, mine.dtype) == (saved.shape, saved.dtype):
                write(mine, saved)
            else:
                self.averages[name] = saved.detach().clone()
