"""Checkpoints of every format give the tensors that were saved, and what is wrong with one is said."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import struct
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tests.conftest import same
from tests.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ewma.readers import open_checkpoint
from ewma.readers.safetensors import DTYPES


def of_every_type() -> dict[str, Tensor]:
    plain = {
        f"of.{dtype}".replace("torch.", ""): torch.arange(7).to(dtype)
        for dtype in DTYPES.values()
        if dtype.is_floating_point or dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64)
    }
    return plain | {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "matrix": torch.randn(5, 3)}


def save_safetensors(tensors: dict[str, Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "model.safetensors", {"told": "yes"})
    return folder / "model.safetensors"


def save_pickled(tensors: dict[str, Tensor], folder: Path) -> Path:
    torch.save(tensors, folder / "model.pt")
    return folder / "model.pt"


def save_old_pickled(tensors: dict[str, Tensor], folder: Path) -> Path:
    torch.save(tensors, folder / "model.pt", _use_new_zipfile_serialization=False)
    return folder / "model.pt"


def save_sharded(tensors: dict[str, Tensor], folder: Path) -> Path:
    shards = {f"model-0000{i}-of-00003.safetensors": dict(list(tensors.items())[i::3]) for i in range(3)}
    for name, shard in shards.items():
        save_file(shard, folder / name)
    places = {tensor: name for name, shard in shards.items() for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def save_distributed(tensors: dict[str, Tensor], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process alone
        dcp.save(dict(tensors), checkpoint_id=folder / "dcp")
    return folder / "dcp"


SAVERS = [save_safetensors, save_pickled, save_old_pickled, save_sharded, save_distributed]


@pytest.mark.parametrize("save", SAVERS)
def test_every_format_gives_what_was_saved(save, tmp_path: Path) -> None:
    tensors = of_every_type()
    if save is save_old_pickled:  # a format older than these types
        tensors = {name: tensor for name, tensor in tensors.items() if "float8" not in name}
    with open_checkpoint(save(tensors, tmp_path)) as checkpoint:
        assert set(checkpoint.names()) == tensors.keys()
        assert f"{len(tensors)} tensors" in repr(checkpoint)
        for name, tensor in tensors.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert checkpoint.dtype(name) == tensor.dtype
            came = checkpoint.read(name)
            assert came.dtype == tensor.dtype
            assert came.shape == tensor.shape
            assert torch.equal(came.view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else came == tensor
            if tensor.numel():
                part = torch.empty(min(3, tensor.numel()), dtype=tensor.dtype)
                begin = tensor.numel() - len(part)
                checkpoint.into(name, part)(begin)
                assert torch.equal(part.view(torch.uint8), tensor.reshape(-1)[begin:].view(torch.uint8))
    came.fill_(0)  # it is ours, also after closing


@pytest.mark.parametrize("save", [save_pickled, save_old_pickled, save_distributed])
def test_nested_states_are_flat_here(save, tmp_path: Path) -> None:
    state = {"model": {"a.weight": torch.ones(2)}, "optimizer": {"state": {0: {"m": torch.zeros(3)}}}, "step": 7}
    with open_checkpoint(save({**state, "shadow": [torch.ones(1), 2.5]}, tmp_path)) as checkpoint:
        assert set(checkpoint.names()) == {"model.a.weight", "optimizer.state.0.m", "shadow.0"}
        assert checkpoint.others() == {"step": 7, "shadow.1": 2.5}
        assert checkpoint.read("shadow.0").tolist() == [1.0]


def test_metadata_of_safetensors(tmp_path: Path) -> None:
    with open_checkpoint(save_safetensors({"a": torch.ones(1)}, tmp_path)) as checkpoint:
        assert checkpoint.others() == {"told": "yes"}


def test_names_that_would_meet_are_an_error(tmp_path: Path) -> None:
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"two values in it are called 'a\.b'"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("save", SAVERS)
def test_a_wrong_name_is_answered_with_near_ones(save, tmp_path: Path) -> None:
    with (
        open_checkpoint(save({"layer.weight": torch.ones(2), "layer.bias": torch.ones(2)}, tmp_path)) as checkpoint,
        pytest.raises(KeyError, match=r"holds no tensor 'layer.weigth'; it has layer.weight.* among 2"),
    ):
        checkpoint.read("layer.weigth")


def test_views_and_parameters_of_pickles(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    model = nn.Linear(2, 2)
    torch.save({"t": matrix.t(), "part": matrix[1:, 1:], **dict(model.named_parameters())}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        read = {name: checkpoint.read(name) for name in checkpoint.names()}
    assert same(read, {"t": matrix.t(), "part": matrix[1:, 1:], **dict(model.named_parameters())})
    assert not any(tensor.requires_grad for tensor in read.values())
    assert read["t"].is_contiguous()


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    save_safetensors({"a": torch.ones(1)}, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names() == ["a"]
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"holds 2 files \*.safetensors, .* pass one of them, such as .*other.safetens"
    ):
        open_checkpoint(tmp_path)


def test_a_folder_with_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder holds no checkpoint: no .metadata"):
        open_checkpoint(tmp_path)


def test_shards_that_are_torch_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "one.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "two.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    with open_checkpoint(index) as checkpoint:
        assert checkpoint.read("b").tolist() == [0.0, 0.0]
        assert checkpoint.read("a").tolist() == [1.0]
        assert checkpoint.read("b").tolist() == [0.0, 0.0]


# What is wrong


def test_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    save_sharded({"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1)}, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    told = index.read_text()
    index.write_text(told.replace('"a"', '"other"'))
    with pytest.raises(ValueError, match=r"not of one checkpoint: other is not in model-00000-of"):
        open_checkpoint(index)
    index.write_text(told)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"the shard is missing; model.safetensors.index.json lists it"):
        open_checkpoint(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="expected an index of shards"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("left", [4, 30, 200, -1])
def test_a_truncated_safetensors_file(tmp_path: Path, left: int) -> None:
    path = save_safetensors({"a": torch.ones(100), "b": torch.ones(100)}, tmp_path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"model.safetensors: expected a .*damaged"):
        open_checkpoint(path)


def test_a_file_that_shrinks_while_it_is_open(tmp_path: Path) -> None:
    path = save_safetensors({"a": torch.ones(100)}, tmp_path)
    with open_checkpoint(path) as checkpoint:
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(ValueError, match="it has become shorter since it was opened; a cannot be read"):
            checkpoint.read("a")


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, "a is of type F4, which torch has no tensors"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "a takes other bytes than its shape and type"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, "a takes other bytes than its shape and type"),
        (
            {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
            r"damaged \(the shape of a is \[-1, -2\]\)",
        ),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, r"damaged \(the shape of a is \[2.0\]\)"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": None}}, "is truncated or damaged"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "is truncated or damaged"),
        ({"a": "b"}, "is truncated or damaged"),
        ({"__metadata__": 3}, "is truncated or damaged"),
    ],
)
def test_a_header_that_cannot_be(tmp_path: Path, header: object, text: str) -> None:
    told = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(told)) + told + bytes(8))
    with pytest.raises((ValueError, TypeError), match=text):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("away", ["../x.safetensors", "/etc/passwd", "sub/../../x.safetensors"])
def test_lists_that_lead_out_of_their_folder_are_refused(tmp_path: Path, away: str) -> None:
    (tmp_path / "in").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": away}}))
    with pytest.raises(ValueError, match=rf"index.json: it lists '{away}', which lies outside of its folder"):
        open_checkpoint(index)
    folder = save_distributed({"a": torch.ones(3)}, tmp_path)
    told = pickle.loads((folder / ".metadata").read_bytes())
    told.storage_data = {k: dataclasses.replace(v, relative_path=away) for k, v in told.storage_data.items()}
    (folder / ".metadata").write_bytes(pickle.dumps(told))
    with pytest.raises(ValueError, match=rf"\.metadata: it lists '{away}', which lies outside of its folder"):
        open_checkpoint(folder)


def test_an_index_of_itself_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": index.name}}))
    with pytest.raises(
        ValueError, match=r"expected an index of shards; it lists model.safetensors.index.json, another"
    ):
        open_checkpoint(index)
    index.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="index.json: expected an index of shards"):
        open_checkpoint(index)


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, object] = {"a": torch.ones(1)}
    state["self"] = state
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt: it is nested more than 100 deep, or holds itself"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_damaged_file_of_the_old_format_is_told(tmp_path: Path) -> None:
    path = save_old_pickled({"a": torch.ones(3)}, tmp_path)
    raw = path.read_bytes()
    key = re.search(rb"X\x0b\x00\x00\x00(\d{11})|X\x0c\x00\x00\x00(\d{12})|X.\x00\x00\x00(\d{8,16})", raw)
    assert key is not None
    path.write_bytes(raw[: key.end() - 2] + b"xx" + raw[key.end() :])
    with pytest.raises(ValueError, match="the torch.save file is truncated or damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize("save", [save_pickled, save_old_pickled])
def test_a_truncated_torch_file(tmp_path: Path, save) -> None:
    path = save({"a": torch.ones(1000)}, tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"model.pt: .*(truncated or damaged|expected tensors)"):
        open_checkpoint(path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(1, 1), "a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"load without running any .* refused it: .*Linear") as caught:
        open_checkpoint(tmp_path / "x.pt")
    assert "save the state dict in it" in str(caught.value)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("ran",)


def test_a_metadata_file_that_runs_code_is_refused(tmp_path: Path, capsys) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"damaged, or holds other things \(builtins.print does not belong there\)"):
        open_checkpoint(tmp_path)
    assert not capsys.readouterr().out


def test_a_distributed_checkpoint_that_is_not_whole(tmp_path: Path) -> None:
    folder = save_distributed({"a": torch.ones(1000)}, tmp_path)
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:500])
    with pytest.raises(ValueError, match="truncated: 500 bytes, of which .metadata needs"):
        open_checkpoint(folder)
    data.unlink()
    with pytest.raises(FileNotFoundError, match=r"missing; .metadata lists it"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"hello, this is not it"])
def test_another_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.pt: expected a checkpoint: safetensors, a torch.save file"):
        open_checkpoint(tmp_path / "x.pt")


def test_a_path_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "nothing.pt")


def save_shards(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(35.0).reshape(7, 5)
    shards = {name: distribute_tensor(whole, mesh, [Shard(n)]) for n, name in enumerate(("rows", "columns"))}
    dcp.save({**shards, "step": 3}, checkpoint_id=folder)


def test_shards_of_two_ranks_come_together(tmp_path: Path) -> None:
    on_ranks(save_shards, 2, tmp_path / "dcp")
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        for name in ("rows", "columns"):
            assert torch.equal(checkpoint.read(name), torch.arange(35.0).reshape(7, 5))
        assert checkpoint.others() == {"step": 3}
