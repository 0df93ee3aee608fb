"""Several ranks make one archive: rank 0 writes what all of them hold, and what goes wrong there all of them learn."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from tests.conftest import Small
from tests.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import ewma
from ewma import posthoc

POWERS = {"narrow": ewma.Power(sigma_rel=0.05), "wide": ewma.Power(sigma_rel=0.1)}


def step(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.rand(1, generator=generator).item()


def archived(kind: str, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """A run of 20 steps; what is reconstructed, and what every rank is told when the disk is full."""
    torch.manual_seed(0)
    model = Small()
    if kind == "fsdp2":
        fully_shard(model)
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    ema, archive = ewma.ModelEMA(model, POWERS), posthoc.Archive(folder)
    for count in range(1, 21):
        step(model)
        ema.update()
        if count % 4 == 0:
            archive.add(ema)
    said = []
    for name in ("full", "another run"):
        full = mock.patch.object(os, "fsync", side_effect=OSError(28, "No space left on device"))
        if name == "another run":
            ema.run = "another"
        with pytest.raises((OSError, RuntimeError, ValueError)) as caught, full if name == "full" else mock.MagicMock():
            archive.add(ema)
        said.append(f"{type(caught.value).__name__}: {caught.value}")
    return archive.reconstruct(ewma.Power(sigma_rel=0.07)).weights, said


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_ranks_make_the_archive_that_one_process_makes(tmp_path: Path, kind: str) -> None:
    alone, _ = archived("alone", tmp_path / "alone")
    (first, said_first), (second, said_second) = on_ranks(archived, 2, kind, tmp_path / kind)
    for name, tensor in alone.items():
        for weights in (first, second):
            torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-7)
    assert said_first[0] == "OSError: [Errno 28] No space left on device"
    assert said_second[0] == f"RuntimeError: archive.add failed on rank 0, which writes: {said_first[0]}"
    assert said_first[1].startswith("ValueError: ")
    assert "of the run another; nothing was written" in said_second[1]
    assert len(list((tmp_path / kind).glob("*.safetensors"))) == 10
