"""NeMo's EMA callback: a second file, "-EMA.ckpt", whose model is the averaged one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ewma.checkpoints.found import Found, Tree, decimal, is_state, tensors_in, whole_number
from ewma.profiles import Exponential


def nemo(tree: Tree) -> Iterator[tuple[str, Found]]:
    """Its optimizer keeps the averages, in the optimizer's order. In an "-EMA" file they are the weights in
    `state_dict` themselves; in others the list is all there is, and `state_dict` is raw."""
    several = tree.get("optimizer_states")
    states = [each for each in several if _is_ema(each)] if isinstance(several, list | tuple) else []
    if not states or not is_state(tree.get("state_dict")):
        return
    weights = tensors_in(tree["state_dict"])
    listed = [average.detach() for state in states for average in state["ema"]]
    places = {tensor.data_ptr() for tensor in weights.values()}
    told = _told(states)
    if all(average.data_ptr() in places for average in listed):
        yield "", Found("NeMo EMA", weights, **told)
    else:
        numbered = {str(number): average for number, average in enumerate(listed)}
        yield "optimizer_states", Found("NeMo EMA", numbered, "positions", False, **told)


def _is_ema(state: Any) -> bool:
    return isinstance(state, Mapping) and {"opt", "ema", "current_step"} <= state.keys()


def _told(states: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A decay for every `every_n_steps` of them, told per step."""
    first = states[0]
    steps, every = whole_number(first["current_step"]) or 0, whole_number(first.get("every_n_steps")) or 1
    decay = decimal(first.get("decay"))
    if any(each.get("decay") != first.get("decay") for each in states) or decay is None or not 0.0 <= decay < 1.0:
        return {"count": -(-steps // every), "time": float(steps)}
    profile = Exponential(decay=decay) if every == 1 else Exponential(decay=decay).scaled(1.0 / every)
    return {"count": -(-steps // every), "time": float(steps), "decay": profile.decay, "profile": profile}
