"""Other libraries' averages of weights, set to the same constant decay and one update a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.weights import ALPHA, Contender, Shapes, largest, model_of, move

DECAY = 1.0 - ALPHA

Peer = Callable[[nn.Module, torch.dtype | None], Contender]


def contender(model: nn.Module, update: Callable[[], object], averages: Any) -> Contender:
    """Args: averages: a function that gives them, in the model's order."""
    for _ in range(3):  # some begin with the weights as they are, in the first one or two
        update()
    return Contender(update, [largest(model.parameters(), averages(), ALPHA)])


def averaged_model(model: nn.Module, dtype: torch.dtype | None, foreach: bool = True) -> Contender:
    swa = torch.optim.swa_utils
    how = {"multi_avg_fn": swa.get_ema_multi_avg_fn(DECAY)} if foreach else {"avg_fn": swa.get_ema_avg_fn(DECAY)}
    peer = swa.AveragedModel(model, **how)
    if dtype is not None:
        peer.module.to(dtype)
    return contender(model, lambda: peer.update_parameters(model), peer.module.parameters)


def timm_v3(model: nn.Module, dtype: torch.dtype | None, foreach: bool = True) -> Contender:
    from timm.utils import ModelEmaV3

    peer = ModelEmaV3(model, decay=DECAY, dtype=dtype, foreach=foreach)
    return contender(model, lambda: peer.update(model), peer.module.parameters)


def ema_pytorch(model: nn.Module, dtype: torch.dtype | None, foreach: bool = True) -> Contender:
    from ema_pytorch import EMA

    once = {"update_after_step": 0, "update_every": 1, "min_value": DECAY}  # min_value: no warm-up
    peer = EMA(model, beta=DECAY, use_foreach=foreach, coerce_dtype=dtype is not None, **once)
    if dtype is not None:
        peer.ema_model.to(dtype)
    return contender(model, peer.update, peer.ema_model.parameters)


def torch_ema(model: nn.Module, dtype: torch.dtype | None) -> Contender:
    from torch_ema import ExponentialMovingAverage

    peer = ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)
    peer.to(dtype=dtype)
    return contender(model, lambda: peer.update(model.parameters()), lambda: peer.shadow_params)


def diffusers(model: nn.Module, dtype: torch.dtype | None, foreach: bool = True) -> Contender:
    from diffusers.training_utils import EMAModel

    peer = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, foreach=foreach)
    peer.to(dtype=dtype)
    return contender(model, lambda: peer.step(model.parameters()), lambda: peer.shadow_params)


PEERS: dict[str, Peer] = {
    "torch AveragedModel, multi_avg": averaged_model,
    "torch AveragedModel, avg_fn": lambda model, dtype: averaged_model(model, dtype, foreach=False),
    "timm ModelEmaV3": timm_v3,
    "timm ModelEmaV3(foreach=False)": lambda model, dtype: timm_v3(model, dtype, foreach=False),
    "ema-pytorch EMA(use_foreach=True)": ema_pytorch,
    "ema-pytorch EMA": lambda model, dtype: ema_pytorch(model, dtype, foreach=False),
    "torch_ema ExponentialMovingAverage": torch_ema,
    "diffusers EMAModel(foreach=True)": diffusers,
    "diffusers EMAModel": lambda model, dtype: diffusers(model, dtype, foreach=False),
}


def peers(
    shapes: Shapes, dtype: torch.dtype = torch.float32, into: torch.dtype | None = None
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that can be made for such a model, all of one, and why the others cannot.

    Args:
        into: the averages' dtype, where it is not the weights'.
    """
    made, left_out = {}, {}
    model = model_of(shapes, dtype)
    for name, make in PEERS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of theirs
                made[name] = make(model, into)
        except Exception as error:
            what = "not installed" if isinstance(error, ModuleNotFoundError) else f"refuses: {type(error).__name__}"
            left_out[name] = f"{what}: {str(error).splitlines()[0][:80]}"
    move(model)
    return made, left_out
