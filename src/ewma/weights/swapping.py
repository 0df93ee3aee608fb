"""Other weights in a model for the duration of a `with`, and the model's own back afterwards, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from threading import RLock
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ewma.names import unwrap
from ewma.shards import has_fsdp, recover, reshard, write

Pair: TypeAlias = tuple[Tensor, Tensor]  # a tensor of the model, and what goes into it
Stash: TypeAlias = Literal["cpu"] | None


class Swap:
    """The raw weights of one model, kept aside while one or several nested swaps are in it."""

    def __init__(self, model: nn.Module) -> None:
        self.raw: dict[int, Pair] = {}
        self.layers: list[list[Pair]] = []
        self.members: list[tuple[dict[str, Any], str, Any]] = []
        for module in () if has_fsdp(model) else model.modules():
            for table in module._parameters, module._buffers:
                if isinstance(table, dict):  # a scripted module's is none, and cannot be assigned over
                    self.members += [(table, *member) for member in table.items()]

    def enter(self, pairs: list[Pair], stash: Stash) -> None:
        for live, _ in pairs:
            if id(live) not in self.raw:
                aside = live.detach().to("cpu", copy=True) if stash == "cpu" else live.detach().clone()
                self.raw[id(live)] = live, aside
        put(pairs)

    def leave(self, pairs: list[Pair]) -> None:
        """Undo one layer: what lies under it comes back, another layer's averages or the raw weights."""
        below = {id(live): (live, aside) for live, aside in self.raw.values()}
        for layer in self.layers:
            below.update((id(live), (live, average)) for live, average in layer)
        self.reinstate()
        put([below[id(live)] for live, _ in pairs if id(live) in below])

    def reinstate(self) -> None:
        """Register again what was assigned over (`self.centre = ...`, load_state_dict(assign=True)): the optimizer
        knows the tensors that were there. One of another shape stays, being a cache that has grown."""
        for table, name, tensor in self.members:
            now = table.get(name)
            if now is not tensor and now is not None and id(tensor) in self.raw and now.shape == tensor.shape:
                table[name] = tensor


_swaps: WeakKeyDictionary[nn.Module, Swap] = WeakKeyDictionary()
_changing = RLock()
"""Held while weights are put in or back: of several threads each finds them whole."""


@contextmanager
def swapped(model: nn.Module, choose: Callable[[], list[Pair]], stash: Stash = None) -> Iterator[None]:
    """Copy each pair's second tensor into its first; on the way out, however that happens, put back what was there.

    The pairs are chosen on the way in: a decorator is made long before. Swaps of one model nest, also those of several
    owners, and may end in any order, as they do in several threads; together they keep one copy of the raw weights.
    """
    if stash not in (None, "cpu"):
        raise ValueError(f'stash must be None (beside the weights) or "cpu"; got {stash!r}')
    key = unwrap(model)
    pairs = choose()
    try:
        with _changing, torch.no_grad():
            reshard(key)
            swap = _swaps[key] = _swaps.get(key) or Swap(key)
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
            _leave(key, pairs)
        except BaseException:
            _leave(key, pairs)
            raise


def _leave(key: nn.Module, pairs: list[Pair]) -> None:
    with _changing, torch.no_grad():
        swap = _swaps.get(key)
        if swap is None:
            return
        swap.layers = [layer for layer in swap.layers if layer is not pairs]
        reshard(key)
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
    with _changing:
        raw = {key: aside for swap in _swaps.values() for key, (_, aside) in swap.raw.items() if key in mine}
        return raw if raw or unwrap(model) in _swaps else None


def put(pairs: Sequence[Pair]) -> None:
    """Copy each pair's second tensor into its first, and let autocast forget what it has cast of the first."""
    for live, source in pairs:
        write(live, source)
    torch.clear_autocast_cache()
