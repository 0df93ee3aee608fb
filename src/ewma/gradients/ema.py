"""GradientEMA: an average of every gradient, and with it the gradient that the optimizer gets to see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ewma import files, hooks, kernels, profiles
from ewma.gradients.measures import Measured
from ewma.gradients.owners import Owner, Owners
from ewma.gradients.resuming import check
from ewma.kernels.layout import parts_of
from ewma.names import mismatch
from ewma.profiles import Profile
from ewma.recurrence import Recurrence
from ewma.shards import local
from ewma.tracks import Track, refuse_capture


class GradientEMA(Measured):
    """Sets each gradient to `raw * gradient + slow * average` just before every optimizer step.

        average' = average + c * (gradient - average)       c = gain / weight of the profile, right from the first step

    The two numbers make the filter:

        raw  slow
        0    1       low-pass: the average instead of the gradient (with SGD, that is momentum)
        1    2       Grokfast: the slow part amplified (with SGD a three times larger learning rate in disguise)
        1-s  s       a mix, with s from 0 to 1
        1    -1      high-pass: only what differs from the average
        1    0       nothing is changed, only measured

    Args:
        optimizer: any torch optimizer, or accelerate's or Lightning's wrapper of one; except LBFGS.
        model: names the averages in `state_dict`, by canonical names. Without it they are known by the optimizer's own
            names, where it was made with `named_parameters()`, else by "group.index".
        profile: how the past is weighted, where it is not exponential.
        half_life, decay, alpha, span, com: instead, exactly one, in steps; see `Exponential`.
        debias: False starts at the first gradient as if it had always been there.
        raw, slow: the filter; finite numbers.
        normalize: divide both by `raw + slow`, so that a constant gradient stays what it is.
        start: for so many steps only average, and leave the gradients alone.
        nonfinite: "skip" keeps NaN and infinite elements out of the average, and counts them in `skipped`; in the
            filtered gradient they stay, but for raw=0. "propagate" does not look.
        sparse: "error" refuses sparse gradients, "densify" makes them dense.
        squares: also average the squared gradients, which `noise_scale` and `snr` need; another buffer per parameter.
        hook: False leaves it to you to call `apply()`, after backward and before the step.
        capturable: keep time, weight and count on the device, as a CUDA graph needs. (Capture after `start`, which the
            host counts.)

    A param group with `"gradient_ema": False` is left alone. A parameter without a gradient at a step keeps its average
    and its time; one that gets its first late starts then. Averages are float32 (float64 of float64), whatever the
    gradients are. Gradients are changed in place, where the optimizer, DDP and CUDA graphs know them. Under GradScaler
    averages are of the unscaled gradients, and a step that it skips changes nothing.

    Clip before it (`clip_grad_norm_` after backward) and the filtered gradient may be larger than the limit, up to
    `|raw| + |slow|` times. To clip what it makes, pass hook=False, call `apply()`, then clip, then step.

    Source: Grokfast, arXiv 2405.20233, equations 4 to 8, without its start at zero. Beside it: AdEMAMix's slow average
    enters the numerator of Adam's step only, while here Adam's second moment sees the filtered gradient too; an
    optimizer's own momentum is `slow` alone, inside the step.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> ema = GradientEMA(optimizer, decay=0.98, raw=1.0, slow=2.0)
    >>> weight.grad = torch.ones(2)
    >>> optimizer.step()
    >>> weight.grad
    tensor([3., 3.])
    """

    def __init__(
        self,
        optimizer: Any,
        model: nn.Module | None = None,
        profile: Profile | None = None,
        *,
        half_life: float | None = None,
        decay: float | None = None,
        alpha: float | None = None,
        span: float | None = None,
        com: float | None = None,
        debias: bool = True,
        raw: float = 0.0,
        slow: float = 1.0,
        normalize: bool = False,
        start: int = 0,
        nonfinite: Literal["skip", "propagate"] = "skip",
        sparse: Literal["error", "densify"] = "error",
        squares: bool = False,
        hook: bool = True,
        capturable: bool = False,
    ) -> None:
        self.optimizer = hooks.unwrap(optimizer)
        if isinstance(self.optimizer, LBFGS):
            raise TypeError(
                "GradientEMA cannot filter LBFGS: it evaluates its closure many times a step, along a line on which it "
                "needs the gradient of the loss itself. Use another optimizer, or LBFGS without GradientEMA."
            )
        named: Any = model
        if not (named is None or isinstance(named, nn.Module)):
            known = f"profile={named!r}" if isinstance(named, Profile) else "half_life=..."
            raise TypeError(
                f"expected the model whose names to use, an nn.Module; got {type(named).__name__}. How the past is "
                f"weighted goes by name: GradientEMA(optimizer, {known})."
            )
        knobs = {"half_life": half_life, "decay": decay, "alpha": alpha, "span": span, "com": com}
        self.track = Track(profiles.resolve("GradientEMA(optimizer, ", profile, debias, **knobs))
        self.raw, self.slow = _mix(raw, slow, normalize)
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"start must be a whole number of steps, 0 or more; got {start!r}")
        for name, value, choices in (
            ("nonfinite", nonfinite, ("skip", "propagate")),
            ("sparse", sparse, ("error", "densify")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
        self.owners = Owners(self.optimizer, model, densify=sparse == "densify")
        self.start, self.guard, self.capturable = start, nonfinite == "skip", capturable
        self.squares: dict[str, Tensor] | None = {} if squares else None
        self.seen = 0
        self._skipped: Any = 0
        self._signature: Any = None  # of the gradients that the plan is for
        self._plan: list[tuple[Recurrence, kernels.Filter, list[int]]] = []
        self._handle = hooks.before_steps(self.optimizer, self._before_step) if hook else None

    def __repr__(self) -> str:
        return f"GradientEMA({self.profile!r}, raw={self.raw:g}, slow={self.slow:g}, count={self.count})"

    def __getstate__(self) -> dict[str, Any]:
        dropped: dict[str, Any] = {"_plan": [], "_signature": None}
        return {**self.__dict__, **dropped, "_skipped": self.skipped, "_handle": self._handle is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy or pickle has an optimizer of its own, which has lost all hooks: it is filtered as the other is."""
        self.__dict__.update(state)
        self._handle = hooks.before_steps(self.optimizer, self._before_step) if state["_handle"] else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @property
    def profile(self) -> Profile:
        """How the past is weighted."""
        return self.track.profile

    @property
    def count(self) -> int:
        """How many steps were averaged. (Waits for the device where only it knows: under a fused GradScaler.)"""
        return int(self.track.clock.count)

    @property
    def skipped(self) -> int:
        """How many elements were kept out so far, being NaN or infinite. Waits for the device."""
        return int(self._skipped + sum((filtering.skipped for _, filtering, _ in self._plan), start=0))

    def detach(self) -> None:
        """Leave the optimizer's gradients alone from now on. The averages stay. Also at the end of a `with`."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def apply(self) -> None:
        """Filter the gradients that are there now, once: what the hook does before a step. For `hook=False`."""
        self._filter(None, None)

    def reset(self) -> None:
        """Forget everything: the next step is the first."""
        self._drop_plan()
        self.track = Track(self.profile)
        self.squares = None if self.squares is None else {}
        self.seen, self._skipped = 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming bit for bit needs: tensors, numbers and strings only, by name."""
        return {
            "format": files.FORMAT,
            "kind": "GradientEMA",
            "seen": self.seen,
            "skipped": self.skipped,
            **self.track.clock_state(),
            "averages": dict(self.track.averages),
            "squares": dict(self.squares or {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` gave; nothing changes unless all of it fits this optimizer's parameters."""
        what = "GradientEMA.load_state_dict"
        parts = ("seen", "skipped", "clocks", "clock_of", "averages", "squares")
        check(what, state, "GradientEMA", self.profile, "GradientEMA", parts)
        if self.squares is not None and state["averages"] and not state["squares"]:
            raise ValueError(f"{what}: squares=True, but the state was saved without them. Nothing was loaded.")
        mine = {name: tuple(parameter.shape) for name, parameter in self.owners.named()}
        came = {name: tuple(average.shape) for name, average in state["averages"].items()}
        known = {name: shape for name, shape in mine.items() if name in came}
        hint = "Nothing was loaded. Pass model= as when it was saved, and an optimizer with the same groups."
        if problem := mismatch(f"{what}: the saved averages are not of these parameters", known, came, hint):
            raise ValueError(problem)
        self._drop_plan()
        with torch.no_grad():
            self.track.load(state["averages"], state, self.profile)
            if self.squares is not None:
                self.squares = {name: square.clone() for name, square in state["squares"].items()}
        self.seen, self._skipped = state["seen"], state["skipped"]

    def _before_step(self, optimizer: Optimizer) -> None:
        self._filter(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    @torch.no_grad()
    def _filter(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Average and filter.

        Args:
            scale, found_inf: of a GradScaler that leaves scaling and skipping to a fused optimizer.
        """
        taken = None
        if found_inf is not None and found_inf.is_cpu:
            if found_inf.item():
                return
        elif found_inf is not None:
            taken = found_inf.reshape(()) == 0.0
        factor = scale.item() if scale is not None and scale.is_cpu else scale
        present, gradients = self.owners.present()
        if not present:
            return
        owners = [(name, id(parameter)) for name, parameter in present]  # tensors themselves compare by their elements
        signature = owners, *([getattr(each, what) for each in gradients] for what in ("dtype", "shape", "device"))
        if signature != self._signature:
            with torch.inference_mode(False):
                self._prepare(present, gradients)
            self._signature = signature
        raw, slow = (self.raw, self.slow) if self.seen >= self.start else (1.0, 0.0)
        elapsed: Any = 1.0 if taken is None else taken.double()
        if self.capturable and taken is None:
            elapsed = gradients[0].new_ones((), dtype=torch.float64)
        clocks = {id(clock): clock for clock in (self.track.clock, *(clock for clock, _, _ in self._plan))}
        if any(gradients[places[0]].is_cuda for _, _, places in self._plan):
            refuse_capture(clocks.values(), "GradientEMA")
        coefficients = {number: clock.advance(elapsed) for number, clock in clocks.items()}
        for clock, filtering, places in self._plan:
            mine = [parts_of(gradients[place]) for place in places]
            filtering(mine, coefficients[id(clock)], raw, slow, factor, taken)
        self.track.updated = True
        self.seen += 1

    def _prepare(self, present: list[Owner], gradients: list[Tensor]) -> None:
        """One filter for all gradients that share a clock, dtype and device."""
        self._drop_plan()
        self.track.begin(
            {
                name: self._room(parameter.grad)
                for name, parameter in present
                if name not in self.track.averages and parameter.grad is not None
            }
        )
        self.track.stop({name for name, _ in present})
        groups: dict[Any, list[int]] = {}
        for place, ((name, parameter), gradient) in enumerate(zip(present, gradients, strict=True)):
            average = self.track.averages[name]
            if average.shape != parameter.shape:
                raise ValueError(
                    f"{name}: expected a gradient of shape {list(average.shape)}, as it was averaged so far; got "
                    f"{list(parameter.shape)}. If that is meant, call reset() to begin anew."
                )
            self.track.averages[name] = average = average.to(gradient.device)
            if self.squares is not None:
                square = self.squares.get(name)
                square = torch.full_like(average, self._nothing) if square is None else square.to(gradient.device)
                self.squares[name] = square
            kind = (id(self.track.clock_of(name)), gradient.dtype, average.dtype, gradient.device)
            groups.setdefault(kind, []).append(place)
        for places in groups.values():
            names = [present[place][0] for place in places]
            averages = [parts_of(local(self.track.averages[name])) for name in names]
            squares = None if self.squares is None else [parts_of(local(self.squares[name])) for name in names]
            filtering = kernels.filter(averages, squares, self.guard)
            self._plan.append((self.track.clock_of(names[0]), filtering, places))

    @property
    def _nothing(self) -> float:
        """What an average holds that has seen nothing: the guard knows such an element by its NaN."""
        return math.nan if self.guard else 0.0

    def _room(self, gradient: Tensor) -> Tensor:
        """Room for a gradient's average, which has seen nothing."""
        real = gradient.dtype.to_real() if gradient.is_complex() else gradient.dtype
        wide = torch.float64 if real == torch.float64 else torch.float32
        dtype = wide.to_complex() if gradient.is_complex() else wide
        nothing = complex(self._nothing, self._nothing) if gradient.is_complex() else self._nothing
        return torch.full_like(gradient, nothing, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)

    def _drop_plan(self) -> None:
        self._skipped = self._skipped + sum((filtering.skipped for _, filtering, _ in self._plan), start=0)
        self._plan, self._signature = [], None


def _mix(raw: Any, slow: Any, normalize: bool) -> tuple[float, float]:
    for name, value in (("raw", raw), ("slow", slow)):
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number; got {value!r}")
    if not normalize:
        return float(raw), float(slow)
    if raw + slow == 0.0:
        raise ValueError(
            f"normalize=True divides by raw + slow, which is 0 for raw={raw:g} and slow={slow:g}: a high-pass leaves "
            f"nothing of a constant gradient to normalize by. Leave normalize out."
        )
    return float(raw) / float(raw + slow), float(slow) / float(raw + slow)
