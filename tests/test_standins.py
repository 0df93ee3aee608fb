"""Other tools' bookkeeping in a pickle is passed over; what is not bookkeeping is refused as before."""

from __future__ import annotations

import argparse
import collections
import fractions
import pathlib
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ewma.readers import open_checkpoint
from ewma.readers.standins import StandIn, refused


def test_arguments_are_kept_as_a_record(tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=0.1, where=pathlib.PurePosixPath("runs/3"))
    torch.save({"weight": torch.ones(2), "args": arguments}, tmp_path / "last.pt")
    content = open_checkpoint(tmp_path / "last.pt").content
    assert torch.equal(content["weight"], torch.ones(2))
    assert isinstance(content["args"], StandIn)
    assert content["args"].state["lr"] == 0.1


def test_nothing_of_theirs_is_run(tmp_path: Path, monkeypatch) -> None:
    theirs = ModuleType("mmengine.logging")

    class Buffer:
        def __init__(self, values: list[float]) -> None:
            self.values = values

        def __setstate__(self, state: Any) -> None:
            pytest.fail("their code was run")

    Buffer.__module__, Buffer.__qualname__ = "mmengine.logging", "Buffer"
    theirs.Buffer = Buffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, theirs)
    torch.save({"weight": torch.ones(2), "log": [Buffer([1.0]), Buffer([2.0])]}, tmp_path / "last.pt")
    content = open_checkpoint(tmp_path / "last.pt").content
    assert [each.state for each in content["log"]] == [{"values": [1.0]}, {"values": [2.0]}]


@pytest.mark.parametrize("other", [fractions.Fraction(1, 3), collections.UserDict(), torch.nn.Linear(1, 1)])
def test_all_else_is_refused_by_name(tmp_path: Path, other: Any) -> None:
    torch.save({"weight": torch.ones(2), "args": argparse.Namespace(lr=0.1), "other": other}, tmp_path / "last.pt")
    name = f"{type(other).__module__}.{type(other).__qualname__}"
    with pytest.raises(ValueError, match=f"weights_only=True.* it asks for {name}"):
        open_checkpoint(tmp_path / "last.pt")


def test_torch_is_as_strict_as_ever_afterwards(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2), "args": argparse.Namespace(lr=0.1)}, tmp_path / "last.pt")
    open_checkpoint(tmp_path / "last.pt")
    assert refused(tmp_path / "last.pt") == ["argparse.Namespace"]
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.pt", weights_only=True)
