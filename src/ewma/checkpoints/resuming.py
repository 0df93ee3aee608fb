"""Go on averaging from another tool's checkpoint: its averages, its steps, and its profile where it is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ewma.checkpoints.averages import Averages
from ewma.checkpoints.found import Found
from ewma.checkpoints.naming import named
from ewma.checkpoints.reading import Source, choose, locate
from ewma.profiles import Profile
from ewma.recurrence import Recurrence
from ewma.weights.ema import ModelEMA
from ewma.weights.states import WhichProfile
from ewma.weights.views import Readable


def resume(
    ema: Readable,
    source: Source,
    *,
    at: str | None = None,
    count: int | None = None,
    profile: WhichProfile = None,
) -> Averages:
    """Continue another tool's average: from here on, each update is the one that the tool would have made.

    Args:
        ema: a ModelEMA of the model that was averaged, or a view of one profile. The model itself is not touched.
        source, at: as `checkpoints.read` takes them.
        count: how many updates the average has seen, where the checkpoint does not tell (timm).
        profile: what to do where the tool's profile is another one than here: by default an error that names both;
            "saved" takes the tool's, "mine" keeps this one. Where the checkpoint does not tell it (AveragedModel,
            ema-pytorch, Lightning, mmengine), this one is kept.

    A tool's average has all of its weight from the start (it begins at the first weights, not at zero), so the weight
    is that of a whole profile: the next update weighs `1 - decay`, and a uniform mean of n the n + 1st `1 / (n + 1)`.
    One update of the tool's counts as one step.

    Gives what was read. Errors are those of `checkpoints.read`, and nothing is changed then. Beside it: `ema.load` and
    `ema.load_state_dict` resume from ModelEMA's own, which this hands on to them.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> averaged = torch.optim.swa_utils.AveragedModel(model)
    >>> averaged.update_parameters(model)
    >>> ema = ModelEMA(model, profile=Uniform())
    >>> resume(ema, averaged.state_dict()).count, ema.count
    (1, 1)
    """
    if not isinstance(ema, Readable):
        raise TypeError(f"resume goes on with a ModelEMA, or a view of one; got {type(ema).__name__}")
    places = locate(source)
    if isinstance(ema, ModelEMA) and at is None and (state := _whole_state(places)) is not None:
        ema.load_state_dict(state, profile)
        place, found = next(iter(places.items()))
    else:
        place, found = choose(source, places, at)
        _resume(ema, found, f"{found.source}{f', {place}' if place else ''}", count, profile)
    weights = named(found, ema.model)
    return Averages(weights, found.source, place, found.count, found.decay, found.profile, found.time)


def _whole_state(places: Mapping[str, Found]) -> Mapping[str, Any] | None:
    """Where all that was found are the profiles of one ModelEMA, its state dict."""
    first = next(iter(places.values()), None)
    return first.state if first and all(found.state is first.state for found in places.values()) else None


def _resume(ema: Readable, found: Found, what: str, count: int | None, profile: WhichProfile) -> None:
    if found.clocks is not None:
        ema.take_over(what, found.tensors, found.clocks, profile)
        return
    seen = count if count is not None else found.count
    if seen is None:
        raise ValueError(
            f"{what}: the checkpoint does not tell how many updates the average has seen. Pass it: resume(..., "
            f"count=10_000)."
        )
    if seen < 1:
        raise ValueError(f"{what}: it has averaged nothing yet (count={seen}), so there is nothing to go on with")
    saved = found.profile if found.profile is not None else ema.profile
    theirs = saved == ema.profile or profile == "saved"
    time = found.time if theirs and found.time is not None and count is None else float(seen)
    clocks = {
        "profile": saved.to_json(),
        "clocks": [_clock(saved if theirs else ema.profile, time, seen)],
        "clock_of": {},
    }
    ema.take_over(what, named(found, ema.model), clocks, profile)


def _clock(profile: Profile, time: float, count: int) -> dict[str, float]:
    """The numbers of an average that is complete: whatever came before the first value counts as seen."""
    clock = Recurrence(profile, weigh="time")
    clock.advance(time)
    _, lost, gain = profile.change(time, min(1.0, time))
    whole = {"weight": 1.0, "residue": 0.0} if gain == lost else {}
    return {**clock.numbers(), **whole, "time": time, "count": float(count)}
