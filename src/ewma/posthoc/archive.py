"""Snapshots of averages in a folder, added during training; and after it, any other average out of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ewma.posthoc.fit import Fit, Metric, begun_late, check, fit
from ewma.posthoc.manifest import NAME, Entry, Manifest, told
from ewma.posthoc.mixing import Mixture, Source, nothing
from ewma.posthoc.recording import Recording, is_first_rank, shared
from ewma.posthoc.step_weights import Snapshot
from ewma.profiles import Profile
from ewma.readers import Checkpoint
from ewma.weights.views import Readable


@dataclass(frozen=True)
class Reconstruction:
    """Weights as another profile would have averaged them, and how near they are.

    `weights` is a state dict; `residual` and `step_residual` are explained at `Fit`.
    """

    weights: dict[str, Tensor]
    fit: Fit

    @property
    def residual(self) -> float:
        return self.fit.residual

    @property
    def step_residual(self) -> float:
        return self.fit.step_residual

    @property
    def coefficients(self) -> tuple[float, ...]:
        return self.fit.coefficients


class Archive:
    """Snapshots of one run's averages, from which any other average of that run is put together after it.

        archive = ewma.posthoc.Archive("run/averages")
        ...                                                  # every so often during training, beside a checkpoint
            archive.add(ema)
        ...                                                  # when it is over
        model.load_state_dict(archive.reconstruct(ewma.Power(sigma_rel=0.15)).weights)

    Every snapshot is a known mixture of the weights that the run went through, and so is the average of any profile:
    `reconstruct` takes the mixture of snapshots that comes nearest to it. Two tracks, `Power(sigma_rel=.05)` and
    `Power(sigma_rel=.10)`, and 16 to 30 snapshots of each reach all of what is usual (see `plan`).

    Args:
        folder: made by the first `add`. It holds one safetensors file, in float32, of each snapshot and track, and
            "manifest.json", which lists them.

    Source: Karras et al. 2024 (arXiv 2312.02696, section 3), here for profiles of any kind and for the steps as they
    were: update intervals, irregular snapshots, restarts. Beside it: `Checkpoints` goes by ordinary checkpoints.

    >>> import tempfile
    >>> model = torch.nn.Linear(1, 1)
    >>> ema = ModelEMA(model, {"narrow": Power(sigma_rel=0.05), "wide": Power(sigma_rel=0.1)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     archive = Archive(folder)
    ...     for step in range(1, 101):
    ...         _ = torch.nn.init.constant_(model.weight, step)
    ...         ema.update()
    ...         if step % 10 == 0:
    ...             archive.add(ema)
    ...     mean = archive.reconstruct(profiles.after(start=50, profile=Uniform())).weights["weight"].item()
    >>> round(mean, 2)  # of 51 to 100
    75.5
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def __repr__(self) -> str:
        return f"Archive({str(self.folder)!r}, {len(self.snapshots)} snapshots)"

    @property
    def snapshots(self) -> list[Snapshot]:
        """What there is, oldest first: (profile, time, count)."""
        return [entry.snapshot() for entry in Manifest.read(self.folder).entries]

    def add(self, ema: Readable) -> None:
        """Write the averages as they are now: of a ModelEMA all profiles, of a view, `ema["wide"]`, one.

        The folder holds all of the new snapshot or nothing of it, also where the disk is full in the middle. After a
        restart from a checkpoint (`ema.load_state_dict`) just go on: snapshots that lie after it are dropped when the
        first new one comes, since the run went another way from there. A folder with snapshots of another run is
        refused.

        With several ranks call it on every one, as reading averages asks for: rank 0 writes, and what goes wrong there
        is raised on all. With `ModelEMA(ranks="alone")` whoever calls writes.

        Errors: ValueError where the run or a profile is another one, where an average is not finite, or before the
        first update; OSError as the disk gives it.
        """
        if not isinstance(ema, Readable):
            raise TypeError(f"archive.add takes a ModelEMA, or a view of one; got {type(ema).__name__}")
        owner, own = ema._read()
        chosen = {name: track for name, track in owner.tracks.items() if ema is owner or track is own}
        if not all(track.updated for track in chosen.values()):
            raise ValueError("nothing is averaged yet: call archive.add(ema) after the first optimizer step")
        recordings = {name: Recording(owner[name]) for name in chosen}
        together = bool(owner.ranks.groups(owner.model)) or any(each.sharded for each in recordings.values())
        failure: Exception | None = None
        if owner.ranks.how == "alone" or is_first_rank():
            try:
                self._write(owner.run, recordings)
            except Exception as error:
                failure = error
        if together:
            for recording in recordings.values():
                recording.drain()
            failure = shared(failure)
        if failure is not None:
            raise failure

    def _write(self, run: str, recordings: Mapping[str, Recording]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = Manifest.read(self.folder)
        manifest.check_run(run)
        for name, recording in recordings.items():
            manifest.check_profile(name, recording.track.profile)
        added: list[Entry] = []
        try:
            for name, recording in recordings.items():
                added.append(manifest.new_entry(name, recording.track))
                recording.write(self.folder, added[-1])
            manifest.replace(run, added)
        except BaseException:
            listed = Manifest.read(self.folder).entries  # an interrupt may come when all is done
            for entry in added:
                if entry not in listed:
                    (self.folder / entry.file).unlink(missing_ok=True)
            raise

    def solve(
        self,
        profile: Profile,
        *,
        last: float | None = None,
        at: float | None = None,
        metric: Metric = "updates",
        max_residual: float | None = None,
    ) -> Fit:
        """Which mixture of the snapshots `reconstruct` would take, without reading them. The same arguments."""
        manifest = Manifest.read(self.folder)
        snapshots, end = [entry.snapshot() for entry in _until(manifest, at)], _end(manifest, at)
        solved = fit(snapshots, begun_late(profile, last, end[0]), end, metric=metric)
        check(solved, max_residual)
        return solved

    def reconstruct(
        self,
        profile: Profile,
        *,
        last: float | None = None,
        at: float | None = None,
        metric: Metric = "updates",
        max_residual: float | None = None,
        done: Callable[[int], object] = nothing,
    ) -> Reconstruction:
        """The weights that `profile` would have averaged, in float32.

        Args:
            profile: any, counted in the same unit as the snapshots: `Power(sigma_rel=0.15)`, `Exponential(...)`.
            last: begin it so many steps before the end: `Uniform(), last=500` is the mean of the last 500 steps,
                `profiles.from_lr_decay(shape="cosine", steps=500), last=500` what stands in for a decay over them.
            at: the time at which to stop; by default that of the last snapshot.
            metric: see `fit`.
            max_residual: an error above it. By default a residual above .01 is warned of.
            done: is told the number of elements of each tensor that is made, for a progress bar.

        Integers, bools and what is not averaged are those of the newest snapshot. The files are read block by block:
        beside the result it takes a few megabytes.

        Errors: ValueError that names the file, where one is truncated, of another run or shape, or holds NaN.
        """
        solved = self.solve(profile, last=last, at=at, metric=metric, max_residual=max_residual)
        with self._mixture(solved, at, metric) as mixture:
            return Reconstruction(mixture.tensors(done), solved)

    def reconstruct_to(
        self,
        path: str | os.PathLike[str],
        profile: Profile,
        *,
        last: float | None = None,
        at: float | None = None,
        metric: Metric = "updates",
        max_residual: float | None = None,
        dtype: torch.dtype | None = None,
        done: Callable[[int], object] = nothing,
    ) -> Fit:
        """`reconstruct` straight into a safetensors file, tensor by tensor: the model is never in memory as a whole.

        Args:
            path: of the file, which appears whole or not at all.
            dtype: of the floating tensors, float32 by default.
        """
        solved = self.solve(profile, last=last, at=at, metric=metric, max_residual=max_residual)
        with self._mixture(solved, at, metric) as mixture:
            mixture.write(path, {"profile": repr(solved.target), "residual": f"{solved.residual:.3g}"}, dtype, done)
        return solved

    def elements(self) -> int:
        """How many numbers a reconstruction makes."""
        manifest = Manifest.read(self.folder)
        with manifest.open(_until(manifest, None)[-1]) as newest:
            return sum(newest.entry(name).numel for name in newest.names())

    @contextlib.contextmanager
    def _mixture(self, solved: Fit, at: float | None, metric: Metric) -> Iterator[Mixture]:
        manifest = Manifest.read(self.folder)
        entries = _until(manifest, at)
        with ExitStack() as stack:
            opened = [stack.enter_context(manifest.open(entry)) for entry in entries]
            newest = opened[-1]
            head = told(newest)
            for file in opened:
                _check_shapes(file, newest, head["averaged"])
            shares: dict[str, Sequence[float] | None] = dict.fromkeys(newest.names())
            for name in head["averaged"]:
                shares[name] = solved.coefficients
                if any(name in entry.late for entry in entries) or any(name not in file.entries for file in opened):
                    shares[name] = _of_late(name, entries, opened, solved.target, metric)
            yield Mixture([Source(f, {n: n for n in f.names()}) for f in opened], shares, head["aliases"])


def _until(manifest: Manifest, at: float | None) -> list[Entry]:
    """The snapshots up to a time."""
    entries = manifest.entries
    if not entries:
        raise FileNotFoundError(f"{manifest.folder}: no snapshots here; archive.add(ema) during training writes them")
    if at is not None and not entries[0].time <= at <= entries[-1].time:
        raise ValueError(
            f"at must be between {entries[0].time:g} and {entries[-1].time:g}, the first and the last snapshot's time; "
            f"got {at:g}"
        )
    return [entry for entry in entries if at is None or entry.time <= at]


def _end(manifest: Manifest, at: float | None) -> tuple[float, int]:
    """(time, count) where the target stops: the last snapshot, or between two of them, at the count nearest to it."""
    before = _until(manifest, at)[-1]
    after = next((entry for entry in manifest.entries if entry.time > before.time), before)
    if at is None or after is before:
        return before.time, before.count
    share = (at - before.time) / (after.time - before.time)
    count = before.count + round(share * (after.count - before.count))
    return (at, count) if before.count < count < after.count else (before.time, before.count)


def _of_late(
    name: str, entries: Sequence[Entry], opened: Sequence[Checkpoint], target: Profile, metric: Metric
) -> list[float]:
    """The coefficients of a tensor that came late, by its own clock, from the snapshots that hold it."""
    held = [number for number, file in enumerate(opened) if name in file.entries]
    snapshots = [entries[number].snapshot(name) for number in held]
    step = entries[0].time / entries[0].count
    begin = max(0.0, snapshots[0].time - snapshots[0].count * step), 0
    coefficients = fit(snapshots, target, begin=begin, metric=metric).coefficients
    shares = dict(zip(held, coefficients, strict=True))
    return [shares.get(number, 0.0) for number in range(len(entries))]


def _check_shapes(file: Checkpoint, newest: Checkpoint, averaged: Sequence[str]) -> None:
    for name in averaged:
        if name in file.entries and file.shape(name) != newest.shape(name):
            raise ValueError(
                f"{file.path}: {name} has shape {list(file.shape(name))}, and {list(newest.shape(name))} in "
                f"{newest.path.name}: the model was changed in between. Reconstruct with at= before the change, or "
                f"take the older snapshots out of {NAME}."
            )
