"""What the ranks that train a model together must have in common: profiles, and buffers when averages are read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ewma.shards import data_groups, is_sharded, mesh_groups

How: TypeAlias = Literal["first", "average", "alone"]

PATIENCE = 300.0
"""Seconds that ranks wait for each other where all of them must come."""


class Ranks:
    """Those that train one model together, as seen by one ModelEMA.

    Args:
        how: "first": buffers are what they are on the first rank; "average": their mean over ranks; "alone": no other
            rank is asked for anything.
        group: of the ranks, where the model does not tell.
    """

    def __init__(self, how: How, group: Any) -> None:
        self.how, self.group = how, group
        self.agreed = False
        self.apart = True
        """Whether the buffers may have come to differ since they were made equal."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}  # connections cannot be copied

    @property
    def together(self) -> bool:
        """Whether there may be others to ask."""
        return self.how != "alone" and dist.is_available() and dist.is_initialized()

    def groups(self, model: nn.Module) -> list[Any]:
        """The process groups over which ranks see other data; none where this process is alone."""
        if not self.together:
            return []
        return _larger_than_one([self.group] if self.group is not None else data_groups(model))

    def agree(self, what: str, model: nn.Module, said: Mapping[str, Any]) -> None:
        """Raise on every rank where one has other settings, or does not come; nothing to do without other ranks."""
        groups = self.groups(model)
        if groups:
            groups = _larger_than_one([*groups, *mesh_groups(model)])
            meet(what, groups)
            compare(what, gathered(said, groups))
            self.agreed = True

    def share(self, what: str, model: nn.Module, said: Mapping[str, Any], buffers: Sequence[Tensor]) -> None:
        """Make the buffers equal on all ranks, in place. Before the first time, all must agree."""
        buffers = [buffer for buffer in buffers if not is_sharded(buffer)]
        groups = self.groups(model)
        if groups and not self.agreed and (buffers or mesh_groups(model)):
            self.agree(what, model, said)
        if groups and buffers:
            meet(what, groups)  # an answer to another rank's other question would be taken for a buffer
        for group in groups:
            for alike in _alike(buffers):
                _make_equal(alike, group, self.how == "average")


def meet(what: str, groups: Sequence[Any], patience: float | None = None) -> None:
    """Wait until every rank has come here; an error where one does not, within so many seconds.

    Only gloo can tell. Elsewhere the group's own time limit is in force.
    """
    patience = PATIENCE if patience is None else patience
    for group in groups:
        if dist.get_backend(group) == dist.Backend.GLOO:
            try:
                dist.monitored_barrier(group, timedelta(seconds=patience), wait_all_ranks=True)
            except RuntimeError as error:
                missing = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
                told = (
                    f"rank {missing[1].strip()} is missing" if missing else "the others' error tells which is missing"
                )
                raise RuntimeError(
                    f"{what}: it takes every rank, and after {patience:g} s {told}. Call it on all ranks, not under "
                    f'`if rank == 0`; or, to keep averages on this rank only, make the ModelEMA with ranks="alone".'
                ) from error


def gathered(said: Any, groups: Sequence[Any]) -> dict[int, Any]:
    """What every rank said, by rank; over a mesh of several dimensions in turn."""
    known = {dist.get_rank() if groups else 0: said}
    for group in groups:
        several: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(several, known, group=group)
        for each in several:
            known |= each
    return dict(sorted(known.items()))


def compare(what: str, said: Mapping[int, Mapping[str, Any]]) -> None:
    """An error, the same on every rank, where one said something else than the first."""
    first, expected = next(iter(said.items()))
    for rank, mine in said.items():
        differing = [name for name in {**expected, **mine} if mine.get(name) != expected.get(name)]
        if differing:
            told = "; ".join(f"{name}: {mine.get(name)} and {expected.get(name)}" for name in differing)
            raise ValueError(
                f"{what}: ranks {rank} and {first} made their ModelEMA with different settings, so that one checkpoint "
                f"could not hold both. {told}. Make it alike on every rank."
            )


def together(what: str, problem: Exception | None, groups: Sequence[Any]) -> None:
    """Raise on every rank where one has met a problem: there the error itself, elsewhere one that quotes it."""
    told = gathered(None if problem is None else f"{type(problem).__name__}: {problem}", groups)
    if problem is not None:
        raise problem
    failed = {rank: text for rank, text in told.items() if text}
    if failed:
        raise RuntimeError(f"{what} failed on rank {next(iter(failed))}: {next(iter(failed.values()))}")


def _larger_than_one(groups: Sequence[Any]) -> list[Any]:
    return [group for group in dict.fromkeys(groups) if dist.get_world_size(group) > 1]


def _alike(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device at a time."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    yield from kinds.values()


def _make_equal(tensors: list[Tensor], group: Any, average: bool) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    sent = flat.to(device(group))
    if average and flat.is_floating_point():
        sent = sent.double() if flat.dtype == torch.float64 else sent.float()
        dist.all_reduce(sent, group=group)
        sent /= dist.get_world_size(group)
    else:
        sent = sent.to(torch.uint8) if flat.dtype == torch.bool else sent
        dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, sent.split(sizes), strict=True):
        tensor.copy_(part.view(tensor.shape))


def device(group: Any) -> torch.device:
    """Where what the group sends lies: its backend takes tensors of no other device."""
    here = torch.device("cpu")
    return here if dist.get_backend(group) == dist.Backend.GLOO else torch.accelerator.current_accelerator() or here
