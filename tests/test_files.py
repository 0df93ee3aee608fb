"""Files appear whole or not at all, and a wrong one says what is wrong with it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ewma import files


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3), "b": torch.tensor(True), "c": torch.randn(3, 2).t(), "d": torch.zeros(0)}
    files.write(tmp_path / "x.safetensors", tensors, {"kind": "test"}, {})
    came, metadata = files.read(tmp_path / "x.safetensors")
    assert all(torch.equal(came[name], tensors[name]) for name in tensors)
    assert metadata == {"format": files.FORMAT, "kind": "test"}


def test_other_tools_can_read_it(tmp_path: Path) -> None:
    files.write(tmp_path / "x.safetensors", {"a": torch.ones(2)}, {}, {})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], torch.ones(2))
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.metadata()["format"] == "pt"


def test_tied_tensors_are_written_under_every_name(tmp_path: Path) -> None:
    tied = torch.randn(4)
    files.write(tmp_path / "x.safetensors", {"a": tied, "b": tied, "c": tied.view(2, 2)}, {}, {})
    came, _ = files.read(tmp_path / "x.safetensors")
    assert torch.equal(came["a"], tied)
    assert torch.equal(came["b"], tied)
    assert torch.equal(came["c"], tied.view(2, 2))


def test_overlapping_tensors_are_written_each_on_its_own(tmp_path: Path) -> None:
    whole = torch.randn(10)
    tensors = {"a": whole[:6], "b": whole[3:], "c": whole[:2]}
    files.write(tmp_path / "x.safetensors", tensors, {}, {})
    came, _ = files.read(tmp_path / "x.safetensors")
    assert all(torch.equal(came[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [(torch.zeros(2, dtype=torch.complex128), "torch.complex128"), (torch.eye(2).to_sparse(), "torch.sparse_coo")],
)
def test_what_such_a_file_cannot_hold_is_named(tmp_path: Path, tensor: torch.Tensor, kind: str) -> None:
    with pytest.raises(TypeError, match=rf"b: a safetensors file cannot hold {kind}.*torch.save\(ema.state_dict"):
        files.write(tmp_path / "x.safetensors", {"a": torch.ones(2), "b": tensor}, {}, {})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.safetensors"
    files.write(path, {"a": torch.ones(2)}, {}, {})
    old = path.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write(path, {"a": torch.zeros(2)}, {}, {})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    files.write(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {}, {})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "x.safetensors")}
    assert len(modes) == 1


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.write(path, {"a": torch.ones(100)}, {}, {})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"x.safetensors: expected a safetensors file .* it is truncated"):
        files.read(path)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"loaded with load_state_dict\(torch.load\(path\)\)"):
        files.read(tmp_path / "x.pt")
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="holds plain weights, with no profile, time or count"):
        files.read(tmp_path / "plain.safetensors")


def test_a_missing_file_is_an_ordinary_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.read(tmp_path / "nowhere.safetensors")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    metadata = {"format": "pt", "ewma": json.dumps({"format": files.FORMAT + 1})}
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match="Upgrade with pip install --upgrade ewma"):
        files.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"weight": 1}, r"expected what EMA.state_dict\(\) gives; got \['weight'\]"),
        ([1], "got list"),
        ({"format": 1, "kind": "ModelEMA"}, "expected the state of EMA; got that of ModelEMA"),
    ],
)
def test_a_foreign_state_is_refused(state: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        files.check_format("here", state, "EMA")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the folder .*nowhere does not exist; make it first"):
        files.write(tmp_path / "nowhere" / "x.safetensors", {"a": torch.ones(1)}, {}, {})


def test_what_is_told_stands_beside_in_plain_text(tmp_path: Path) -> None:
    files.write(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {}, {"count": "3"})
    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.metadata()["count"] == "3"


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=r"this is a folder. Pass .*ema.safetensors"):
        files.write(tmp_path, {}, {}, {})
    with pytest.raises(IsADirectoryError, match="expected a file written by ModelEMA.save; this is a folder"):
        files.read(tmp_path)
