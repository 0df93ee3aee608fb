"""What a model's tensors are called, whatever wraps the model.

A tensor is known by its canonical name: the path to it without the parts that DDP, `torch.compile`, FSDP and activation
checkpointing add. A tied tensor has several; the first is its name, the rest are aliases.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ewma.shards import reshard

_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)


@dataclass(frozen=True)
class Named:
    """One tensor of a model, under all the names it goes by."""

    names: tuple[str, ...]
    tensor: Tensor
    is_parameter: bool
    persistent: bool

    @property
    def name(self) -> str:
        return self.names[0]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, AveragedModel and `torch.compile`."""
    while True:
        inside = "module" if isinstance(model, _WRAPPERS) else "_orig_mod"
        if inside not in model._modules or (inner := model._modules[inside]) is None:  # scripted modules have no get
            return model
        model = inner


def named_tensors(model: nn.Module) -> list[Named]:
    """Every parameter and buffer once, in the model's order, tied ones with all their names; FSDP2's as shards."""
    reshard(model)
    found: dict[int, tuple[list[str], Tensor, bool, bool]] = {}
    owners: dict[str, Tensor] = {}
    for name, tensor, is_parameter, persistent in _walk(model, "", set()):
        if owners.setdefault(name, tensor) is not tensor:
            raise ValueError(f"two tensors of the model share the canonical name {name!r}; rename one of their modules")
        names, _, _, kept = found.get(id(tensor), ([], tensor, is_parameter, False))
        if name not in names:
            names.append(name)
        found[id(tensor)] = names, tensor, is_parameter, kept or persistent
    return [Named(tuple(names), tensor, is_parameter, kept) for names, tensor, is_parameter, kept in found.values()]


def _walk(module: nn.Module, prefix: str, above: set[int]) -> Iterator[tuple[str, Tensor, bool, bool]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter, True, True
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield prefix + name, buffer, False, name not in module._non_persistent_buffers_set
    for name, child in module._modules.items():
        if child is not None and id(child) not in above:
            transparent = name in _WRAPPED or (name == "module" and isinstance(module, _WRAPPERS))
            yield from _walk(child, prefix if transparent else f"{prefix}{name}.", above | {id(module)})


def canonical(name: str, known: Container[str]) -> str:
    """The name under which a foreign file's tensor is known here: wrappers' prefixes removed where that helps."""
    if name in known:
        return name
    shorter = bare(name)
    while shorter not in known and shorter.startswith("module."):
        shorter = shorter.removeprefix("module.")
    return shorter if shorter in known else name


def bare(name: str) -> str:
    """A name without the parts that `torch.compile`, FSDP and activation checkpointing add.

    >>> bare("_orig_mod.layer._checkpoint_wrapped_module.weight")
    'layer.weight'
    """
    return re.sub(rf"(^|\.)({'|'.join(sorted(_WRAPPED))})(?=\.)", "", name).lstrip(".")


def mismatch(
    what: str, expected: dict[str, tuple[int, ...]], came: dict[str, tuple[int, ...]], hint: str
) -> str | None:
    """Why `came` (names and shapes) does not fit `expected`, with every name; None where it fits."""
    reshaped = [
        f"{n} {list(came[n])} for {list(expected[n])}" for n in expected if n in came and came[n] != expected[n]
    ]
    parts = (
        ("missing", [n for n in expected if n not in came]),
        ("not known here", [n for n in came if n not in expected]),
        ("of another shape", reshaped),
    )
    said = [f"{label}: {_listed(names)}" for label, names in parts if names]
    return f"{what}: {'; '.join(said)}. {hint}" if said else None


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
