"""GradientEMA in every training loop, beside values worked out by hand."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ewma
from ewma import GradientEMA, kernels
from ewma.gradients import NoiseScale

SLOW: dict[str, Any] = {"decay": 0.98, "raw": 1.0, "slow": 2.0}  # of a constant gradient 1: exactly 3 at every step


class Recorder(torch.optim.Optimizer):
    """An optimizer that keeps what it gets to see, and moves nothing."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.got: list[list[Tensor | None]] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.got.append([None if p.grad is None else p.grad.detach().clone() for p in parameters])
        return loss


def weights(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]


def step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], *values: Any) -> list[Tensor | None]:
    """One step with these gradients; what the optimizer got."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = None if value is None else torch.full_like(parameter, value)
    optimizer.step()
    return optimizer.got[-1]


def debiased(values: list[float], decay: float = 0.98) -> float:
    shares = [decay**age for age in range(len(values))][::-1]
    return sum(share * value for share, value in zip(shares, values, strict=True)) / sum(shares)


def test_each_filter_is_its_formula() -> None:
    for raw, slow in ((0.0, 1.0), (1.0, 2.0), (0.25, 0.75), (1.0, -1.0), (1.0, 0.0)):
        [p] = parameters = weights(3)
        optimizer = Recorder(parameters)
        GradientEMA(optimizer, decay=0.98, raw=raw, slow=slow)
        seen: list[float] = []
        for value in (1.0, -2.0, 4.0, 0.5):
            seen.append(value)
            [got] = step(optimizer, parameters, value)
            torch.testing.assert_close(got, torch.full_like(p, raw * value + slow * debiased(seen)))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_constant_gradient_is_tripled_at_every_step(set_to_none: bool) -> None:
    [p] = parameters = weights(5)
    optimizer = Recorder(parameters)
    GradientEMA(optimizer, **SLOW)
    for _ in range(6):
        p.sum().backward()
        optimizer.step()
        assert optimizer.got[-1][0].tolist() == [3.0] * 5
        optimizer.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_behind_a_closure(by_keyword: bool) -> None:
    [p] = parameters = weights(5)
    optimizer = Recorder(parameters)
    GradientEMA(optimizer, **SLOW)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss + 7.0

    for _ in range(4):
        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert loss.item() == 7.0
        assert optimizer.got[-1][0].tolist() == [3.0] * 5


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_real_optimizers_with_closures_see_it(kind: Any) -> None:
    [p] = parameters = weights(2)
    optimizer = kind(parameters, lr=0.5)
    GradientEMA(optimizer, **SLOW)

    def closure() -> Tensor:
        optimizer.zero_grad()
        p.sum().backward()
        return p.sum()

    optimizer.step(closure)
    assert p.grad.tolist() == [3.0, 3.0]


def test_gradient_accumulation_counts_steps() -> None:
    [p] = parameters = weights(5)
    optimizer = Recorder(parameters)
    ema = GradientEMA(optimizer, **SLOW)
    for batch in range(8):
        (p.sum() / 4).backward()
        if batch % 4 == 3:
            optimizer.step()
            assert optimizer.got[-1][0].tolist() == [3.0] * 5
            optimizer.zero_grad()
    assert ema.count == 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscales", [False, True])
def test_under_grad_scaler_with_a_step_that_overflows(fused: bool, unscales: bool) -> None:
    model = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(model.weight)  # so that what is subtracted from it is seen exactly
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
    ema = GradientEMA(optimizer, model, **SLOW)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for value, taken in ((1.0, True), (math.inf, False), (1.0, True), (1.0, True)):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(model(torch.full((1, 4), value)).sum()).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved = before - model.weight.detach()
        assert moved.tolist() == [[3.0 if taken else 0.0] * 4]
    assert ema.count == 3
    assert ema.skipped == 0
    assert dict(ema.named_gradients())["weight"].tolist() == [[1.0] * 4]


def test_clipping_before_and_after() -> None:
    [p] = parameters = weights(4)
    optimizer = Recorder(parameters)
    GradientEMA(optimizer, **SLOW)
    p.grad = torch.full_like(p, 5.0)
    nn.utils.clip_grad_norm_(parameters, 2.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.got[-1][0], torch.full_like(p, 3.0))  # clipped to 1 each, then amplified
    by_hand = GradientEMA(second := Recorder(parameters), hook=False, **SLOW)
    p.grad = torch.full_like(p, 5.0)
    by_hand.apply()
    assert p.grad.tolist() == [15.0] * 4
    nn.utils.clip_grad_norm_(parameters, 2.0)
    second.step()
    torch.testing.assert_close(second.got[-1][0], torch.ones(4))
    assert by_hand.count == 1


def test_each_parameter_has_a_time_of_its_own() -> None:
    """Frozen, unfrozen late, and experts that only some steps use."""
    parameters = weights(2, 3, 4)
    optimizer = Recorder(parameters)
    ema = GradientEMA(optimizer, decay=0.98)
    steps = [(1.0, None, None), (2.0, 5.0, None), (3.0, None, 7.0), (4.0, 6.0, None), (5.0, 8.0, 9.0), (6.0, None, 1.0)]
    seen: list[list[float]] = [[], [], []]
    for values in steps:
        got = step(optimizer, parameters, *values)
        for history, value, result in zip(seen, values, got, strict=True):
            if value is None:
                assert result is None
            else:
                history.append(value)
                torch.testing.assert_close(result, torch.full_like(result, debiased(history)))
    assert ema.count == 6
    averages = dict(ema.named_gradients())
    for name, history in zip(("0.0", "0.1", "0.2"), seen, strict=True):
        torch.testing.assert_close(averages[name], torch.full_like(averages[name], debiased(history)))


def test_the_power_profile_of_a_late_parameter_is_right_from_there_on() -> None:
    parameters = weights(1, 1)
    optimizer = Recorder(parameters)
    profile = ewma.Power(sigma_rel=0.1)
    GradientEMA(optimizer, profile=profile)
    kept = [profile.step(t, 1.0)[0] for t in range(1, 7)]
    weight, mean = 0.0, 0.0
    for t in range(1, 7):
        got = step(optimizer, parameters, 1.0, float(t) if t > 3 else None)
        if t > 3:
            weight = kept[t - 1] * weight + (1 - kept[t - 1])
            mean += (1 - kept[t - 1]) / weight * (t - mean)
            assert got[1].item() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("raw", [0.0, 1.0])
def test_what_is_not_finite_is_counted_and_never_enters(raw: float) -> None:
    [p] = parameters = weights(3)
    optimizer = Recorder(parameters)
    ema = GradientEMA(optimizer, decay=0.5, raw=raw, slow=1.0)
    gradients = [[1.0, 1.0, math.nan], [math.nan, math.inf, 2.0], [1.0, 1.0, 2.0]]
    for gradient in gradients:
        p.grad = torch.tensor(gradient)
        optimizer.step()
    assert ema.skipped == 3
    assert dict(ema.named_gradients())["0.0"].tolist() == [1.0, 1.0, 2.0]
    first, second, third = (got[0] for got in optimizer.got)
    assert first[2].isnan()  # nothing is known that could stand for it
    if raw:
        assert not second[:2].isfinite().any()  # as the optimizer would have seen it
    else:
        assert second[:2].tolist() == [1.0, 1.0]
    assert third.tolist() == [raw + 1.0, raw + 1.0, 2.0 * raw + 2.0]


@pytest.mark.parametrize("squares", [False, True])
def test_propagated_what_is_not_finite_stays(squares: bool) -> None:
    [p] = parameters = weights(2)
    optimizer = Recorder(parameters)
    ema = GradientEMA(optimizer, nonfinite="propagate", squares=squares, **SLOW)
    for _ in range(3):
        assert step(optimizer, parameters, 1.0)[0].tolist() == [3.0, 3.0]
    p.grad = torch.tensor([math.nan, 1.0])
    optimizer.step()
    assert optimizer.got[-1][0].isnan().tolist() == [True, False]
    assert step(optimizer, parameters, 1.0)[0].isnan().tolist() == [True, False]
    assert ema.skipped == 0
    if squares:
        assert ema.squares["0.0"].isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_have_wide_averages(dtype: torch.dtype) -> None:
    parameters = weights(4, dtype=dtype)
    optimizer = Recorder(parameters)
    ema = GradientEMA(optimizer, **SLOW)
    for _ in range(3):
        [got] = step(optimizer, parameters, 1.0)
        assert (got.dtype, got.tolist()) == (dtype, [3.0] * 4)
    ema = GradientEMA(optimizer := Recorder(parameters), decay=0.9999)
    for value in (1.0, 1.0 + 2.0**-7):
        step(optimizer, parameters, value)
    average = dict(ema.named_gradients())["0.0"]
    assert average.dtype == torch.float32
    assert average[0].item() == pytest.approx(1.0 + 2.0**-7 / 1.9999, rel=1e-7)


def test_complex_gradients_are_averaged_by_their_parts() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = Recorder([p])
    GradientEMA(optimizer, **SLOW)
    for _ in range(3):
        p.grad = torch.full_like(p, 1.0 - 2.0j)
        optimizer.step()
        assert optimizer.got[-1][0].tolist() == [3.0 - 6.0j] * 3


def test_a_gradient_whose_memory_is_its_conjugate() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = Recorder([p])
    GradientEMA(optimizer, **SLOW)
    for _ in range(2):
        p.grad = torch.full_like(p, 1 - 2j).conj()
        optimizer.step()
        torch.testing.assert_close(optimizer.got[-1][0], torch.full_like(p, 3 + 6j))


def test_what_complex_gradients_tell_is_that_of_their_parts() -> None:
    wave, parts = nn.Parameter(torch.zeros(3, dtype=torch.complex64)), nn.Parameter(torch.zeros(3, 2))
    told = []
    for parameter in (wave, parts):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        ema = GradientEMA(optimizer, half_life=3, raw=1.0, slow=0.0, squares=True)
        for _ in range(5):
            gradient = torch.randn(3, 2)
            parameter.grad = torch.view_as_complex(gradient) if parameter is wave else gradient
            optimizer.step()
        told.append(torch.stack([ema.snr()["0.0"], ema.noise_scale(4), ema.norm()]))
    torch.testing.assert_close(*told)


def test_sparse_gradients_are_an_error_or_made_dense() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = Recorder(table.parameters())
    refuses = GradientEMA(optimizer, table, **SLOW)
    table(torch.tensor([1, 3])).sum().backward()
    text = (
        'weight: its gradient is sparse, .* as large as the parameter. Pass sparse="densify" if that is meant, or leave'
    )
    with pytest.raises(TypeError, match=text):
        optimizer.step()
    refuses.detach()
    GradientEMA(optimizer, table, sparse="densify", **SLOW)
    optimizer.step()
    assert optimizer.got[-1][0].tolist() == [[0.0] * 2, [3.0] * 2, [0.0] * 2, [3.0] * 2, [0.0] * 2]


def test_a_group_may_be_left_alone() -> None:
    parameters = weights(2, 2)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "gradient_ema": False}]
    optimizer = Recorder(groups)
    GradientEMA(optimizer, **SLOW)
    one, other = step(optimizer, parameters, 1.0, 1.0)
    assert (one.tolist(), other.tolist()) == ([3.0, 3.0], [1.0, 1.0])
    optimizer.param_groups[1]["gradient_ema"] = True
    assert step(optimizer, parameters, 1.0, 1.0)[1].tolist() == [3.0, 3.0]


def test_start_only_watches_at_first() -> None:
    parameters = weights(2)
    optimizer = Recorder(parameters)
    GradientEMA(optimizer, start=2, **SLOW)
    assert [step(optimizer, parameters, 1.0)[0][0].item() for _ in range(4)] == [1.0, 1.0, 3.0, 3.0]


def test_normalized_a_constant_gradient_stays() -> None:
    parameters = weights(2)
    optimizer = Recorder(parameters)
    ema = GradientEMA(optimizer, decay=0.98, raw=1.0, slow=3.0, normalize=True)
    assert (ema.raw, ema.slow) == (0.25, 0.75)
    assert step(optimizer, parameters, 2.0)[0].tolist() == [2.0, 2.0]


def test_detached_and_after_the_with_gradients_are_left_alone() -> None:
    parameters = weights(2)
    optimizer = Recorder(parameters)
    with GradientEMA(optimizer, **SLOW) as ema:
        assert step(optimizer, parameters, 1.0)[0][0].item() == 3.0
    assert step(optimizer, parameters, 1.0)[0][0].item() == 1.0
    ema.detach()
    assert ema.count == 1
    ema.reset()
    assert (ema.count, dict(ema.named_gradients())) == (0, {})


def test_several_optimizers_have_one_each() -> None:
    one, other = weights(2), weights(2)
    optimizers = Recorder(one), Recorder(other)
    for optimizer, slow in zip(optimizers, (2.0, 4.0), strict=True):
        GradientEMA(optimizer, decay=0.98, raw=1.0, slow=slow)
    assert step(optimizers[0], one, 1.0)[0][0].item() == 3.0
    assert step(optimizers[1], other, 1.0)[0][0].item() == 5.0


def test_a_wrapped_optimizer_is_unwrapped() -> None:
    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    parameters = weights(2)
    optimizer = Recorder(parameters)
    GradientEMA(Wrapper(optimizer), **SLOW)
    assert step(optimizer, parameters, 1.0)[0][0].item() == 3.0


def test_in_a_compiled_step() -> None:
    [p] = parameters = weights(3)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    GradientEMA(optimizer, **SLOW)

    @torch.compile(backend="eager")
    def take() -> None:
        optimizer.step()

    for count in range(1, 4):
        p.grad = torch.ones_like(p)
        take()
        assert p.tolist() == [-3.0 * count] * 3


def test_gradients_stay_where_they_are() -> None:
    [p] = parameters = weights(3)
    optimizer = Recorder(parameters)
    GradientEMA(optimizer, **SLOW)
    gradient = p.grad = torch.ones(3)
    optimizer.step()
    assert p.grad is gradient
    assert gradient.tolist() == [3.0] * 3


# ---- names and states


def test_names_are_the_models_the_optimizers_or_places() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    def names(**how: Any) -> list[str]:
        optimizer = Recorder(how.pop("params", model.parameters()))
        ema = GradientEMA(optimizer, how.get("model"), half_life=3.0)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return [name for name, _ in ema.named_gradients()]

    own = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert names(model=model) == own
    assert names(model=torch.compile(model)) == own
    assert names(params=model.named_parameters()) == own
    assert names() == ["0.0", "0.1", "0.2", "0.3"]
    loss = nn.Linear(1, 1)
    assert names(model=model, params=[*model.parameters(), *loss.parameters()]) == own
    with pytest.raises(
        ValueError, match=r"names none of the optimizer's 4 parameters: it is another Linear .* Pass the"
    ):
        names(model=loss)


def test_a_parameter_that_is_exchanged_keeps_its_average() -> None:
    first, second = weights(4, 4)
    optimizer = Recorder([first])
    ema = GradientEMA(optimizer, alpha=0.5, debias=False)
    for parameter, value in ((first, 1.0), (first, 1.0), (second, 3.0)):
        optimizer.param_groups[0]["params"] = [parameter]
        parameter.grad = torch.full((4,), value)
        optimizer.step()
    assert ema.count == 3
    assert second.grad.tolist() == [2.0] * 4


@pytest.mark.parametrize("squares", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(squares: bool, tmp_path: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(4, generator=generator), torch.randn(3, generator=generator)] for _ in range(10)]

    def run(optimizer: Recorder, parameters: list[nn.Parameter], steps: slice) -> None:
        for number, (one, other) in list(enumerate(gradients))[steps]:
            parameters[0].grad = one.clone()
            parameters[1].grad = None if number % 3 == 0 else other.clone()
            optimizer.step()

    how: dict[str, Any] = {"half_life": 3.0, "raw": 0.5, "slow": 2.0, "start": 2, "squares": squares}
    parameters = weights(4, 3)
    whole, first, second = (Recorder(parameters) for _ in range(3))
    GradientEMA(whole, **how)
    run(whole, parameters, slice(0, 10))
    saved = GradientEMA(first, **how)
    run(first, parameters, slice(0, 5))
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    resumed = GradientEMA(second, **how)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(second, parameters, slice(5, 10))
    for got, right in zip(first.got + second.got, whole.got, strict=True):
        for one, other in zip(got, right, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    assert resumed.count == 10


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("hook", [True, False])
def test_a_copy_filters_the_optimizer_that_was_copied_with_it(duplicate: Any, hook: bool) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    ema = GradientEMA(optimizer, **SLOW, hook=hook, squares=True)
    for size in (1.0, 2.0):
        weight.grad = torch.full((2,), size)
        optimizer.step() if hook else ema.apply()
    twin, its_optimizer = duplicate((ema, optimizer))
    its_weight = its_optimizer.param_groups[0]["params"][0]
    for each, parameter, stepping in (ema, weight, optimizer), (twin, its_weight, its_optimizer):
        parameter.grad = torch.full((2,), 3.0)
        stepping.step() if hook else each.apply()
    assert torch.equal(its_weight.grad, weight.grad)
    assert weight.grad[0] > 3.0
    assert twin.count == ema.count == 3
    assert torch.equal(twin.norm(), ema.norm())
    twin.detach()
    weight.grad = torch.full((2,), 3.0)
    optimizer.step() if hook else ema.apply()
    assert (twin.count, ema.count) == (3, 4)


def test_a_saved_state_goes_where_the_gradients_are() -> None:
    def filtering(device: str) -> tuple[GradientEMA, nn.Parameter]:
        weight = nn.Parameter(torch.zeros(2, device=device))
        weight.grad = torch.ones(2, device=device)
        return GradientEMA(torch.optim.SGD([weight], lr=0.0), **SLOW, hook=False, squares=True), weight

    saved, _ = filtering("cpu")
    saved.apply()
    ema, weight = filtering("meta")
    ema.load_state_dict(saved.state_dict())
    ema.apply()
    assert dict(ema.named_gradients())["0.0"].device == weight.grad.device
    assert ema.squares is not None
    assert ema.squares["0.0"].device == weight.grad.device


@pytest.mark.skipif(bool(kernels.missing()), reason="the other kernels change each gradient in turn")
def test_two_gradients_that_are_one_are_told() -> None:
    one, other = weights(2, 2)
    one.grad = other.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"two tensors overlap. .* parameter.grad = parameter.grad.clone\(\)"):
        GradientEMA(torch.optim.SGD([one, other], lr=0.0), **SLOW, hook=False).apply()


def test_a_step_without_any_gradient_does_not_count() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    ema = GradientEMA(optimizer, **SLOW)
    for gradient in (None, torch.ones(2), None, torch.ones(2)):
        weight.grad = gradient
        optimizer.step()
    assert ema.count == 2


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    parameters = weights(2, 3)
    optimizer = Recorder(parameters)
    ema = GradientEMA(optimizer, **SLOW)
    step(optimizer, parameters, 1.0, 1.0)
    before = copy.deepcopy(ema.state_dict())
    other = GradientEMA(elsewhere := Recorder(owners := weights(2, 4, 1)), **SLOW)
    step(elsewhere, owners, 2.0, 2.0, 2.0)
    text = r"not of these parameters: not known here: 0\.2; of another shape: 0\.1 \[4\] for \[3\]\. Nothing was loaded"
    with pytest.raises(ValueError, match=text):
        ema.load_state_dict(other.state_dict())
    with pytest.raises(
        ValueError, match=r"saved with Exponential\(decay=0\.98\), but this GradientEMA has Exponential\(half"
    ):
        GradientEMA(optimizer, half_life=3.0, hook=False).load_state_dict(before)
    with pytest.raises(ValueError, match="squares=True, but the state was saved without them"):
        GradientEMA(optimizer, decay=0.98, squares=True, hook=False).load_state_dict(before)
    with pytest.raises(ValueError, match=r"expected what GradientEMA\.state_dict\(\) gives; got dict"):
        ema.load_state_dict({})
    with pytest.raises(ValueError, match=r"expected the state of GradientEMA; got that of EMA"):
        ema.load_state_dict(ewma.EMA(half_life=3.0).state_dict())
    for part in ("seen", "skipped", "clocks", "averages", "squares"):
        with pytest.raises(ValueError, match=f"the state is not whole, it lacks '{part}'"):
            ema.load_state_dict({name: value for name, value in before.items() if name != part})
    after = ema.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before["averages"][name], after["averages"][name]) for name in before["averages"])


# ---- what it can tell


def linear_gradients(batch: int, steps: int, scale: float) -> tuple[list[Tensor], float]:
    """Gradients of a linear model at frozen weights, and their true noise scale tr(S) / |G|^2."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.linspace(0.5, 1.5, 40, dtype=torch.float64)
    deviation = scale * torch.linspace(1.0, 3.0, 40, dtype=torch.float64)
    samples = (
        mean + deviation * torch.randn(steps, batch, 40, generator=generator, dtype=torch.float64).mean(1)
        if batch <= 8
        else mean + deviation / batch**0.5 * torch.randn(steps, 40, generator=generator, dtype=torch.float64)
    )
    return list(samples), float(deviation.square().sum() / mean.square().sum())


