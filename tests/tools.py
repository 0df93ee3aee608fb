"""Other tools' averages of one model, and the files they write: the tools themselves where they are installed here,
else what they keep, built to the documented layout."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from ewma.profiles import Exponential, Profile, Uniform, after, inverse_gamma, tensorflow

DECAY = 0.75


class Tool:
    """One tool at work on a model.

    Every one begins where the model is when it is made. What a checkpoint tells of it: `source`, `counts`, `decay`,
    `profile`; `goes_on` is the profile that goes on as the tool does, told or not.
    """

    source: str
    at = ""
    counts = True
    decay: float | None = None
    profile: Profile | None = None
    named = True
    goes_on: Profile = Exponential(decay=DECAY)

    def __init__(self, model: nn.Module) -> None:
        self.model, self.count = model, 0

    def update(self) -> None:
        raise NotImplementedError

    def averages(self) -> dict[str, Tensor]:
        """By name, of the parameters."""
        raise NotImplementedError

    def content(self) -> Any:
        """What is saved."""
        raise NotImplementedError

    def save(self, path: Path) -> Path:
        torch.save(self.content(), path)
        return path


class TorchEMA(Tool):
    source = "torch AveragedModel"
    at = "ema"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.module = swa_utils.AveragedModel(model, multi_avg_fn=self.average(), use_buffers=False)

    def average(self) -> Any:
        return swa_utils.get_ema_multi_avg_fn(DECAY)

    def update(self) -> None:
        self.module.update_parameters(self.model)

    def averages(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.module.module.named_parameters()}

    def content(self) -> Any:
        return {"epoch": 3, "model": self.model.state_dict(), "ema": self.module.state_dict()}


class TorchSWA(TorchEMA):
    goes_on = Uniform()

    def average(self) -> Any:
        return None


class EmaPytorch(Tool):
    source = "ema-pytorch"

    def __init__(self, model: nn.Module) -> None:
        from ema_pytorch import EMA

        super().__init__(model)
        self.module = EMA(model, beta=DECAY, update_after_step=0, update_every=1, min_value=DECAY)

    def update(self) -> None:
        self.module.update()

    def averages(self) -> dict[str, Tensor]:
        return dict(self.module.ema_model.named_parameters())

    def content(self) -> Any:
        return self.module.state_dict()


class TorchEma(Tool):
    source = "torch_ema"
    named = False
    decay = DECAY
    profile = goes_on = tensorflow(decay=DECAY)
    counted = True

    def __init__(self, model: nn.Module) -> None:
        from torch_ema import ExponentialMovingAverage

        super().__init__(model)
        self.kept = ExponentialMovingAverage(model.parameters(), DECAY, self.counted)

    def update(self) -> None:
        self.kept.update()

    def averages(self) -> dict[str, Tensor]:
        return dict(zip(dict(self.model.named_parameters()), self.kept.shadow_params, strict=True))

    def content(self) -> Any:
        return self.kept.state_dict()


class TorchEmaConstant(TorchEma):
    counts = counted = False
    profile = goes_on = Exponential(decay=DECAY)


class Diffusers(Tool):
    source = "diffusers EMAModel"
    named = False
    decay = DECAY
    settings: ClassVar[dict[str, Any]] = {}
    profile = goes_on = tensorflow(decay=DECAY)

    def __init__(self, model: nn.Module) -> None:
        from diffusers.training_utils import EMAModel

        super().__init__(model)
        self.kept = EMAModel(model.parameters(), decay=DECAY, **self.settings)

    def update(self) -> None:
        self.kept.step(self.model.parameters())

    def averages(self) -> dict[str, Tensor]:
        return dict(zip(dict(self.model.named_parameters()), self.kept.shadow_params, strict=True))

    def content(self) -> Any:
        return self.kept.state_dict()


class DiffusersWarm(Diffusers):
    settings: ClassVar[dict[str, Any]] = {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75}
    profile = goes_on = inverse_gamma(gamma=2.0, power=0.75, decay=DECAY)


class DiffusersLate(Diffusers):
    settings: ClassVar[dict[str, Any]] = {"update_after_step": 2}
    profile = goes_on = after(start=2, profile=tensorflow(decay=DECAY, debias=False))


class Kept(Tool):
    """What a tool keeps, where it is not installed: averages by name that follow the model."""

    decay = DECAY
    profile: Profile | None = Exponential(decay=DECAY)
    everything = False
    """Whether buffers are averaged too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.kept = {name: tensor.detach().clone() for name, tensor in self.tensors()}

    def tensors(self) -> list[tuple[str, Tensor]]:
        return list(self.model.named_parameters())

    def keep(self) -> float:
        return DECAY if self.count > 1 else 0.0

    def update(self) -> None:
        self.count += 1
        for name, tensor in self.tensors():
            self.kept[name].lerp_(tensor.detach(), 1.0 - self.keep())

    def averages(self) -> dict[str, Tensor]:
        return self.kept

    def averaged_model(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        aliases = {name: self.kept[first] for name, first in (("tied.weight", "last.weight"),)}
        return {**state, **self.kept, **aliases}


class Timm(Kept):
    """timm's CheckpointSaver, its arguments and bookkeeping included."""

    source = "timm"
    at = "state_dict_ema"
    counts = False

    def content(self) -> Any:
        return {
            "epoch": 3,
            "arch": "small",
            "version": 2,
            "state_dict": self.model.state_dict(),
            "state_dict_ema": self.averaged_model(),
            "args": Namespace(model="small", model_ema=True, model_ema_decay=DECAY, model_ema_warmup=False),
            "saver": {"checkpoint_files": [("checkpoint-3.pth.tar", 81.5)], "best_epoch": 3},
        }


class TimmWarm(Timm):
    profile = goes_on = inverse_gamma(decay=DECAY)

    def keep(self) -> float:
        return min(1.0 - self.count ** (-2.0 / 3.0), DECAY)

    def content(self) -> Any:
        arguments = Namespace(model_ema=True, model_ema_decay=DECAY, model_ema_warmup=True)
        return {**super().content(), "args": arguments}


class Script(Kept):
    """A script with a second state dict, as in DiT."""

    source = "'ema'"
    at = "ema"
    counts = False
    decay = profile = None

    def content(self) -> Any:
        return {"model": self.model.state_dict(), "ema": self.averaged_model(), "args": Namespace(lr=0.1)}


class CountingScript(Script):
    """With a count beside it, as in RT-DETR."""

    counts = True

    def content(self) -> Any:
        return {"model": self.model.state_dict(), "ema": {"module": self.averaged_model(), "updates": self.count}}


class MmengineHook(Kept):
    """mmengine's EMAHook: the averages under `state_dict`, the raw weights under `ema_state_dict`."""

    source = "mmengine EMAHook"
    decay = profile = None

    def content(self) -> Any:
        raw = {f"module.{name}": tensor for name, tensor in self.model.state_dict().items()}
        steps = {"steps": torch.tensor(self.count)}
        return {"meta": {"epoch": 1}, "state_dict": self.averaged_model(), "ema_state_dict": steps | raw}


class MmengineModel(Kept):
    source = "mmengine averaged model"
    at = "teacher"
    decay = profile = None

    def content(self) -> Any:
        kept = {f"module.{name}": tensor for name, tensor in self.averaged_model().items()}
        return {"teacher": {"steps": torch.tensor(self.count)} | kept}


class Nemo(Kept):
    """NeMo's second file, "-EMA.ckpt": its optimizer's averages are the model's weights."""

    source = "NeMo EMA"

    def keep(self) -> float:
        return DECAY

    def content(self) -> Any:
        ema = {"ema": [nn.Parameter(tensor) for tensor in self.kept.values()], "current_step": self.count}
        state = {"opt": {"state": {}, "param_groups": []}, "decay": DECAY, "every_n_steps": 1, **ema}
        return {"global_step": self.count, "state_dict": self.averaged_model(), "optimizer_states": [state]}


class NemoOne(Nemo):
    """NeMo's callback with an ordinary ModelCheckpoint: a raw model, and the averages in the optimizer's order."""

    at = "optimizer_states"
    named = False

    def content(self) -> Any:
        return {**super().content(), "state_dict": self.model.state_dict()}


class LitEma(Kept):
    """A latent diffusion model's LitEma, of a part of the whole: `model.` is averaged, and its names have no dots."""

    source = "LitEma"
    at = "state_dict/model_ema"
    profile = goes_on = tensorflow(decay=DECAY)

    def keep(self) -> float:
        return min(DECAY, (1 + self.count) / (10 + self.count))

    def dotless(self) -> dict[str, Tensor]:
        numbers = {"decay": torch.tensor(DECAY, dtype=torch.float32), "num_updates": torch.tensor(self.count).int()}
        return numbers | {name.replace(".", ""): tensor for name, tensor in self.kept.items()}

    def content(self) -> Any:
        raw = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        kept = {f"model_ema.{name}": tensor for name, tensor in self.dotless().items()}
        return {"global_step": 9, "state_dict": {**raw, **kept, "first_stage.weight": torch.ones(3)}}


class LitEmaAlone(LitEma):
    at = ""
    named = False

    def content(self) -> Any:
        return self.dotless()


INSTALLED = {"EmaPytorch": "ema_pytorch", "TorchEma": "torch_ema", "Diffusers": "diffusers"}


def here(tool: type[Tool]) -> bool:
    """Whether the tool is installed, if it takes that."""
    needed = next((package for name, package in INSTALLED.items() if tool.__name__.startswith(name)), "torch")
    return importlib.util.find_spec(needed) is not None


TOOLS: list[type[Tool]] = [
    TorchEMA,
    TorchSWA,
    EmaPytorch,
    TorchEma,
    TorchEmaConstant,
    Diffusers,
    DiffusersWarm,
    DiffusersLate,
    Timm,
    TimmWarm,
    Script,
    CountingScript,
    MmengineHook,
    MmengineModel,
    Nemo,
    NemoOne,
    LitEma,
    LitEmaAlone,
]


def run(tool: Tool, steps: int, also: Callable[[], None] = lambda: None) -> None:
    """Train for some steps: each changes every weight and the statistics, and then the averages are updated."""
    model = tool.model
    for _ in range(steps):
        with torch.no_grad():
            for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
                tensor.add_(0.1 * torch.randn_like(tensor))
        tool.update()
        also()
