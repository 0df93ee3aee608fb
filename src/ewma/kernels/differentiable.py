"""The scan as autograd sees it: its backward pass is the same scan, from the end to the start.

    y[t] = y[t-1] + (u[t] - lost[t] * y[t-1])
    a[t] = a[t+1] + (dy[t] - lost[t+1] * a[t+1])        adjoint: what a change of y[t] does to all that follows

    du[t] = a[t]        dlost[t] = -a[t] * y[t-1]       dinitial = (1 - lost[0]) * a[0]

The backward pass is made of differentiable steps, so it can be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ewma import kernels
from ewma.arrays import before


def scan(u: Tensor, lost: float | Tensor, initial: Tensor, kept: Tensor | None = None) -> Tensor:
    """`kernels.scan`, differentiable in u, lost and initial. Shapes (outer, n, inner); lost and initial broadcast."""
    steps = lost if isinstance(lost, Tensor) else u.new_full((1, 1, 1), lost)
    initial = initial.expand(u.shape[0], 1, u.shape[2])
    constant = lost if isinstance(lost, float) else None
    result: Tensor = _Scan.apply(u, steps, initial, constant, _fixed(kept))  # type: ignore[no-untyped-call]  # torch has it untyped
    return result


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