@pytest.mark.parametrize("batch", [8, 32, 128])
def test_the_noise_scale_at_frozen_weights(batch: int) -> None:
    gradients, right = linear_gradients(batch, 800, 3.0)
    [p] = parameters = weights(40, dtype=torch.float64)
    optimizer = Recorder(parameters)
    ema = GradientEMA(optimizer, decay=0.99, raw=1.0, slow=0.0, squares=True)
    told = []
    for number, gradient in enumerate(gradients):
        p.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(p.grad, gradient)  # only measured
        if number >= 300 and number % 100 == 0:
            told.append(float(ema.noise_scale(batch)))
    assert sorted(told)[len(told) // 2] == pytest.approx(right, rel=0.15)
    assert float(ema.snr()["0.0"]) == pytest.approx(batch / float(ema.noise_scale(batch)), rel=1e-9)


def test_the_noise_scale_of_two_batch_sizes() -> None:
    small, right = linear_gradients(8, 4000, 3.0)
    scale = NoiseScale(half_life=2000.0)
    for number in range(0, 4000, 4):
        four = torch.stack(small[number : number + 4])
        scale.update(four.square().sum(1).mean(), four.mean(0).square().sum(), small=8, big=32)
    assert float(scale.get()) == pytest.approx(right, rel=0.15)
    with pytest.raises(ValueError, match="0 < small < big; got small=8 and big=8"):
        scale.update(1.0, 1.0, 8, 8)
    with pytest.raises(RuntimeError, match="no average before the first update"):
        NoiseScale(half_life=3.0).get()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [float, torch.tensor, lambda x: Elsewhere(torch.tensor(x))])
