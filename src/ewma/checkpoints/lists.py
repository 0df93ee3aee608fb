"""Tools that keep the averages as a list: the model's parameters in their order, without names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ewma.checkpoints.found import Found, Tree, decimal, tensors_in, whole_number
from ewma.profiles import Exponential, Profile, after, inverse_gamma, tensorflow
from ewma.profiles.schedules import Schedule


def torch_ema(tree: Tree) -> Iterator[tuple[str, Found]]:
    """torch_ema's ExponentialMovingAverage: `shadow_params` beside `decay` and `num_updates`."""
    if "num_updates" in tree and _is_list(tree.get("shadow_params")):
        count, decay = whole_number(tree["num_updates"]), decimal(tree.get("decay"))
        yield "", Found("torch_ema", _numbered(tree["shadow_params"]), "positions", False, **warming_up(count, decay))


def diffusers(tree: Tree) -> Iterator[tuple[str, Found]]:
    """diffusers' EMAModel: `shadow_params` beside `optimization_step`; or, from `save_pretrained`, the averages as a
    model by name, and the numbers in its config.json."""
    if "optimization_step" in tree and _is_list(tree.get("shadow_params")):
        yield "", Found("diffusers EMAModel", _numbered(tree["shadow_params"]), "positions", False, **_diffusers(tree))
    config = tree.get("config.json")
    if isinstance(config, dict) and {"optimization_step", "decay", "inv_gamma"} <= config.keys():
        yield "", Found("diffusers EMAModel", tensors_in(tree["weights"]), **_diffusers(config))


def warming_up(count: int | None, decay: float | None) -> dict[str, Any]:
    """TensorFlow's rule as torch_ema and LitEma have it: the k-th update weighs `(1 + k) / (10 + k)`, at most `decay`,
    where our profile counts from 0; without a count, `decay` from the start."""
    profile: Profile | None = None
    if decay is not None and 0.0 <= decay < 1.0:
        profile = Exponential(decay=decay) if count is None else tensorflow(decay=decay)
    return {"count": count, "time": None if count is None else count + 1.0, "decay": decay, "profile": profile}


def _diffusers(told: Tree) -> dict[str, Any]:
    step, decay = whole_number(told["optimization_step"]), decimal(told.get("decay"))
    start = whole_number(told.get("update_after_step")) or 0
    return {"count": step, "decay": decay, "profile": _schedule(told, step, decay, start)}


def _schedule(told: Tree, step: int | None, decay: float | None, start: int) -> Profile | None:
    if decay is None or step is None or not 0.0 <= decay <= 1.0:
        return None
    debias = start <= 0  # where nothing was averaged yet, it begins at the value that it finds
    schedule: Schedule = tensorflow(decay=decay, debias=debias)
    if told.get("use_ema_warmup"):
        gamma, power = told.get("inv_gamma", 1.0), told.get("power", 2.0 / 3.0)
        schedule = inverse_gamma(gamma=gamma, power=power, decay=decay, debias=debias)
    if schedule.alpha_at(max(step - start, 0)) > 1.0 - (told.get("min_decay") or 0.0):
        return None  # the lower limit is still in force, which no profile of ours has
    return schedule if debias else after(start=start, profile=schedule)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(each, Tensor) for each in value)


def _numbered(values: Any) -> dict[str, Tensor]:
    return {str(number): tensor.detach() for number, tensor in enumerate(values)}
