"""The README's code runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

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
    assert len([line for line in BLOCKS[0].splitlines() if line]) == 15


def test_the_profiles() -> None:
    exec(BLOCKS[1], {"ewma": ewma})


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link
