"""A CUDA graph is captured only where the device keeps the clocks."""

from __future__ import annotations

import pytest
import torch

from ewma import Exponential
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


def test_a_clock_of_the_host_would_stand_still_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    refuse_capture([on_device()], "ModelEMA")
    said = r"every replay would repeat this one update. Write GradientEMA\(..., capturable=True\), and run a few steps"
    with pytest.raises(RuntimeError, match=said):
        refuse_capture([on_device(), clock()], "GradientEMA")
