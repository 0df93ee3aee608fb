"""A CUDA graph is captured only where the device keeps the clocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ewma import Exponential, ModelEMA
from ewma.recurrence import Recurrence
from ewma.tracks import refuse_capture


def clock() -> Recurrence:
    return Recurrence(Exponential(half_life=3), weigh="time")


def on_device() -> Recurrence:
    one = clock()
    one.on_device(torch.zeros(()))
    return one


def test_without_a_capture_any_clock_will_do() -> None:
    refuse_capture([clock(), on_device()], "ModelEMA")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


@pytest.mark.usefixtures("captured")
def test_a_clock_of_the_host_would_stand_still_in_a_graph() -> None:
    refuse_capture([on_device()], "ModelEMA")
    said = r"every replay would repeat this one update. Write GradientEMA\(..., capturable=True\), and run a few steps"
    with pytest.raises(RuntimeError, match=said):
        refuse_capture([on_device(), clock()], "GradientEMA")


@pytest.mark.usefixtures("captured")
def test_nor_does_a_graph_count_steps() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ModelEMA(model, half_life=3, capturable=True).attach(optimizer, every=10)
    model(torch.ones(2)).sum().backward()
    with pytest.raises(RuntimeError, match=r"every=10 counts steps on the host, .* ema.update\(elapsed=10\) beside it"):
        optimizer.step()
    ema.detach()
