"""A ModelEMA's state: collected for saving, and taken over again, all of it or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ewma import files, profiles
from ewma.names import Named, canonical, mismatch, named_tensors
from ewma.profiles import Profile
from ewma.shards import is_flat, write
from ewma.weights import swapping

if TYPE_CHECKING:
    from ewma.tracks import Track
    from ewma.weights.ema import ModelEMA

WhichProfile: TypeAlias = Literal["saved", "mine"] | None

NUMBERS = ("seed", "skipped", "steps", "waiting", "waiting_at_most")
"""What `ModelEMA.resumed` goes on with."""

CLOCKS = ("profile", "clocks", "clock_of")
"""What `Track.load` goes on with."""


def collect(ema: ModelEMA) -> dict[str, Any]:
    """What `ModelEMA.state_dict` gives."""
    if is_flat(ema.model):
        raise NotImplementedError(
            "FSDP1 leaves this rank pieces of the parameters that no other number of ranks could load. Shard with "
            "torch.distributed.fsdp.fully_shard (FSDP2) to save averages; or save the averaged model by FSDP1's own "
            "means: with ema.swapped(): get_model_state_dict(model)."
        )
    known = ema.updated or not any(named.tensor.is_meta or is_lazy(named.tensor) for named in named_tensors(ema.model))
    binding = ema.bind() if known else None
    present = {named.name: named.names for named in binding.averaged} if binding else {}
    absent = sorted(next(iter(ema.tracks.values())).averages.keys() - present.keys()) if binding else []
    names = {**{name: (name,) for name in absent}, **present}
    state = {
        "format": files.FORMAT,
        "kind": "ModelEMA",
        "seed": ema.seed,
        "run": ema.run,
        "skipped": ema.skipped,
        **ema.step_state(),
        "tracks": {name: track.clock_state() for name, track in ema.tracks.items()},
        "averages": {
            name: {alias: track.averages[own] for own, aliases in names.items() for alias in aliases}
            for name, track in ema.tracks.items()
            if binding
        },
        "absent": absent,
        "copies": {n.name: ema.copies[n.name] for n in binding.copied if n.persistent} if binding else {},
    }
    raw = swapping.raw_weights(ema.model)
    if raw:
        state["raw"] = {n.name: raw[id(n.tensor)] for n in named_tensors(ema.model) if id(n.tensor) in raw}
    state["made_with"] = _made_with(ema, bool(raw))
    return state


def _made_with(ema: ModelEMA, swapped: bool) -> dict[str, int]:
    """Names, so that torch.distributed.checkpoint misses one, and reads nothing, where they are others."""
    in_the_model = "averages in the model, raw weights beside" if swapped else "raw weights in the model"
    return {in_the_model: 1, **{f"{name}: {track.profile!r}": 1 for name, track in ema.tracks.items()}}


def restore(ema: ModelEMA, state: Mapping[str, Any], profile: WhichProfile) -> None:
    """Take over what `collect` gave."""
    what = "ModelEMA.load_state_dict"
    ema.agree(what)
    commit(ema, state, check(ema, what, state, profile))


class Checked(NamedTuple):
    """What of a state fits, by the model's names."""

    profiles: dict[str, Profile]
    averages: dict[str, dict[str, Tensor]]
    copies: dict[str, Tensor]
    raw: dict[str, Tensor]


def check(ema: ModelEMA, what: str, state: Mapping[str, Any], profile: WhichProfile) -> Checked:
    """What there is to take over; an error where any of it does not fit. Only shapes are looked at, no values."""
    files.check_format(what, state, "ModelEMA", (*NUMBERS, "tracks", "averages", "absent", "copies"))
    if state["tracks"].keys() != ema.tracks.keys():
        raise ValueError(
            f"{what}: expected the profiles {sorted(ema.tracks)}, as this ModelEMA was made with; the state has "
            f"{sorted(state['tracks'])}"
        )
    chosen, averages = {}, {}
    for name, track in ema.tracks.items():
        chosen[name] = _choose_profile(what, track.profile, state["tracks"][name]["profile"], profile)
        if state["averages"]:
            averages[name] = _fit(ema, what, state["averages"][name], state["absent"])
    copied = _check_copies(ema, what, state["copies"])
    live = {named.name: named.tensor for named in named_tensors(ema.model)}
    raw = {canonical(name, live): tensor for name, tensor in state.get("raw", {}).items()}
    if problem := mismatch(f"{what}, raw weights", _shapes({n: live[n] for n in raw if n in live}), _shapes(raw), ""):
        raise ValueError(problem)
    return Checked(chosen, averages, copied, raw)


