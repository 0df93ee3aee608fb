"""SpikeGuard: a gradient norm or a loss that leaps out of its own past is cut back to what was usual."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ewma import files, hooks, profiles
from ewma.gradients.resuming import check
from ewma.profiles import Profile, Scalar, choose
from ewma.recurrence import Recurrence
from ewma.shards import local
from ewma.weights import ranks

LEAST = 1.5
"""Up to so many times the usual value nothing is a spike, however quiet it was before."""


class SpikeGuard:
    """Cuts a gradient norm (or a loss) that is `z` standard deviations above its running mean back to that height.

        l = log(norm)       limit = mean + max(z * sigma, log 1.5)      factor = min(1, exp(limit - l))
        mean: running mean of min(l, limit)      sigma: running standard deviation of all that was not cut

    Mean and variance are debiased. A spike enters the mean as what it was cut to, and leaves the deviation as it was:
    one spike does not make room for the next, and a height that stays is followed in a hundred steps or so. What is NaN
    or infinite never enters. Only large values are cut.

        guard = SpikeGuard().attach(optimizer)              # scales gradients before every step

        guard = SpikeGuard()
        loss = loss * guard.update(loss.detach())           # or by hand, with a loss

    Args:
        z: from how many standard deviations above the mean on a value is a spike.
        warmup: how many values are only watched before the first may be cut.
        log: watch the logarithm, of values above 0. None: yes for the norms that `attach` watches, no for what `update`
            is given, such as a loss, whose limit is `mean + max(z * sigma, |mean| / 2)`.
        profile, half_life, decay, alpha, span, com: how the past is weighted, in steps; by default half_life=25.
        all_reduce: in a process group, watch the mean over all ranks, so that all decide alike. True for the default
            group, or a group. Gradients that DDP has averaged, and those of sharded parameters, agree without.

    Nothing waits for the device, save `attach(..., skip=True)` where it says so. `clipped` counts.

    Source: the z-score of ZClip, arXiv 2504.02507, which a single NaN turns off for good and whose mean is moved by the
    spikes themselves; the cut value in the average as in AdaGC, arXiv 2502.11034. Beside it: `clip_grad_norm_` needs a
    limit that is right for the whole run.

    >>> guard = SpikeGuard(warmup=5)
    >>> for loss in (1.0, 1.1, 0.9, 1.0, 1.1, 0.9): factor = guard.update(loss)
    >>> factor, round(guard.update(10.0), 3), guard.clipped
    (1.0, 0.154, 1)
    """

    NUMBERS = ("mean", "variance", "_clipped", "_missing")

    def __init__(
        self,
        z: float = 6.0,
        warmup: int = 25,
        *,
        log: bool | None = None,
        profile: Profile | None = None,
        half_life: float | None = None,
        decay: float | None = None,
        alpha: float | None = None,
        span: float | None = None,
        com: float | None = None,
        all_reduce: bool | dist.ProcessGroup = False,
    ) -> None:
        if isinstance(z, bool) or not isinstance(z, int | float) or not 0.0 < z < math.inf:
            raise ValueError(f"z must be a finite number above 0, of standard deviations; got {z!r}")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 2:
            raise ValueError(f"warmup must be a whole number of values, 2 or more for a deviation; got {warmup!r}")
        knobs = {"half_life": half_life, "decay": decay, "alpha": alpha, "span": span, "com": com}
        if profile is None and all(knob is None for knob in knobs.values()):
            knobs["half_life"] = 25.0
        self.z, self.warmup, self.log = float(z), warmup, log
        self.all_reduce = all_reduce
        self.clock = Recurrence(profiles.resolve("SpikeGuard(", profile, True, **knobs))
        self.mean: Scalar = 0.0
        self.variance: Scalar = 0.0
        self._clipped: Scalar = 0.0
        self._missing: Scalar = 0.0
        self._handles: list[RemovableHandle] = []
        self._optimizer: Optimizer | None = None

    def __repr__(self) -> str:
        return f"SpikeGuard(z={self.z:g}, warmup={self.warmup}, count={self.count}, clipped={self.clipped})"

    @property
    def profile(self) -> Profile:
        """How the past is weighted."""
        return self.clock.profile

    @property
    def count(self) -> int:
        """How many values have entered the average. Waits for the device."""
        return int(self.clock.count)

    @property
    def clipped(self) -> int:
        """How many values were cut, or their steps skipped. Waits for the device."""
        return int(self._clipped)

    @property
    def missing(self) -> int:
        """How many values were NaN or infinite. Waits for the device."""
        return int(self._missing)

    def update(self, value: Any) -> Any:
        """Take in one value; gives the factor that cuts it back: 1 where it is no spike, or no number.

        Args:
            value: a number, or a tensor of one element; of a tensor on a device the factor is a 0-dim tensor there, and
                nothing waits for it.
        """
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"SpikeGuard.update: expected one number, a loss or a norm; got a tensor of shape "
                    f"{list(value.shape)}. Reduce it first: guard.update(losses.mean().detach())."
                )
        elif not isinstance(value, Real):
            raise TypeError(
                f"SpikeGuard.update: expected a number or a tensor of one element; got {type(value).__name__}"
            )
        return self._watch(value, bool(self.log))[0]

    def attach(self, optimizer: Any, skip: bool = False) -> Self:
        """Watch the norm of all of an optimizer's gradients before every step, and scale them back at a spike.

        Args:
            skip: leave out the whole step instead, at a spike or where the norm is no finite number. A fused optimizer
                is told on the device (`found_inf`); for others the gradients are set to None, which has to wait for the
                device once a step: a gradient of zero would still move AdamW. An attached ModelEMA or GradientEMA does
                not count that step.

        Without skip a gradient that is not finite is left as it is. Attach it before a GradientEMA to cut what that one
        averages, after it to cut what it makes.
        """
        if self._handles:
            raise RuntimeError("this SpikeGuard is attached already; call guard.detach() before attaching it elsewhere")
        inner = hooks.unwrap(optimizer)

        def act(optimizer: Optimizer) -> None:
            self._before_step(optimizer, skip)

        def forget(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
            _forget(optimizer)

        self._optimizer = inner
        self._handles = [hooks.before_steps(inner, act), inner.register_step_post_hook(torch.compiler.disable(forget))]
        return self

    def detach(self) -> None:
        """Stop watching the optimizer. What was learned stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._optimizer is not None:
            hooks.leave_out(self._optimizer, False)
        self._optimizer = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle is not attached to anything: optimizers drop their hooks likewise."""
        return {**self.__dict__, "_handles": [], "_optimizer": None}

    def state_dict(self) -> dict[str, Any]:
        """All there is to save: numbers and strings."""
        return {
            "format": files.FORMAT,
            "kind": "SpikeGuard",
            "profile": self.profile.to_json(),
            "clock": self.clock.numbers(),
            **{name: float(getattr(self, name)) for name in self.NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, without a new warm-up."""
        what = "SpikeGuard.load_state_dict"
        check(what, state, "SpikeGuard", self.profile, "guard", ("clock", *self.NUMBERS))
        self.clock = Recurrence(self.profile)
        self.clock.load(state["clock"])
        for name in self.NUMBERS:
            setattr(self, name, state[name])

    def _watch(self, value: Any, log: bool) -> tuple[Scalar, Scalar, Scalar]:
        """The factor, whether the value is a spike, and whether it is finite: floats, or tensors on a device."""
        if isinstance(value, Tensor):
            value = value.detach().reshape(()).double()
        value = self._over_ranks(value)
        value = value.item() if isinstance(value, Tensor) and value.is_cpu else value
        value = value if isinstance(value, Tensor) else float(value)
        finite = abs(value) < math.inf  # False for NaN
        height = _logarithm(value) if log else value
        known = abs(height) < math.inf  # a norm of 0 has no logarithm, and is no spike either
        height = choose(known, height, self.mean)
        sigma = _root(self._unbiased())
        least = math.log(LEAST) if log else (LEAST - 1.0) * abs(self.mean)
        limit = self.mean + _larger(self.z * sigma, least)
        spikes = known & (height > limit) & (self.clock.count >= self.warmup)
        height = choose(spikes, limit, height)
        taken = choose(known, 1.0, 0.0)
        if not isinstance(value, float):
            self._on_device(value)
        self._take(height, taken, spikes)
        self._clipped = self._clipped + choose(spikes, 1.0, 0.0)
        self._missing = self._missing + choose(finite, 0.0, 1.0)
        if log:
            factor = choose(spikes, _exponential(height - _logarithm(choose(known, value, 1.0))), 1.0)
        else:
            factor = choose(spikes, _larger(limit, 0.0) / choose(spikes, value, 1.0), 1.0)
        return factor, spikes, finite

    def _take(self, height: Scalar, taken: Scalar, spikes: Scalar) -> None:
        if isinstance(taken, float) and not taken:
            return
        usual = self._unbiased()
        coefficient = self.clock.advance(taken)
        step = height - self.mean
        # A value cut at z sigma would widen sigma by z^2 / 2 of its share: with z = 6, a few spikes let all others in.
        as_usual = usual * (1.0 - self.clock.concentration)
        widened = (1.0 - coefficient) * (self.variance + coefficient * step * step)
        self.variance = choose(spikes, as_usual, widened)
        self.mean = self.mean + coefficient * step

    def _unbiased(self) -> Scalar:
        """The variance of what has entered; 0 until two values have."""
        spread = 1.0 - self.clock.concentration
        some = spread > 1e-12
        return choose(some, self.variance / choose(some, spread, 1.0), 0.0)

    def _on_device(self, like: Tensor) -> None:
        self.clock.on_device(like)
        for name in self.NUMBERS:
            if isinstance(getattr(self, name), float):
                setattr(self, name, like.new_full((), getattr(self, name)))

    def _over_ranks(self, value: Any) -> Any:
        if not self.all_reduce or not dist.is_initialized():
            return value
        group = None if self.all_reduce is True else self.all_reduce
        device = value.device if isinstance(value, Tensor) and not value.is_cpu else ranks.device(group)
        mean = torch.as_tensor(value, dtype=torch.float64, device=device).clone()
        dist.all_reduce(mean, group=group)
        return mean / dist.get_world_size(group)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, skip: bool) -> None:
        _forget(optimizer)  # a step that was broken off has not
        hooks.leave_out(optimizer, False)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        norm = _norm(gradients)
        scale = getattr(optimizer, "grad_scale", None)
        factor, spikes, finite = self._watch(norm if scale is None else norm / scale, self.log is not False)
        if skip:
            self._skip(optimizer, gradients, spikes, finite)
        elif not (isinstance(factor, float) and factor == 1.0):
            for device in {gradient.device for gradient in gradients}:
                several = [
                    gradient if gradient.is_sparse else local(gradient)  # of a sparse one, detach shares no values
                    for gradient in gradients
                    if gradient.device == device
                ]
                torch._foreach_mul_(several, factor if isinstance(factor, float) else factor.to(device))

    def _skip(self, optimizer: Optimizer, gradients: list[Tensor], spikes: Any, finite: Any) -> None:
        if getattr(optimizer, "_step_supports_amp_scaling", False) and optimizer.defaults.get("fused"):
            skips = torch.as_tensor(spikes | (finite == 0), device=gradients[0].device)
            found = getattr(optimizer, "found_inf", None)
            if found is None:
                optimizer.__dict__["_ewma_skips"] = True
                found = torch.zeros((), dtype=torch.float32, device=skips.device)
            optimizer.found_inf = torch.maximum(found, skips.reshape(found.shape).to(found))  # type: ignore[attr-defined]
            skips = hooks.left_out(optimizer)
            hooks.leave_out(optimizer, bool(skips) if skips.is_cpu else skips)
        elif bool(spikes) or not bool(finite):
            hooks.leave_out(optimizer, True)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None


def _forget(optimizer: Optimizer) -> None:
    """Take back what a fused optimizer was told about one step."""
    if optimizer.__dict__.pop("_ewma_skips", False):
        del optimizer.found_inf  # type: ignore[attr-defined]  # torch's own name for it


def _norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients, over all ranks where they are sharded: a 0-dim tensor."""
    parts: list[Tensor] = []
    for gradient in gradients:
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        part = torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
        parts.append(part.full_tensor() if hasattr(part, "full_tensor") else part)
    whole: Tensor = torch.linalg.vector_norm(torch.stack([part.double().to(parts[0].device) for part in parts]))
    return whole


def _logarithm(x: Scalar) -> Scalar:
    if isinstance(x, float):
        return math.log(x) if x > 0.0 else math.nan
    return x.log()


def _exponential(x: Scalar) -> Scalar:
    return math.exp(x) if isinstance(x, float) else x.exp()


def _root(x: Scalar) -> Scalar:
    return math.sqrt(x) if isinstance(x, float) else x.sqrt()


def _larger(x: Scalar, y: Scalar) -> Scalar:
    return choose(x > y, x, y)
