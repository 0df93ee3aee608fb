"""From what a tool left to the model's own names, checked against its shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from ewma.checkpoints.dotless import without_dots
from ewma.checkpoints.found import Found
from ewma.names import Named, bare, canonical, mismatch, named_tensors

HINT = "Nothing was loaded. Pass the model that was averaged, built as it was then."


def unnamed(found: Found) -> dict[str, Tensor]:
    """The averages by the names in the checkpoint, without what `torch.compile`, DDP and FSDP put before them."""
    if found.naming == "positions":
        raise ValueError(
            f"{found.source} keeps its averages as a list of {len(found.tensors)} tensors, without names. Pass the "
            f"model that it averaged: read(path, model=model)."
        )
    if found.naming == "dotless":
        raise ValueError(
            f"{found.source} takes the dots out of its {len(found.tensors)} names, and the checkpoint has no raw "
            f"weights to tell them by. Pass the model that it averaged: read(path, model=model)."
        )
    names = {name: bare(name) for name in found.tensors}
    while names and all(name.startswith("module.") for name in names.values()):
        names = {name: shorter.removeprefix("module.") for name, shorter in names.items()}
    return {names[name]: tensor.detach() for name, tensor in found.tensors.items()}


def named(found: Found, model: nn.Module) -> dict[str, Tensor]:
    """The averages as the model's state dict. What the tool does not keep (buffers, what it was not to average) is the
    model's own; all else that is missing, reshaped or unknown is an error that names it."""
    everything = [each for each in named_tensors(model) if each.persistent]
    if found.naming == "positions":
        came = _by_position(found, [each for each in everything if each.is_parameter])
    elif found.naming == "dotless":
        came = _by_dotless_name(found, everything)
    else:
        came = _by_name(found, everything)
    weights = {}
    for each in everything:
        known = next((came[name] for name in each.names if name in came), None)
        tensor = each.tensor.detach().clone() if known is None else known.detach()
        weights.update(dict.fromkeys(each.names, tensor))
    return weights


def _by_name(found: Found, everything: list[Named]) -> dict[str, Tensor]:
    shapes = {name: tuple(each.tensor.shape) for each in everything for name in each.names}
    came = {canonical(name, shapes): tensor for name, tensor in found.tensors.items()}
    needed = [each for each in everything if found.whole and not any(name in came for name in each.names)]
    if part := _part(came, shapes) if needed else "":
        came = {name.removeprefix(part): tensor for name, tensor in came.items() if name.startswith(part)}
        needed = [each for each in everything if not any(name in came for name in each.names)]
    expected = {name: shapes[name] for name in came if name in shapes} | {
        each.name: shapes[each.name] for each in needed
    }
    _refuse(found, expected, came)
    return came


def _part(came: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What stands before the model's names in a checkpoint of a larger one that it is a part of: where it is plain."""
    found = Counter(name[:dot] for name in came for dot in _after_dots(name) if name[dot:] in shapes)
    (part, fitting), (_, next_best) = (*found.most_common(2), ("", 0), ("", 0))[:2]
    return part if fitting > max(next_best, len(came.keys() & shapes.keys())) else ""


def _after_dots(name: str) -> list[int]:
    return [place + 1 for place, letter in enumerate(name) if letter == "."]


def _by_position(found: Found, parameters: list[Named]) -> dict[str, Tensor]:
    came = list(found.tensors.values())
    trained = [each for each in parameters if each.tensor.requires_grad]
    averaged = parameters if len(came) == len(parameters) else trained
    if len(came) != len(averaged):
        raise ValueError(
            f"{found.source}: expected one average for each of the model's {len(parameters)} parameters, or for the "
            f"{len(trained)} that are trained; the checkpoint has {len(came)}, by position. {HINT}"
        )
    by_name = {each.name: tensor for each, tensor in zip(averaged, came, strict=True)}
    _refuse(found, {each.name: tuple(each.tensor.shape) for each in averaged}, by_name)
    return by_name


def _by_dotless_name(found: Found, everything: list[Named]) -> dict[str, Tensor]:
    keys = {key.replace("_orig_mod", ""): tensor for key, tensor in found.tensors.items()}
    names = without_dots((name for each in everything for name in each.names), keys)
    came = {names.get(key, key): tensor for key, tensor in keys.items()}
    trained = [each for each in everything if each.is_parameter and each.tensor.requires_grad]
    lacking = [each for each in trained if not any(name in came for name in each.names)]
    shapes = {name: tuple(each.tensor.shape) for each in everything for name in each.names}
    expected = {name: shapes[name] for name in came if name in shapes} | {e.name: shapes[e.name] for e in lacking}
    _refuse(found, expected, came)
    return came


def _refuse(found: Found, expected: Mapping[str, tuple[int, ...]], came: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in came.items()}
    if problem := mismatch(f"{found.source}: the averages are not of this model", dict(expected), shapes, HINT):
        raise ValueError(problem)
