"""The README's code runs as it is printed."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ewma

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_example_of_all_three_jobs() -> None:
    model = nn.Linear(4, 2)
    seen: list[float] = []
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "criterion": nn.CrossEntropyLoss(),
        "loader": [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(5)],
        "validate": lambda model: seen.append(model.weight.sum().item()),
    }
    exec(BLOCKS[0], names)
    average = dict(names["ema"].named_parameters())["weight"]
    assert seen == [average.sum().item()]
    assert names["loss_curve"].count == names["gradients"].count == names["ema"].count == 5
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 12


def test_the_series() -> None:
    exec(BLOCKS[1], {"ewma": ewma, "losses": [3.0, 2.0, 2.5]})


def test_the_gradients() -> None:
    exec(BLOCKS[2], {"ewma": ewma, "optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)})


def test_the_profiles() -> None:
    exec(BLOCKS[3], {"ewma": ewma})


def test_the_page_on_gradients(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(4, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    names = {"ewma": ewma, "torch": torch, "model": model, "scaler": scaler, "loss_of": loss_of}
    names |= {"batch": torch.randn(8, 4), "microbatches": torch.randn(4, 2, 4)}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/gradients.md").read_text(), re.DOTALL):
        names["optimizer"] = torch.optim.AdamW(model.parameters())
        exec(block, names)


def test_the_page_on_series(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).normal(size=60)
    names = {"ewma": ewma, "torch": torch, "datetime": datetime, "losses": values, "learning_rates": values**2}
    names |= {"stamps": [datetime.datetime(2026, 1, 1, 0, minute) for minute in range(60)], "samples_seen": range(60)}
    names |= {"chunks": np.split(values, 3), "value": 1.0, "next_value": 2.0, "later": ewma.EMA(half_life=100)}
    names |= {"x": torch.randn(2, 9, 64), "next_steps": torch.randn(2, 1, 64), "state": None}
    torch.save(ewma.EMA(half_life=100).state_dict(), "ema.pt")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/series.md").read_text(), re.DOTALL):
        exec(block, names)
    line = np.arange(400.0)  # DEMA and TEMA follow a line without lag, once the start is forgotten
    for follow in (names["dema"], names["tema"]):
        assert follow(line, span=9)[-1] == pytest.approx(399.0, abs=1e-9)
    assert names["macd"](line)[0][-1] == pytest.approx((26 - 12) / 2)


def test_the_page_on_checkpoints(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(4, 2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), "last.ckpt")
    names = {"ewma": ewma, "torch": torch, "model": model, "optimizer": torch.optim.SGD(model.parameters())}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/checkpoints.md").read_text(), re.DOTALL):
        exec(block, names)
    assert names["ema"].count == 1
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"averaged.safetensors", "ema.safetensors"}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link
