"""`torch.set_default_device("cuda")` changes where new tensors come to be, and nothing here. Without a GPU meta stands
for it: what would come to be there has no values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import ewma
from ewma import checkpoints, posthoc
from ewma.gradients import SpikeGuard


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


@pytest.fixture
def elsewhere(model: nn.Module) -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("how", [{}, {"dtype": torch.bfloat16}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("kernel", [None, "foreach"])
def test_weights(model: nn.Module, tmp_path: Path, monkeypatch, how: dict, kernel: str | None) -> None:
    if kernel:
        monkeypatch.setenv("EWMA_KERNEL", kernel)
    ema = ewma.ModelEMA(model, {"long": ewma.Exponential(half_life=1e6), "wide": ewma.Power(sigma_rel=0.1)}, **how)
    for _ in range(3):
        ema.update()
    with ema.swapped(stash="cpu"), ema["wide"].swapped():
        pass
    ema.save(tmp_path / "ema.safetensors")
    ema.load(tmp_path / "ema.safetensors")
    ema.load_state_dict(ema.state_dict())
    tensors = [*ema.tensors().values(), *ema.module().state_dict().values(), *model.state_dict().values()]
    assert all(tensor.is_cpu for tensor in tensors)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files(model: nn.Module, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(model, ewma.Power(sigma_rel=0.1))
    archive = posthoc.Archive(tmp_path / "archive")
    for _ in range(4):
        ema.update()
        archive.add(ema)
    assert archive.reconstruct(ewma.Power(sigma_rel=0.12)).weights["0.weight"].is_cpu
    assert archive.solve(ewma.Power(sigma_rel=0.12)).curves()[0].is_cpu
    checkpoints.export(ema, tmp_path)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    assert checkpoints.read(tmp_path / "ema.pt").weights["0.weight"].is_cpu
    dcp.save({"ema": ema}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert checkpoints.read(tmp_path / "dcp").weights["0.weight"].is_cpu
    checkpoints.resume(ema, tmp_path / "dcp")
    assert ema.count == 4


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("fused", [False, True])
def test_gradients(model: nn.Module, fused: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    guard = SpikeGuard(warmup=3).attach(optimizer, skip=True)
    ema = ewma.GradientEMA(optimizer, model, half_life=3, squares=True)
    for step in range(8):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e9 if step == 6 else step + 1.0)
        optimizer.step()
    assert (guard.clipped, ema.count) == (1, 7)
    for number in (ema.norm(), ema.cosine(), ema.noise_scale(3), *ema.snr().values()):
        assert number.is_cpu


def test_modules_may_come_to_be_there() -> None:
    with torch.device("meta"):
        smooth = ewma.nn.Smooth(channels=2, half_life=[1.0, 2.0])
        centre = ewma.nn.EMA(shape=2, half_life=10)
    assert smooth.log_half_life.is_meta
    assert centre.average.is_meta
