"""What ModelEMA itself wrote: state dicts, anywhere in a checkpoint, and the files of `save`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ewma import files, profiles
from ewma.checkpoints.found import Found, Tree
from ewma.profiles import Exponential


def model_ema(tree: Tree) -> Iterator[tuple[str, Found]]:
    """A ModelEMA's state dict: `kind` says so. Of several profiles, one each."""
    if tree.get("kind") == "ModelEMA" and isinstance(tree.get("tracks"), Mapping):
        files.check_format("ModelEMA's state", tree, "ModelEMA")
        for name, track in tree["tracks"].items():
            averages = {n: t for n, t in tree["averages"].get(name, {}).items() if n not in tree["absent"]}
            tensors = averages | dict(tree["copies"]) if averages else {}
            clocks = {**tree, **track, "averaged": list(averages)}
            found = Found("ModelEMA", tensors, whole=False, **_told(track), state=tree, clocks=clocks)
            yield f"{name}." if len(tree["tracks"]) > 1 else "", found


def model_ema_file(tree: Tree) -> Iterator[tuple[str, Found]]:
    """A file that `ModelEMA.save` wrote: the averaged model, and in the metadata the clocks."""
    metadata = tree.get("metadata of ewma")
    if isinstance(metadata, Mapping):
        files.check_format("a file of ModelEMA.save", metadata, "ModelEMA")
        yield "", Found("ModelEMA", tree["tensors"], whole=False, **_told(metadata), clocks=metadata)


def _told(track: Mapping[str, Any]) -> dict[str, Any]:
    profile, clock = profiles.from_json(track["profile"]), track["clocks"][0]
    decay = profile.decay if isinstance(profile, Exponential) else None
    return {"profile": profile, "decay": decay, "count": int(clock["count"]), "time": clock["time"]}
