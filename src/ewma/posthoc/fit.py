"""Which mixture of snapshots comes nearest to a target: exact least squares, with coefficients that sum to 1."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ewma.posthoc.step_weights import Snapshot, StepWeights, Updates
from ewma.profiles import Profile, after, check_profile

Metric: TypeAlias = Literal["updates", "steps"]

POOR = 0.01
"""A residual above this is warned of."""


class FarFromTarget(UserWarning):
    """The snapshots do not reach the target: see the residual."""


@dataclass(frozen=True)
class Fit:
    """A mixture of snapshots that stands in for an average that was not tracked.

    `coefficients` are the snapshots' shares of the mixture, which sum to 1; `residual` is how far its weights are from
    the target's, counted by the changes of the weights that they leave out or add:

        |shares reached - shares wanted| / |1 - shares wanted|          share of a change: sum of the weights from it on

    which is the expected error of the parameters, relative to how far the average lies behind the newest weights, if
    the changes were independent. `step_residual` is the plain `|weights reached - weights wanted| / |weights wanted|`.
    """

    target: Profile
    snapshots: tuple[Snapshot, ...]
    coefficients: tuple[float, ...]
    residual: float
    step_residual: float
    updates: Updates = field(repr=False)

    def curves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a plot shows: the time of each update, the weight that the target gives it, and the one reached."""
        weights = StepWeights(self.updates, (*self.snapshots, _target(self.target, self.updates)))
        wanted = torch.zeros(len(self.coefficients) + 1, dtype=torch.float64, device="cpu")
        wanted[-1] = 1.0
        reached = wanted.new_tensor([*self.coefficients, 0.0])
        times, mixtures = zip(*weights.mixtures(torch.stack((wanted, reached), dim=1)), strict=True)
        both = torch.cat(mixtures)
        return torch.cat(times), both[:, 0], both[:, 1]


def fit(
    snapshots: Sequence[Snapshot],
    target: Profile,
    at: tuple[float, int] | None = None,
    begin: tuple[float, int] = (0.0, 0),
    metric: Metric = "updates",
) -> Fit:
    """The mixture of snapshots nearest to the target, as tracked until `at`.

    Args:
        snapshots: at any times up to `at`, of any profiles.
        at: (time, count) of the target; by default those of the last snapshot.
        begin: (time, count) at which nothing had been averaged yet.
        metric: what is made small: "updates" the `residual` above, "steps" the `step_residual`. Weights of a run move
            slowly, so two snapshots differ less the nearer they are in time, and the first knows that: on real runs
            its parameters are several times nearer, and from raw weights only it gives anything sensible at all.

    Source: least squares over profiles as in Karras et al. 2024 (arXiv 2312.02696, section 3.2), but over the discrete
    steps as they were; float64, by QR factorisations, never by normal equations.
    """
    check_profile(target)
    if metric not in ("updates", "steps"):
        raise ValueError(f'metric must be "updates" or "steps"; got {metric!r}')
    if not snapshots:
        raise ValueError("expected one snapshot or more to mix; got none")
    knots = {(snapshot.time, snapshot.count) for snapshot in snapshots} | {begin}
    updates = Updates(sorted(knots | ({at} if at else set()), key=lambda knot: knot[1]))
    weights = StepWeights(updates, (*snapshots, _target(target, updates)))
    by_steps, by_updates = weights.of_steps(), weights.of_updates()
    coefficients = _least_squares(by_updates if metric == "updates" else by_steps)
    off = torch.cat((coefficients, -coefficients.new_ones(1)))
    return Fit(
        target=target,
        snapshots=tuple(snapshots),
        coefficients=tuple(coefficients.tolist()),
        residual=_relative(by_updates @ off, by_updates[:, -1]),
        step_residual=_relative(by_steps @ off, by_steps[:, -1]),
        updates=updates,
    )


def check(fit: Fit, max_residual: float | None) -> None:
    """Warn of a poor fit, or refuse one beyond the limit that was given."""
    limit = POOR if max_residual is None else max_residual
    if fit.residual <= limit:
        return
    told = (
        f"the {len(fit.snapshots)} snapshots do not reach {fit.target!r}: residual {fit.residual:.2g} by the changes "
        f"of the weights, {fit.step_residual:.2g} by the steps; "
    )
    if max_residual is not None:
        raise ValueError(f"{told}max_residual={max_residual:g} was asked for. Take a target nearer to what was tracked")
    warnings.warn(
        f"{told}above {POOR:g} the result may be far from the average that was meant. Track a profile nearer to it, or "
        f"take more snapshots; max_residual= makes this an error, or accepts it.",
        FarFromTarget,
        stacklevel=3,
    )


def begun_late(profile: Profile, last: float | None, end: float) -> Profile:
    """A profile that begins `last` before the end; by default at the start."""
    if last is None or last == end:
        return profile
    if not 0.0 < last < end:
        raise ValueError(f"last must be above 0 and at most {end:g}, the time there is; got {last:g}")
    return after(start=end - last, profile=profile)


def _target(target: Profile, updates: Updates) -> Snapshot:
    return Snapshot(target, *updates.knots[-1])


def _least_squares(columns: Tensor) -> Tensor:
    """Coefficients of all columns but the last that come nearest to the last and sum to 1.

    They are an even mixture plus what lies in the directions that sum to 0; where several are as good, as with a
    snapshot that is there twice, the smallest.
    """
    many = columns.shape[1] - 1
    even = columns.new_full((many,), 1.0 / many)
    if many == 1:
        return even
    directions = torch.linalg.qr(even[:, None], mode="complete").Q[:, 1:]
    known, wanted = columns[:, :-1], columns[:, -1]
    short = (wanted - known @ even)[:, None]
    found = torch.linalg.lstsq(known @ directions, short, rcond=1e-13, driver="gelsd").solution
    nearest: Tensor = even + (directions @ found)[:, 0]
    return nearest


def _relative(part: Tensor, whole: Tensor) -> float:
    off, size = float(part.norm()), float(whole.norm())
    return off / size if size else off
