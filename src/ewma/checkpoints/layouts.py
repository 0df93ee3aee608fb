"""All layouts that are known, and the search for them through a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ewma.checkpoints import dotless, lists, modules, nemo, own
from ewma.checkpoints.found import Found, Tree

LAYOUTS: dict[str, tuple[Callable[[Tree], Iterator[tuple[str, Found]]], ...]] = {
    "ewma's ModelEMA (kind, tracks)": (own.model_ema, own.model_ema_file),
    "Lightning's WeightAveraging (current_model_state, averaging_state)": (modules.lightning,),
    "mmengine's EMAHook (ema_state_dict)": (modules.mmengine_hook, modules.mmengine_model),
    'NeMo\'s EMA (optimizer_states with "ema", or a file called *-EMA.ckpt)': (nemo.nemo,),
    "timm (state_dict_ema)": (modules.timm,),
    "ultralytics (ema, updates)": (modules.ultralytics,),
    "torch's AveragedModel (n_averaged, module.*)": (modules.averaged_model,),
    "ema-pytorch (initted, ema_model.*)": (modules.ema_pytorch,),
    "LitEma (model_ema.*, num_updates)": (dotless.lit_ema,),
    "torch_ema (shadow_params, num_updates)": (lists.torch_ema,),
    "diffusers' EMAModel (shadow_params, optimization_step)": (lists.diffusers,),
    "a state dict that is called so (ema, model_ema, ema_model, ema_state_dict)": (modules.called_ema,),
}
"""What each is called and known by, in the errors that list them."""

DEEPEST = 6


def search(tree: Any, at: str = "", depth: int = 0) -> Iterator[tuple[str, Found]]:
    """Every place where averages lie, and what lies there; the parts of what has been recognised are not searched."""
    if isinstance(tree, nn.Module):
        tree = tree.state_dict()
    if not isinstance(tree, Mapping) or depth > DEEPEST:
        return
    here = [each for layouts in LAYOUTS.values() for layout in layouts for each in layout(tree)]
    for part, found in here:
        yield "/".join(filter(None, (at, part.rstrip(".")))), found
    if not here:
        for name, value in tree.items():
            if not isinstance(value, Tensor):
                yield from search(value, f"{at}/{name}" if at else str(name), depth + 1)


def contents(tree: Any) -> str:
    """What a checkpoint holds instead, for an error."""
    if not isinstance(tree, Mapping):
        return type(tree).__name__
    told = [f"{name!r}{f' ({len(v)} entries)' if isinstance(v, Mapping) else ''}" for name, v in tree.items()]
    return ", ".join(told[:8]) + (f" and {len(told) - 8} more" if len(told) > 8 else "")
