"""Averages of ordinary checkpoints, as every training script leaves them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ewma.names import canonical, mismatch
from ewma.posthoc.archive import Reconstruction
from ewma.posthoc.fit import Fit, Metric, begun_late, check, fit
from ewma.posthoc.mixing import Mixture, Source, nothing
from ewma.posthoc.step_weights import RAW, Snapshot
from ewma.profiles import Profile
from ewma.readers import Checkpoint, open_checkpoint
from ewma.recurrence import Recurrence

PARTS = ("state_dict", "model_state_dict", "model", "module", "model_state", "params")
"""Where checkpoints of other tools keep the model, the likeliest first."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class Average:
    """An average of checkpoints: `weights` is a state dict, `coefficients` are the checkpoints' shares of it."""

    weights: dict[str, Tensor]
    paths: tuple[Path, ...]
    coefficients: tuple[float, ...]


class Checkpoints:
    """Ordinary checkpoints of one run, of any format that `readers` opens, to be averaged.

        ewma.posthoc.Checkpoints("run/checkpoints").average(last=10).weights
        ewma.posthoc.Checkpoints(paths).average(ewma.Exponential(half_life=2_000)).weights

    Args:
        paths: a folder with checkpoints, or their paths, each a file or a folder. They are put in the order of the
            last number in their names ("checkpoint-1000"), which also is their time.
        steps: their times, where the names do not tell: paths are then taken in the order given.
        part: where in a nested checkpoint the model lies ("model", "ema.params"); by default what tools usually call
            it, or the only part there is.

    Memory is that of the result, and of one tensor. Checkpoints hold weights, not averages of what was in between: for
    an average over all steps snapshots of tracks (`Archive`) are several times nearer from the same number of files.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        steps: Sequence[float] | None = None,
        part: str | None = None,
    ) -> None:
        found = _inside(Path(paths)) if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]
        if not found:
            raise FileNotFoundError(f"{paths}: no checkpoints there: files {', '.join(SUFFIXES)}, or folders of these")
        self.paths, self.steps = _in_order(found, steps)
        self.part = part

    def average(
        self,
        profile: Profile | None = None,
        *,
        last: int | None = None,
        done: Callable[[int], object] = nothing,
    ) -> Average:
        """The average of the checkpoints, in float32 or wider, as if they had been the updates.

        Args:
            profile: weighs each checkpoint by its time; its unit is that of the checkpoints' steps. By default all
                count alike.
            last: only the last so many.

        Integers and bools are those of the newest. Tensors that are missing, added or of another shape are an error
        that names them.
        """
        paths, coefficients = self._shares(profile, last)
        with self._mixture(paths, coefficients) as mixture:
            return Average(mixture.tensors(done), tuple(paths), tuple(coefficients))

    def average_to(
        self,
        path: str | os.PathLike[str],
        profile: Profile | None = None,
        *,
        last: int | None = None,
        dtype: torch.dtype | None = None,
        done: Callable[[int], object] = nothing,
    ) -> tuple[float, ...]:
        """`average` straight into a safetensors file, tensor by tensor. Gives the checkpoints' shares."""
        paths, coefficients = self._shares(profile, last)
        told = f"mean of the last {len(paths)} checkpoints" if profile is None else repr(profile)
        with self._mixture(paths, coefficients) as mixture:
            mixture.write(path, {"profile": told}, dtype, done)
        return tuple(coefficients)

    def solve(
        self,
        profile: Profile,
        *,
        last: float | None = None,
        metric: Metric = "updates",
        max_residual: float | None = None,
    ) -> Fit:
        """Which mixture of checkpoints comes nearest to `profile` over all steps, without reading them."""
        if any(step != round(step) for step in self.steps):
            raise ValueError(f"expected whole numbers of steps; got {self.steps[:5]}")
        snapshots = [Snapshot(RAW, step, round(step)) for step in self.steps if step]
        solved = fit(snapshots, begun_late(profile, last, self.steps[-1]), metric=metric)
        check(solved, max_residual)
        return solved

    def reconstruct(
        self,
        profile: Profile,
        *,
        last: float | None = None,
        metric: Metric = "updates",
        max_residual: float | None = None,
        done: Callable[[int], object] = nothing,
    ) -> Reconstruction:
        """What `profile` would have averaged over all steps, as near as checkpoints come: see `Archive.reconstruct`.

        Beside it: `average` weighs only what the checkpoints hold; here each also stands for the steps around it.
        """
        solved = self.solve(profile, last=last, metric=metric, max_residual=max_residual)
        with self._mixture(self.paths[-len(solved.snapshots) :], solved.coefficients) as mixture:
            return Reconstruction(mixture.tensors(done), solved)

    def reconstruct_to(
        self,
        path: str | os.PathLike[str],
        profile: Profile,
        *,
        last: float | None = None,
        metric: Metric = "updates",
        max_residual: float | None = None,
        dtype: torch.dtype | None = None,
        done: Callable[[int], object] = nothing,
    ) -> Fit:
        """`reconstruct` straight into a safetensors file, tensor by tensor."""
        solved = self.solve(profile, last=last, metric=metric, max_residual=max_residual)
        with self._mixture(self.paths[-len(solved.snapshots) :], solved.coefficients) as mixture:
            mixture.write(path, {"profile": repr(solved.target), "residual": f"{solved.residual:.3g}"}, dtype, done)
        return solved

    def elements(self) -> int:
        """How many numbers an average has."""
        with self._mixture(self.paths[-1:], [1.0]) as mixture:
            return mixture.elements

    def _shares(self, profile: Profile | None, last: int | None) -> tuple[list[Path], list[float]]:
        if last is not None and not 1 <= last <= len(self.paths):
            raise ValueError(f"last must be between 1 and {len(self.paths)}, the checkpoints there are; got {last}")
        paths, steps = self.paths[-(last or 0) :], self.steps[-(last or 0) :]
        if profile is None:
            return paths, [1.0 / len(paths)] * len(paths)
        first = steps[1] - steps[0] if len(steps) > 1 else steps[0]  # what it stands for, as nothing is before it
        recurrence = Recurrence(profile, "time", max(0.0, steps[0] - first))
        elapsed = [first or 1.0, *(b - a for a, b in pairwise(steps))]
        shares: list[float] = []
        for each in elapsed:
            coefficient = recurrence.advance(float(each))
            shares = [*(share * (1.0 - coefficient) for share in shares), coefficient]
        return paths, shares

    @contextlib.contextmanager
    def _mixture(self, paths: Sequence[Path], coefficients: Sequence[float]) -> Iterator[Mixture]:
        with ExitStack() as stack:
            sources = [self._source(stack.enter_context(open_checkpoint(path))) for path in paths]
            newest = sources[-1]
            shapes = {name: newest.shape(name) for name in newest.names}
            for source in sources[:-1]:
                source.names = {canonical(name, shapes): own for name, own in source.names.items()}
                problem = mismatch(
                    f"{source.file.path} is not of the same model as {newest.file.path}",
                    shapes,
                    {name: source.shape(name) for name in source.names},
                    "Average checkpoints of one model; with part= choose the part of them that is the model.",
                )
                if problem:
                    raise ValueError(problem)
            real = {name: newest.dtype(name).is_floating_point or newest.dtype(name).is_complex for name in shapes}
            yield Mixture(sources, {name: coefficients if real[name] else None for name in shapes})

    def _source(self, file: Checkpoint) -> Source:
        """The model in a checkpoint."""
        part = self.part if self.part is not None else _model_part(file)
        names = {
            name.removeprefix(f"{part}."): name for name in file.names() if not part or name.startswith(f"{part}.")
        }
        if not names:
            raise ValueError(
                f"{file.path}: part={part!r} holds no tensors; there are {', '.join(file.parts()) or 'no parts'}"
            )
        return Source(file, names)


