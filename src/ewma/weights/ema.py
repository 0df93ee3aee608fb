"""Job 2: averaged weights of a model, updated after every optimizer step."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ewma import hooks, profiles
from ewma.profiles import Profile
from ewma.recurrence import check_elapsed
from ewma.shards import reshard
from ewma.tracks import Track, capturing
from ewma.weights import resharding, states, swapping
from ewma.weights.binding import Binding, Policy
from ewma.weights.ranks import How, Ranks
from ewma.weights.states import WhichProfile, one_of
from ewma.weights.views import Readable, View


class ModelEMA(Readable):
    """Exponential moving average of a model's weights.

        average' = average + c * (weight - average)        c = gain / weight of the profile, see `ewma.profiles`

    Attach it to the optimizer and it updates itself after every step; put the averages into the model to evaluate:

        ema = ewma.ModelEMA(model, half_life=2_000).attach(optimizer)
        ...
        with ema.swapped():
            validate(model)

    Args:
        model: any nn.Module; before or after `.to()`, `torch.compile`, DDP, `fully_shard` and `parallelize_module`, or
            still on meta. Nothing is read from it before the first update. Of what is sharded, each rank averages its
            part, and an update communicates nothing.
        profile: a profile, or several by name: {"fast": Exponential(half_life=500), "wide": Power(sigma_rel=.1)}.
            They share one pass over the weights; `ema["wide"]` is the view of one.
        half_life, decay, alpha, span, com: instead of `profile`, exactly one (see `Exponential`), in `elapsed`'s unit.
        debias: False starts at the first weights seen as if they had always been there.
        dtype: of the averages. "auto" keeps float32 and float64 and averages 16-bit weights in float32;
            torch.bfloat16 halves the memory and rounds stochastically: unbiased, with noise of one part in 250. So
            does torch.float16, with one part in 2,000; but it holds nothing beyond 65,504 (such a weight counts as not
            finite), and below 6e-5 its noise is 6e-8 whatever the weight.
        device: of the averages; by default where each parameter is. "cpu" keeps those of weights on an accelerator in
            pinned host memory, and copies and averages beside the training (docs/weights.md).
        buffers: what becomes of floating buffers such as BatchNorm statistics: "copy" the newest, "average" them, or
            "leave" them out. Integers and bools are always copied.
        only: which parameters to average: globs over canonical names ("blocks.*", or a list), or a predicate
            (name, parameter) -> bool; a tied weight counts if any of its names does. What is left out stays raw in
            `swapped` and is saved raw. A predicate is asked again when parameters come, go or are unfrozen; what it has
            selected once stays so.
        nonfinite: "skip" leaves an average alone where the weight is NaN or infinite, and counts that in `skipped`;
            "propagate" does not look, which is a little faster.
        capturable: keep time, weight and count on the device, as a CUDA graph needs.
        ranks: where DDP or FSDP train on several ranks: what buffers are made to be on all of them when averages are
            read. "first": what they are on the first rank; "average": their mean (integers: the first's). "alone": this
            rank keeps averages for itself; the others need not even have any.
        group: the process group of those ranks, where the model does not tell: one that is wrapped in DDP elsewhere.
        seed: of the random bits of stochastic rounding, which are a pure function of (seed, count, name, element).

    A half-life of 2,000 steps: a step's weight halves every 2,000 updates, and about 7 % of the average is older than
    7,700. Tied weights are averaged once, frozen ones too; a parameter that appears late starts then.

    Source: Polyak and Juditsky 1992; with a debiased start as in Adam. Beside it: `torch.optim.swa_utils.AveragedModel`
    keeps a second module and goes by position; here averages go by name, and the model stays one.

    >>> model = nn.Linear(2, 1)
    >>> ema = ModelEMA(model, half_life=10)
    >>> ema.update()
    >>> with ema.swapped():
    ...     prediction = model(torch.zeros(1, 2))
    """

    def __init__(
        self,
        model: nn.Module,
        profile: Profile | Mapping[str, Profile] | None = None,
        *,
        half_life: float | None = None,
        decay: float | None = None,
        alpha: float | None = None,
        span: float | None = None,
        com: float | None = None,
        debias: bool = True,
        dtype: torch.dtype | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        buffers: Literal["copy", "average", "leave"] = "copy",
        only: str | Sequence[str] | Callable[[str, Tensor], bool] | None = None,
        nonfinite: Literal["skip", "propagate"] = "skip",
        capturable: bool = False,
        ranks: How = "first",
        group: Any = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"ModelEMA averages an nn.Module; got {type(model).__name__}. For a tensor or a dict of tensors use "
                f"ewma.EMA."
            )
        if next(model.parameters(), None) is None:
            raise ValueError(f"{type(model).__name__} has no parameters to average; build its layers first")
        if dtype not in ("auto", torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(
                f'dtype must be "auto", torch.float32, torch.float64, torch.bfloat16 or torch.float16; got {dtype!r}'
            )
        if not (only is None or isinstance(only, str | Sequence) or callable(only)):
            raise TypeError(
                f'only must be globs like "blocks.*", or a function (name, parameter) -> bool; got {only!r}'
            )
        if not isinstance(seed, int):
            raise TypeError(f"seed must be a whole number; got {seed!r}")
        one_of("buffers", buffers, ("copy", "average", "leave"))
        one_of("nonfinite", nonfinite, ("skip", "propagate"))
        one_of("ranks", ranks, ("first", "average", "alone"))
        knobs = {"half_life": half_life, "decay": decay, "alpha": alpha, "span": span, "com": com}
        several = profile if isinstance(profile, Mapping) and profile else {"average": profile}
        if unnamed := [name for name in several if not isinstance(name, str)]:
            raise TypeError(
                f'several profiles go by names, {{"fast": Exponential(half_life=500)}}; got {unnamed[0]!r} as one'
            )
        self.tracks = {
            name: Track(profiles.resolve("ModelEMA(model, ", each, debias, **knobs)) for name, each in several.items()
        }
        self.model = model
        self.policy = Policy(
            dtype=dtype,
            device=None if device is None else torch.device(device),
            buffers=buffers,
            only=[only] if isinstance(only, str) else only,
            guard=nonfinite == "skip",
            capturable=capturable,
        )
        self.ranks = Ranks(ranks, group)
        self.seed = seed
        self.run = secrets.token_hex(8)
        self.copies: dict[str, Tensor] = {}
        self._binding: Binding | None = None
        self._skipped: Any = 0
        self._handles: list[RemovableHandle] = []
        self._steps = 0
        self._waiting: Any = 0.0
        self._waiting_at_most = 0.0

    def __getitem__(self, name: str) -> View:
        """The averages of one of several profiles, by its name."""
        if name not in self.tracks:
            raise KeyError(f"no profile is called {name!r}; there are {', '.join(map(repr, self.tracks))}")
        return View(self, name)

    def __repr__(self) -> str:
        told = [repr(track.profile) for track in self.tracks.values()]
        return f"ModelEMA({type(self.model).__name__}, {', '.join(told)}, count={self.count})"

    @property
    def skipped(self) -> int:
        """How many elements were left out of an update so far, being NaN or infinite. Waits for the device."""
        return int(self._skipped + (self._binding.skipped() if self._binding else 0))

    @property
    def updated(self) -> bool:
        """Whether any of the profiles has averaged anything yet."""
        return any(track.updated for track in self.tracks.values())

    def update(self, elapsed: float = 1.0) -> None:
        """Take in the weights as they are now.

        Args:
            elapsed: what has passed since the last update, in the half-life's unit: 1 step; k, when updating every
                k-th step; the batch's samples; seconds.

        Nothing waits for the device and nothing of the model's size is allocated, save at the first update.
        """
        self._update(check_elapsed(elapsed), float(elapsed))

    def attach(self, *optimizers: Any, every: int = 1, elapsed: float | Callable[[], float] = 1.0) -> Self:
        """Update after each optimizer step from now on; with several optimizers, after the last one's. Returns self.

        Args:
            optimizers: torch optimizers, or accelerate's or Lightning's wrappers of them.
            every: update at every k-th step only, with k steps' worth of elapsed: the horizon stays the same.
            elapsed: what one step counts for: 1, the batch size to count in samples, or a function that tells.

        Gradient accumulation needs nothing; a step that GradScaler skips, fused or not, or SpikeGuard, does not count.
        """
        if self._handles:
            raise RuntimeError("this ModelEMA is attached already; call ema.detach() before attaching it elsewhere")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of steps, 1 or more; got {every!r}")

        def after_step(taken: Any) -> None:
            if every > 1 and capturing():
                raise RuntimeError(
                    f"a CUDA graph is being captured, and every={every} counts steps on the host, which replays do "
                    f"not. Attach with every=1; or do not attach, and call ema.update(elapsed={every}) beside it."
                )
            amount = check_elapsed(elapsed() if callable(elapsed) else elapsed)
            self._waiting = self._waiting + (amount if taken is True else taken.double() * amount)
            self._waiting_at_most += amount
            self._steps += 1
            if self._steps >= every:
                waiting, at_most = self._waiting, self._waiting_at_most
                self._start_waiting()
                self._update(waiting, at_most)

        if not callable(elapsed):
            check_elapsed(elapsed)
        self.agree("ema.attach")
        self._handles = hooks.around_steps(optimizers, self._before_step, after_step)
        return self

    def detach(self) -> None:
        """Stop following the optimizer. The averages stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._hold()

    def reset(self) -> None:
        """Forget everything: the next update is the first."""
        self.refuse_if_swapped()
        self.settle()
        for track in self.tracks.values():
            track.restart()
        self.policy.selected.clear()
        self._binding, self._skipped = None, 0
        self.run = secrets.token_hex(8)
        self._start_waiting()

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming bit for bit needs: tensors, numbers and strings only, all profiles in one.

        The tensors are the averages themselves, as in torch's own state dicts. With it a ModelEMA is `Stateful`, which
        torch.distributed.checkpoint saves and loads as it is (docs/sharded.md). Written while the averages are swapped
        in, it also holds the raw weights, and `load_state_dict` puts those back into the model.
        """
        return states.collect(self)

    def load_state_dict(self, state: Mapping[str, Any], profile: WhichProfile = None) -> None:
        """Resume from what `state_dict` gave; nothing changes unless all of it fits.

        Args:
            state: also as `torch.load(path, weights_only=True)` reads it, also of a model that was compiled or in DDP.
                Load the model's own state first: one written inside `swapped()` holds the averages, and the raw weights
                that come with it here put that right.
            profile: what to do where the saved profile is another one than here: by default an error that names both;
                "saved" takes the saved one, "mine" keeps this one with the saved averages.
        """
        self.refuse_if_swapped()
        states.restore(self, state, profile)

    def load(
        self, path: str | os.PathLike[str], profile: WhichProfile = None, *, patience: float | None = None
    ) -> None:
        """Resume from a file that `save` wrote, or from a folder that torch.distributed.checkpoint wrote.

            torch.distributed.checkpoint.save({"model": ..., "ema": ema}, checkpoint_id=folder)
            ema.load(folder)                # on any number of ranks, or in one process alone

        Averages, clocks and copied buffers; of a file the first profile's, of a folder all profiles'. The model is not
        touched, save where the folder was written inside `swapped()`: then it gets its raw weights back.

        Args:
            profile: what to do where the saved profile is another one than here: by default an error that names both;
                "saved" takes the saved one, "mine" keeps this one with the saved averages.
            patience: for how many seconds ranks wait for each other before an error says which one is missing.

        On several ranks a folder is loaded by all of them together. Everything is checked first, and what is wrong on
        one rank is an error on all; until then nothing has changed.
        """
        if os.path.isdir(path) or (self.ranks.together and not os.path.exists(path)):
            self.refuse_if_swapped()
            resharding.load(self, path, profile, patience)
        else:
            super().load(path, profile)

    def resumed(self, state: Mapping[str, Any]) -> None:
        """Go on with the numbers of a state whose averages have been taken over."""
        self.seed = state["seed"]
        self.run = state.get("run", self.run)
        self._skipped = state["skipped"]
        self._steps, self._waiting = state["steps"], state["waiting"]
        self._waiting_at_most = state["waiting_at_most"]
        self._binding = None
        self.ranks.apart = True

    def step_state(self) -> dict[str, Any]:
        """What `attach(every=k)` has gathered since the last update."""
        return {"steps": self._steps, "waiting": float(self._waiting), "waiting_at_most": self._waiting_at_most}

    def bind(self) -> Binding:
        """The model's tensors as they are now, each with its average; before the first update a copy of the weights."""
        if torch.compiler.is_compiling():
            binding: Binding = torch.compiler.disable(self.bind)()
            return binding
        with torch.inference_mode(False), torch.no_grad():
            binding = self._rebind_if_moved()
            binding.settle()
            if swapping.raw_weights(self.model) is None:
                for track in self.tracks.values():
                    if not track.updated:
                        for named in binding.averaged:
                            self.policy.fill(track.averages[named.name], named.tensor)
                if not self.updated:
                    for named in binding.copied:
                        self.copies[named.name].copy_(named.tensor)
            if self.ranks.apart:
                self.ranks.share("reading averages", self.model, self._settings(), binding.buffers())
                self.ranks.apart = not self.updated
        return binding

    def agree(self, what: str) -> None:
        """Raise on every rank where they were made with different settings, or one does not come. Collective."""
        self.ranks.agree(what, self.model, self._settings())

    def refuse_if_swapped(self, model: nn.Module | None = None) -> None:
        if swapping.raw_weights(self.model if model is None else model) is not None:
            raise RuntimeError(
                "the averages are in the model (inside swapped()), so there are no raw weights to train, average or "
                "overwrite now. Leave the with block first; only evaluate inside it."
            )

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle is not attached to anything: optimizers drop their hooks likewise."""
        self.refuse_if_swapped()
        self.settle()
        return {**self.__dict__, "_skipped": self.skipped, "_binding": None, "_handles": []}

    def _settings(self) -> dict[str, Any]:
        profiles = {f"profile {name!r}": repr(track.profile) for name, track in self.tracks.items()}
        return {**profiles, **self.policy.told(), "ranks": self.ranks.how, "seed": self.seed}

    def _read(self) -> tuple[ModelEMA, Track]:
        return self, next(iter(self.tracks.values()))

    def settle(self) -> None:
        """Wait until averages in host memory hold the last update. All that reads or writes them does."""
        if self._binding is not None:
            self._binding.settle()

    def _before_step(self) -> None:
        self.refuse_if_swapped()
        self._hold()

    def _hold(self) -> None:
        if self._binding is not None:
            self._binding.hold()

    def _start_waiting(self) -> None:
        self._steps, self._waiting, self._waiting_at_most = 0, 0.0, 0.0

    def _update(self, elapsed: Any, at_most: float) -> None:
        if torch.compiler.is_compiling():  # nothing here is part of anybody's graph
            torch.compiler.disable(self._update)(elapsed, at_most)
            return
        self.refuse_if_swapped()
        self.ranks.apart = True
        binding = self._binding
        if binding and not binding.begun:
            binding = self._binding = None
        if binding and binding.free and isinstance(elapsed, float) and not binding.moved():
            binding.run(elapsed, at_most, self.seed)
            return
        # Averages made or written in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._rebind_if_moved().run(elapsed, at_most, self.seed)
            if not self._handles:  # nobody tells when the weights change next
                self._hold()

    def _rebind_if_moved(self) -> Binding:
        if self._binding is not None and self._binding.moved():
            reshard(self.model)
        if self._binding is None or self._binding.moved():
            if self._binding is not None:
                self._binding.settle()
                self._skipped = self._skipped + self._binding.skipped()
            self._binding = None
            self._binding = Binding(self.model, self.policy, list(self.tracks.values()), self.copies)
        return self._binding
