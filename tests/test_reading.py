"""Averages out of every tool's checkpoint: the right ones, under the right names; else an error says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tests.conftest import Small, same
from tests.tools import (
    TOOLS,
    LitEma,
    LitEmaAlone,
    MmengineHook,
    Nemo,
    NemoOne,
    Timm,
    Tool,
    TorchEMA,
    TorchEma,
    here,
    run,
)
from torch import nn

import ewma
from ewma import checkpoints

STEPS = 4


@pytest.fixture
def model() -> Small:
    return Small().double()


def each(*tools: type[Tool]) -> pytest.MarkDecorator:
    marked = [pytest.param(t, marks=pytest.mark.skipif(not here(t), reason="not installed")) for t in tools]
    return pytest.mark.parametrize("tool", marked, ids=lambda tool: tool.__name__)


@each(*TOOLS)
def test_the_averages_under_the_models_names(model: Small, tmp_path: Path, tool: type[Tool]) -> None:
    at_work = tool(model)
    run(at_work, STEPS)
    came = checkpoints.read(at_work.save(tmp_path / "last.ckpt"), model)
    assert came.weights.keys() == model.state_dict().keys()
    assert same(at_work.averages(), {name: came.weights[name] for name in at_work.averages()})
    assert torch.equal(came.weights["tied.weight"], came.weights["last.weight"])
    assert not torch.equal(came.weights["first.weight"], model.first.weight)
    assert (came.source, came.at) == (tool.source, tool.at)
    assert came.count == (STEPS if tool.counts else None)
    assert (came.decay, came.profile) == (tool.decay, tool.profile)
    Small().double().load_state_dict(came.weights)


@each(*TOOLS)
def test_without_the_model_they_have_the_checkpoints_names(model: Small, tmp_path: Path, tool: type[Tool]) -> None:
    at_work = tool(model)
    run(at_work, STEPS)
    path = at_work.save(tmp_path / "last.ckpt")
    if not tool.named:
        with pytest.raises(ValueError, match=f"{tool.source} (keeps its averages as a list|takes the dots out)"):
            checkpoints.read(path)
        return
    came = checkpoints.read(path)
    before = "model." if tool is LitEma else ""
    assert same(at_work.averages(), {name: came.weights[before + name] for name in at_work.averages()})
    others = {"first_stage.weight"} if tool is LitEma else set()
    assert came.weights.keys() == {before + name for name in model.state_dict()} | others


@each(*TOOLS)
def test_what_was_loaded_can_be_read_as_well(model: Small, tool: type[Tool]) -> None:
    at_work = tool(model)
    run(at_work, STEPS)
    came = checkpoints.read(at_work.content(), model)
    assert same(at_work.averages(), {name: came.weights[name] for name in at_work.averages()})
    assert (came.source, came.decay, came.profile) == (tool.source, tool.decay, tool.profile)


@each(*TOOLS)
def test_a_model_of_other_shapes_or_names_is_refused(model: Small, tmp_path: Path, tool: type[Tool]) -> None:
    at_work = tool(model)
    run(at_work, 1)
    path = at_work.save(tmp_path / "last.ckpt")
    reshaped, extended = Small().double(), Small().double()
    reshaped.first = nn.Linear(4, 7).double()
    extended.more = nn.Linear(2, 2).double()
    with pytest.raises(
        ValueError, match=r"are not of this model: of another shape: first.weight \[6, 4\] for \[7, 4\]"
    ):
        checkpoints.read(path, reshaped)
    with pytest.raises(ValueError, match=r"missing: more.weight|expected one average for each of the model's 8 par"):
        checkpoints.read(path, extended)
    with pytest.raises(ValueError, match=r"(missing|not known here|expected one average)"):
        checkpoints.read(path, nn.Linear(4, 6).double())


def test_wrappers_leave_no_trace(model: Small, tmp_path: Path) -> None:
    compiled = torch.compile(nn.DataParallel(model), backend="eager")
    tool = TorchEMA(compiled)
    run(tool, 2)
    came = checkpoints.read(tool.save(tmp_path / "last.pt"))
    assert came.weights.keys() == model.state_dict().keys()
    assert checkpoints.read(tmp_path / "last.pt", compiled).weights.keys() == model.state_dict().keys()


def test_a_module_that_holds_the_average_of_another(model: Small) -> None:
    whole = nn.Module()
    whole.net, whole.teacher = model, torch.optim.swa_utils.AveragedModel(model)
    whole.teacher.update_parameters(model)
    came = checkpoints.read({"state_dict": whole.state_dict()}, model)
    assert (came.at, came.count) == ("state_dict/teacher", 1)
    assert same(dict(came.weights), model.state_dict())


def test_a_module_itself(model: Small) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert checkpoints.read(averaged).count == 1


def test_a_part_of_the_model(model: Small, tmp_path: Path) -> None:
    whole = nn.Module()
    whole.net, whole.head = model, nn.Linear(2, 2)
    averaged = torch.optim.swa_utils.AveragedModel(whole)
    averaged.update_parameters(whole)
    came = checkpoints.read(averaged, model)
    assert same(dict(came.weights), model.state_dict())


def test_trained_parameters_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    kept = [torch.full_like(each, 7.0) for each in model[1].parameters()]
    came = checkpoints.read({"shadow_params": kept, "num_updates": 3, "decay": 0.9, "collected_params": None}, model)
    assert torch.equal(came.weights["1.weight"], torch.full((1, 3), 7.0))
    assert torch.equal(came.weights["0.weight"], model[0].weight)
    with pytest.raises(
        ValueError, match="each of the model's 4 parameters, or for the 2 that are trained; .* has 1, by"
    ):
        checkpoints.read({"shadow_params": kept[:1], "num_updates": 3, "decay": 0.9}, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_stay_as_they_are(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert {tensor.dtype for tensor in checkpoints.read(averaged, model).weights.values()} == {dtype}


def test_a_decay_kept_in_float32_is_the_number_that_was_meant(model: Small) -> None:
    kept = LitEma(model).dotless() | {"decay": torch.tensor(0.9999)}
    assert checkpoints.read(kept, model).decay == 0.9999


def test_litema_without_a_count_is_a_constant_decay(model: Small) -> None:
    kept = LitEmaAlone(model).dotless() | {"num_updates": torch.tensor(-1).int()}
    came = checkpoints.read(kept, model)
    assert (came.count, came.profile) == (None, ewma.Exponential(decay=0.75))


def test_litema_of_two_names_that_become_one() -> None:
    model = nn.Module()
    model.a, model.ab = nn.Module(), nn.Module()
    model.a.bc, model.ab.c = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    kept = {"abc": torch.ones(2), "decay": torch.tensor(0.9), "num_updates": torch.tensor(3)}
    beside = {f"model_ema.{name}": tensor for name, tensor in kept.items()} | model.state_dict()
    for checkpoint, given in ((kept, model), (beside, None)):
        with pytest.raises(ValueError, match="LitEma: a.bc and ab.c are one name without their dots"):
            checkpoints.read(checkpoint, given)


def test_nemos_second_file_is_known_by_its_name(model: Small, tmp_path: Path) -> None:
    raw, averages = {"state_dict": model.state_dict()}, {"state_dict": Nemo(model).averaged_model()}
    torch.save(raw, tmp_path / "step=9.ckpt")
    with pytest.raises(ValueError, match="found no averaged weights"):
        checkpoints.read(tmp_path / "step=9.ckpt")
    torch.save(averages, tmp_path / "step=9-EMA.ckpt")
    assert checkpoints.read(tmp_path / "step=9-EMA.ckpt", model).source == "NeMo EMA"
    with pytest.raises(ValueError, match="step=9-EMA.ckpt lies beside it, and was probably meant"):
        checkpoints.read(tmp_path / "step=9.ckpt")


def test_nemos_decay_for_every_k_steps_is_told_per_step(model: Small) -> None:
    content = NemoOne(model).content()
    content["optimizer_states"][0].update(every_n_steps=4, current_step=9, decay=0.5)
    came = checkpoints.read(content, model)
    assert came.profile == ewma.Exponential(half_life=4)
    assert (came.count, came.time) == (3, 9.0)


def test_ultralytics_pickles_the_module(model: Small, tmp_path: Path) -> None:
    content = {"epoch": 1, "model": None, "ema": model.half(), "updates": 40, "train_args": {"imgsz": 640}}
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"weights_only=True.*asks for .*Small.*read\(torch.load\(...\)\)"):
        checkpoints.read(tmp_path / "last.pt")
    came = checkpoints.read(torch.load(tmp_path / "last.pt", weights_only=False), model)
    assert (came.source, came.count, came.weights["first.weight"].dtype) == ("ultralytics", 40, torch.float16)


def test_arguments_of_other_tools_do_not_stand_in_the_way(model: Small, tmp_path: Path) -> None:
    content = Timm(model).content() | {"where": tmp_path}
    torch.save(content, tmp_path / "last.pth.tar")
    assert checkpoints.read(tmp_path / "last.pth.tar").decay == 0.75


def test_several_averages_are_not_guessed_among(model: Small, tmp_path: Path) -> None:
    one, two = (torch.optim.swa_utils.AveragedModel(model) for _ in range(2))
    one.update_parameters(model)
    torch.save({"fast": one.state_dict(), "slow": {"ema": two.state_dict()}}, tmp_path / "last.pt")
    with pytest.raises(
        ValueError, match=r"found several averages: 'fast' \(torch AveragedModel\), 'slow/ema' .*example at='fast'"
    ):
        checkpoints.read(tmp_path / "last.pt")
    assert checkpoints.read(tmp_path / "last.pt", at="fast").count == 1
    assert checkpoints.read(tmp_path / "last.pt", at="slow/ema").count == 0
    with pytest.raises(ValueError, match=r"no averages at 'ema'; found 'fast' .*, 'slow/ema'"):
        checkpoints.read(tmp_path / "last.pt", at="ema")


def test_an_error_lists_what_was_looked_for(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "model": {"weight": torch.ones(2)}}, tmp_path / "last.pt")
    with pytest.raises(
        ValueError, match=r"last.pt: found no averaged weights. It holds 'epoch', 'model' \(1 "
    ) as error:
        checkpoints.read(tmp_path / "last.pt")
    for tool in ("AveragedModel", "timm", "diffusers", "torch_ema", "ema-pytorch", "Lightning", "mmengine", "LitEma"):
        assert tool in str(error.value)


@pytest.mark.parametrize("size", [10, 300, 0.5, -3])
def test_a_truncated_file_is_refused(model: Small, tmp_path: Path, size: float) -> None:
    path = TorchEMA(model).save(tmp_path / "last.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: round(size * len(whole)) if 0 < size < 1 else int(size)])
    with pytest.raises(ValueError, match="last.pt: .*(truncated|damaged)"):
        checkpoints.read(path)


def test_a_missing_file_and_other_things(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        checkpoints.read(tmp_path / "nowhere.pt")
    with pytest.raises(TypeError, match="read takes a path, or what was loaded from one; got int"):
        checkpoints.read(3)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Run:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"state_dict_ema": {"weight": torch.ones(2)}, "args": Run()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"that refused it: it asks for builtins.exec"):
        checkpoints.read(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_our_own_files_and_states(model: Small, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(model, {"fast": ewma.Exponential(decay=0.5), "slow": ewma.Exponential(half_life=50)})
    ema.update()
    with torch.no_grad():
        model.first.weight.add_(1.0)
    ema.update()
    ema["slow"].save(tmp_path / "slow.safetensors")
    came = checkpoints.read(tmp_path / "slow.safetensors", model)
    slow = dict(ema["slow"].named_parameters())
    assert same(slow, {name: came.weights[name] for name in slow})
    assert (came.source, came.count, came.time, came.profile) == ("ModelEMA", 2, 2.0, ewma.Exponential(half_life=50))
    torch.save({"trainer": {"ema": ema.state_dict()}}, tmp_path / "last.pt")
    came = checkpoints.read(tmp_path / "last.pt", model, at="trainer/ema/slow")
    assert same(slow, {name: came.weights[name] for name in slow})
    assert checkpoints.read(tmp_path / "last.pt", at="trainer/ema/fast").decay == 0.5
    with pytest.raises(ValueError, match="found several averages: 'trainer/ema/fast'"):
        checkpoints.read(tmp_path / "last.pt")
    empty = ewma.ModelEMA(model, half_life=3).state_dict()
    with pytest.raises(ValueError, match="the ModelEMA in it has averaged nothing yet"):
        checkpoints.read(empty)


@each(MmengineHook, TorchEma)
def test_reading_changes_nothing(model: Small, tmp_path: Path, tool: type[Tool]) -> None:
    tool = tool(model)
    run(tool, 2)
    path = tool.save(tmp_path / "last.pt")
    before, bytes_before = {name: tensor.clone() for name, tensor in model.state_dict().items()}, path.read_bytes()
    came = checkpoints.read(path, model)
    for tensor in came.weights.values():
        tensor.zero_()
    assert same(before, model.state_dict())
    assert path.read_bytes() == bytes_before


def test_other_formats_than_torchs(model: Small, tmp_path: Path) -> None:
    tool = LitEma(model)
    run(tool, STEPS)
    whole = {name: tensor.clone().contiguous() for name, tensor in tool.content()["state_dict"].items()}
    save_file(whole, tmp_path / "last.safetensors")
    checkpoints.export(whole, tmp_path / "parts", max_shard_size=500)
    torch.save(tool.content(), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for path in ("last.safetensors", "parts", "parts/model.safetensors.index.json", "old.ckpt"):
        came = checkpoints.read(tmp_path / path, model)
        assert (came.source, came.count) == ("LitEma", STEPS)
        assert same(tool.averages(), {name: came.weights[name] for name in tool.averages()})


@pytest.mark.filterwarnings("ignore")  # that one process alone writes it
@each(TorchEMA, TorchEma, LitEma, Nemo)
def test_a_folder_of_torch_distributed_checkpoint(model: Small, tmp_path: Path, tool: type[Tool]) -> None:
    at_work = tool(model)
    run(at_work, STEPS)
    content = at_work.content()
    dcp.save({name: value for name, value in content.items() if value is not None}, checkpoint_id=tmp_path / "dcp")
    came = checkpoints.read(tmp_path / "dcp", model)
    assert same(at_work.averages(), {name: came.weights[name] for name in at_work.averages()})
    assert (came.source, came.count, came.profile) == (tool.source, STEPS, tool.profile)


@pytest.mark.parametrize(
    ("step", "start", "told"),
    [(3, 0, False), (80, 0, False), (81, 0, True), (81, 5, False), (86, 5, True), (3, 5, False)],
)
def test_diffusers_lower_limit_is_no_profile_of_ours_while_it_is_in_force(step: int, start: int, told: bool) -> None:
    """(1 + n) / (10 + n) reaches .9 at n = 80, and must be above it for the limit not to matter from there on."""
    model = nn.Linear(2, 1)
    kept = {"shadow_params": list(model.parameters()), "optimization_step": step, "update_after_step": start}
    came = checkpoints.read({**kept, "decay": 0.99, "min_decay": 0.9001, "use_ema_warmup": False}, model)
    assert (came.profile is not None) == told
    assert (came.count, came.decay) == (step, 0.99)