def _model_part(file: Checkpoint) -> str:
    parts = file.parts()
    if not parts:
        return ""
    known = [part for part in PARTS if part in parts]
    if not known and len(parts) > 1:
        raise ValueError(
            f"{file.path}: which of its parts is the model? There are {', '.join(parts)}; pass part={parts[0]!r}"
        )
    return known[0] if known else parts[0]


def _inside(folder: Path) -> list[Path]:
    """The checkpoints in a folder, files or folders; a path to something else stands for itself."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: does not exist")
    if not folder.is_dir() or (folder / ".metadata").is_file() or list(folder.glob("*.index.json")):
        return [folder]
    entries = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return [path for path in entries if path.suffix in SUFFIXES or (path.is_dir() and _is_checkpoint(path))]


def _is_checkpoint(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    return any(name == ".metadata" or name.endswith((".index.json", *SUFFIXES)) for name in names)


def _in_order(paths: list[Path], steps: Sequence[float] | None) -> tuple[list[Path], list[float]]:
    if steps is not None:
        if len(steps) != len(paths) or any(b <= a for a, b in pairwise(steps)):
            raise ValueError(f"steps must be {len(paths)} rising numbers, one a checkpoint; got {list(steps)[:5]}")
        return paths, [float(step) for step in steps]
    numbers = [
        re.findall(r"\d+", path.name.removesuffix(path.suffix) if path.suffix in SUFFIXES else path.name)
        for path in paths
    ]
    told = [int(found[-1]) for found in numbers if found]
    if len(set(told)) == len(paths):
        ordered = sorted(zip(told, paths, strict=True))
        return [path for _, path in ordered], [float(step) for step, _ in ordered]
    raise ValueError(
        f"the order of the checkpoints is not told by a number in their names: {', '.join(p.name for p in paths[:4])}. "
        f"Pass them in order, with steps=range(1, {len(paths) + 1}) or their true steps."
    )
