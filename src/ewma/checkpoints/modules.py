"""Tools that keep the averages as a second module, and save its state: the model's own names, under a prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ewma.checkpoints.found import Found, Tree, is_state, owners, tensors_in, whole_number
from ewma.profiles import Exponential, inverse_gamma
from ewma.readers.standins import StandIn


def averaged_model(tree: Tree) -> Iterator[tuple[str, Found]]:
    """torch.optim.swa_utils.AveragedModel: `n_averaged` beside `module.*`. Its decay is a function, and not saved."""
    for prefix in owners(tree, "n_averaged"):
        if tensors := tensors_in(tree, f"{prefix}module."):
            count = whole_number(tree[f"{prefix}n_averaged"])
            yield prefix, Found("torch AveragedModel", tensors, count=count)


def mmengine_model(tree: Tree) -> Iterator[tuple[str, Found]]:
    """mmengine's averaged models by themselves: `steps` beside `module.*`. The momentum is not saved."""
    for prefix in owners(tree, "steps"):
        if tensors := tensors_in(tree, f"{prefix}module."):
            yield prefix, Found("mmengine averaged model", tensors, count=whole_number(tree[f"{prefix}steps"]))


def ema_pytorch(tree: Tree) -> Iterator[tuple[str, Found]]:
    """ema-pytorch's EMA: `initted` and `step` beside `ema_model.*`. Its settings are not saved."""
    for prefix in owners(tree, "initted"):
        if tensors := tensors_in(tree, f"{prefix}ema_model."):
            yield prefix, Found("ema-pytorch", tensors, count=whole_number(tree.get(f"{prefix}step")))


def mmengine_hook(tree: Tree) -> Iterator[tuple[str, Found]]:
    """mmengine's EMAHook: it saves with the two exchanged, so that `state_dict` holds the averages, and `module.*` of
    `ema_state_dict` the raw weights."""
    raw: Any = tree.get("ema_state_dict")
    if is_state(raw) and is_state(tree.get("state_dict")) and tensors_in(raw, "module."):
        yield "", Found("mmengine EMAHook", tensors_in(tree["state_dict"]), count=whole_number(raw.get("steps")))


def lightning(tree: Tree) -> Iterator[tuple[str, Found]]:
    """Lightning's WeightAveraging: the averages in `state_dict`, the raw weights in `current_model_state`."""
    if is_state(tree.get("current_model_state")) and is_state(tree.get("state_dict")) and "averaging_state" in tree:
        count = whole_number(tree["averaging_state"].get("n_averaged"))
        yield "", Found("Lightning WeightAveraging", tensors_in(tree["state_dict"]), count=count)


def timm(tree: Tree) -> Iterator[tuple[str, Found]]:
    """timm's checkpoints. The decay stands among the arguments, the step nowhere."""
    if _is_plain(tree.get("state_dict_ema")):
        arguments = tree["args"].state if isinstance(tree.get("args"), StandIn) else tree.get("args")
        told = arguments if isinstance(arguments, dict) else getattr(arguments, "__dict__", {})
        decay, profile = told.get("model_ema_decay"), None
        if isinstance(decay, float) and 0.0 <= decay < 1.0:
            profile = inverse_gamma(decay=decay) if told.get("model_ema_warmup") else Exponential(decay=decay)
        found = Found("timm", tensors_in(tree["state_dict_ema"]), decay=decay, profile=profile)
        yield "state_dict_ema", found


def called_ema(tree: Tree) -> Iterator[tuple[str, Found]]:
    """Scripts that save a second state dict and call it so (DiT and its kin), some with a count (RT-DETR, D-FINE)."""
    for key in ("ema", "model_ema", "ema_model", "ema_state_dict"):
        kept: Any = tree.get(key)
        if isinstance(kept, Mapping) and _is_plain(kept.get("module")):
            yield key, Found(f"{key!r}", tensors_in(kept["module"]), count=whole_number(kept.get("updates")))
        elif _is_plain(kept):
            yield key, Found(f"{key!r}", tensors_in(kept), count=whole_number(tree.get("updates")))


def _is_plain(state: Any) -> bool:
    """Whether it is a model's own state, without what the tools that are known by more put beside it."""
    markers = ("n_averaged", "steps", "initted", "num_updates")
    return is_state(state) and not any(name.rpartition(".")[2] in markers for name in state)


def ultralytics(tree: Tree) -> Iterator[tuple[str, Found]]:
    """ultralytics' checkpoints, loaded by who trusts them: `ema` is the averaged module itself, in half precision."""
    module: Any = tree.get("ema")
    if "updates" in tree and hasattr(module, "state_dict"):
        yield "", Found("ultralytics", tensors_in(module.state_dict()), count=whole_number(tree["updates"]))
