"""What each snapshot holds of each update, reduced without loss to a few rows for each piece between snapshots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ewma.profiles import Exponential, Profile

RAW = Exponential(alpha=1.0)
"""The profile of raw weights: the newest value, and nothing of what was before."""

PIECE = 2**18
"""Updates are taken this many at a time, so that a run of any length needs little memory."""


@dataclass(frozen=True)
class Snapshot:
    """An average as it was after `count` updates, at `time`."""

    profile: Profile
    time: float
    count: int


@dataclass(frozen=True)
class Updates:
    """When the updates of a run were: known at the snapshots, and taken as equally spaced between them.

    Args:
        knots: (time, count) in rising order. The first is where nothing had been averaged yet: (0, 0), save for a
            tensor that came late.
    """

    knots: Sequence[tuple[float, int]]

    @cached_property
    def pieces(self) -> list[tuple[float, int, float, int]]:
        """(time, count) before and after each piece: knots, and cuts where they lie far apart."""
        found = []
        for (begin, first), (end, last) in pairwise(self.knots):
            cuts = [*range(first, last, PIECE), last]
            times = [begin + (end - begin) * (cut - first) / (last - first) for cut in cuts]
            found += [(*a, *b) for a, b in pairwise(zip(times, cuts, strict=True))]
        return found

    def times(self, piece: int) -> Tensor:
        """When the updates of a piece were, as float64."""
        begin, first, end, last = self.pieces[piece]
        steps = torch.arange(1, last - first + 1, dtype=torch.float64, device="cpu")
        return begin + (end - begin) / (last - first) * steps

    def terms(self, profile: Profile, piece: int) -> tuple[Tensor, Tensor]:
        """`keep` and `gain` of each update in a piece."""
        begin, first, end, last = self.pieces[piece]
        times = self.times(piece)
        elapsed = torch.full_like(times, (end - begin) / (last - first))
        keep, _, gain = (
            times.new_tensor(each) if isinstance(each, float) else each for each in profile.change(times, elapsed)
        )
        keep, gain = keep.broadcast_to(times.shape), gain.broadcast_to(times.shape)
        if first == 0 and not profile.debias:
            gain = gain.clone()
            gain[0] = 1.0
        return keep, gain


@dataclass(frozen=True)
class StepWeights:
    """The weight that each update has in each of several snapshots.

    Between two snapshots, those of one profile weigh the updates in the same proportions, `base`, and differ by a
    factor only. So the n updates of a piece are worth as many rows as there are profiles: those of the triangle of a
    QR factorisation of the bases, which leaves every inner product as it is. Of a million updates and 40 snapshots
    some hundred rows remain.
    """

    updates: Updates
    snapshots: Sequence[Snapshot]
    profiles: list[Profile] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "profiles", list(dict.fromkeys(snapshot.profile for snapshot in self.snapshots)))

    def bases(self, piece: int) -> tuple[Tensor, Tensor]:
        """Of each profile, what every update of a piece still counts at its end (updates, profiles); and the share of
        what was before that survives the piece."""
        bases, kept = [], []
        for profile in self.profiles:
            keep, gain = self.updates.terms(profile, piece)
            surviving = keep.flip(0).cumprod(0).flip(0)
            bases.append(gain * torch.cat((surviving[1:], surviving.new_ones(1))))
            kept.append(surviving[0])
        return torch.stack(bases, dim=1), torch.stack(kept)

    @cached_property
    def _passed(self) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Of each piece and profile what it brings and keeps; and the triangles of bases and of their sums."""
        brought, kept, triangles, summed = [], [], [], []
        for piece in range(len(self.updates.pieces)):
            bases, surviving = self.bases(piece)
            brought.append(bases.sum(0))
            kept.append(surviving)
            triangles.append(torch.linalg.qr(bases, mode="r").R)
            sums = torch.cat((bases.new_ones(len(bases), 1), bases.cumsum(0)), dim=1)
            summed.append(torch.linalg.qr(sums, mode="r").R)
        return torch.stack(brought), torch.stack(kept), triangles, summed

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """What a piece's bases are multiplied by in each snapshot, and each snapshot's mass before the piece as a share
        of all of it: both (pieces, snapshots), 0 and 1 in pieces after a snapshot."""
        brought, kept, *_ = self._passed
        masses = [brought[0].new_zeros(len(self.profiles))]
        for piece in range(len(brought)):
            masses.append(kept[piece] * masses[-1] + brought[piece])
        ends = {end: piece for piece, (_, _, _, end) in enumerate(self.updates.pieces)}
        shape = len(brought), len(self.snapshots)
        factors, before = masses[0].new_zeros(shape), masses[0].new_ones(shape)
        for column, snapshot in enumerate(self.snapshots):
            number, last = self.profiles.index(snapshot.profile), ends[snapshot.count]
            factor = 1.0 / masses[last + 1][number]
            for piece in range(last, -1, -1):
                factors[piece, column] = factor
                factor = factor * kept[piece, number]
                before[piece, column] = masses[piece][number] * factor
        return factors, before

    def of_steps(self) -> Tensor:
        """Columns whose inner products are those of the step weights: (rows, snapshots)."""
        _, _, triangles, _ = self._passed
        rows = [triangle @ self._spread(piece) for piece, triangle in enumerate(triangles)]
        return torch.cat(rows)

    def of_updates(self) -> Tensor:
        """The same of what each snapshot leaves out of each change of the weights: a snapshot is where the run began
        plus every change, counted by the weights of the steps from there on."""
        _, _, _, summed = self._passed
        _, before = self.factors
        rows = [
            triangle @ torch.cat((before[piece : piece + 1] - 1.0, self._spread(piece)))
            for piece, triangle in enumerate(summed)
        ]
        return torch.cat(rows)

    def _spread(self, piece: int) -> Tensor:
        """A piece's factors, each in the row of its snapshot's profile: (profiles, snapshots)."""
        factors, _ = self.factors
        which = [self.profiles.index(snapshot.profile) for snapshot in self.snapshots]
        numbers = torch.tensor(which, device=factors.device)
        spread = factors.new_zeros(len(self.profiles), len(numbers))
        return spread.scatter_(0, numbers[None], factors[piece : piece + 1])

    def mixtures(self, coefficients: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Piece by piece, the times of the updates and their weights in mixtures of the snapshots.

        Args:
            coefficients: (snapshots, mixtures).
        """
        for piece in range(len(self.updates.pieces)):
            bases, _ = self.bases(piece)
            yield self.updates.times(piece), bases @ (self._spread(piece) @ coefficients)
