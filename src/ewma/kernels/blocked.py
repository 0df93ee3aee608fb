"""The scan in blocks, by NumPy's or torch's own operations: any device, no compiler.

A block's steps are one product with a small triangular matrix of the weights, or, where the coefficients vary, one loop
over the steps of all blocks at once. What a block leaves to the next is the same recurrence over the blocks. So nothing
is as slow as a Python loop over time, and rounding happens once a block rather than once a step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ewma import columns
from ewma.arrays import Array, is_tensor, module_of, wide

BLOCK = {"one lane": 32, "many lanes": 8, "varying": 32}
WHOLE = {"one lane": 128, "many lanes": 16}
MANY_LANES = 256
"""In steps: how long blocks are; up to where one matrix does for all. In lanes: from where a plain loop over time is as
fast as blocks."""


def scan(u: Array, lost: float | Array, initial: Array, out: Array, kept: Array | None = None) -> None:
    """`y[t] = y[t-1] + (u[t] - lost[t] * y[t-1])`, written to `out`; see `ewma.kernels.scan`."""
    if u.shape[1]:
        if isinstance(lost, float):
            _constant(u, lost, initial, out)
        else:
            _varying(u, Decline.of(lost, kept), initial, out)


@functools.lru_cache(maxsize=64)
def _tables(lost: float, n: int) -> tuple[Any, float]:
    """The triangle that takes a block's inputs to its outputs, and what a whole block loses."""
    import numpy

    kept, steps = columns.powers(lost, n), numpy.arange(n)
    age = steps[:, None] - steps
    whole = -math.expm1(n * math.log1p(-lost)) if lost < 1.0 else 1.0
    return numpy.where(age >= 0, kept[age], 0.0), whole


@functools.lru_cache(maxsize=64)
def _on_device(lost: float, n: int, device: Any) -> Any:
    import torch

    with torch.inference_mode(False):
        return torch.from_numpy(_tables(lost, n)[0]).to(device)


def _constant(u: Array, lost: float, initial: Array, out: Array) -> None:
    """Blocks of one matrix product each. Uses u up."""
    outer, n, inner = u.shape
    lanes = "one lane" if inner == 1 else "many lanes"
    length = n if n <= WHOLE[lanes] else BLOCK[lanes]
    blocks, module = n // length, module_of(u)
    triangle, lost_by_block = _tables(lost, length)
    if is_tensor(u):
        triangle = _on_device(lost, length, u.device)
    head = u[:, : blocks * length].reshape(outer, blocks, length, inner)
    if blocks > 1:
        ends = (triangle[-1] @ head) if inner > 1 else (head[..., 0] @ triangle[-1])[..., None]
        carries = module.empty_like(ends)
        _constant(ends, lost_by_block, initial, carries)
        head[:, 1:, 0] += (1.0 - lost) * carries[:, :-1]
    head[:, 0, 0] += (1.0 - lost) * initial[:, 0]
    result = out[:, : blocks * length].reshape(outer, blocks, length, inner)
    if inner > 1:
        module.matmul(triangle, head, out=result)
    elif n == blocks * length and _contiguous(u) and _contiguous(out):
        module.matmul(u.reshape(-1, length), triangle.T, out=out.reshape(-1, length))
    else:
        module.matmul(head[..., 0], triangle.T, out=result[..., 0])
    if n > blocks * length:
        done = blocks * length
        _constant(u[:, done:], lost, out[:, done - 1 : done], out[:, done:])


def _contiguous(x: Array) -> bool:
    return bool(x.is_contiguous() if is_tensor(x) else x.flags.c_contiguous)


class Decline(NamedTuple):
    """What steps leave of what was, as `y + (u - lost * y)` or, where most is lost, as `kept * y + u`.

    The one is right where next to nothing is lost, the other where next to nothing is left.
    """

    lost: Array
    kept: Array | None
    whole: Array | None  # 1 where `taken` is what is lost, 0 where it is minus what is left
    taken: Array

    @classmethod
    def of(cls, lost: Array, kept: Array | None) -> Decline:
        if kept is None:
            return cls(lost, None, None, lost)
        module, most = module_of(lost), lost > 0.5
        return cls(lost, kept, wide(~most), module.where(most, -kept, lost))

    def map(self, change: Callable[[Array], Array]) -> Decline:
        return Decline(*(None if part is None else change(part) for part in self))

    def step(self, y: Array, u: Array, t: int) -> Array:
        taken = self.taken[..., t, :] * y
        return (y if self.whole is None else self.whole[..., t, :] * y) + (u[..., t, :] - taken)

    def of_blocks(self) -> Decline:
        """What whole blocks leave, of coefficients shaped (outer, blocks, length, inner)."""
        lost = 0.0 * self.lost[:, :, 0]
        for t in range(self.lost.shape[2]):
            lost = lost + (self.lost[:, :, t] - self.lost[:, :, t] * lost)
        return Decline.of(lost, None if self.kept is None else self.kept.prod(2))


def _varying(u: Array, decline: Decline, initial: Array, out: Array) -> None:
    """Blocks side by side, one step of all of them at a time: once for what each leaves, and again from what came."""
    outer, n, inner = u.shape
    length = BLOCK["varying"]
    blocks = n // length
    if decline.lost.shape[1] != n:
        decline = decline.map(lambda part: module_of(u).broadcast_to(part, (part.shape[0], n, part.shape[2])))
    if blocks < 2 or outer * inner >= MANY_LANES:
        _loop(u, decline, initial[:, 0], out)
        return
    done = blocks * length
    head, result = (x[:, :done].reshape(outer, blocks, length, inner) for x in (u, out))
    going = decline.map(lambda part: part[:, :done].reshape(part.shape[0], blocks, length, part.shape[2]))
    ends = 0.0 * head[:, :, 0]
    for t in range(length):
        ends = going.step(ends, head, t)
    carries = module_of(u).empty_like(ends)
    _varying(ends, going.of_blocks(), initial, carries)
    y = module_of(u).concatenate((initial, carries[:, :-1]), 1)
    for t in range(length):
        y = going.step(y, head, t)
        result[:, :, t] = y
    _loop(u[:, done:], decline.map(lambda part: part[:, done:]), out[:, done - 1], out[:, done:])


def _loop(u: Array, decline: Decline, y: Array, out: Array) -> None:
    for t in range(u.shape[1]):
        y = decline.step(y, u, t)
        out[:, t] = y
