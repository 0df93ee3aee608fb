"""One call for every tool's checkpoint: find the averages, name them, tell what is known of them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from ewma.checkpoints.averages import Averages
from ewma.checkpoints.found import Found, Tree, is_state, tensors_in
from ewma.checkpoints.layouts import LAYOUTS, contents, search
from ewma.checkpoints.naming import named, unnamed
from ewma.checkpoints.opening import open_tree

Source: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | nn.Module


def read(source: Source, model: nn.Module | None = None, *, at: str | None = None) -> Averages:
    """The averaged weights out of a checkpoint of torch's AveragedModel, timm, diffusers, torch_ema, ema-pytorch,
    Lightning, mmengine, LitEma, NeMo, ultralytics, or of ModelEMA itself.

    Args:
        source: a file (torch.save, safetensors), a folder (torch.distributed.checkpoint, sharded safetensors); or what
            has been loaded from one already.
        model: the model that was averaged: then the names are the model's, and every name and shape is checked.
            Without it they are those in the checkpoint. Needed where the tool keeps no names (torch_ema, diffusers).
        at: which averages to take where a checkpoint has several, as the error lists them.

    Errors: ValueError where there are no averages (it lists what was looked for), several, or others than the model's;
    where the file is truncated; where a pickle asks for more than weights_only=True allows, which could run code.

    Nothing is loaded into the model: `model.load_state_dict(averages.weights)` does that, `checkpoints.resume` goes on
    averaging, `averages.save` writes a plain file.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> averaged = torch.optim.swa_utils.AveragedModel(model)
    >>> averaged.update_parameters(model)
    >>> read({"epoch": 3, "ema": averaged.state_dict()})
    Averages(source='torch AveragedModel', at='ema', count=1, decay=None, profile=None, time=None)
    """
    place, found = choose(source, locate(source), at)
    if not found.tensors or (found.clocks is not None and not found.count):
        raise ValueError(f"{called(source)}: the {found.source} in it has averaged nothing yet; there are no averages")
    weights = unnamed(found) if model is None else named(found, model)
    return Averages(weights, found.source, place, found.count, found.decay, found.profile, found.time)


def locate(source: Source) -> dict[str, Found]:
    """All averages in a checkpoint, by where they are: one at least, or an error that lists what was looked for."""
    tree = _open(source)
    places = dict(search(tree)) or _by_file_name(source, tree)
    if not places:
        raise ValueError(
            f"{called(source)}: found no averaged weights. It holds {contents(tree)}. Looked for "
            f"{'; '.join(LAYOUTS)}.{_beside(source)}"
        )
    return places


def choose(source: Source, places: Mapping[str, Found], at: str | None) -> tuple[str, Found]:
    """The one that is meant."""
    if at is not None and at not in places:
        raise ValueError(f"{called(source)}: no averages at {at!r}; found {_listed(places)}")
    if at is None and len(places) > 1:
        raise ValueError(
            f"{called(source)}: found several averages: {_listed(places)}. Say which, for example "
            f"at={next(iter(places))!r}."
        )
    place = next(iter(places)) if at is None else at
    return place, places[place]


def _open(source: Source) -> Tree:
    if isinstance(source, nn.Module):
        return {"": source}
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"read takes a path, or what was loaded from one; got {type(source).__name__}")
    try:
        return open_tree(source)
    except ValueError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise ValueError(
                f"{error} What it gives can be read too: read(torch.load(...)).{_pickled(error)}"
            ) from error
        raise


def _pickled(error: Exception) -> str:
    pickles = " (ultralytics pickles the whole averaged module; its package must be installed for that.)"
    return pickles if "ultralytics." in str(error) else ""


def _by_file_name(source: Source, tree: Tree) -> dict[str, Found]:
    """NeMo's second file may differ from an ordinary one in its name only."""
    if (
        isinstance(source, str | os.PathLike)
        and Path(source).stem.endswith("-EMA")
        and is_state(tree.get("state_dict"))
    ):
        return {"state_dict": Found("NeMo EMA", tensors_in(tree["state_dict"]))}
    return {}


def _beside(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        second = path.with_name(f"{path.stem}-EMA{path.suffix}")
        if second.exists():
            return f" {second.name} lies beside it, and was probably meant."
    return ""


def _listed(places: Mapping[str, Found]) -> str:
    return ", ".join(f"{place!r} ({found.source})" for place, found in places.items())


def called(source: Source) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "the checkpoint"
