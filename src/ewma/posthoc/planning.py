"""How near a target will be, before a run has begun."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ewma.posthoc.fit import Fit, Metric, fit
from ewma.posthoc.step_weights import Snapshot
from ewma.profiles import Power, Profile, after

TRACKS = (Power(sigma_rel=0.05), Power(sigma_rel=0.10))
"""The two that Karras et al. track (arXiv 2312.02696)."""


def plan(
    steps: int,
    snapshots: int | Sequence[int],
    tracks: Profile | Iterable[Profile] | Mapping[str, Profile] = TRACKS,
    target: Profile | None = None,
    *,
    every: int = 1,
    last: float | None = None,
    metric: Metric = "updates",
) -> Fit:
    """The fit that an archive will give, known before training: `.residual` tells how near the target will be.

    Args:
        steps: of the whole run.
        snapshots: how many there will be of each track, at `snapshot_steps`; or the steps at which they will be.
        tracks: what will be tracked. `posthoc.RAW` stands for ordinary checkpoints.
        target: what will be asked for; by default `Power(sigma_rel=0.15)`.
        every: the update interval, in steps: that of `ema.attach(optimizer, every=...)`.
        last: begin the target so many steps before the end.

    >>> plan(100_000, snapshots=16, target=Power(sigma_rel=0.15)).residual < 1e-3
    True
    """
    chosen = snapshot_steps(steps, snapshots, every) if isinstance(snapshots, int) else list(snapshots)
    _check(steps, chosen, every)
    several = (
        [tracks] if isinstance(tracks, Profile) else list(tracks.values() if isinstance(tracks, Mapping) else tracks)
    )
    points = [Snapshot(profile, float(step), step // every) for step in chosen for profile in several]
    target = target or Power(sigma_rel=0.15)
    end = max(chosen)
    begun = target if last is None else after(start=end - last, profile=target)
    return fit(points, begun, (float(end), end // every), metric=metric)


def snapshot_steps(steps: int, snapshots: int, every: int = 1) -> list[int]:
    """When to take snapshots: denser at the start, `steps * (k / snapshots) ** 1.5`, where weights move the most.

    With as many as these, averages with a long memory come several times nearer than from equally spaced ones.

    >>> snapshot_steps(1_000, 4)
    [125, 354, 650, 1000]
    """
    if not 1 <= snapshots <= steps // every:
        raise ValueError(
            f"expected between 1 and {steps // every} snapshots, one for every update at the most; got {snapshots} for "
            f"{steps} steps with every={every}"
        )
    last = steps // every
    taken = [max(k, round(last * (k / snapshots) ** 1.5)) for k in range(1, snapshots + 1)]
    return [every * each for each in taken]


def _check(steps: int, chosen: Sequence[int], every: int) -> None:
    wrong = [step for step in chosen if not 1 <= step <= steps or step % every]
    if wrong or sorted(set(chosen)) != list(chosen) or not chosen:
        raise ValueError(
            f"snapshots must be rising steps between 1 and {steps}, at multiples of every={every}, where the updates "
            f"are; got {wrong[:5] or list(chosen)[:5]}"
        )
