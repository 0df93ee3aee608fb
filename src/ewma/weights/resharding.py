"""A ModelEMA from a folder that torch.distributed.checkpoint wrote, on whatever number of ranks there is now."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy

from ewma.names import canonical, mismatch, named_tensors
from ewma.readers.base import Entry
from ewma.readers.distributed import Distributed
from ewma.weights import ranks, states
from ewma.weights.states import WhichProfile

if TYPE_CHECKING:
    from ewma.weights.ema import ModelEMA

Steps: TypeAlias = tuple[Any, ...]


def load(ema: ModelEMA, folder: str | os.PathLike[str], profile: WhichProfile, patience: float | None) -> None:
    """Take over averages, clocks and buffers: all of it on every rank, or nothing and an error on every rank.

    Whatever can be wrong is found in the folder's metadata first. The averages are then read beside those that are
    there, each rank its own part of the tensors.
    """
    what = os.fspath(folder)
    groups = _everyone(ema)
    ranks.meet(f"loading {what}", groups, patience)
    named = {name: shape for each in ranks.gathered(_shapes(ema), groups).values() for name, shape in each.items()}
    problem: Exception | None = None
    try:
        state, prefix = _plan(ema, Path(folder), named, profile)
    except Exception as error:
        problem = error
    ranks.together(f"loading {what}", problem, groups)
    nested: Any = _tensors(state)
    for part in reversed(prefix):
        nested = {part: nested}
    _read(nested, what, groups)
    ema.agree(f"loading {what}")
    states.commit(ema, state, states.check(ema, what, state, profile))


def _everyone(ema: ModelEMA) -> list[Any]:
    if not ema.ranks.together:
        return []
    group = ema.ranks.group or dist.group.WORLD
    return [group] if dist.get_world_size(group) > 1 else []


def _shapes(ema: ModelEMA) -> dict[str, tuple[int, ...]]:
    """What this rank averages. Others may hold other parts of the model."""
    return {
        named.name: tuple(named.tensor.shape)
        for named in named_tensors(ema.model)
        if ema.policy.role(named) == "averaged" and not is_lazy(named.tensor)
    }


def _plan(
    ema: ModelEMA, folder: Path, named: Mapping[str, tuple[int, ...]], profile: WhichProfile
) -> tuple[dict[str, Any], Steps]:
    """The saved state with room in place of its tensors, and where in the checkpoint it is."""
    _check_folder(folder)
    checkpoint = Distributed(folder)
    paths = checkpoint.paths()
    prefix = _prefix(folder, list(paths.values()))
    state: dict[str, Any] = {"averages": {}, "copies": {}}
    mine = {alias: each for each in named_tensors(ema.model) for alias in each.names}
    for name, path in paths.items():
        if path[: len(prefix)] != prefix:
            continue
        inside = path[len(prefix) :]
        if name not in checkpoint.entries:
            _put(state, inside, checkpoint.other(name))
        elif inside[0] in ("averages", "copies", "raw"):
            own = mine.get(canonical(inside[-1], mine))
            _put(state, inside, _room(checkpoint.entries[name], own.tensor if own else None))
    _check_names(folder, state, named, {alias: each.name for alias, each in mine.items()})
    for tensors in (*state["averages"].values(), state["copies"], state.get("raw", {})):
        for name in [name for name, tensor in tensors.items() if tensor.is_meta]:
            del tensors[name]  # another rank's
    states.check(ema, str(folder), state, profile)
    return state, prefix


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected a folder that torch.distributed.checkpoint wrote; it does not exist"
        )
    if (folder / ".metadata").is_file():
        return
    inside = sorted(path.name for path in folder.iterdir())
    deeper = [name for name in inside if (folder / name / ".metadata").is_file()]
    if deeper:
        said = f"{folder / deeper[-1]} was probably meant"
    elif any(Path(name).suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl") for name in inside):
        said = (
            f"it holds {', '.join(inside[:4])}. Files that each rank wrote on its own (torch.save) do not say how they "
            f'belong together: save with torch.distributed.checkpoint.save({{"ema": ema}}, checkpoint_id=folder)'
        )
    elif any(name.endswith(".distcp") for name in inside):
        said = "it was not written to its end: .metadata comes last. Take the checkpoint before"
    else:
        said = f"it holds {', '.join(inside[:4]) or 'nothing'}"
    raise FileNotFoundError(
        f"{folder}: expected a folder that torch.distributed.checkpoint wrote, with .metadata in it; {said}"
    )


def _prefix(folder: Path, paths: list[Steps]) -> Steps:
    """Where the state of a ModelEMA is: in front of "tracks", the name of one, and its "profile"."""
    found = {path[:-3] for path in paths if len(path) > 2 and (path[-3], path[-1]) == ("tracks", "profile")}
    if len(found) == 1:
        return found.pop()
    top = list(dict.fromkeys(str(path[0]) for path in paths))
    if not found:
        raise ValueError(
            f"{folder}: no ModelEMA's state is in this checkpoint; it holds {', '.join(top[:8])}. It is saved as "
            f'torch.distributed.checkpoint.save({{"ema": ema, ...}}, checkpoint_id=folder)'
        )
    raise ValueError(
        f"{folder}: the states of several ModelEMAs are in this checkpoint, {sorted(map('.'.join, found))}. Say which: "
        f'torch.distributed.checkpoint.load({{"name": ema}}, checkpoint_id=folder)'
    )


def _room(entry: Entry, like: Tensor | None) -> Tensor:
    """Where to read a tensor to, placed as the model's own is; on no device where there is none that fits."""
    if like is None or tuple(like.shape) != tuple(entry.shape):
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    return torch.empty_like(like, dtype=entry.dtype, requires_grad=False)


def _check_names(
    folder: Path, state: Mapping[str, Any], named: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> None:
    """The saved averages against those of all ranks together."""
    for averages in state["averages"].values():
        known = {canonical(name, {**names, **named}): tuple(tensor.shape) for name, tensor in averages.items()}
        saved = {n: shape for n, shape in known.items() if names.get(n, n) == n and n not in state["absent"]}
        problem = mismatch(
            f"{folder}: the saved averages are not of this model",
            dict(named),
            saved,
            "Nothing was loaded. Build the model as it was when they were saved, with the same only= and buffers=.",
        )
        if problem:
            raise ValueError(problem)


def _put(state: dict[str, Any], path: Steps, value: Any) -> None:
    for part in path[:-1]:
        state = state.setdefault(part, {})
    state[path[-1]] = value


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in ("averages", "copies", "raw") if name in state}


def _read(nested: dict[str, Any], folder: str, groups: list[Any]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load as read

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            read(nested, checkpoint_id=folder, process_group=groups[0] if groups else None, no_dist=not groups)
        except CheckpointException as error:  # which no `except Exception` would catch
            failed = next(iter(error.failures.items()))
            raise RuntimeError(f"{folder}: could not be read on rank {failed[0]}: {failed[1][0]!r}") from error
