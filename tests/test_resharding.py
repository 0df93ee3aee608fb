"""Saved on some ranks, loaded on others, bit for bit; and what is wrong is told on every rank, with nothing changed."""

from __future__ import annotations

import re
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.conftest import same
from tests.ranks import on_ranks
from tests.test_sharded import Net, mesh_of, net, shard, split, steps, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.stateful import Stateful

import ewma
from ewma.profiles import Exponential, Power

PAGE = Path(__file__).parents[1] / "docs" / "sharded.md"
PROFILES = {"fast": Exponential(half_life=2), "wide": Power(sigma_rel=0.1)}


class Counting(Net):
    """With a buffer, and a weight that has two names."""

    def __init__(self) -> None:
        super().__init__(8)
        self.register_buffer("seen", torch.tensor(0))
        self.tied = nn.Linear(6, 1, bias=False)
        self.tied.weight = self.one.weight


def counting() -> Counting:
    torch.manual_seed(1)
    return Counting()


def made(kind: str, profile=PROFILES, model: Net | None = None) -> tuple[Net, ewma.ModelEMA]:
    model = model or counting()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "tp":
        split(model, mesh_of(kind))
    elif kind != "plain":
        shard(model, mesh_of(kind))
    return model, ewma.ModelEMA(model, profile)