def test_what_is_not_finite_never_enters_the_noise_scale(bad: float, kind: Callable[[float], Any]) -> None:
    one, other = NoiseScale(half_life=2.0), NoiseScale(half_life=2.0)
    for small, big in ((5.0, 2.0), (4.0, 3.0), (6.0, 2.0)):
        one.update(kind(small), kind(bad), 1, 4)
        one.update(kind(small), kind(big), 1, 4)
        other.update(small, big, 1, 4)
    got = one.get()
    assert float(got.as_subclass(Tensor) if isinstance(got, Tensor) else got) == pytest.approx(other.get(), rel=1e-6)


class Elsewhere(Tensor):
    """A tensor that says it is on a device, and refuses to be waited for."""

    is_cpu = False  # type: ignore[assignment]

    def item(self) -> Any:
        raise AssertionError("waited for the device")

    __bool__ = __float__ = __int__ = tolist = item


def test_a_saved_noise_scale_goes_on(tmp_path: Any) -> None:
    one, other = NoiseScale(half_life=2.0), NoiseScale(half_life=2.0)
    one.update(5.0, 2.0, 1, 4)
    torch.save(one.state_dict(), tmp_path / "scale.pt")
    other.load_state_dict(torch.load(tmp_path / "scale.pt", weights_only=True))
    for each in one, other:
        each.update(4.0, 3.0, 1, 4)
    assert one.get() == other.get()
    with pytest.raises(ValueError, match="this NoiseScale has Exponential"):
        NoiseScale(half_life=3.0).load_state_dict(one.state_dict())


