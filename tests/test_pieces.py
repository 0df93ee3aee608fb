"""Safetensors written tensor by tensor: what any reader gets, what is on the disk when, and at what price."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ewma import pieces
from ewma.pieces import NAMES, Piece

KINDS = {
    "a": torch.randn(3, 5),
    "bool": torch.tensor([True, False, True]),
    "transposed": torch.randn(3, 2).t(),
    "none": torch.zeros(0, 4),
    "scalar": torch.tensor(1.5, dtype=torch.float64),
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "slice": torch.arange(10, dtype=torch.int16)[1:8:2],
}


def write(path: Path, tensors: dict[str, Tensor], most: float = 1e9) -> list[Path]:
    each = [Piece(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
    shards = pieces.split(each, most)
    return pieces.write(path, shards, (piece.read() for shard in shards for piece in shard), {"format": "pt"})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def together(paths: list[Path]) -> dict[str, Tensor]:
    return {name: tensor for path in paths if path.suffix == ".safetensors" for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("most", [1, 30, 64, 1e9])
def test_what_was_written_comes_back(tmp_path: Path, most: float) -> None:
    came = together(write(tmp_path / "model.safetensors", KINDS, most))
    assert came.keys() == KINDS.keys()
    for name, tensor in KINDS.items():
        assert came[name].dtype == tensor.dtype
        assert came[name].shape == tensor.shape
        assert torch.equal(came[name], tensor)


@pytest.mark.parametrize("dtype", NAMES)
def test_every_dtype_of_the_format(tmp_path: Path, dtype: torch.dtype) -> None:
    written = torch.tensor([0.0, 1.0, 2.5]).to(dtype)
    (path,) = write(tmp_path / "model.safetensors", {"odd": torch.ones(3, dtype=torch.int8), "x": written})
    came = load_file(path)["x"]
    assert came.dtype == dtype
    assert torch.equal(came.view(torch.uint8), written.view(torch.uint8))


def test_a_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="x: a safetensors file cannot hold torch.complex128; leave it out or convert"):
        write(tmp_path / "model.safetensors", {"x": torch.ones(1, dtype=torch.complex128)})
    assert names(tmp_path) == []


def test_each_tensor_begins_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "model.safetensors", KINDS)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    for name, entry in head.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % KINDS[name].dtype.itemsize == 0


def test_parts_are_as_large_as_allowed_and_the_index_tells_where(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(size) for name, size in (("a", 2), ("b", 2), ("c", 9), ("d", 1), ("e", 3))}
    *parts, index = write(tmp_path / "ema.safetensors", tensors, most=16)
    assert [part.name for part in parts] == [f"ema-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [sorted(load_file(part)) for part in parts] == [["a", "b"], ["c"], ["d", "e"]]
    told = json.loads(index.read_text())
    assert index.name == "ema.safetensors.index.json"
    assert told["metadata"] == {"total_size": 4 * 17}
    assert {name: load_file(tmp_path / part)[name].numel() for name, part in told["weight_map"].items()} == {
        "a": 2,
        "b": 2,
        "c": 9,
        "d": 1,
        "e": 3,
    }


def test_other_tools_are_told_the_format(tmp_path: Path) -> None:
    for path in write(tmp_path / "model.safetensors", KINDS, 64)[:-1]:
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("before", [1, 40, 1e9])
@pytest.mark.parametrize("after", [1, 40, 1e9])
def test_what_was_there_before_is_replaced_and_nothing_else(tmp_path: Path, before: float, after: float) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "model-00001-of-00002.safetensors").write_text("not of an export")
    (tmp_path / "config.json").write_text("{}")
    write(path, {name: tensor for name, tensor in KINDS.items() if name != "a"}, before)
    written = write(path, KINDS, after)
    others = {"config.json", "model-00001-of-00002.safetensors"}
    assert set(names(tmp_path)) - others == {each.name for each in written} - others
    assert together(written).keys() == KINDS.keys()


@pytest.mark.parametrize("most", [40, 1e9])
def test_a_failure_leaves_the_old_files_and_nothing_else(tmp_path: Path, most: float) -> None:
    path = tmp_path / "model.safetensors"
    old = together(write(path, KINDS, 40))
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    each = [Piece(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in KINDS.items()]

    def failing() -> Iterator[Tensor]:
        yield KINDS["scalar"]
        raise OSError("disk full")

    shards = pieces.split(sorted(each, key=lambda piece: piece.name != "scalar"), most)
    with pytest.raises(OSError, match="disk full"):
        pieces.write(path, shards, failing(), {})
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before
    assert old.keys() == KINDS.keys()


def test_an_interrupted_replacement_is_never_a_mix(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    write(path, {"a": torch.zeros(4), "b": torch.zeros(4)}, 16)
    real, done = os.replace, []

    def replace(*arguments: str) -> None:
        if done:
            raise OSError("no more")
        done.append(real(*arguments))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no more"):
        write(path, {"a": torch.ones(4), "b": torch.ones(4)}, 16)
    assert names(tmp_path) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_tensor_that_has_changed_meanwhile(tmp_path: Path) -> None:
    piece = Piece("x", torch.float32, (3,), lambda: torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"x: expected shape \[3\], as it was .* it has become \[4\]"):
        pieces.write(tmp_path / "model.safetensors", [[piece]], iter([piece.read()]), {})


def test_a_wrong_index_of_somebody_else_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[1")
    (path,) = write(tmp_path / "model.safetensors", KINDS)
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("size", [pieces.BLOCK - 1, pieces.BLOCK, 2 * pieces.BLOCK + 3])
def test_large_tensors_are_converted_block_by_block(tmp_path: Path, size: int) -> None:
    tensor = torch.randn(size)
    piece = Piece("x", torch.bfloat16, (size,), lambda: tensor)
    pieces.write(tmp_path / "model.safetensors", [[piece]], iter([tensor]), {})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], tensor.bfloat16())


def test_no_tensor_is_held_while_the_next_is_read(tmp_path: Path) -> None:
    held: list[int] = []
    alive = 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def read() -> Tensor:
        nonlocal alive
        held.append(alive)
        alive += 1
        return torch.zeros(4).as_subclass(Counted)

    shards = pieces.split([Piece(str(n), torch.float32, (4,), read) for n in range(5)], 32)
    pieces.write(tmp_path / "model.safetensors", shards, (p.read() for shard in shards for p in shard), {})
    assert max(held) <= 1