def trained(kind: str) -> tuple[Net, torch.optim.Optimizer, ewma.ModelEMA]:
    model, ema = made(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema.attach(optimizer)
    steps(model, optimizer, 1, 0)
    return model, optimizer, ema


def contents(ema: ewma.ModelEMA) -> dict[str, Tensor]:
    """All averages, whole, and the clocks."""
    told = {
        f"{name} {own}": whole(average)
        for name in ema.tracks
        for own, average in sorted(ema[name].named_parameters(), key=lambda pair: pair[0])
    }
    clocks = [list(numbers.values()) for track in ema.tracks.values() for numbers in track.clock_state()["clocks"]]
    return {**told, "clocks": torch.tensor(clocks, dtype=torch.float64), "seen": ema.copies["seen"].clone()}


def saved(kind: str, folder: str) -> dict[str, Tensor]:
    model, optimizer, ema = trained(kind)
    inner = model.module if kind == "ddp" else model
    inner.seen.fill_(7)
    inner.late = nn.Linear(3, 3)  # with a clock of its own, plain beside what is sharded
    with torch.no_grad():
        for parameter in inner.late.parameters():
            dist.broadcast(parameter, 0)
    steps(model, optimizer, 1, 0, first=4, count=1)
    assert isinstance(ema, Stateful)
    dcp.save({"app": {"ema": ema.state_dict()}, "other": 3}, checkpoint_id=folder)
    return contents(ema)


def loaded(kind: str, folder: str, how: str) -> dict[str, Tensor]:
    model, ema = made(kind)
    (model.module if kind == "ddp" else model).late = nn.Linear(3, 3)
    if how == "used":
        ema.update()
    if how == "torch":
        state = {"app": {"ema": ema.state_dict()}}
        dcp.load(state, checkpoint_id=folder)
        ema.load_state_dict(state["app"]["ema"])
    else:
        ema.load(folder)
    assert ema.count == 5
    return contents(ema)


@pytest.mark.parametrize("source", ["fsdp2", "ddp", "tp"])
def test_what_some_ranks_saved_others_load(source: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    (expected, other) = on_ranks(saved, 2, source, folder)
    assert same(expected, other)
    assert expected["clocks"].shape == (4, 5)
    cases = [("fsdp2", 3, "load"), ("plain", 1, "torch"), ("hsdp", 4, "torch"), ("ddp", 2, "used")]
    for kind, ranks, how in cases if source == "fsdp2" else cases[:1]:
        for answer in on_ranks(loaded, ranks, kind, folder, how):
            assert same(answer, expected)
    assert same(loaded("plain", folder, "load"), expected)  # without a process group
    with warnings.catch_warnings(action="ignore"):
        assert same(loaded("plain", folder, "torch"), expected)


def saved_in_the_background(folder: str) -> tuple[dict[str, Tensor], bool]:
    model, optimizer, ema = trained("fsdp2")
    before = contents(ema)
    apart = dist.new_group()  # with the training's own, the two would answer each other's messages
    writing = dcp.async_save({"ema": ema}, checkpoint_id=folder, process_group=apart)
    steps(model, optimizer, 1, 0, first=9, count=3)
    writing.result()
    fresh = made("fsdp2")[1]
    dist.barrier()
    fresh.load(folder)
    return before, same(contents(fresh), before), same(contents(ema), before)


def test_training_goes_on_while_it_is_saved(tmp_path: Path) -> None:
    for _, kept, still in on_ranks(saved_in_the_background, 2, str(tmp_path / "checkpoint")):
        assert kept
        assert not still


def as_the_models_own(folder: str) -> None:
    ema = trained("fsdp2")[2]
    dcp.save({"model": ema.tensors()}, checkpoint_id=folder)
    fresh = made("fsdp2")[0]
    state = {"model": get_model_state_dict(fresh)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(fresh, state["model"])
    averages = {name: whole(average) for name, average in ema.named_parameters()}
    assert same({name: whole(parameter) for name, parameter in fresh.named_parameters()}, averages)
    with pytest.raises(NotImplementedError, match=r'sharded .*checkpoint.save\(\{"ema": ema\}, checkpoint_id=folder\)'):
        ema.save(Path(folder, "ema.safetensors"))


def test_the_averages_alone_are_the_models_checkpoint(tmp_path: Path) -> None:
    on_ranks(as_the_models_own, 2, str(tmp_path / "checkpoint"))


def from_one_file(path: str) -> dict[str, Tensor]:
    ema = made("fsdp2", Exponential(half_life=2))[1]
    ema.update()
    ema.load(path)
    return contents(ema)


def test_every_rank_takes_its_part_of_a_whole_file(tmp_path: Path) -> None:
    model, ema = made("plain", Exponential(half_life=2))
    for _ in range(3):
        with torch.no_grad():
            model.first.weight.add_(1.0)
        ema.update()
    path = tmp_path / "ema.safetensors"
    ema.save(path)
    for answer in on_ranks(from_one_file, 2, str(path)):
        assert same(answer, contents(ema))


def inside_swapped(folder: str) -> None:
    model, _, ema = trained("fsdp2")
    raw = {name: whole(parameter) for name, parameter in model.named_parameters()}
    with ema.swapped():
        dcp.save({"model": get_model_state_dict(model), "ema": ema}, checkpoint_id=folder)
    model, fresh = made("fsdp2")
    with pytest.raises(dcp.api.CheckpointException, match="Missing key .* ema.made_with.raw weights in the model"):
        dcp.load({"ema": fresh}, checkpoint_id=folder)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    assert not same({name: whole(parameter) for name, parameter in model.named_parameters()}, raw)
    fresh.load(folder)
    assert same({name: whole(parameter) for name, parameter in model.named_parameters()}, raw)
    assert same(contents(fresh), contents(ema))


def test_what_was_saved_inside_swapped_brings_the_weights_back(tmp_path: Path) -> None:
    on_ranks(inside_swapped, 2, str(tmp_path / "checkpoint"))


def stage() -> tuple[nn.Module, ewma.ModelEMA]:
    layers = net(8)
    kept = {"first": layers.first} if dist.get_rank() == 0 else {"second": layers.second}
    model = nn.ModuleDict(kept)
    return model, ewma.ModelEMA(model, half_life=2)


def in_a_pipeline(folder: str) -> None:
    model, ema = stage()
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update()
    averages = {name: average.clone() for name, average in ema.named_parameters()}
    dcp.save({"ema": ema}, checkpoint_id=folder)
    for how in ("load", "torch"):
        fresh = stage()[1]
        fresh.load(folder) if how == "load" else dcp.load({"ema": fresh}, checkpoint_id=folder)
        assert same(dict(fresh.named_parameters()), averages)
        assert fresh.count == 2


def test_stages_of_a_pipeline_save_and_load_their_own_names(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    on_ranks(in_a_pipeline, 2, str(folder))
    both = nn.ModuleDict({"first": net(8).first, "second": net(8).second})
    ema = ewma.ModelEMA(both, half_life=2)
    ema.load(folder)
    assert ema.count == 2
    assert len(list(ema.named_parameters())) == 4


def fails(folder: str, options: dict) -> tuple[str, bool]:
    """The error of loading on this rank, and whether all is as it was."""
    path = folder if dist.get_rank() in options.get("good", ()) else options.get("path", folder)
    ema = made(options.get("kind", "fsdp2"), options.get("profile", PROFILES), options.get("model"))[1]
    ema.update()
    before, numbers = ema.tensors(), ema.state_dict()["tracks"]
    before = {name: whole(tensor) for name, tensor in before.items()}
    start = time.monotonic()
    try:
        if options.get("torch"):
            dcp.load({"ema": ema}, checkpoint_id=path)
        elif dist.get_rank() not in options.get("missing", ()):
            ema.load(path, patience=options.get("patience", 60.0))
        else:
            time.sleep(2.0)
        told = "nothing"
    except BaseException as error:  # CheckpointException is no Exception
        told = f"{type(error).__name__}: {error}"
    unchanged = (
        same({name: whole(tensor) for name, tensor in ema.tensors().items()}, before)
        if "missing" not in options
        else True
    )
    assert time.monotonic() - start < 60  # far from the group's own limit
    return told, unchanged and numbers == ema.state_dict()["tracks"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    on_ranks(plainly_saved, 2, str(folder))
    return folder


def plainly_saved(folder: str) -> None:
    dcp.save({"ema": trained("fsdp2")[2], "model": {"w": torch.zeros(2)}}, checkpoint_id=folder)


OTHER = {**PROFILES, "fast": Exponential(half_life=3)}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"profile": OTHER},
            ["saved with Exponential(half_life=2), but this ModelEMA has Exponential(half_life=3)"] * 2,
        ),
        (
            {"profile": OTHER, "torch": True},
            ["Missing key in checkpoint state_dict: ema.made_with.fast: Exponential"] * 2,
        ),
        ({"model": net(6)}, ["first.weight [8, 4] for [6, 4]"] * 2),
        (
            {"model": nn.Sequential(nn.Linear(2, 2)), "kind": "ddp"},
            ["missing: 0.weight, 0.bias; not known here: scale, first"] * 2,
        ),
        ({"path": "elsewhere", "good": (0,)}, ["failed on rank 1: FileNotFoundError: elsewhere", "does not exist"]),
        ({"missing": (1,), "patience": 1.0}, ["after 1 s rank 1 is missing", "nothing"]),
    ],
    ids=["profile", "profile by torch", "shapes", "names", "a folder that one rank lacks", "a missing rank"],
)
def test_what_does_not_fit_is_told_on_every_rank(checkpoint: Path, options: dict, told: list[str]) -> None:
    for (came, unchanged), expected in zip(on_ranks(fails, 2, str(checkpoint), options), told, strict=True):
        assert expected in came
        assert unchanged


def test_what_is_no_checkpoint_is_told(checkpoint: Path, tmp_path: Path) -> None:
    ema = made("plain")[1]
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"with .metadata in it; it holds nothing"):
        ema.load(folder)
    for rank in range(2):
        torch.save({}, folder / f"ema_rank{rank}.pt")
    with pytest.raises(
        FileNotFoundError, match=r"it holds ema_rank0.pt, ema_rank1.pt. Files that each rank wrote on its"
    ):
        ema.load(folder)
    shutil.copytree(checkpoint, folder / "step_2")
    with pytest.raises(FileNotFoundError, match=r"run/step_2 was probably meant"):
        ema.load(folder)
    (folder / "step_2" / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match=r"it was not written to its end: .metadata comes last"):
        ema.load(folder / "step_2")
    shutil.copy(checkpoint / ".metadata", folder / "step_2")
    next((folder / "step_2").glob("*.distcp")).write_bytes(b"")
    with pytest.raises(ValueError, match="truncated: 0 bytes"):
        ema.load(folder / "step_2")


def test_the_state_is_found_wherever_it_is(tmp_path: Path) -> None:
    ema = made("plain")[1]
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"model": {"w": torch.zeros(2)}}, checkpoint_id=tmp_path / "none", no_dist=True)
        dcp.save({"one": ema, "two": ema}, checkpoint_id=tmp_path / "two", no_dist=True)
    with pytest.raises(ValueError, match=r"no ModelEMA's state is in this checkpoint; it holds model. It is saved as"):
        ema.load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"several ModelEMAs are in this checkpoint, \['one', 'two'\]. Say which"):
        ema.load(tmp_path / "two")


def the_page(folder: str) -> None:
    model, _, ema = trained("fsdp2")
    names = {
        "ewma": ewma,
        "dist": dist,
        "model": model,
        "inner": net(8),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "ema": ema,
        "validate": lambda model: model(torch.zeros(1, 4)),
        "get_model_state_dict": get_model_state_dict,
        "set_model_state_dict": set_model_state_dict,
    }
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)):
        names["folder"] = f"{folder}/{number}"
        exec(block, names)


def test_the_pages_code_runs(tmp_path: Path) -> None:
    on_ranks(the_page, 2, str(tmp_path))
