"""LitEma (latent diffusion, Stable Diffusion): buffers named as the parameters are, but for the dots."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping

from torch import Tensor

from ewma.checkpoints.found import Found, Tree, decimal, owners, tensors_in, whole_number
from ewma.checkpoints.lists import warming_up


def lit_ema(tree: Tree) -> Iterator[tuple[str, Found]]:
    """`decay` and `num_updates` beside `inputblocks0weight`. The names come from the raw weights in the same
    checkpoint, from which the averaged model differs in these; where there are none, from the model."""
    for prefix in owners(tree, "num_updates"):
        if isinstance(tree[f"{prefix}num_updates"], Tensor) and isinstance(tree.get(f"{prefix}decay"), Tensor):
            dotless = tensors_in(tree, prefix)
            count, decay = whole_number(dotless.pop("num_updates")), decimal(dotless.pop("decay"))
            told = warming_up(count if count is not None and count >= 0 else None, decay)
            beside = {n: t for n, t in tensors_in(tree).items() if not (prefix and n.startswith(prefix))}
            names = _names(dotless, beside) if prefix else {}
            if names:
                weights = beside | {name: dotless[key] for key, name in names.items()}
                yield prefix, Found("LitEma", weights, **told)
            elif dotless:
                yield prefix, Found("LitEma", dotless, "dotless", False, **told)


def without_dots(names: Iterable[str], keys: Container[str]) -> dict[str, str]:
    """Dotless name -> name, of those among the keys. Two that become one are an error: LitEma has one average for both,
    and it is of neither."""
    found: dict[str, str] = {}
    for name in names:
        key = name.replace(".", "")
        if key in keys and found.setdefault(key, name) != name:
            raise ValueError(
                f"LitEma: {found[key]} and {name} are one name without their dots, so the checkpoint has one average "
                f"for both, which is of neither. Take the raw weights for the two, or average anew."
            )
    return found


def _names(dotless: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> dict[str, str]:
    """Dotless name -> name in the whole model, a part of which was averaged: `model.` of `model.0.weight`."""
    longest = max(dotless, key=len, default="")
    for name in beside:
        steps = name.split(".")
        for depth in range(len(steps)):
            if "".join(steps[depth:]) == longest:
                part = "".join(f"{step}." for step in steps[:depth])
                within = (each.removeprefix(part) for each in beside if each.startswith(part))
                names = without_dots(within, dotless)
                if names.keys() == dotless.keys():
                    return {key: part + inner for key, inner in names.items()}
    return {}
