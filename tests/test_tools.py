"""Checkpoints that whole training tools wrote here, in this test: those that are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Small, same
from tests.tools import DECAY
from torch.utils.data import DataLoader, TensorDataset

import ewma
from ewma import checkpoints
from ewma.profiles import inverse_gamma

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools

STEPS = 6


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed")


def batches() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(8 * STEPS, 4)), batch_size=8)


@needs("pytorch_lightning")
def test_lightnings_weight_averaging(tmp_path: Path) -> None:
    import pytorch_lightning as lightning
    from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Small()
            self.save_hyperparameters({"where": tmp_path, "lr": 0.1})

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.net(batch[0]).pow(2).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    averaging = EMAWeightAveraging(decay=DECAY)
    saving = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    settings = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(callbacks=[averaging, saving], enable_model_summary=False, **settings)
    task = Task()
    trainer.fit(task, batches())
    averages = {name: t.detach() for name, t in averaging._average_model.module.net.named_parameters()}
    came = checkpoints.read(tmp_path / "last.ckpt", task.net)
    assert (came.source, came.count, came.at) == ("Lightning WeightAveraging", STEPS, "")
    assert same(averages, {name: came.weights[name] for name in averages})
    ema = ewma.ModelEMA(task.net, decay=DECAY)
    checkpoints.resume(ema, tmp_path / "last.ckpt")
    assert same(averages, dict(ema.named_parameters()))


@needs("diffusers")
def test_diffusers_save_pretrained(tmp_path: Path) -> None:
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    config = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    model = UNet2DModel(**config, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    kept = EMAModel(
        model.parameters(), decay=DECAY, use_ema_warmup=True, model_cls=UNet2DModel, model_config=model.config
    )
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        kept.step(model.parameters())
    kept.save_pretrained(tmp_path / "unet_ema")
    averages = dict(zip(dict(model.named_parameters()), kept.shadow_params, strict=True))
    came = checkpoints.read(tmp_path / "unet_ema", model)
    assert (came.source, came.count, came.decay) == ("diffusers EMAModel", 3, DECAY)
    assert came.profile == inverse_gamma(decay=DECAY)
    assert same(averages, {name: came.weights[name] for name in averages})
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text((tmp_path / "unet_ema" / "config.json").read_text())
    came.save(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    again = UNet2DModel.from_pretrained(tmp_path / "ours")
    assert same(averages, dict(again.named_parameters()))


@needs("diffusers")
def test_a_folder_of_ours_is_what_from_pretrained_loads(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    config = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
    model = UNet2DModel(**config, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    ema = ewma.ModelEMA(model, half_life=2)
    ema.update()
    model.save_config(tmp_path)
    written = checkpoints.export(ema, tmp_path / "diffusion_pytorch_model.safetensors", max_shard_size="20KB")
    assert len(written) > 2
    again = UNet2DModel.from_pretrained(tmp_path)
    assert same(dict(ema.named_parameters()), dict(again.named_parameters()))


@needs("mmengine", "cv2")
def test_mmengines_hook(small: Small, tmp_path: Path) -> None:
    from mmengine.hooks import EMAHook
    from mmengine.logging import HistoryBuffer

    class Runner:
        model, iter, epoch = small, 0, 0

    hook = EMAHook(momentum=1.0 - DECAY)
    hook.before_run(Runner)
    for Runner.iter in range(STEPS):
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        hook.after_train_iter(Runner, Runner.iter)
    averages = {name: tensor.clone() for name, tensor in hook.ema_model.module.named_parameters()}
    checkpoint = {"state_dict": small.state_dict(), "message_hub": {"loss": HistoryBuffer([1.0, 2.0], [1, 1])}}
    hook.before_save_checkpoint(Runner, checkpoint)
    torch.save(checkpoint, tmp_path / "iter_6.pth")
    came = checkpoints.read(tmp_path / "iter_6.pth", small)
    assert (came.source, came.count) == ("mmengine EMAHook", STEPS)
    assert same(averages, {name: came.weights[name] for name in averages})


def of_timm(name: str) -> Any:
    """A file of timm's that needs torch alone; the package itself imports torchvision."""
    folder = Path(importlib.util.find_spec("timm").origin).parent
    spec = importlib.util.spec_from_file_location(name, folder / "utils" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs("timm")
def test_timms_averaged_model(small: Small, tmp_path: Path) -> None:
    kept = of_timm("model_ema").ModelEmaV3(small, decay=DECAY, use_warmup=True)
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        kept.update(small, step)
    # What its CheckpointSaver writes of it: the state of the module inside.
    torch.save(
        {"state_dict": small.state_dict(), "state_dict_ema": kept.module.state_dict()}, tmp_path / "last.pth.tar"
    )
    came = checkpoints.read(tmp_path / "last.pth.tar", small)
    assert same(dict(kept.module.state_dict()), dict(came.weights))
    ema = ewma.ModelEMA(small, inverse_gamma(decay=DECAY))
    checkpoints.resume(ema, tmp_path / "last.pth.tar", count=STEPS)
    with torch.no_grad():
        small.first.weight.add_(1.0)
    kept.update(small, STEPS + 1)
    ema.update()
    expected = kept.module.first.weight.detach()
    assert torch.allclose(dict(ema.named_parameters())["first.weight"], expected, rtol=0, atol=1e-6)