def test_a_noise_scale_without_signal_is_infinite() -> None:
    scale = NoiseScale(half_life=2.0)
    scale.update(2.0, 1.0, 1, 2)
    assert scale.get() == math.inf


def test_norm_and_cosine_of_the_slow_gradient() -> None:
    parameters = weights(2, 2)
    optimizer = Recorder(parameters)
    ema = GradientEMA(optimizer, decay=0.5, raw=1.0, slow=0.0)
    with pytest.raises(RuntimeError, match="has seen no gradient yet; ask after the first optimizer step"):
        ema.norm()
    for one, other in ((3.0, 0.0), (3.0, 0.0)):
        step(optimizer, parameters, one, other)
    assert float(ema.norm()) == pytest.approx(math.sqrt(18.0))
    for one, other, cosine in ((1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (-1.0, 1.0, -math.sqrt(0.5))):
        for parameter, value in zip(parameters, (one, other), strict=True):
            parameter.grad = torch.full_like(parameter, value)
        assert float(ema.cosine()) == pytest.approx(cosine, abs=1e-12)
    with pytest.raises(
        RuntimeError, match=r"squared gradients, which were not kept: GradientEMA\(\.\.\., squares=True\)"
    ):
        ema.noise_scale(32)


# ---- what is refused


def test_lbfgs_is_refused_with_a_reason() -> None:
    with pytest.raises(TypeError, match="cannot filter LBFGS: it evaluates its closure many times a step"):
        GradientEMA(torch.optim.LBFGS(weights(2)), half_life=3.0)


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ({}, TypeError, "expected exactly one of half_life, decay, alpha, span, com; got none"),
        ({"half_life": 3.0, "raw": math.nan}, ValueError, "raw must be a finite number; got nan"),
        ({"half_life": 3.0, "slow": "1"}, ValueError, "slow must be a finite number; got '1'"),
        (
            {"half_life": 3.0, "raw": 1.0, "slow": -1.0, "normalize": True},
            ValueError,
            "which is 0 for raw=1 and slow=-1",
        ),
        ({"half_life": 3.0, "start": -1}, ValueError, "start must be a whole number of steps, 0 or more; got -1"),
        ({"half_life": 3.0, "nonfinite": "no"}, ValueError, "nonfinite must be one of 'skip', 'propagate'; got 'no'"),
        ({"half_life": 3.0, "sparse": "no"}, ValueError, "sparse must be one of 'error', 'densify'; got 'no'"),
        ({"model": 100.0}, TypeError, r"an nn\.Module; got float\. .* GradientEMA\(optimizer, half_life=\.\.\.\)"),
        ({"model": ewma.Uniform()}, TypeError, r"got Uniform\. .* GradientEMA\(optimizer, profile=Uniform\(\)\)"),
    ],
)
def test_bad_arguments_are_refused(how: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        GradientEMA(torch.optim.SGD(weights(2), lr=1.0), **how)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer; got Linear"):
        GradientEMA(nn.Linear(2, 2), half_life=3.0)


def test_capturable_gives_the_same_with_the_clock_on_the_device() -> None:
    """In place from the second step on, as a CUDA graph needs."""
    made = []
    for capturable in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        ema = GradientEMA(optimizer, half_life=3, raw=1.0, slow=2.0, capturable=capturable)
        places = set()
        for _ in range(4):
            weight.grad = torch.randn(5)
            optimizer.step()
            if capturable:
                places.add(ema.track.clock.weight.data_ptr())
        made.append(weight.detach())
        assert ema.count == 4
    assert len(places) == 1
    torch.testing.assert_close(*made, rtol=1e-6, atol=1e-6)
