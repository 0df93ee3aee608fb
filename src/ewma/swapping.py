"""Other weights in a model for the duration of a `with`, and the model's own back afterwards, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ewma.names import unwrap
from ewma.shards import recover, reshard, write

Pair: TypeAlias = tuple[Tensor, Tensor]  # a tensor of the model, and what goes into it
Stash: TypeAlias = Literal["cpu"] | None


class Swap:
    """The raw weights of one model, kept aside while one or several nested swaps are in it."""

    def __init__(self) -> None:
        self.raw: dict[int, Pair] = {}
        self.layers: list[list[Pair]] = []

    def enter(self, pairs: list[Pair], stash: Stash) -> None:
        for live, _ in pairs:
            if id(live) not in self.raw:
                aside = live.detach().to("cpu", copy=True) if stash == "cpu" else live.detach().clone()
                self.raw[id(live)] = live, aside
        _copy_in(pairs)

    def leave(self, pairs: list[Pair]) -> None:
        """Undo one layer: what lies under it comes back, another layer's averages or the raw weights."""
        below = {id(live): (live, aside) for live, aside in self.raw.values()}
        for layer in self.layers:
            below.update((id(live), (live, average)) for live, average in layer)
        _copy_in([below[id(live)] for live, _ in pairs if id(live) in below])


_swaps: WeakKeyDictionary[nn.Module, Swap] = WeakKeyDictionary()


@contextmanager
def swapped(model: nn.Module, pairs: list[Pair], stash: Stash = None) -> Iterator[None]:
    """Copy each pair's second tensor into its first; on the way out, however that happens, put back what was there.

    Swaps of one model nest, also those of several owners; together they keep one copy of the raw weights.
    """
    if stash not in (None, "cpu"):
        raise ValueError(f'stash must be None (beside the weights) or "cpu"; got {stash!r}')
    key = unwrap(model)
    swap = _swaps.setdefault(key, Swap())
    try:
        reshard(key)
        with torch.no_grad():
            swap.enter(pairs, stash)
        swap.layers.append(pairs)
        yield
    except BaseException:
        reshard(key)
        present = {id(tensor) for tensor in chain(key.parameters(), key.buffers())}
        if any(id(live) not in present for live, _ in pairs):
            recover(key)
        raise
    finally:
        # An interrupt that arrives in here would leave half of each: finish first, then let it out.
        try:
            _leave(key, swap, pairs)
        except BaseException:
            _leave(key, swap, pairs)
            raise


def _leave(key: nn.Module, swap: Swap, pairs: list[Pair]) -> None:
    if swap.layers and swap.layers[-1] is pairs:
        swap.layers.pop()
    reshard(key)
    with torch.no_grad():
        swap.leave(pairs)
    if not swap.layers:
        _swaps.pop(key, None)


def raw_weights(model: nn.Module) -> dict[int, Tensor] | None:
    """While any of the model is swapped, the raw tensors by `id` of the swapped ones; None while it is not.

    A part of the model may be swapped by somebody who averages that part, or a whole of which the model is a part.
    """
    if not _swaps:
        return None
    reshard(model)
    mine = {id(tensor) for tensor in chain(model.parameters(), model.buffers())}
    raw = {key: aside for swap in _swaps.values() for key, (_, aside) in swap.raw.items() if key in mine}
    return raw if raw or unwrap(model) in _swaps else None


def _copy_in(pairs: list[Pair]) -> None:
    for live, source in pairs:
        write(live, source)