def commit(ema: ModelEMA, state: Mapping[str, Any], checked: Checked) -> None:
    """Take it over."""
    ema.settle()
    live = {named.name: named.tensor for named in named_tensors(ema.model)}
    with torch.inference_mode(False), torch.no_grad():
        for name, track in ema.tracks.items():
            track.load(checked.averages.get(name, {}), state["tracks"][name], checked.profiles[name])
        _keep(ema, checked.copies)
        for name, tensor in checked.raw.items():
            write(live[name], tensor)
    ema.resumed(state)


def restore_track(
    ema: ModelEMA,
    track: Track,
    what: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    profile: WhichProfile,
) -> None:
    """Take over one profile from a file's tensors and metadata."""
    ema.agree(what)
    files.check_format(what, metadata, "ModelEMA", (*NUMBERS, *CLOCKS, "averaged"))
    chosen = _choose_profile(what, track.profile, metadata["profile"], profile)
    averages = _fit(ema, what, {each: tensors[each] for each in metadata["averaged"] if each in tensors}, [])
    roles = {named.name: ema.policy.role(named) for named in named_tensors(ema.model)}
    buffers = {name: tensor for name, tensor in tensors.items() if roles.get(name) == "copied"}
    copied = _check_copies(ema, what, buffers)
    ema.settle()
    with torch.inference_mode(False), torch.no_grad():
        track.load(averages, metadata, chosen)
        _keep(ema, copied)
    ema.resumed(metadata)


def _fit(ema: ModelEMA, what: str, saved: Mapping[str, Tensor], absent: Sequence[str]) -> dict[str, Tensor]:
    """The saved averages by the model's names, at least as precise as asked for; an error where they do not fit."""
    averaged = [named for named in named_tensors(ema.model) if ema.policy.role(named) == "averaged"]
    own = {alias: named for named in averaged for alias in named.names}
    known = {canonical(name, own.keys()): tensor for name, tensor in saved.items()}
    aliases = {alias for named in averaged for alias in named.names[1:]}
    problem = mismatch(
        f"{what}: the saved averages are not of this model",
        {n.name: tuple(n.tensor.shape) for n in averaged if not is_lazy(n.tensor)},
        {name: shape for name, shape in _shapes(known).items() if name not in aliases and name not in absent},
        "Nothing was loaded. Build the model as it was when they were saved, with the same only= and buffers=.",
    )
    if problem:
        raise ValueError(problem)
    return {
        name: tensor.to(torch.promote_types(tensor.dtype, _kept_dtype(ema, own.get(name), tensor)))
        for name, tensor in known.items()
        if name not in aliases
    }


def _kept_dtype(ema: ModelEMA, named: Named | None, saved: Tensor) -> torch.dtype:
    return saved.dtype if named is None else ema.policy.average_dtype(named.tensor)


def _check_copies(ema: ModelEMA, what: str, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The saved copies by the model's names; an error where one is of another shape than the model's buffer."""
    mine = {n.name: n.tensor for n in named_tensors(ema.model) if n.persistent and ema.policy.role(n) == "copied"}
    known = {canonical(name, mine): tensor for name, tensor in saved.items()}
    both = {name: tensor for name, tensor in known.items() if name in mine}
    problem = mismatch(f"{what}: the saved buffers", _shapes({n: mine[n] for n in both}), _shapes(both), "")
    if problem:
        raise ValueError(problem)
    return known


def _keep(ema: ModelEMA, copies: Mapping[str, Tensor]) -> None:
    """Take over copied buffers, in the storage that is there, for teachers that share it."""
    for name, copy in copies.items():
        mine = ema.copies.get(name)
        if mine is not None and (mine.shape, mine.dtype) == (copy.shape, copy.dtype):
            write(mine, copy)
        else:
            ema.copies[name] = copy.clone()


def _choose_profile(what: str, mine: Profile, saved_json: str, which: WhichProfile) -> Profile:
    one_of("profile", which, (None, "saved", "mine"))
    saved = profiles.from_json(saved_json)
    if saved != mine and which is None:
        raise ValueError(
            f"{what}: saved with {saved!r}, but this ModelEMA has {mine!r}. Nothing was loaded. Pass "
            f'profile="saved" to go on with the saved one, or profile="mine" to keep this one.'
        )
    return saved if which == "saved" else mine


def one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a value that is not among the choices, which the text lists."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
