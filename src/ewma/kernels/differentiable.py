"""The scan as autograd sees it: its backward pass is the same scan, from the end to the start.

    y[t] = y[t-1] + (u[t] - lost[t] * y[t-1])
    a[t] = a[t+1] + (dy[t] - lost[t+1] * a[t+1])        adjoint: what a change of y[t] does to all that follows

    du[t] = a[t]        dlost[t] = -a[t] * y[t-1]       dinitial = (1 - lost[0]) * a[0]

The backward pass is made of differentiable steps, so it can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from ewma import kernels
from ewma.arrays import before, empty


def scan(u: Tensor, lost: float | Tensor, initial: Tensor, kept: Tensor | None = None) -> Tensor:
    """`kernels.scan`, differentiable in u, lost and initial. Shapes (outer, n, inner); lost and initial broadcast."""
    steps = lost if isinstance(lost, Tensor) else u.new_full((1, 1, 1), lost)
    initial = initial.expand(u.shape[0], 1, u.shape[2])
    constant = lost if isinstance(lost, float) else None
    result: Tensor = _Scan.apply(u, steps, initial, constant, _fixed(kept))  # type: ignore[no-untyped-call]  # torch has it untyped
    return result


def remembering(x: Tensor, made: Tensor, linear: Callable[[Tensor, bool], Tensor]) -> Tensor:
    """`made`, the running mean of x, as what autograd goes back through to x.

    The mean is linear in x, so its gradient is the transposed: the same pass from the end to the start.

    Args:
        linear: of a tensor, the running mean from 0; or, where True, what its gradient is.
    """
    result: Tensor = _Mean.apply(x, linear, False, [made])  # type: ignore[no-untyped-call]  # torch has it untyped
    return result


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any, transposed: bool, made: list[Tensor]) -> Tensor:
        ctx.linear, ctx.transposed = linear, transposed
        return made.pop() if made else linear(x, transposed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _Mean.apply(dy, ctx.linear, not ctx.transposed, []), None, None, None  # type: ignore[no-untyped-call]


def linear(stretches: Sequence[Any], x: Tensor, transposed: bool) -> Tensor:
    """The running mean from 0, or what its gradient is: shares and sums change places, and time runs backwards.

    Args:
        stretches: the steps, in parts of which each loses the same; see `whole.Stretch`.
    """
    kernel = kernels.compiled()
    out: Tensor = empty(x, x.dtype)
    source, target = kernel.lend(x), kernel.lend(out)
    if source is None:
        raise RuntimeError(f"expected a gradient with memory of its own; got {type(x).__name__}, {x.dtype}")
    for threads in (kernel.threads(x), 1):  # a NaN reaches all that follows only where one thread goes through all
        base, sums = numpy.zeros((2, x.shape[0], 1, x.shape[2]))
        finite = True
        for part, lost, share in reversed(stretches) if transposed else stretches:
            u, y = source[:, part], target[:, part]
            if transposed:
                share = share if isinstance(share, float) else numpy.ascontiguousarray(share[:, ::-1])
                u, y = u[:, ::-1], y[:, ::-1]
            pre, post = (share, 1.0) if transposed else (1.0, share)
            finite &= kernel.run(u, y, base, sums, lost, pre, post, threads, untouched=True)
        if finite:
            break
    return out


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, lost: Tensor, initial: Tensor, constant: float | None, kept: Tensor | None
    ) -> Tensor:
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        u = u.clone(memory_format=torch.contiguous_format)  # the kernel may use it up
        kernels.scan(u, lost if constant is None else constant, initial, y, kept)
        ctx.constant, ctx.kept = constant, kept
        ctx.save_for_backward(lost, initial, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        lost, initial, y = ctx.saved_tensors
        backwards = _following(lost) if ctx.constant is None else ctx.constant
        kept = None if ctx.kept is None else _following(ctx.kept)
        adjoint = scan(dy.flip(1), backwards, torch.zeros_like(initial), kept).flip(1)
        dlost = (-adjoint * before(y, initial)).sum_to_size(lost.shape) if ctx.needs_input_grad[1] else None
        dinitial = (1.0 - lost[:, :1]) * adjoint[:, :1] if ctx.needs_input_grad[2] else None
        return adjoint, dlost, dinitial, None, None


def _following(steps: Tensor) -> Tensor:
    """Of each step what belongs to the one after it, from the end to the start. (The last has none, nor needs one.)"""
    return steps if steps.shape[1] == 1 else torch.cat((steps[:, 1:], steps[:, :1]), 1).flip(1)


def _fixed(kept: Tensor | None) -> Tensor | None:
    return None if kept is None else kept.detach()
