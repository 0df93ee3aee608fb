"""SpikeGuard: what it cuts, what it lets through, and what it remembers, beside the definition in plain floats."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ewma import GradientEMA, ModelEMA
from ewma.gradients import SpikeGuard

DECAY = 0.5 ** (1 / 25)


def noise(count: int, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (0.1 * torch.randn(count, generator=generator, dtype=torch.float64)).exp().tolist()


def definition(values: list[float], log: bool, z: float = 6.0, warmup: int = 25) -> list[float]:
    """The factors, from sums over the whole past at every step."""
    heights: list[float] = []
    spread: list[float] = []  # what each step adds to the variance, relative to the mean before it
    factors = []
    mean = variance = 0.0
    for value in values:
        height = math.log(value) if log else value
        limit = mean + max(z * math.sqrt(variance), math.log(1.5) if log else 0.5 * abs(mean))
        cut = len(heights) >= warmup and height > limit
        factors.append((math.exp(limit - height) if log else limit / value) if cut else 1.0)
        heights.append(limit if cut else height)
        shares = [DECAY**age for age in range(len(heights))][::-1]
        total = sum(shares)
        step = heights[-1] - mean
        mean = sum(share * height for share, height in zip(shares, heights, strict=True)) / total
        if cut:  # no spread of its own: the deviation stays what it was
            spread = [variance * (1.0 - sum(share**2 for share in shares) / total**2)]
        else:
            share = 1.0 / total
            spread = [(1.0 - share) * (sum(spread) + share * step * step)]
        concentration = sum(share**2 for share in shares) / total**2
        variance = spread[0] / (1.0 - concentration) if len(heights) > 1 else 0.0
    return factors


@pytest.mark.parametrize("log", [False, True])
def test_factors_are_those_of_the_definition(log: bool) -> None:
    values = noise(200)
    for place, size in ((3, 1.5), (40, 3.0), (41, 50.0), (42, 1e6), (90, 1.4), (150, 4.0)):
        values[place] *= size
    guard = SpikeGuard(log=log)
    got = [guard.update(value) for value in values]
    assert got == pytest.approx(definition(values, log), rel=1e-9)
    assert [place for place, factor in enumerate(got) if factor < 1.0] == [40, 41, 42, 150]
    assert guard.clipped == 4


def test_nothing_is_cut_below_one_and_a_half_times_the_usual() -> None:
    guard = SpikeGuard()
    for _ in range(40):
        assert guard.update(2.0) == 1.0
    assert guard.update(2.99) == 1.0
    for _ in range(400):
        guard.update(2.0)
    assert guard.update(3.2) < 1.0
    assert guard.clipped == 1


def test_only_what_is_large_is_cut() -> None:
    guard = SpikeGuard()
    for _ in range(40):
        guard.update(2.0)
    assert [guard.update(value) for value in (1e-9, 0.0, -5.0, -1e9)] == [1.0] * 4


def test_the_warm_up_only_watches() -> None:
    guard = SpikeGuard(warmup=10)
    assert [guard.update(value) for value in (1.0, 1e9, 1.0, 1e6, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)] == [1.0] * 10
    guard = SpikeGuard(warmup=10)
    for _ in range(10):
        guard.update(1.0)
    assert guard.update(100.0) == pytest.approx(0.015)


@pytest.mark.parametrize("spacing", [10, 50])
def test_one_spike_does_not_make_room_for_the_next(spacing: int) -> None:
    guard = SpikeGuard(log=True)
    values = noise(1000)
    for value in values[:100]:
        guard.update(value)
    for step, value in enumerate(values[100:]):
        if step % spacing == 0:
            assert guard.update(100.0) < 0.5
        else:
            guard.update(value)


@pytest.mark.parametrize("log", [False, True])
def test_a_height_that_stays_is_followed(log: bool) -> None:
    guard = SpikeGuard(log=log)
    for value in noise(100):
        guard.update(value)
    factors = [guard.update(10.0 * value) for value in noise(400, seed=1)]
    assert factors[0] < 0.3
    assert factors[200:] == [1.0] * 200


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_never_enters(bad: float) -> None:
    one, other = SpikeGuard(), SpikeGuard()
    for value in noise(60):
        assert one.update(bad) == 1.0
        assert one.update(value) == other.update(value)
    assert one.update(50.0) == other.update(50.0) < 0.1
    assert (one.missing, one.count, other.missing) == (60, 61, 0)


class Elsewhere(Tensor):
    """A tensor that says it is on a device, and refuses to be waited for."""

    is_cpu = False  # type: ignore[assignment]

    def item(self) -> Any:
        raise AssertionError("waited for the device")

    __bool__ = __float__ = __int__ = tolist = item


def here(x: Any) -> float:
    return float(x.as_subclass(Tensor))


@pytest.mark.parametrize("log", [False, True])
def test_on_a_device_nothing_is_waited_for_and_all_is_the_same(log: bool) -> None:
    one, other = SpikeGuard(log=log), SpikeGuard(log=log)
    values = noise(120)
    values[10], values[50], values[80], values[81], values[90] = math.nan, 40.0, math.inf, 40.0, 0.0
    for value in values:
        factor = other.update(torch.tensor(value, dtype=torch.float64).as_subclass(Elsewhere))
        assert here(factor) == pytest.approx(one.update(value), rel=1e-12)
    for name in ("mean", "variance", "_clipped", "_missing"):
        assert here(getattr(other, name)) == pytest.approx(getattr(one, name), rel=1e-12)


def test_a_loss_is_a_tensor_or_a_number() -> None:
    for kind in (float, torch.tensor, lambda x: torch.tensor([x])):
        guard = SpikeGuard()
        for value in [1.0] * 30 + [6.0]:
            factor = guard.update(kind(value))
        assert factor == pytest.approx(0.25)


# ---- attached


def parameters_of(*gradients: Any, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(gradient), dtype=dtype)) for gradient in gradients]
    set_gradients(parameters, *gradients)
    return parameters


def set_gradients(parameters: list[nn.Parameter], *gradients: Any) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient, dtype=parameter.dtype)


def warm(optimizer: Any, parameters: list[nn.Parameter], *gradients: Any, steps: int = 30) -> None:
    for _ in range(steps):
        set_gradients(parameters, *gradients)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_attached_a_spike_is_scaled_back_before_the_step(dtype: torch.dtype) -> None:
    parameters = parameters_of([3.0], [0.0, 4.0], dtype=dtype)
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    guard = SpikeGuard().attach(optimizer)
    warm(optimizer, parameters, [3.0], [0.0, 4.0])
    set_gradients(parameters, [300.0], [0.0, 400.0])
    optimizer.step()
    got = torch.cat([parameter.grad.double() for parameter in parameters])
    torch.testing.assert_close(got, torch.tensor([4.5, 0.0, 6.0], dtype=torch.float64), rtol=4e-3, atol=0.0)
    guard.detach()
    set_gradients(parameters, [300.0], [0.0, 400.0])
    optimizer.step()
    assert parameters[0].grad.item() == 300.0
    assert (guard.clipped, guard.count) == (1, 31)


def test_the_norm_of_narrow_gradients_does_not_overflow() -> None:
    parameters = parameters_of([3e4] * 100, dtype=torch.float16)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    guard = SpikeGuard().attach(optimizer)
    optimizer.step()
    assert guard.mean == pytest.approx(math.log(3e5), rel=1e-4)


def test_gradients_that_are_no_numbers_are_left_to_the_optimizer() -> None:
    parameters = parameters_of([1.0])
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    guard = SpikeGuard().attach(optimizer)
    warm(optimizer, parameters, [1.0])
    set_gradients(parameters, [math.nan])
    optimizer.step()
    assert parameters[0].grad.isnan().all()
    assert (guard.missing, guard.clipped, guard.count) == (1, 0, 30)


def test_behind_a_closure() -> None:
    parameters = parameters_of([1.0])
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    SpikeGuard().attach(optimizer)

    def closure(size: float) -> float:
        set_gradients(parameters, [size])
        return size

    for size in [1.0] * 30 + [100.0]:
        assert optimizer.step(lambda size=size: closure(size)) == size
    assert parameters[0].grad.item() == pytest.approx(1.5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [100.0, math.nan, math.inf])
def test_a_skipped_step_moves_nothing(fused: bool, size: float) -> None:
    """A gradient of zero would: AdamW's momentum and its weight decay go on."""
    parameters = parameters_of([1.0, 1.0], [1.0])
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    guard = SpikeGuard().attach(optimizer, skip=True)
    warm(optimizer, parameters, [1.0, 1.0], [1.0])
    before = [parameter.detach().clone() for parameter in parameters]
    momentum = [optimizer.state[parameter]["exp_avg"].clone() for parameter in parameters]
    set_gradients(parameters, [size, size], [size])
    optimizer.step()
    for parameter, value, average in zip(parameters, before, momentum, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(optimizer.state[parameter]["exp_avg"], average)
        assert optimizer.state[parameter]["step"].item() == 30.0
    assert not hasattr(optimizer, "found_inf")
    set_gradients(parameters, [1.0, 1.0], [1.0])
    optimizer.step()
    assert not torch.equal(parameters[0], before[0])
    assert (guard.clipped, guard.missing) == ((1, 0) if math.isfinite(size) else (0, 1))


def test_a_gradient_of_zero_is_no_reason_to_skip() -> None:
    parameters = parameters_of([1.0])
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    guard = SpikeGuard().attach(optimizer, skip=True)
    warm(optimizer, parameters, [1.0])
    set_gradients(parameters, [0.0])
    optimizer.step()
    assert optimizer.state[parameters[0]]["step"].item() == 31.0
    assert (guard.missing, guard.count) == (0, 30)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_under_grad_scaler_the_unscaled_norm_counts(fused: bool, skip: bool) -> None:
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    guard = SpikeGuard().attach(optimizer, skip=skip)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=7)  # the scale grows: no spike is made of it
    for size in [0.5] * 30 + [math.inf, 50.0]:
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(model(torch.full((1, 4), size)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    moved = (before - model.weight.detach()).tolist()
    assert moved == [[0.0] * 4] if skip else moved[0] == pytest.approx([0.75] * 4, rel=1e-5)
    assert (guard.count, guard.clipped) == (31, 1)
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("fused", [False, True])
def test_before_a_filter_a_skipped_step_is_not_averaged(fused: bool) -> None:
    parameters = parameters_of([1.0])
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    SpikeGuard().attach(optimizer, skip=True)
    ema = GradientEMA(optimizer, half_life=10.0)
    warm(optimizer, parameters, [1.0])
    set_gradients(parameters, [100.0])
    optimizer.step()
    assert dict(ema.named_gradients())["0.0"].item() == 1.0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("guard_first", [False, True])
def test_a_skipped_step_does_not_count_whatever_was_attached_first(fused: bool, guard_first: bool) -> None:
    model = nn.Linear(1, 1, bias=False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    guard, ema = SpikeGuard(), ModelEMA(model, half_life=10.0)
    if guard_first:
        guard.attach(optimizer, skip=True)
    ema.attach(optimizer)
    if not guard_first:
        guard.attach(optimizer, skip=True)
    filtering = GradientEMA(optimizer, half_life=10.0)
    warm(optimizer, parameters, [[1.0]])
    average = dict(ema.named_parameters())["weight"].clone()
    for size in (100.0, math.nan):
        set_gradients(parameters, [[size]])
        optimizer.step()
    assert (ema.count, filtering.count) == (30, 30)
    assert torch.equal(dict(ema.named_parameters())["weight"], average)
    guard.detach()
    set_gradients(parameters, [[100.0]])
    optimizer.step()
    assert (ema.count, filtering.count) == (31, 31)


def test_a_step_that_breaks_off_leaves_nothing_behind() -> None:
    parameters = parameters_of([1.0])
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    SpikeGuard().attach(optimizer, skip=True)
    warm(optimizer, parameters, [1.0])

    def breaks(*anything: Any) -> None:
        raise ValueError("broken off")

    handle = optimizer.register_step_pre_hook(breaks)
    set_gradients(parameters, [100.0])
    with pytest.raises(ValueError, match="broken off"):
        optimizer.step()
    handle.remove()
    before = parameters[0].detach().clone()
    set_gradients(parameters, [1.0])
    optimizer.step()
    assert not torch.equal(parameters[0], before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_goes_on_unattached(duplicate: Callable[[Any], Any]) -> None:
    parameters = parameters_of([1.0])
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    guard = SpikeGuard().attach(optimizer)
    warm(optimizer, parameters, [1.0])
    twin = duplicate(guard)
    set_gradients(parameters, [1.0])
    optimizer.step()
    assert (twin.count, guard.count) == (30, 31)
    twin.attach(optimizer)


def test_sparse_gradients_are_watched_too() -> None:
    table = nn.Embedding(5, 1, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.0)
    guard = SpikeGuard().attach(optimizer)
    for size in [1.0] * 30 + [100.0]:
        optimizer.zero_grad()
        (size * table(torch.tensor([1, 1, 3]))).sum().backward()
        optimizer.step()
    assert guard.mean == pytest.approx(math.log(5.0) / 2, abs=0.02)
    torch.testing.assert_close(
        table.weight.grad.to_dense().flatten(), torch.tensor([0.0, 3.0, 0.0, 1.5, 0.0]), rtol=1e-5, atol=0.0
    )


# ---- states and errors


def test_a_saved_guard_goes_on_without_a_warm_up(tmp_path: Any) -> None:
    values = noise(80)
    values[20], values[60] = math.nan, 30.0
    whole, first, second = SpikeGuard(), SpikeGuard(), SpikeGuard()
    right = [whole.update(value) for value in values]
    got = [first.update(value) for value in values[:50]]
    torch.save(first.state_dict(), tmp_path / "guard.pt")
    second.load_state_dict(torch.load(tmp_path / "guard.pt", weights_only=True))
    assert got + [second.update(value) for value in values[50:]] == right
    assert (second.clipped, second.missing, second.count) == (whole.clipped, whole.missing, whole.count) == (1, 1, 79)
    with pytest.raises(ValueError, match=r"saved with Exponential\(half_life=25\), but this guard has Exponential\("):
        SpikeGuard(decay=0.9).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="the state is not whole, it lacks 'mean'"):
        second.load_state_dict({name: value for name, value in first.state_dict().items() if name != "mean"})


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: SpikeGuard(z=0.0), ValueError, "z must be a finite number above 0, of standard deviations; got 0.0"),
        (lambda: SpikeGuard(z=math.nan), ValueError, "z must be a finite number above 0, of standard deviations"),
        (lambda: SpikeGuard(warmup=1), ValueError, "warmup must be a whole number of values, 2 or more .*; got 1"),
        (lambda: SpikeGuard(half_life=0.0), ValueError, "half_life must be"),
        (lambda: SpikeGuard(half_life=2.0, decay=0.5), TypeError, "exactly one of half_life, decay"),
        (lambda: SpikeGuard().update("1"), TypeError, "expected a number or a tensor of one element; got str"),
        (
            lambda: SpikeGuard().update(torch.ones(2, 3)),
            ValueError,
            r"expected one number, a loss or a norm; got a tensor of shape \[2, 3\]\. Reduce it first: guard\.update\(",
        ),
        (lambda: SpikeGuard().attach(nn.Linear(1, 1)), TypeError, r"expected a torch\.optim\.Optimizer; got Linear"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_a_guard_watches_one_optimizer_at_a_time() -> None:
    optimizer = torch.optim.SGD(parameters_of([1.0]), lr=0.0)
    guard = SpikeGuard().attach(optimizer)
    with pytest.raises(RuntimeError, match=r"attached already; call guard\.detach\(\) before attaching it elsewhere"):
        guard.attach(optimizer)
    guard.detach()
    guard.attach(optimizer)


# ---- on a real task


def accuracy(corrupt: bool, guarded: bool, seed: int, scale: float = 1.0) -> tuple[float, int, int]:
    """In percent, of digits never seen, after 600 steps; how many steps were cut, and how many batches corrupted.

    A corrupted batch has pixels of random sign, a thousand times too large.
    """
    pixels, labels = (torch.tensor(each) for each in load_digits(return_X_y=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    pixels, labels = pixels[order].float() / 16, labels[order]
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.125, 0.125, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03 / scale, momentum=0.9)
    guard = SpikeGuard().attach(optimizer) if guarded else None
    corrupted = 0
    for step in range(600):
        batch = torch.randint(0, 1400, (64,), generator=generator)
        seen = pixels[batch]
        if corrupt and step >= 25 and torch.rand((), generator=generator) < 0.02:
            seen, corrupted = 1000 * seen * torch.randn(seen.shape, generator=generator), corrupted + 1
        optimizer.zero_grad()
        (scale * nn.functional.cross_entropy(model(seen), labels[batch])).backward()
        optimizer.step()
    with torch.no_grad():
        right = model(pixels[1400:]).argmax(1) == labels[1400:]
    return 100 * float(right.double().mean()), guard.clipped if guard else 0, corrupted


def test_corrupted_batches_do_not_harm_a_guarded_run() -> None:
    seeds = range(4)
    clean, watched, harmed, guarded = (
        [accuracy(corrupt, guard, seed) for seed in seeds]
        for corrupt, guard in ((False, False), (False, True), (True, False), (True, True))
    )
    assert watched == clean  # zero cuts, and the very same weights
    mean = [sum(run[0] for run in runs) / len(runs) for runs in (clean, harmed, guarded)]
    assert mean[0] > 94.0
    assert mean[1] < mean[0] - 20.0
    assert mean[2] > mean[0] - 1.0
    assert all(cut == corrupted > 3 for _, cut, corrupted in guarded)
    for scale in (100.0, 0.01):
        for seed in seeds:
            scaled = accuracy(True, True, seed, scale)
            assert scaled[1:] == guarded[seed][1:]
            assert scaled[0] == pytest.approx(guarded[seed][0], abs=1.0)
