"""The optimizer's hooks: once per step that was taken, in every loop."""

from __future__ import annotations

import pytest
import torch
from tests.conftest import Small, train
from torch import Tensor, nn

import ewma
from ewma.hooks import around_steps, unwrap


class Counter:
    def __init__(self) -> None:
        self.before = 0
        self.after: list[bool] = []

    def follow(self, *optimizers):
        return around_steps(optimizers, self._before, lambda taken: self.after.append(bool(taken)))

    def _before(self) -> None:
        self.before += 1


def test_once_per_step_with_gradient_accumulation(small: Small, sgd) -> None:
    counter = Counter()
    counter.follow(sgd)
    for batch in range(8):
        small(torch.randn(4, 4)).sum().backward()
        if batch % 4 == 3:
            sgd.step()
            sgd.zero_grad()
    assert (counter.before, counter.after) == (2, [True, True])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused: bool) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counter = Counter()
    counter.follow(optimizer)
    for value in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((2, 4), value)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert counter.after == ([True, False, True] if fused else [True, True])


def test_several_optimizers_count_after_the_last() -> None:
    one, two = (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(2))
    counter = Counter()
    counter.follow(one, two)
    one.step()
    assert counter.after == []
    two.step()
    assert (counter.before, counter.after) == (2, [True])


def test_a_closure_and_lbfgs_count_once(small: Small) -> None:
    optimizer = torch.optim.LBFGS(small.parameters(), lr=0.1, max_iter=3)
    counter = Counter()
    counter.follow(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = small(torch.ones(4, 4)).pow(2).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert counter.after == [True]


class AccelerateLike(torch.optim.Optimizer):
    """As accelerate's wrapper: an Optimizer that never called its own constructor, so without hooks."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step()


class LightningLike:
    def __init__(self, optimizer) -> None:
        self._optimizer = optimizer


@pytest.mark.parametrize("wrapper", [AccelerateLike, LightningLike, lambda o: LightningLike(AccelerateLike(o))])
def test_wrapped_optimizers_are_unwrapped(sgd, wrapper) -> None:
    assert unwrap(wrapper(sgd)) is sgd
    counter = Counter()
    counter.follow(wrapper(sgd))
    sgd.step()
    assert counter.after == [True]


class LookaheadLike(torch.optim.Optimizer):
    """A wrapper that is an optimizer in its own right: its step ends after the inner one's."""

    def __init__(self, optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure=None):
        return self.optimizer.step()


def test_a_wrapper_with_hooks_of_its_own_is_not_unwrapped(sgd) -> None:
    wrapper = LookaheadLike(sgd)
    assert unwrap(wrapper) is wrapper
    counter = Counter()
    counter.follow(wrapper)
    wrapper.step()
    assert counter.after == [True]


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer; got Linear.*call ema.update\(\)"):
        unwrap(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"got none. Write ema.attach\(optimizer\)"):
        around_steps((), lambda: None, lambda taken: None)


def test_handles_remove_the_hooks(sgd) -> None:
    counter = Counter()
    for handle in counter.follow(sgd):
        handle.remove()
    sgd.step()
    assert (counter.before, counter.after) == (0, [])


def test_a_compiled_step_counts_and_averages(small: Small, sgd) -> None:
    plain_model = Small()
    plain_model.load_state_dict(small.state_dict())
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.05)
    ema = ewma.ModelEMA(small, half_life=3).attach(sgd)
    expected = ewma.ModelEMA(plain_model, half_life=3).attach(plain)
    compiled = torch.compile(lambda: sgd.step(), backend="eager")
    for _ in range(4):
        x = torch.randn(8, 4)
        for model, optimizer, step in ((small, sgd, compiled), (plain_model, plain, plain.step)):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            step()
    assert ema.count == 4
    for (_, mine), (_, theirs) in zip(ema.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_training_goes_on_as_without(small: Small) -> None:
    other = Small()
    other.load_state_dict(small.state_dict())
    one, two = (torch.optim.SGD(model.parameters(), lr=0.05) for model in (small, other))
    ewma.ModelEMA(small, half_life=3).attach(one)
    for model, optimizer in ((small, one), (other, two)):
        torch.manual_seed(1)
        train(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), other.parameters(), strict=True))
