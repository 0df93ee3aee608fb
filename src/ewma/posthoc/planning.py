"""How near a target will be, before a run has begun."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ewma.posthoc.fit import Fit, Metric, begun_late, fit
from ewma.posthoc.step_weights import Snapshot
from ewma.profiles import Power, Profile, check_profile

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
    chosen = list(snapshots) if isinstance(snapshots, Iterable) else snapshot_steps(steps, snapshots, every)
    _check(steps, chosen, every)
    target = check_profile(target or Power(sigma_rel=0.15))
    several = (
        [tracks] if isinstance(tracks, Profile) else list(tracks.values() if isinstance(tracks, Mapping) else tracks)
    )
    points = [Snapshot(check_profile(profile), float(step), step // every) for step in chosen for profile in several]
    end = max(chosen)
    return fit(points, begun_late(target, last, end), (float(end), end // every), metric=metric)


def snapshot_steps(steps: int, snapshots: int, every: int = 1) -> list[int]:
    """When to take snapshots: denser at the start, `steps * (k / snapshots) ** 1.5`, where weights move the most.

    With as many as these, averages with a long memory come several times nearer than from equally spaced ones.

    >>> snapshot_steps(1_000, 4)
    [125, 354, 650, 1000]
    """
    for name, value in (("steps", steps), ("snapshots", snapshots), ("every", every)):
        if not hasattr(value, "__index__") or (name != "snapshots" and value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    if not 1 <= snapshots <= steps // every:
        raise ValueError(
            f"expected between 1 and {steps // every} snapshots, one for every update at the most; got {snapshots} for "
            f"{steps} steps with every={every}"
        )
    last = steps // every
    taken = [max(k, round(last * (k / snapshots) ** 1.5)) for k in range(1, snapshots + 1)]
    return [every * each for each in taken]


def _check(steps: int, chosen: Sequence[int], every: int) -> None:
    if every < 1:
        raise ValueError(f"every must be a whole number of at least 1; got {every!r}")
    wrong = [step for step in chosen if not 1 <= step <= steps or step % every]
    if wrong or sorted(set(chosen)) != list(chosen) or not chosen:
        raise ValueError(
            f"snapshots must be rising steps between 1 and {steps}, at multiples of every={every}, where the updates "
            f"are; got {wrong[:5] or list(chosen)[:5]}"
        )
