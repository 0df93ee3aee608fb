"""What a layout finds in a checkpoint, before it is known which model it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ewma.profiles import Profile

Tree: TypeAlias = Mapping[Any, Any]
"""A checkpoint, or a part of one: names and what they hold."""


@dataclass(frozen=True)
class Found:
    """Averages as a tool left them.

    Args:
        source, count, decay, profile, time: as in `Averages`.
        tensors: by the names in the checkpoint, or, by number, in the order of the model's parameters.
        naming: what is to be done before the model's names are there: nothing; count the parameters; take the dots out
            of the model's names.
        whole: whether buffers are among them, so that one that lacks is an error.
        clocks: of our own, what `ema.save` writes beside the tensors, which resumes bit for bit.
        state: of our own, the state dict that they are a part of.
    """

    source: str
    tensors: Mapping[str, Tensor]
    naming: Literal["names", "positions", "dotless"] = "names"
    whole: bool = True
    count: int | None = None
    decay: float | None = None
    profile: Profile | None = None
    time: float | None = None
    clocks: Mapping[str, Any] | None = None
    state: Mapping[str, Any] | None = None


def is_state(value: Any) -> bool:
    """Whether it is a model's state: names and tensors, and nothing else but what modules add (`_extra_state`)."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(each, Tensor) for each in value.values())
        and all(isinstance(name, str) for name in value)
    )


def tensors_in(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, by the rest of the name."""
    cut = len(prefix)
    return {
        n[cut:]: t for n, t in state.items() if isinstance(t, Tensor) and isinstance(n, str) and n.startswith(prefix)
    }


def owners(tree: Tree, marker: str) -> Iterator[str]:
    """The prefixes under which a name stands: "" and "teacher." for "n_averaged" and "teacher.n_averaged"."""
    for name in tree:
        if isinstance(name, str) and (name == marker or name.endswith(f".{marker}")):
            yield name.removesuffix(marker)


def whole_number(value: Any) -> int | None:
    """A count, out of a number or a tensor that holds one."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def decimal(value: Any) -> float | None:
    """A decay as it was written: out of a float32, the shortest number that rounds to it (.9999, not .99989998)."""
    if isinstance(value, Tensor) and value.numel() == 1:
        exact = value.double().item()
        short = (float(f"{exact:.{digits}g}") for digits in range(1, 18))
        return next(each for each in short if value.new_tensor(each) == value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
