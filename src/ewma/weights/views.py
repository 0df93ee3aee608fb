"""Reading averages and putting them to use: in the model for a while or for good, as a module, as a file."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ewma import files
from ewma.names import Named, mismatch, named_tensors, unwrap
from ewma.profiles import Profile
from ewma.shards import has_fsdp, is_sharded, reshard
from ewma.weights import states, swapping

if TYPE_CHECKING:
    from ewma.tracks import Track
    from ewma.weights.ema import ModelEMA


class Readable(ABC):
    """What ModelEMA and each of its views can do with the averages of one profile."""

    @abstractmethod
    def _read(self) -> tuple[ModelEMA, Track]:
        """The ModelEMA, and the profile's track in it."""

    model: nn.Module
    """The model whose weights are averaged."""

    @property
    def profile(self) -> Profile:
        """How the past is weighted."""
        return self._read()[1].profile

    @property
    def count(self) -> int:
        """How many updates were made. (Waits for the device where only it knows: fused GradScaler, capturable.)"""
        return int(self._read()[1].clock.count)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and average of each averaged parameter, a tied one once; before the first update, the weights.

        These are the averages themselves, which the next update changes: clone one to keep it as it is.
        """
        ema, track = self._read()
        for named in ema.bind().averaged:
            if named.is_parameter:
                yield named.name, track.averages[named.name]

    def swapped(self, stash: swapping.Stash = None) -> AbstractContextManager[None]:
        """The averages are in the model for the duration of a `with`, or of a function that is decorated with it; then
        the raw weights are back, bit for bit.

        The raw weights are kept aside meanwhile, in one copy: beside the weights, or with stash="cpu" in host memory.
        The averages do not move. Exceptions and Ctrl-C restore; swaps nest, also those of several profiles. Updating
        meanwhile is an error, before the optimizer steps. Before the first update the averages are the weights.

        Under torch.no_grad or with autograd alike; buffers go by `buffers=`, and are put back too. What is loaded into
        the model inside is gone afterwards. For BatchNorm statistics of the averages
        themselves call torch.optim.swa_utils.update_bn(loader, model) inside.
        """
        ema, track = self._read()
        return swapping.swapped(ema.model, lambda: self._pairs() if track.updated else _as_they_are(ema.model), stash)

    def copy_to(self, model: nn.Module | None = None) -> None:
        """Write the averages into the model for good; or into another one with the same names and shapes.

        In another model, what is not averaged (`only=`, buffers="leave") becomes what it is in the trained one.
        """
        ema, _ = self._read()
        if model is None or unwrap(model) is unwrap(ema.model):
            ema.refuse_if_swapped()
            pairs = self._pairs()
            reshard(ema.model)
        else:
            ema.refuse_if_swapped(model)
            mine = {named.name: (named, source) for named, source in self._sources()}
            theirs = {named.name: named for named in named_tensors(model)}
            problem = mismatch(
                f"copy_to({type(model).__name__}) does not fit",
                {name: tuple(named.tensor.shape) for name, (named, _) in mine.items()},
                {name: tuple(named.tensor.shape) for name, named in theirs.items()},
                "Pass a model built like the trained one.",
            )
            if problem:
                raise ValueError(problem)
            pairs = [(named.tensor, mine[name][1]) for name, named in theirs.items()]
        with torch.no_grad():
            swapping.put(pairs)

    def module(self) -> nn.Module:
        """A frozen evaluation module that holds the averages: a teacher, or what to export.

        It shares the averages' storage wherever dtype and device are those of the model, so it moves with every update
        and costs no memory. Elsewhere (float32 averages of a bfloat16 model, averages on another device) it is a copy
        in the model's dtype, to be refreshed by `ema.copy_to(teacher)`. Parameters that are not averaged are shared
        with the model; buffers that are left out are copied, so that a teacher in training mode does not touch them.
        """
        ema, _ = self._read()
        if has_fsdp(ema.model):
            raise NotImplementedError(
                "an FSDP model cannot be copied, so there is no module() of one. Build the teacher as the model was "
                "built, shard it likewise, and fill it after updates: ema.copy_to(teacher). To evaluate the averages "
                "in the model itself: with ema.swapped()."
            )
        memo: dict[int, Any] = {}
        given: dict[str, Tensor] = {}
        left = {id(named.tensor) for named in ema.bind().raw if not named.is_parameter}
        for named, source in self._sources():
            if id(named.tensor) not in left:
                value = source.detach().to(named.tensor)
                given[named.name] = nn.Parameter(value, requires_grad=False) if named.is_parameter else value
                memo[id(named.tensor)] = given[named.name]
        for module in unwrap(ema.model).modules():
            for value in vars(module).values():
                if isinstance(value, Tensor) and not value.is_leaf:  # made anew by every forward; deepcopy refuses it
                    memo[id(value)] = value.detach().clone()
        teacher = copy.deepcopy(unwrap(ema.model), memo).eval()
        held = {named.name: named.tensor for named in named_tensors(teacher)}
        with torch.no_grad():  # what is copied in a way of its own, as a scripted module, has memory of its own
            swapping.put([(held[name], value) for name, value in given.items()])
        for parameter in teacher.parameters():
            parameter.detach_()
        return teacher

    def tensors(self) -> dict[str, Tensor]:
        """The averaged model's state dict under canonical names, tied tensors under each of theirs.

        These are the averages themselves, which the next update changes, and beside them what is copied or left raw.
        """
        return {name: source for named, source in self._sources() if named.persistent for name in named.names}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the averaged model as safetensors: its whole state dict under canonical names, tied ones under each.

        Any tool can load it into the model: `model.load_state_dict(safetensors.torch.load_file(path))`. Profile, time
        and count are in the metadata, and `load` resumes from it bit for bit. The file appears whole or not at all.
        """
        ema, track = self._read()
        if any(is_sharded(tensor) for tensor in self.tensors().values()):
            raise NotImplementedError(
                f"{os.fspath(path)}: the averages are sharded over ranks, and one file would take all of them into one "
                f'memory. Save them with torch.distributed.checkpoint.save({{"ema": ema}}, checkpoint_id=folder), and '
                f"ema.load(folder) resumes; or ewma.checkpoints.export(ema, folder) writes the averaged model, tensor "
                f"by tensor."
            )
        metadata = {
            "kind": "ModelEMA",
            "averaged": [name for named in ema.bind().averaged for name in named.names],
            "seed": ema.seed,
            "run": ema.run,
            "skipped": ema.skipped,
            **ema.step_state(),
            **track.clock_state(),
        }
        told = {"profile": repr(track.profile), "time": str(float(track.clock.time)), "count": str(self.count)}
        files.write(path, self.tensors(), metadata, told)

    def load(self, path: str | os.PathLike[str], profile: Any = None) -> None:
        """Resume from a file that `save` wrote: averages, clocks and copied buffers. The model itself is not touched.

        On several ranks each reads the file.

        Args:
            profile: what to do where the file's profile is another one than here: by default an error that names both;
                "saved" takes the file's, "mine" keeps this one with the file's averages.
        """
        tensors, metadata = files.read(path)
        self.take_over(os.fspath(path), tensors, metadata, profile)

    def take_over(
        self, what: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], profile: Any = None
    ) -> None:
        """Go on with averages and clocks from elsewhere, all of them or none. `ewma.checkpoints` reads other tools'.

        Args:
            what: they are, for the errors.
            tensors: by name, those of the whole model or the averaged ones.
            metadata: as `save` writes it. Of what is missing, this ModelEMA's own is kept.
            profile: as in `load`.
        """
        ema, track = self._read()
        ema.refuse_if_swapped()
        named = [each for each in named_tensors(ema.model) if ema.policy.role(each) == "averaged"]
        mine = {
            "format": files.FORMAT,
            "kind": "ModelEMA",
            "averaged": [name for each in named for name in each.names],
            "seed": ema.seed,
            "skipped": ema.skipped,
            **ema.step_state(),
        }
        states.restore_track(ema, track, what, tensors, {**mine, **metadata}, profile)

    def _sources(self) -> Iterator[tuple[Named, Tensor]]:
        """Each tensor of the model, and what the averaged model has in its place."""
        ema, track = self._read()
        binding = ema.bind()
        yield from ((named, track.averages[named.name]) for named in binding.averaged)
        yield from ((named, ema.copies[named.name]) for named in binding.copied)
        yield from ((named, named.tensor.detach()) for named in binding.raw)

    def _pairs(self) -> list[swapping.Pair]:
        left = {named.name for named in self._read()[0].bind().raw if named.is_parameter or not _dense(named)}
        pairs = [(named.tensor, source) for named, source in self._sources() if named.name not in left]
        return pairs[::-1]  # averages last: a buffer may be a view of weights, and holds the newest ones


def _as_they_are(model: nn.Module) -> list[swapping.Pair]:
    """The weights in their own place: nothing is swapped, but all of it is put back afterwards."""
    return [(named.tensor, named.tensor.detach()) for named in named_tensors(model) if _dense(named)]


def _dense(named: Named) -> bool:
    """Whether it can be written into. What is sparse is a constant, which nothing writes."""
    return not nn.parameter.is_lazy(named.tensor) and named.tensor.layout == torch.strided


class View(Readable):
    """One of several profiles' averages: what `ema[name]` gives."""

    def __init__(self, ema: ModelEMA, name: str) -> None:
        self._ema, self._name = ema, name
        self.model = ema.model

    def _read(self) -> tuple[ModelEMA, Track]:
        return self._ema, self._ema.tracks[self._name]

    def __repr__(self) -> str:
        return f"View({self._name!r}, {self.profile!r}, count={self.count})"
