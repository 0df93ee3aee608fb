"""From a path to all that the checkpoint holds, nested as it was saved."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ewma.checkpoints.found import Tree
from ewma.readers import open_checkpoint
from ewma.readers.distributed import Distributed
from ewma.readers.pickled import Pickled


def open_tree(path: str | os.PathLike[str]) -> Tree:
    """What is in a checkpoint of any format that `readers.open_checkpoint` knows.

    Tensors of torch.save files are mapped from the file; those of the others are read.
    """
    with open_checkpoint(path) as checkpoint:
        if isinstance(checkpoint, Pickled):
            return _mapping(checkpoint.content)
        if isinstance(checkpoint, Distributed):
            return _nested(checkpoint)
        tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
        told = checkpoint.others()
    if "ewma" in told:
        return {"metadata of ewma": json.loads(told["ewma"]), "tensors": tensors}
    config = Path(path) / "config.json"
    if config.is_file():
        return {"config.json": json.loads(config.read_text()), "weights": tensors}
    return tensors


def _mapping(content: Any) -> Tree:
    return content if isinstance(content, dict) else {"": content}


def _nested(checkpoint: Distributed) -> Tree:
    """torch.distributed.checkpoint keeps flat names, and beside them the paths that they were."""
    paths = checkpoint.metadata.planner_data or {}
    tree: dict[Any, Any] = {}
    values = {name: checkpoint.read(name) for name in checkpoint.names()} | checkpoint.others()
    for name, value in values.items():
        *parents, last = paths.get(name, (name,))
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
        branch[last] = value
    return {name: _lists(branch) for name, branch in tree.items()}


def _lists(tree: Any) -> Any:
    """Lists are kept by their numbers; they are lists again here."""
    if not isinstance(tree, dict):
        return tree
    if tree.keys() == set(range(len(tree))):
        return [_lists(tree[number]) for number in range(len(tree))]
    return {name: _lists(branch) for name, branch in tree.items()}
