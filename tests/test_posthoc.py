"""Averages put together after a run are those that would have been tracked, as near as is said; and never a mix."""

from __future__ import annotations

import json
import os
import re
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Small, same, train
from torch import Tensor, nn

import ewma
from ewma import posthoc, profiles
from ewma.posthoc import FarFromTarget

POWERS = {"narrow": ewma.Power(sigma_rel=0.05), "wide": ewma.Power(sigma_rel=0.1)}
STEPS = 120


class Walk(nn.Module):
    """Weights that wander, and what else a model may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(7, 3))
        self.b = nn.Parameter(torch.randn(70_001))
        self.c = nn.Parameter(torch.tensor([1 + 1j, 2 - 1j]))
        self.tied = self.a
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("newest", torch.zeros(2))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter += 0.03 * torch.randn_like(parameter)
            self.count += 1
            self.newest += 1.0


def walked(
    folder: Path,
    targets: dict[str, profiles.Profile],
    steps: int = STEPS,
    at: Callable[[int], bool] = lambda step: step % 8 == 0,
    tracks: dict[str, profiles.Profile] = POWERS,
    every: int = 1,
) -> tuple[posthoc.Archive, dict[str, dict[str, Tensor]], Walk]:
    """A run, archived on the way, and beside it the averages that were truly tracked, in float64."""
    model, archive = Walk(), posthoc.Archive(folder)
    ema = ewma.ModelEMA(model, tracks)
    true = ewma.ModelEMA(model, targets, dtype=torch.float64) if targets else None
    for step in range(1, steps + 1):
        model.step()
        if step % every == 0:
            for each in filter(None, (ema, true)):
                each.update(every)
        if at(step):
            archive.add(ema)
    return archive, {name: dict(true[name].named_parameters()) for name in targets}, model


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative, over all parameters."""
    off = sum((one[name] - other[name]).abs().double().square().sum() for name in other)
    return (off / sum(tensor.abs().double().square().sum() for tensor in other.values())).sqrt().item()


# The fit


