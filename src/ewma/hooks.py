"""Call something around every optimizer step, in any training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

LEFT_OUT = "_ewma_left_out"


def unwrap(optimizer: Any) -> Optimizer:
    """The optimizer whose hooks work: accelerate's and Lightning's wrappers have none of their own."""
    inner = optimizer
    while "_optimizer_step_post_hooks" not in getattr(inner, "__dict__", {}):
        wrapped = getattr(inner, "_optimizer", None) or getattr(inner, "optimizer", None)
        if wrapped is None:
            break
        inner = wrapped
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"expected a torch.optim.Optimizer; got {type(optimizer).__name__}. If it wraps one, pass that one; if it "
            f"is none, call ema.update() after each of its steps. Several are written attach(one, two), and a "
            f"number of steps attach(optimizer, every=10)."
        )
    return inner


def before_steps(optimizer: Any, act: Callable[[Optimizer], None]) -> RemovableHandle:
    """Run `act(optimizer)` just before every step, when the gradients are there: with a closure, behind that."""

    def pre_hook(optimizer: Optimizer, arguments: Any, keywords: Any) -> Any:
        given = arguments[1] if len(arguments) > 1 else keywords.get("closure")
        if given is None:
            act(optimizer)
            return None

        def closure(*several: Any, **named: Any) -> Any:
            loss = given(*several, **named)
            act(optimizer)
            return loss

        if len(arguments) > 1:
            return (arguments[0], closure, *arguments[2:]), keywords
        return arguments, {**keywords, "closure": closure}

    return unwrap(optimizer).register_step_pre_hook(torch.compiler.disable(pre_hook))


def leave_out(optimizer: Optimizer, skips: Any) -> None:
    """Note that the step under way moves nothing: a bool, or a 0-dim tensor where only the device knows. It holds until
    the next is noted, whichever hooks run in between."""
    optimizer.__dict__[LEFT_OUT] = skips


def left_out(optimizer: Optimizer) -> Any:
    """Whether the step under way moves nothing, by what was noted or by what a GradScaler has left to it."""
    found_inf = getattr(optimizer, "found_inf", None)
    return optimizer.__dict__.get(LEFT_OUT, False) if found_inf is None else found_inf.reshape(()) != 0


def around_steps(
    optimizers: tuple[Any, ...], before: Callable[[], None], after: Callable[[Any], None]
) -> list[RemovableHandle]:
    """Run `before()` ahead of every optimizer's step, and `after(taken)` behind the last optimizer's.

    `taken` is True; or, where a GradScaler left the decision to a fused optimizer, a 0-dim bool tensor on the device.
    (Without `fused=True` the scaler does not call `step` at all when it skips one.) Behind a step that a guard is known
    to have left out `after` is not run.
    """
    if not optimizers:
        raise TypeError("attach needs the optimizer whose steps to follow; got none. Write ema.attach(optimizer).")
    inner = [unwrap(optimizer) for optimizer in optimizers]

    def pre_hook(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        before()

    def post_hook(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        skips = left_out(optimizer)
        if not isinstance(skips, bool):
            after(~skips)
        elif not skips:
            after(True)

    # An optimizer step may be compiled; the hooks' bookkeeping is not part of anybody's graph.
    handles = [each.register_step_pre_hook(torch.compiler.disable(pre_hook)) for each in inner]
    handles.append(inner[-1].register_step_post_hook(torch.compiler.disable(post_hook)))
    return handles
