"""Small models and the truth beside them, for all tests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ewma import kernels

TRITON_MISSING = None if importlib.util.find_spec("triton") else "Triton is not installed"
if torch.cuda.is_available():
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

NATIVE_MISSING = kernels.missing()
if NATIVE_MISSING:
    os.environ.setdefault("EWMA_KERNEL", "foreach")  # content with that, without the warning


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if NATIVE_MISSING:
        terminalreporter.write_line(f"{NATIVE_MISSING}: the tests of kernels/c were skipped")
    if TRITON_MISSING:
        terminalreporter.write_line(f"{TRITON_MISSING}: the tests of kernels/triton*.py were skipped")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Small(nn.Module):
    """Two layers, BatchNorm between them, and a tied output: every kind of tensor that a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.last.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.last(self.norm(self.first(x))).relu())


@pytest.fixture
def small() -> Small:
    return Small()


@pytest.fixture
def sgd(small: Small) -> torch.optim.Optimizer:
    return torch.optim.SGD(small.parameters(), lr=0.05)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).pow(2).mean().backward()
        optimizer.step()


class Truth:
    """The definition in float64: the mean of the values seen, each weighted by gain and by all keeps since."""

    def __init__(self, decay: float) -> None:
        self.decay, self.weight, self.sum = decay, 0.0, 0.0

    def update(self, x: Tensor, elapsed: float = 1.0) -> None:
        keep = self.decay**elapsed
        self.weight = keep * self.weight + (1 - keep)
        self.sum = keep * self.sum + (1 - keep) * x.detach().double()

    @property
    def mean(self) -> Tensor:
        return self.sum / self.weight


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer, to be compared bit for bit."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def python() -> Callable[[str], str]:
    """Run a program in a fresh interpreter and give what it prints."""

    def run(program: str) -> str:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