def dense(snapshots: list[posthoc.Snapshot], target: profiles.Profile, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The step weights of every snapshot, straight from the profiles, and those of the target."""
    rows = np.zeros((len(snapshots), steps))
    for row, snapshot in zip(rows, snapshots, strict=True):
        row[: snapshot.count] = snapshot.profile.weights(snapshot.count)
    return rows, np.array(target.weights(steps))


TARGETS = [
    ewma.Power(sigma_rel=0.15),
    ewma.Power(sigma_rel=0.03),
    ewma.Exponential(decay=0.97),
    ewma.Exponential(decay=0.9, debias=False),
    ewma.Uniform(),
    profiles.after(start=150, profile=ewma.Uniform()),
    profiles.after(start=150, profile=profiles.triangular(steps=90)),
    profiles.after(start=150, profile=profiles.triangular(steps=90, peak=0.5)),
    *(
        profiles.after(start=150, profile=profiles.from_lr_decay(shape=s, steps=90))
        for s in ("linear", "cosine", "sqrt")
    ),
    profiles.after(start=100.5, profile=ewma.Exponential(half_life=30, debias=False)),
    profiles.cosine(steps=200),
    profiles.tensorflow(),
    profiles.inverse_gamma(),
    profiles.mean_teacher(),
    profiles.fraction(share=0.2),
    profiles.linear(first=0.5, last=0.99, steps=40),
    profiles.ramp(tau=50.0),
    profiles.ramp(tau=50.0).scaled(2),
]


@pytest.mark.parametrize("metric", ["updates", "steps"])
@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_the_fit_is_the_least_squares_of_the_dense_step_weights(target, metric: str) -> None:
    steps = 240
    taken = [10, 47, 48, 110, 200, 240]
    snapshots = [posthoc.Snapshot(p, float(s), s) for s in taken for p in (*POWERS.values(), ewma.Uniform())]
    found = posthoc.fit(snapshots, target, metric=metric)
    rows, wanted = dense(snapshots, target, steps)
    x = np.array(found.coefficients)
    assert x.sum() == pytest.approx(1.0, abs=1e-12)
    off = x @ rows - wanted
    shares = 1.0 - np.cumsum(wanted)
    assert found.step_residual == pytest.approx(np.linalg.norm(off) / np.linalg.norm(wanted), rel=1e-6, abs=1e-12)
    assert found.residual == pytest.approx(np.linalg.norm(np.cumsum(off)) / np.linalg.norm(shares), rel=1e-6, abs=1e-12)
    # KKT by the textbook: the gradient is the same in every coefficient
    seen, aim = (rows, wanted) if metric == "steps" else (np.cumsum(rows, 1), np.cumsum(wanted))
    gradient = seen @ (x @ seen - aim)
    assert np.ptp(gradient) < 1e-10 * np.abs(seen @ aim).max()
    times, want, reached = found.curves()
    assert times.tolist() == list(range(1, steps + 1))
    np.testing.assert_allclose(want, wanted, rtol=1e-10, atol=1e-17)
    np.testing.assert_allclose(reached, x @ rows, rtol=0, atol=1e-14)


def test_a_tracked_profile_is_reached_exactly() -> None:
    found = posthoc.plan(1_000, 10, POWERS, ewma.Power(sigma_rel=0.1))
    assert found.residual < 1e-12
    assert found.step_residual < 1e-12
    assert max(found.coefficients) == pytest.approx(1.0)


def test_a_snapshot_that_is_there_twice_changes_nothing() -> None:
    once = posthoc.plan(300, 6, POWERS, ewma.Power(sigma_rel=0.2))
    twice = posthoc.plan(300, 6, [*POWERS.values(), POWERS["wide"]], ewma.Power(sigma_rel=0.2))
    assert twice.residual == pytest.approx(once.residual, rel=1e-6)
    assert max(map(abs, twice.coefficients)) < 10


def test_pieces_do_not_change_the_fit(monkeypatch) -> None:
    whole = posthoc.plan(1_000, 7, target=ewma.Power(sigma_rel=0.2))
    monkeypatch.setattr("ewma.posthoc.step_weights.PIECE", 13)
    parts = posthoc.plan(1_000, 7, target=ewma.Power(sigma_rel=0.2))
    assert parts.coefficients == pytest.approx(whole.coefficients, rel=1e-9)
    assert parts.residual == pytest.approx(whole.residual, rel=1e-9)


def test_long_runs_overflow_nothing() -> None:
    """Over 100,000 steps an exponential forgets more than a float can tell."""
    tracks = [ewma.Exponential(half_life=50), ewma.Exponential(half_life=500)]
    found = posthoc.plan(100_000, 20, tracks, ewma.Exponential(half_life=500))
    assert found.residual < 1e-12
    assert all(np.isfinite(found.coefficients))


# Before the run


def test_the_plan_is_what_comes(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {})
    planned = posthoc.plan(STEPS, range(8, STEPS + 1, 8), POWERS, ewma.Power(sigma_rel=0.15))
    assert planned.residual == archive.solve(ewma.Power(sigma_rel=0.15)).residual


def test_more_snapshots_and_more_tracks_come_nearer() -> None:
    target = ewma.Power(sigma_rel=0.2)
    few, many = (posthoc.plan(1_000, n, POWERS, target) for n in (6, 20))
    one = posthoc.plan(1_000, 20, ewma.Power(sigma_rel=0.1), target)
    raw = posthoc.plan(1_000, 20, posthoc.RAW, target)
    assert many.residual < few.residual
    assert many.residual < one.residual < raw.residual
    assert posthoc.plan(1_000, 20, POWERS, ewma.Uniform(), last=300) == posthoc.plan(
        1_000, 20, POWERS, profiles.after(start=700, profile=ewma.Uniform())
    )


def test_when_to_take_snapshots() -> None:
    assert posthoc.snapshot_steps(10, 10) == list(range(1, 11))
    assert posthoc.snapshot_steps(100_000, 5, every=100)[-1] == 100_000
    assert all(step % 100 == 0 for step in posthoc.snapshot_steps(100_000, 5, every=100))
    evenly = posthoc.plan(10_000, range(500, 10_001, 500), POWERS, ewma.Exponential(half_life=3_000))
    bent = posthoc.plan(10_000, 20, POWERS, ewma.Exponential(half_life=3_000))
    assert bent.residual < evenly.residual


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((100, 0), "expected between 1 and 100 snapshots"),
        ((100, [50, 40]), "snapshots must be rising steps between 1 and 100"),
        ((100, [50, 101]), r"snapshots must be rising steps between 1 and 100, .* got \[101\]"),
    ],
)
def test_a_plan_that_cannot_be(arguments, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        posthoc.plan(*arguments)


# After the run


@pytest.mark.parametrize(
    ("target", "most"),
    [
        (ewma.Power(sigma_rel=0.05), 1e-6),
        (ewma.Power(sigma_rel=0.12), 1e-4),
        (ewma.Exponential(decay=0.95), 1e-3),
        (profiles.after(start=80, profile=ewma.Uniform()), 2e-3),
        (profiles.after(start=60, profile=profiles.from_lr_decay(shape="cosine", steps=60)), 2e-3),
        (profiles.after(start=60, profile=profiles.triangular(steps=60)), 2e-3),
    ],
    ids=repr,
)
@pytest.mark.parametrize("every", [1, 4])
def test_it_is_the_average_that_would_have_been_tracked(tmp_path: Path, target, most: float, every: int) -> None:
    archive, true, _ = walked(tmp_path, {"true": target}, every=every)
    found = archive.reconstruct(target)
    assert distance(found.weights, true["true"]) < most
    assert found.weights["a"].dtype == torch.float32
    assert found.weights["b"].shape == (70_001,)


def test_the_horizon_does_not_stretch_with_the_update_interval(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {}, every=4)
    times, wanted, reached = archive.solve(ewma.Power(sigma_rel=0.1)).curves()
    assert times.tolist() == list(range(4, STEPS + 1, 4))
    for weights in (wanted, reached):  # (gamma + 1) / (gamma + 2) of the run, plus half an interval
        assert (weights @ times).item() == pytest.approx(0.888 * STEPS + 2, abs=0.2)


def test_all_of_the_model_comes_back(tmp_path: Path) -> None:
    archive, _, model = walked(tmp_path, {})
    weights = archive.reconstruct(ewma.Power(sigma_rel=0.07)).weights
    assert weights.keys() == model.state_dict().keys()
    assert weights["tied"] is weights["a"]
    assert weights["count"].item() == STEPS
    assert weights["newest"].tolist() == [STEPS, STEPS]
    assert weights["mask"].tolist() == [0.0, -torch.inf]
    Walk().load_state_dict(weights)


def test_what_never_moves_comes_out_to_the_bit(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    ema = ewma.ModelEMA(model, POWERS)
    archive = posthoc.Archive(tmp_path)
    for _ in range(20):
        ema.update()
        archive.add(ema)
    weights = archive.reconstruct(ewma.Exponential(half_life=3)).weights
    assert same(weights, dict(model.state_dict()))


def test_irregular_snapshots(tmp_path: Path) -> None:
    target = ewma.Power(sigma_rel=0.12)
    taken = {1, 5, 6, 20, 33, 34, 60, 90, 101, 120}
    archive, true, _ = walked(tmp_path, {"true": target}, at=lambda step: step in taken)
    assert distance(archive.reconstruct(target).weights, true["true"]) < 1e-3


def test_as_it_was_at_an_earlier_time(tmp_path: Path) -> None:
    target = ewma.Power(sigma_rel=0.12)
    archive, true, _ = walked(tmp_path / "half", {"true": target}, steps=STEPS // 2 + 4)
    torch.manual_seed(0)
    longer, _, _ = walked(tmp_path / "whole", {})
    found = longer.reconstruct(target, at=STEPS // 2 + 4)  # between two snapshots
    assert distance(found.weights, true["true"]) < 2e-2
    assert longer.reconstruct(target, at=56).fit.coefficients == archive.reconstruct(target, at=56).fit.coefficients
    with pytest.raises(ValueError, match="at must be between 8 and 120, the first and the last snapshot's time; got 1"):
        longer.reconstruct(target, at=130)


def test_the_last_steps(tmp_path: Path) -> None:
    archive, true, _ = walked(tmp_path, {"true": profiles.after(start=80, profile=ewma.Uniform())})
    assert distance(archive.reconstruct(ewma.Uniform(), last=40).weights, true["true"]) < 2e-3
    assert archive.solve(ewma.Uniform(), last=STEPS, max_residual=1).target == ewma.Uniform()
    with pytest.raises(ValueError, match="last must be above 0 and at most 120, the time there is; got 121"):
        archive.solve(ewma.Uniform(), last=121)


def test_a_file_is_what_reconstruct_gives(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path / "run", {})
    target = ewma.Power(sigma_rel=0.15)
    made: list[int] = []
    told = archive.reconstruct_to(tmp_path / "model.safetensors", target, done=made.append)
    found = archive.reconstruct(target)
    assert told == found.fit
    assert same(load_file(tmp_path / "model.safetensors"), found.weights)
    assert sum(made) == sum(tensor.numel() for tensor in found.weights.values())
    archive.reconstruct_to(tmp_path / "half.safetensors", target, dtype=torch.bfloat16)
    half = load_file(tmp_path / "half.safetensors")
    assert torch.equal(half["a"], found.weights["a"].bfloat16())
    assert half["count"].dtype == torch.int64
    with pytest.raises(FileNotFoundError, match="the folder .*nowhere does not exist; make it first"):
        archive.reconstruct_to(tmp_path / "nowhere" / "x.safetensors", target)


@pytest.mark.parametrize("block", [999, 35_000, 70_000, 70_001])
def test_blocks_and_threads_change_nothing(tmp_path: Path, monkeypatch, block: int) -> None:
    archive, _, _ = walked(tmp_path, {}, steps=24)
    whole = archive.reconstruct(ewma.Power(sigma_rel=0.07)).weights
    monkeypatch.setattr("ewma.posthoc.mixing.BLOCK", block)
    assert same(archive.reconstruct(ewma.Power(sigma_rel=0.07)).weights, whole)


def test_torch_keeps_its_threads(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {}, steps=24)
    before = torch.get_num_threads()
    archive.reconstruct(ewma.Power(sigma_rel=0.07))
    assert torch.get_num_threads() == before


def test_a_late_parameter_goes_by_its_own_clock(tmp_path: Path) -> None:
    target = ewma.Power(sigma_rel=0.12)
    model, archive = Walk(), posthoc.Archive(tmp_path)
    ema, true = ewma.ModelEMA(model, POWERS), ewma.ModelEMA(model, {"true": target}, dtype=torch.float64)
    for step in range(1, 121):
        if step == 41:
            model.late = nn.Parameter(torch.randn(500))
        model.step()
        ema.update()
        true.update()
        if step % 8 == 0:
            archive.add(ema)
    found = archive.reconstruct(target).weights
    assert distance(found, dict(true["true"].named_parameters())) < 2e-4
    archive.reconstruct_to(tmp_path / "out", target)
    assert same(load_file(tmp_path / "out"), found)
    only = {"late": dict(true["true"].named_parameters())["late"]}
    assert distance(found, only) < 1e-3


def test_only_what_is_averaged_is_put_together(tmp_path: Path) -> None:
    model, archive = Walk(), posthoc.Archive(tmp_path)
    ema = ewma.ModelEMA(model, POWERS, only=["a", "tied"])
    for _ in range(10):
        model.step()
        ema.update()
        archive.add(ema)
    weights = archive.reconstruct(ewma.Power(sigma_rel=0.07)).weights
    assert torch.equal(weights["b"], model.b)
    assert not torch.equal(weights["a"], model.a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_sixteen_bits_are_archived_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4).to(dtype)
    ema = ewma.ModelEMA(model, half_life=3, dtype=dtype)
    ema.update()
    archive = posthoc.Archive(tmp_path)
    archive.add(ema)
    saved = load_file(next(tmp_path.glob("*.safetensors")))
    assert saved["weight"].dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FarFromTarget)
        model.load_state_dict(archive.reconstruct(ewma.Exponential(half_life=3)).weights)


def test_one_view_can_be_archived_alone(tmp_path: Path) -> None:
    model, archive = Walk(), posthoc.Archive(tmp_path)
    ema = ewma.ModelEMA(model, POWERS)
    for _ in range(6):
        ema.update()
        archive.add(ema["wide"])
        archive.add(ema["narrow"])
    assert len(archive.snapshots) == 12
    assert archive.solve(POWERS["narrow"]).residual < 1e-12


# Restarts, and other runs


def test_a_restarted_run_goes_on(tmp_path: Path) -> None:
    target = ewma.Power(sigma_rel=0.12)
    model, archive = Walk(), posthoc.Archive(tmp_path)
    ema, true = ewma.ModelEMA(model, POWERS), ewma.ModelEMA(model, {"true": target}, dtype=torch.float64)

    def go(until: int) -> None:
        while ema["wide"].count < until:
            model.step()
            ema.update()
            true.update()
            if ema["wide"].count % 8 == 0:
                posthoc.Archive(tmp_path).add(ema)

    go(60)
    saved = [each.state_dict() for each in (model, ema, true)]
    saved = torch.load(_through(saved, tmp_path / "saved"), weights_only=True)
    go(90)  # and here it crashed
    assert archive.snapshots[-1].count == 88
    model, ema = Walk(), ewma.ModelEMA(Walk(), POWERS)
    ema = ewma.ModelEMA(model, POWERS)
    true = ewma.ModelEMA(model, {"true": target}, dtype=torch.float64)
    for each, state in zip((model, ema, true), saved, strict=True):
        each.load_state_dict(state)
    torch.manual_seed(5)  # another way from here
    go(64)
    assert [snapshot.count for snapshot in archive.snapshots][-2:] == [64, 64]
    assert len(list(tmp_path.glob("*.safetensors"))) == len(archive.snapshots) == 16
    go(120)
    assert distance(archive.reconstruct(target).weights, dict(true["true"].named_parameters())) < 1e-4


def _through(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def test_a_snapshot_taken_again_replaces_the_first(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {}, steps=16)
    model = Walk()
    ema = ewma.ModelEMA(model, POWERS)
    ema.update()
    ema.run = archive_run(tmp_path)
    archive.add(ema)
    archive.add(ema)
    assert [snapshot.count for snapshot in archive.snapshots] == [1, 1]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def archive_run(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["run"]


def test_another_run_is_refused(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {}, steps=16)
    before = snapshot_of(tmp_path)
    other = ewma.ModelEMA(Walk(), POWERS)
    other.update()
    with pytest.raises(ValueError, match=r"of the run \w+, and these averages are of the run \w+; nothing was written"):
        archive.add(other)
    (tmp_path / "manifest.json").unlink()  # lost: its files alone still tell
    with pytest.raises(ValueError, match=r"narrow-000000008.safetensors: it is of the run"):
        archive.add(other)
    assert snapshot_of(tmp_path) == {name: text for name, text in before.items() if name != "manifest.json"}


def snapshot_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_stale_file_of_another_run_is_not_mixed_in(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path / "one", {})
    walked(tmp_path / "two", {})
    name = "wide-000000064.safetensors"
    (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    with pytest.raises(ValueError, match=rf"{name}: it is of the run \w+, and manifest.json of the run \w+"):
        archive.reconstruct(ewma.Power(sigma_rel=0.07))


def test_a_file_in_the_place_of_another(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {})
    (tmp_path / "wide-000000064.safetensors").write_bytes((tmp_path / "wide-000000056.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"wide-000000064.safetensors: time is 56.0 in it, and 64.0 in manifest.json"):
        archive.reconstruct(ewma.Power(sigma_rel=0.07))


def test_a_state_that_begins_anew_is_another_run(tmp_path: Path) -> None:
    model = Walk()
    ema = ewma.ModelEMA(model, POWERS)
    archive = posthoc.Archive(tmp_path)
    ema.update()
    archive.add(ema)
    run = ema.run
    ema.reset()
    ema.update()
    assert ema.run != run
    with pytest.raises(ValueError, match="of the run"):
        archive.add(ema)


def test_the_run_goes_with_the_state_and_the_file(small: Small, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(small, half_life=2)
    ema.update()
    ema.save(tmp_path / "x.safetensors")
    loaded, resumed = ewma.ModelEMA(Small(), half_life=2), ewma.ModelEMA(Small(), half_life=2)
    loaded.load(tmp_path / "x.safetensors")
    resumed.load_state_dict(ema.state_dict())
    assert loaded.run == resumed.run == ema.run != ewma.ModelEMA(Small(), half_life=2).run


def test_a_track_of_another_profile(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {}, steps=16)
    other = ewma.ModelEMA(Walk(), {"narrow": ewma.Power(sigma_rel=0.06)})
    other.update()
    other.run = archive_run(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"the snapshots of 'narrow' so far are of Power\(sigma_rel=0.05\); it is now Power\(sigma_rel=0.06\)",
    ):
        archive.add(other)


def test_nothing_averaged_yet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is averaged yet: call archive.add\(ema\) after the first optimizer"):
        posthoc.Archive(tmp_path / "new").add(ewma.ModelEMA(Walk(), POWERS))
    assert not (tmp_path / "new").exists()


# What goes wrong


def test_a_disk_full_in_the_middle_of_add(tmp_path: Path, monkeypatch) -> None:
    """Of the second track's file nothing remains, nor of the first's; the archive is what it was."""
    archive, _, model = walked(tmp_path, {})
    before = snapshot_of(tmp_path)
    weights = archive.reconstruct(POWERS["wide"]).weights
    ema = ewma.ModelEMA(model, POWERS)
    ema.run = archive_run(tmp_path)
    ema.update(200.0)
    real, calls, first = os.fsync, [], [0]

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) == first[0]:
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    for fails_at in (1, 2, 3):  # the first track's file, the second's, the manifest
        calls.clear()
        first[0] = fails_at
        with pytest.raises(OSError, match="No space left on device"):
            archive.add(ema)
        assert snapshot_of(tmp_path) == before
    assert same(archive.reconstruct(POWERS["wide"]).weights, weights)


def test_an_interrupt_when_all_is_done_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    archive, _, model = walked(tmp_path, {}, steps=16)
    ema = ewma.ModelEMA(model, POWERS)
    ema.run = archive_run(tmp_path)
    ema.update(8.0)
    real = Path.unlink

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        monkeypatch.setattr(Path, "unlink", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", interrupted)  # of the snapshots that lie after the new one
    with pytest.raises(KeyboardInterrupt):
        archive.add(ema)
    assert [snapshot.time for snapshot in archive.snapshots] == [8.0, 8.0]
    archive.reconstruct(POWERS["wide"])


def test_an_average_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = Walk()
    ema = ewma.ModelEMA(model, POWERS, nonfinite="propagate")
    archive = posthoc.Archive(tmp_path)
    ema.update()
    archive.add(ema)
    before = snapshot_of(tmp_path)
    with torch.no_grad():
        model.b[3] = torch.nan
    ema.update()
    with pytest.raises(ValueError, match=r"b: its average holds NaN or infinity in 1 of 70001 elements; nothing was"):
        archive.add(ema)
    assert snapshot_of(tmp_path) == before


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Other tensors in a snapshot's file, under the same head."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(change(load_file(path)), path, metadata)


def test_nan_in_a_snapshot_is_named(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {})

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["b"][66_000] = torch.nan
        return tensors

    rewrite(tmp_path / "narrow-000000064.safetensors", spoil)
    with pytest.raises(ValueError, match=r"narrow-000000064.safetensors: b holds NaN or infinity in 1 of 70001 elem"):
        archive.reconstruct(ewma.Power(sigma_rel=0.07))
    with pytest.raises(ValueError, match="b holds NaN"):
        archive.reconstruct_to(tmp_path / "out.safetensors", ewma.Power(sigma_rel=0.07))
    assert not (tmp_path / "out.safetensors").exists()


def test_a_changed_shape_is_named(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {})
    rewrite(tmp_path / "wide-000000064.safetensors", lambda tensors: tensors | {"a": torch.zeros(7, 4)})
    with pytest.raises(
        ValueError, match=r"wide-000000064.safetensors: a has shape \[7, 4\], and \[7, 3\] in .*changed"
    ):
        archive.reconstruct(ewma.Power(sigma_rel=0.07))


def test_a_truncated_snapshot_is_named(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {})
    path = tmp_path / "wide-000000064.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"wide-000000064.safetensors: expected a whole safetensors file; .*truncated"):
        archive.reconstruct(ewma.Power(sigma_rel=0.07))


def test_a_missing_snapshot_is_named(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {})
    (tmp_path / "wide-000000064.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"the snapshot of 'wide' at 64 is missing; manifest.json lists it"):
        archive.reconstruct(ewma.Power(sigma_rel=0.07))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"format": 1', "it is damaged"),
        ('{"format": 99, "kind": "Archive"}', "written in format 99"),
        ('{"format": 1, "kind": "ModelEMA"}', "expected the state of Archive; got that of ModelEMA"),
        ("[]", r"manifest.json: expected the list of an archive's snapshots; it is damaged \(TypeError"),
        ('{"format": 1, "kind": "Archive", "run": "a"}', r"it is damaged \(KeyError: 'snapshots'\)"),
        ('{"format": 1, "kind": "Archive", "run": "a", "snapshots": [{"file": "x"}]}', r"damaged \(KeyError: 'late'\)"),
    ],
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        posthoc.Archive(tmp_path).solve(ewma.Uniform())


def test_a_manifest_that_leads_elsewhere_is_refused_and_nothing_is_deleted(tmp_path: Path) -> None:
    """Also where a newer snapshot would have taken the place of what it lists."""
    archive, _, model = walked(tmp_path / "in", {})
    ema = ewma.ModelEMA(model, POWERS)
    ema.update()
    other = tmp_path / "mine.safetensors"
    other.write_text("precious")
    manifest = tmp_path / "in" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["snapshots"][-1]["file"] = "../mine.safetensors"
    manifest.write_text(json.dumps(told))
    for call in (lambda: archive.add(ema), lambda: archive.reconstruct(ewma.Power(sigma_rel=0.07))):
        with pytest.raises(
            ValueError, match=r"manifest.json: it lists '../mine.safetensors', which lies outside of its"
        ):
            call()
    assert other.read_text() == "precious"


def test_what_is_no_profile_metric_or_average_is_refused(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {})
    for wrong in (0.1, None, "Power"):
        with pytest.raises(TypeError, match=r"profile must be a profile, such as Power\(sigma_rel=0.1\); got"):
            archive.reconstruct(wrong)
    with pytest.raises(ValueError, match='metric must be "updates" or "steps"; got \'update\''):
        archive.solve(ewma.Uniform(), metric="update")
    with pytest.raises(TypeError, match="archive.add takes a ModelEMA, or a view of one; got Linear"):
        archive.add(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"dtype must be a floating one, such as torch.bfloat16; got torch.int32"):
        archive.reconstruct_to(tmp_path / "x.safetensors", ewma.Power(sigma_rel=0.07), dtype=torch.int32)
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(ValueError, match="expected one snapshot or more to mix; got none"):
        posthoc.fit([], ewma.Uniform())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"snapshots": 16.0}, ValueError, "snapshots must be a whole number of at least 1; got 16.0"),
        ({"snapshots": 16, "every": 0}, ValueError, "every must be a whole number of at least 1; got 0"),
        ({"snapshots": [50, 100], "every": 0}, ValueError, "every must be a whole number of at least 1; got 0"),
        (
            {"snapshots": 16, "last": 1000},
            ValueError,
            "last must be above 0 and at most 100, the time there is; got 1000",
        ),
        ({"snapshots": 16, "last": -5}, ValueError, "last must be above 0 and at most 100, the time there is; got -5"),
        ({"snapshots": 16, "tracks": [0.05]}, TypeError, "profile must be a profile"),
        ({"snapshots": 16, "tracks": []}, ValueError, "expected one snapshot or more"),
        ({"snapshots": 16, "target": 0.1}, TypeError, "profile must be a profile"),
    ],
)
def test_plans_that_cannot_be(arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        posthoc.plan(100, **arguments)
    assert posthoc.plan(np.int64(100), np.int64(16)).residual == posthoc.plan(100, 16).residual


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no snapshots here; archive.add\(ema\) during training writes them"):
        posthoc.Archive(tmp_path).reconstruct(ewma.Uniform())


def test_a_target_that_is_out_of_reach(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {}, at=lambda step: step >= 112)
    told = r"the 18 snapshots do not reach Uniform\(\): residual [0-9.]+ by the changes of the weights, [0-9.]+ by the"
    with pytest.warns(FarFromTarget, match=told):
        found = archive.reconstruct(ewma.Uniform())
    assert found.residual > 0.01
    with pytest.raises(ValueError, match=told.replace("residual", "residual") + r".*max_residual=0.01 was asked for"):
        archive.reconstruct(ewma.Uniform(), max_residual=0.01)
    archive.reconstruct(ewma.Uniform(), max_residual=found.residual)  # accepted, without a warning


def test_an_archive_prints_what_it_holds(tmp_path: Path) -> None:
    archive, _, _ = walked(tmp_path, {}, steps=16)
    assert repr(archive).endswith("4 snapshots)")
    assert archive.elements() == 7 * 3 + 70_001 + 2 + 1 + 2 + 2


def test_more_snapshots_than_a_process_may_have_files(tmp_path: Path, monkeypatch) -> None:
    archive, _, _ = walked(tmp_path, {}, at=lambda step: step % 4 == 0)
    monkeypatch.setattr("ewma.posthoc.mixing.MANY", 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        archive.reconstruct(ewma.Power(sigma_rel=0.12))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_in_a_training_loop(small: Small, sgd, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(small, POWERS).attach(sgd)
    true = ewma.ModelEMA(small, ewma.Power(sigma_rel=0.15), dtype=torch.float64).attach(sgd)
    archive = posthoc.Archive(tmp_path)
    for _ in range(20):
        train(small, sgd, 4)
        archive.add(ema)
    with ema.swapped():
        archive.add(ema)
    found = archive.reconstruct(ewma.Power(sigma_rel=0.15)).weights
    assert distance(found, dict(true.named_parameters())) < 1e-4
    small.load_state_dict(found)


def test_the_pages_about_it_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = 100
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)

    def train_step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 2)).pow(2).mean().backward()
        optimizer.step()

    for step in range(1, 11):
        torch.save(model.state_dict(), f"run/checkpoints/{step}.pt")
    names = {"ewma": ewma, "model": model, "optimizer": optimizer, "steps": steps, "train_step": train_step}
    docs = Path(__file__).parents[1] / "docs" / "posthoc.md"
    readme = [block for block in _blocks(docs.parents[1] / "README.md") if "ewma.posthoc" in block]
    for block in [*_blocks(docs), *readme]:
        exec(block, names)
    assert names["found"].residual < 1e-3
    assert load_file("model.safetensors").keys() == model.state_dict().keys()


def _blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
