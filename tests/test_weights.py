"""ModelEMA: the averages are what float64 arithmetic says, in every training loop, and resume bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from tests.conftest import Small, Truth, bits, same, train
from torch import nn

import ewma
from ewma import profiles

DECAY = 0.9


def averages(ema) -> dict[str, torch.Tensor]:
    return {name: average.clone() for name, average in ema.named_parameters()}


def close(ema, truths: dict[str, Truth]) -> None:
    for name, average in ema.named_parameters():
        torch.testing.assert_close(average.double(), truths[name].mean, rtol=0, atol=3e-7)


# The averages themselves


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_the_average_is_the_definition(small: Small, sgd, nonfinite: str) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY, nonfinite=nonfinite).attach(sgd)
    truths = {name: Truth(DECAY) for name, _ in small.named_parameters()}
    for _ in range(12):
        train(small, sgd)
        for name, parameter in small.named_parameters():
            truths[name].update(parameter)
    assert ema.count == 12
    close(ema, truths)


def test_every_k_steps_passes_k_steps_of_elapsed(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd, every=3)
    truths = {name: Truth(DECAY) for name, _ in small.named_parameters()}
    for step in range(1, 13):
        train(small, sgd)
        if step % 3 == 0:
            for name, parameter in small.named_parameters():
                truths[name].update(parameter, elapsed=3)
    assert ema.count == 4
    close(ema, truths)


def test_elapsed_counts_in_samples_and_may_be_a_function(small: Small, sgd) -> None:
    sizes = [16, 16, 5]
    left = iter(sizes)
    ema = ewma.ModelEMA(small, half_life=20).attach(sgd, elapsed=lambda: next(left))
    truths = {name: Truth(2 ** (-1 / 20)) for name, _ in small.named_parameters()}
    for size in sizes:
        train(small, sgd)
        for name, parameter in small.named_parameters():
            truths[name].update(parameter, elapsed=size)
    close(ema, truths)


def test_not_debiased_starts_at_the_first_weights(small: Small) -> None:
    ema = ewma.ModelEMA(small, alpha=0.25, debias=False)
    ema.update()
    first = averages(ema)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 1.0
    ema.update()
    for name, average in ema.named_parameters():
        torch.testing.assert_close(average, first[name] + 0.25)


@pytest.mark.parametrize(
    "profile",
    [
        ewma.Power(sigma_rel=0.1),
        ewma.Uniform(),
        profiles.cosine(steps=9),
        profiles.after(start=4, profile=ewma.Uniform()),
    ],
    ids=repr,
)
def test_every_profile_gives_the_weights_it_promises(profile) -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = ewma.ModelEMA(model, profile)
    for step in range(8):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update()
    expected = sum(weight * step for step, weight in enumerate(profile.weights(8)))
    assert averages(ema)["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_several_profiles_share_one_pass(small: Small, sgd) -> None:
    several = {"fast": ewma.Exponential(half_life=2), "wide": ewma.Power(sigma_rel=0.1)}
    ema = ewma.ModelEMA(small, several).attach(sgd)
    alone = {name: ewma.ModelEMA(small, profile).attach(sgd) for name, profile in several.items()}
    train(small, sgd, 6)
    for name, single in alone.items():
        assert same(averages(ema[name]), averages(single))
        assert ema[name].profile == several[name]
        assert ema[name].count == 6
    assert same(averages(ema), averages(ema["fast"]))


# Which tensors


def test_tied_weights_are_averaged_once(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd)
    train(small, sgd, 3)
    names = [name for name, _ in ema.named_parameters()]
    assert "last.weight" in names
    assert "tied.weight" not in names
    state = ema.state_dict()["averages"]["average"]
    assert state["last.weight"] is state["tied.weight"]


def test_frozen_weights_are_averaged_too(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd)
    truth = Truth(DECAY)
    for step in range(6):
        train(small, sgd)
        truth.update(small.first.weight)
        small.first.requires_grad_(step < 2)
    torch.testing.assert_close(averages(ema)["first.weight"].double(), truth.mean, rtol=0, atol=1e-7)


@pytest.mark.parametrize("profile", [ewma.Exponential(decay=DECAY), ewma.Power(sigma_rel=0.1)], ids=repr)
def test_a_late_parameter_starts_when_it_comes(small: Small, sgd, profile) -> None:
    ema = ewma.ModelEMA(small, profile).attach(sgd)
    train(small, sgd, 5)
    small.extra = nn.Linear(2, 2)
    ema.update()
    assert torch.equal(averages(ema)["extra.weight"], small.extra.weight)
    before = small.extra.weight.detach().clone()
    with torch.no_grad():
        small.extra.weight += 1.0
    ema.update()
    gains = [profile.step(time, 1)[1] for time in (6, 7)]
    keep = profile.step(7, 1)[0]
    coefficient = gains[1] / (keep * gains[0] + gains[1])
    torch.testing.assert_close(averages(ema)["extra.weight"], before + coefficient)


def test_an_absent_parameter_keeps_its_average_and_its_time(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd)
    train(small, sgd, 3)
    before = averages(ema)["first.bias"]
    bias, small.first.bias = small.first.bias, None
    train(small, sgd, 4)
    assert "first.bias" not in averages(ema)
    small.first.bias = bias
    with torch.no_grad():
        bias += 1.0
    ema.update()
    weight = sum((1 - DECAY) * DECAY**n for n in range(4))
    expected = before.double() + (1 - DECAY) / weight * (bias.double() - before.double())
    torch.testing.assert_close(averages(ema)["first.bias"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("first.*", {"first.weight", "first.bias"}),
        (["*.bias", "norm.weight"], {"first.bias", "norm.bias", "norm.weight", "last.bias"}),
        (lambda name, parameter: parameter.ndim == 2, {"first.weight", "last.weight"}),
        ("tied.*", {"last.weight"}),
    ],
)
def test_only_the_selected_are_averaged(small: Small, sgd, only, expected: set[str]) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY, only=only).attach(sgd)
    train(small, sgd, 3)
    assert averages(ema).keys() == expected
    raw = bits(small)
    with ema.swapped():
        for name, parameter in small.named_parameters():
            # first.bias does not learn: BatchNorm takes it away again.
            assert torch.equal(parameter, raw[name]) == (name not in expected or name == "first.bias")


def test_a_predicate_is_asked_again_when_something_is_unfrozen(small: Small) -> None:
    small.first.requires_grad_(False)
    ema = ewma.ModelEMA(small, decay=DECAY, only=lambda name, parameter: parameter.requires_grad)
    ema.update()
    assert "first.weight" not in averages(ema)
    small.first.requires_grad_(True)
    nn.init.constant_(small.first.weight, 5.0)
    ema.update()
    assert averages(ema)["first.weight"].unique().tolist() == [5.0]


@pytest.mark.parametrize("move", [False, True])
def test_what_a_predicate_has_selected_is_still_averaged_when_frozen(small: Small, move: bool) -> None:
    """A GAN freezes and unfreezes its halves in turn."""
    ema = ewma.ModelEMA(small, decay=DECAY, only=lambda name, parameter: parameter.requires_grad)
    ema.update()
    small.requires_grad_(False)
    if move:
        small.last.weight.data = small.last.weight.data.clone()
    nn.init.constant_(small.last.weight, 5.0)
    ema.update()
    assert ema.count == 2
    ema.update(1e6)
    assert averages(ema)["last.weight"].unique().tolist() == [5.0]
    ema.load_state_dict(copy.deepcopy(ema.state_dict()))
    small.last.requires_grad_(True)
    ema.reset()
    ema.update()
    assert set(averages(ema)) == {"last.weight", "last.bias"}


def test_selecting_nothing_is_refused(small: Small) -> None:
    with pytest.raises(
        ValueError, match=r"only=\['head.\*'\] selects none of the model's parameters; some of them: fir"
    ):
        ewma.ModelEMA(small, decay=DECAY, only="head.*").update()


def test_buffers_by_choice(small: Small, sgd) -> None:
    copied, averaged, left = (
        ewma.ModelEMA(small, decay=DECAY, buffers=b).attach(sgd) for b in ("copy", "average", "leave")
    )
    truth = Truth(DECAY)
    for _ in range(5):
        train(small, sgd)
        truth.update(small.norm.running_mean)
    last = small.norm.running_mean.clone()
    with torch.no_grad():
        small.norm.running_mean += 1.0
        small.norm.num_batches_tracked += 1
        small.mask.logical_not_()
    for ema, expected in ((copied, last), (averaged, truth.mean.float()), (left, last + 1.0)):
        with ema.swapped():
            torch.testing.assert_close(small.norm.running_mean, expected)
            assert small.norm.num_batches_tracked.item() == 5
            assert small.mask.tolist() == [True, False]
            assert small.table.tolist() == [0.0, 1.0, 2.0]


def test_integer_and_complex_parameters() -> None:
    model = nn.Module()
    model.steps = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    model.wave = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    ema = ewma.ModelEMA(model, alpha=0.5)
    truth = Truth(0.5)
    for factor in (1, 2j, -1):
        with torch.no_grad():
            model.wave.copy_(torch.tensor([1 + 2j, 3 - 1j]) * factor)
            model.steps.add_(1)
        ema.update()
        truth.update(torch.view_as_real(model.wave))
    torch.testing.assert_close(torch.view_as_real(averages(ema)["wave"]).double(), truth.mean, rtol=1e-6, atol=1e-6)
    assert ema.module().steps.tolist() == [4, 5]


def test_channels_last_and_odd_layouts() -> None:
    model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    ema = ewma.ModelEMA(model, decay=DECAY)
    truth = Truth(DECAY)
    for step in range(4):
        if step == 2:
            model.to(memory_format=torch.contiguous_format)
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight)
        ema.update()
        truth.update(model.weight)
    torch.testing.assert_close(averages(ema)["weight"].double(), truth.mean, rtol=0, atol=1e-6)


# When and where the model comes to be


def test_before_the_first_update_the_average_is_the_weights(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    list(ema.named_parameters())
    with torch.no_grad():
        small.first.weight += 1.0
    assert torch.equal(averages(ema)["first.weight"], small.first.weight)
    assert ema.count == 0


def test_built_on_meta() -> None:
    with torch.device("meta"):
        model = Small()
    ema = ewma.ModelEMA(model, decay=DECAY)
    with pytest.raises(RuntimeError, match="is still on the meta device"):
        ema.update()
    model.to_empty(device="cpu")
    model.load_state_dict(Small().state_dict())
    ema.update()
    assert torch.equal(averages(ema)["first.weight"], model.first.weight)


def test_built_before_lazy_layers_know_their_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    ema = ewma.ModelEMA(model, decay=DECAY)
    model(torch.randn(2, 4))
    ema.update()
    assert averages(ema)["0.weight"].shape == (3, 4)


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
        lambda model: model.double().float(),
        lambda model: setattr(model, "first", copy.deepcopy(model.first)),
    ],
    ids=["assign", "p.data =", "to", "replaced"],
)
def test_storage_that_moves_is_noticed(small: Small, move) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    truth = Truth(DECAY)
    for _ in range(3):
        ema.update()
        truth.update(small.first.weight)
        move(small)
        with torch.no_grad():
            small.first.weight += 1.0
    ema.update()
    truth.update(small.first.weight)
    torch.testing.assert_close(averages(ema)["first.weight"].double(), truth.mean, rtol=0, atol=1e-6)


def test_a_parameter_that_changed_shape_is_named(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    ema.update()
    small.first = nn.Linear(4, 7)
    with pytest.raises(ValueError, match=r"first.weight: expected shape \[6, 4\].*shape \[7, 4\].*call ema.reset\(\)"):
        ema.update()
    ema.reset()
    ema.update()
    assert averages(ema)["first.weight"].shape == (7, 4)


def test_in_inference_mode_and_out_again(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    with torch.inference_mode():
        ema.update()
        with ema.swapped():
            pass
    ema.update()
    assert ema.count == 2
    assert not any(average.is_inference() for average in averages(ema).values())


def test_inside_a_compiled_step(small: Small) -> None:
    ema, plain = (ewma.ModelEMA(small, half_life=3) for _ in range(2))
    compiled = torch.compile(lambda: ema.update(), backend="eager")
    for _ in range(4):
        with torch.no_grad():
            small.first.weight += 1.0
        compiled()
        plain.update()
    assert same(averages(ema), averages(plain))


# Precision


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_moves_as_far_as_float64_says(narrow: torch.dtype) -> None:
    model = nn.Linear(64, 64).to(narrow)
    ema, coarse = (ewma.ModelEMA(model, decay=0.9999, dtype=dtype) for dtype in ("auto", narrow))
    ema.update()
    coarse.update()
    start = model.weight.detach().double()
    with torch.no_grad():
        model.weight += 0.5
    for _ in range(4000):
        ema.update()
        coarse.update()
    rate = -torch.log(torch.tensor(0.9999, dtype=torch.float64))
    moved = 1 - (1 - torch.exp(-rate)) * torch.exp(-4000 * rate) / (1 - torch.exp(-4001 * rate))
    expected = moved * (model.weight.double() - start).mean()
    for each, dtype in ((ema, torch.float32), (coarse, narrow)):
        weight = dict(each.named_parameters())["weight"]
        assert weight.dtype == dtype
        assert (weight.double() - start).mean().item() == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize("coefficient", [1e-4, 1e-5, 1e-6])
def test_float32_does_not_stall(coefficient: float) -> None:
    model = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        model.weight.uniform_(1.0, 2.0)
    ema = ewma.ModelEMA(model, alpha=coefficient, debias=False)
    ema.update()
    start = model.weight.detach().double()
    with torch.no_grad():
        model.weight += 5e-4
    for _ in range(20_000):
        ema.update()
    expected = (1 - (1 - coefficient) ** 20_000) * (model.weight.double() - start).mean().item()
    moved = (averages(ema)["weight"].double() - start).mean().item()
    assert moved == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("weights", "dtype", "expected"),
    [
        (torch.float16, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.float64, "auto", torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float16),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float16, torch.float16),
    ],
)
def test_dtype_policy(weights: torch.dtype, dtype, expected: torch.dtype) -> None:
    model = nn.Linear(4, 4).to(weights)
    ema = ewma.ModelEMA(model, decay=DECAY, dtype=dtype)
    ema.update()
    ema.update()
    assert {average.dtype for _, average in ema.named_parameters()} == {expected}
    torch.testing.assert_close(averages(ema)["weight"].double(), model.weight.double(), rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize(
    "dtype",
    [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu],
    ids=str,
)
def test_weights_of_8_bits_are_averaged_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(1, 1)
    model.table = nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)
    ema = ewma.ModelEMA(model, half_life=1)
    ema.update()
    model.table.data = torch.full((4,), 4.0).to(dtype)
    ema.update()
    torch.testing.assert_close(averages(ema)["table"], torch.full((4,), 3.0))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_complex_weights_of_16_bits_are_averaged_in_32() -> None:
    model = nn.Module()
    model.wave = nn.Parameter(torch.tensor([1 + 2j], dtype=torch.complex32))
    ema = ewma.ModelEMA(model, half_life=1)
    ema.update()
    model.wave.data = torch.tensor([4 - 1j], dtype=torch.complex32)
    ema.update()
    torch.testing.assert_close(averages(ema)["wave"], torch.tensor([3 + 0j], dtype=torch.complex64))


def test_averages_become_as_precise_as_the_model_does(small: Small) -> None:
    ema = ewma.ModelEMA(small, half_life=1)
    ema.update()
    small.double()
    nn.init.constant_(small.first.weight, 1.0 + 1e-12)
    ema.update()
    ema.update(100.0)
    torch.testing.assert_close(averages(ema)["first.weight"], small.first.weight.detach(), rtol=0, atol=1e-15)
    small.half()
    ema.update()
    assert averages(ema)["first.weight"].dtype == torch.float64


# NaN and infinity


def test_what_float16_cannot_hold_counts_as_not_finite() -> None:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[65519.0, 1.0, 1e5]]))
    ema = ewma.ModelEMA(model, decay=DECAY, dtype=torch.float16)
    ema.update()
    with torch.no_grad():
        model.weight[0, 1] = -65520.0
    ema.update()
    assert ema.skipped == 3
    assert averages(ema)["weight"].tolist() == [[65504.0, 1.0, pytest.approx(float("nan"), nan_ok=True)]]
    with torch.no_grad():
        model.weight[0, 2] = 2.0
    ema.update()
    assert averages(ema)["weight"][0, 2] == 2.0


def test_float16_follows_weights_far_below_its_spacing() -> None:
    model = nn.Linear(200, 200, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e-9)
    ema = ewma.ModelEMA(model, half_life=100, dtype=torch.float16)
    for _ in range(50):
        ema.update()
    average = averages(ema)["weight"].double()
    assert (average == 0).sum() > 0.9 * average.numel()
    assert average.mean().item() == pytest.approx(1e-9, rel=0.2)


def test_a_non_finite_element_never_enters(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    ema.update()
    before = averages(ema)["first.weight"]
    good = small.first.weight.detach().clone()
    with torch.no_grad():
        small.first.weight += 1.0
        small.first.weight[0, 0] = torch.nan
        small.first.weight[1, 1] = torch.inf
    ema.update()
    after = averages(ema)["first.weight"]
    assert ema.skipped == 2
    assert after[0, 0] == before[0, 0]
    assert after[1, 1] == before[1, 1]
    assert torch.isfinite(after).all()
    assert after[0, 1] > before[0, 1]
    with torch.no_grad():
        small.first.weight.copy_(good)
    ema.update()
    assert torch.isfinite(averages(ema)["first.weight"]).all()
    assert ema.skipped == 2


def test_what_has_seen_nothing_finite_takes_the_first_finite_value(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    with torch.no_grad():
        small.first.weight[0, 0] = torch.nan
    ema.update()
    ema.update()
    with torch.no_grad():
        small.first.weight[0, 0] = 5.0
    ema.update()
    assert averages(ema)["first.weight"][0, 0] == 5.0


# The device's clock


@pytest.mark.parametrize("profile", [ewma.Exponential(half_life=2), ewma.Power(sigma_rel=0.1), profiles.tensorflow()])
def test_capturable_gives_the_same_and_stays_in_place(small: Small, sgd, profile) -> None:
    ema = ewma.ModelEMA(small, profile, capturable=True).attach(sgd)
    host = ewma.ModelEMA(small, profile).attach(sgd)
    train(small, sgd)
    clock = ema.tracks["average"].clock
    places = [getattr(clock, name).data_ptr() for name in clock.NUMBERS]
    train(small, sgd, 5)
    assert [getattr(clock, name).data_ptr() for name in clock.NUMBERS] == places
    assert ema.count == 6
    for (_, mine), (_, theirs) in zip(ema.named_parameters(), host.named_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-7)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_steps_that_the_scaler_skips_have_no_weight(fused: bool, every: int) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    ema = ewma.ModelEMA(model, half_life=3).attach(optimizer, every=every)
    truth, waiting, calls = Truth(2 ** (-1 / 3)), 0, 0
    for step in range(9):
        x = torch.full((2, 4), float("inf") if step in (0, 3, 4) else 1.0)
        optimizer.zero_grad()
        scaler.scale(model(x).pow(2).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        taken = step not in (0, 3, 4)
        calls, waiting = calls + (taken or fused), waiting + taken
        if (taken or fused) and calls % every == 0 and waiting:
            truth.update(model.weight, elapsed=waiting)
            waiting = 0
    torch.testing.assert_close(averages(ema)["weight"].double(), truth.mean, rtol=0, atol=3e-7)


# Saving and resuming


def state_of(ema) -> dict:
    buffer = io.BytesIO()
    torch.save(ema.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


SEVERAL = {"fast": ewma.Exponential(half_life=20_000), "wide": ewma.Power(sigma_rel=0.1)}


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(dtype, every: int) -> None:
    def start() -> tuple[Small, torch.optim.Optimizer, ewma.ModelEMA]:
        model = Small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, ewma.ModelEMA(model, SEVERAL, dtype=dtype, seed=3).attach(optimizer, every=every)

    model, optimizer, ema = start()
    train(model, optimizer, 4)
    model.extra = nn.Parameter(torch.ones(2))
    train(model, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state())), state_of(ema)
    train(model, optimizer, 7)

    (weights, moments, generator), state = saved
    resumed, resumed_optimizer, resumed_ema = start()
    resumed.extra = nn.Parameter(torch.zeros(2))
    resumed.load_state_dict(weights)
    resumed_optimizer.load_state_dict(moments)
    resumed_ema.load_state_dict(state)
    torch.set_rng_state(generator)
    train(resumed, resumed_optimizer, 7)

    assert same(bits(resumed), bits(model))
    for name in SEVERAL:
        assert same(averages(resumed_ema[name]), averages(ema[name]))
    assert resumed_ema.count == ema.count


@pytest.mark.parametrize("alpha", [0.1, 1e-5])
@pytest.mark.parametrize("dtype", ["auto", torch.float16])
def test_a_file_resumes_bit_for_bit(small: Small, sgd, tmp_path: Path, alpha: float, dtype) -> None:
    ema = ewma.ModelEMA(small, alpha=alpha, dtype=dtype, seed=7).attach(sgd)
    train(small, sgd, 5)
    ema.save(tmp_path / "ema.safetensors")
    other = ewma.ModelEMA(small, alpha=alpha, dtype=dtype)
    other.load(tmp_path / "ema.safetensors")
    other.attach(sgd)
    train(small, sgd, 5)
    assert same(averages(other), averages(ema))
    assert other.count == ema.count == 10


def test_loading_writes_into_the_storage_a_teacher_shares(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd)
    train(small, sgd, 3)
    state, teacher = copy.deepcopy(ema.state_dict()), ema.module()
    train(small, sgd, 3)
    ema.load_state_dict(state)
    assert torch.equal(teacher.first.weight, state["averages"]["average"]["first.weight"])


@pytest.mark.parametrize(("saved", "dtype"), [("auto", torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_precision_is_never_lost_on_load(saved, dtype: torch.dtype) -> None:
    fine, coarse = nn.Linear(4, 4), nn.Linear(4, 4).to(dtype)
    ema = ewma.ModelEMA(fine, decay=DECAY, dtype=saved)
    ema.update()
    other = ewma.ModelEMA(coarse, decay=DECAY, dtype=dtype)
    other.update()
    other.load_state_dict(ema.state_dict())
    assert all(map(torch.equal, averages(other).values(), (each.float() for each in averages(ema).values())))
    other.update()
    assert {average.dtype for _, average in other.named_parameters()} == {torch.float32}


def test_states_load_across_wrappers(small: Small, sgd) -> None:
    wrapped = nn.DataParallel(small)
    ema = ewma.ModelEMA(torch.compile(wrapped, backend="eager"), decay=DECAY).attach(sgd)
    train(small, sgd, 3)
    bare = ewma.ModelEMA(small, decay=DECAY)
    bare.load_state_dict(state_of(ema))
    assert same(averages(bare), averages(ema))
    foreign = state_of(ema)
    foreign["averages"]["average"] = {f"module._orig_mod.{n}": a for n, a in foreign["averages"]["average"].items()}
    bare.load_state_dict(foreign)
    assert same(averages(bare), averages(ema))


def test_a_state_from_before_the_first_update(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    used = ewma.ModelEMA(small, decay=DECAY)
    used.update()
    used.load_state_dict(state_of(ema))
    assert used.count == 0
    with torch.no_grad():
        small.first.weight += 1.0
    assert torch.equal(averages(used)["first.weight"], small.first.weight)


def test_a_state_of_another_model_names_what_differs(small: Small) -> None:
    other = Small()
    other.first = nn.Linear(4, 7)
    other.head = nn.Linear(1, 1)
    del other.norm
    ema, foreign = (ewma.ModelEMA(model, decay=DECAY) for model in (small, other))
    ema.update()
    foreign.update()
    before = averages(ema)
    with pytest.raises(
        ValueError, match="are not of this model: missing: norm.weight, norm.bias; not known here: "
    ) as e:
        ema.load_state_dict(foreign.state_dict())
    assert "head.weight, head.bias; of another shape: first.weight [7, 4] for [6, 4]" in str(e.value)
    assert "Nothing was loaded." in str(e.value)
    assert same(averages(ema), before)


def test_a_state_under_another_profile_names_both(small: Small, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(small, half_life=10)
    ema.update()
    ema.save(tmp_path / "ema.safetensors")
    for load in (
        lambda other, **how: other.load_state_dict(ema.state_dict(), **how),
        lambda other, **how: other.load(tmp_path / "ema.safetensors", **how),
    ):
        other = ewma.ModelEMA(small, ewma.Uniform())
        with pytest.raises(
            ValueError, match=r"saved with Exponential\(half_life=10\), but this ModelEMA has Uniform\(\)"
        ):
            load(other)
        load(other, profile="mine")
        assert other.profile == ewma.Uniform()
        load(other, profile="saved")
        assert other.profile == ewma.Exponential(half_life=10)
        with pytest.raises(ValueError, match="profile must be one of None, 'saved', 'mine'; got 'theirs'"):
            load(other, profile="theirs")


def test_a_state_of_other_profiles_is_refused(small: Small) -> None:
    with pytest.raises(ValueError, match=r"expected the profiles \['average'\].*the state has \['fast', 'wide'\]"):
        ewma.ModelEMA(small, half_life=10).load_state_dict(ewma.ModelEMA(small, SEVERAL).state_dict())
    with pytest.raises(ValueError, match="expected the state of ModelEMA; got that of EMA"):
        ewma.ModelEMA(small, half_life=10).load_state_dict(ewma.EMA(half_life=3).state_dict())


@pytest.mark.parametrize(
    "part", ["seed", "skipped", "steps", "waiting", "waiting_at_most", "tracks", "averages", "copies"]
)
def test_a_state_that_lacks_a_part_changes_nothing(small: Small, part: str) -> None:
    ema, other = ewma.ModelEMA(small, decay=DECAY), ewma.ModelEMA(small, decay=DECAY, seed=7)
    ema.update()
    nn.init.ones_(small.first.weight)
    other.update()
    other.update()
    before, state = averages(ema), other.state_dict()
    del state[part]
    with pytest.raises(ValueError, match=f"load_state_dict: the state is not whole, it lacks '{part}'. Nothing was"):
        ema.load_state_dict(state)
    assert same(averages(ema), before)
    assert (ema.count, ema.seed) == (1, 0)


def test_a_state_holds_tensors_numbers_and_strings_only(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, SEVERAL).attach(sgd)
    train(small, sgd, 2)

    def leaves(x):
        if isinstance(x, dict):
            assert all(isinstance(key, str) for key in x)
            return [leaf for value in x.values() for leaf in leaves(value)]
        return [leaf for value in x for leaf in leaves(value)] if isinstance(x, list | tuple) else [x]

    assert {type(leaf) for leaf in leaves(ema.state_dict())} <= {torch.Tensor, int, float, str}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_copies_and_pickles_go_on_unattached(small: Small, sgd, duplicate) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd)
    train(small, sgd, 3)
    twin = duplicate(ema)
    before = averages(twin)
    train(small, sgd, 2)
    assert same(averages(twin), before)
    assert twin.count == 3
    twin.update()
    twin.attach(torch.optim.SGD(twin.model.parameters(), lr=0.1))


# Attaching, and bad input


def test_attach_returns_self_and_detach_stops(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    assert ema.attach(sgd) is ema
    with pytest.raises(RuntimeError, match=r"attached already; call ema.detach\(\)"):
        ema.attach(sgd)
    ema.detach()
    train(small, sgd)
    assert ema.count == 0
    ema.attach(sgd)
    train(small, sgd)
    assert ema.count == 1


def test_reset_begins_anew(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd)
    train(small, sgd, 3)
    ema.reset()
    assert ema.count == 0
    train(small, sgd)
    assert torch.equal(averages(ema)["first.weight"], small.first.weight)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {},
            TypeError,
            "expected exactly one of half_life, decay, alpha, span, com; got none. For example half_life=2000",
        ),
        ({"half_life": 3, "decay": 0.9}, TypeError, "got half_life=3 and decay=0.9. Keep one"),
        ({"decay": 1.5}, ValueError, r"decay must be in \[0, 1\); got decay=1.5"),
        ({"decay": float("nan")}, ValueError, "got decay=nan"),
        ({"half_life": -1}, ValueError, "half_life must be a finite number above 0"),
        ({"profile": 0.999}, TypeError, r"Write ModelEMA\(model, decay=0.999\) .* or ModelEMA\(model, alpha=0.999\)"),
        ({"profile": "ema"}, TypeError, "profile must be a profile, such as Power"),
        ({"profile": ewma.Uniform(), "decay": 0.9}, TypeError, r"got Uniform\(\) and decay=: keep one of them"),
        ({"profile": {"a": 0.9}}, TypeError, "could be read two ways"),
        ({"decay": 0.9, "dtype": torch.float8_e5m2}, ValueError, "or torch.float16; got torch.float8_e5m2"),
        (
            {"decay": 0.9, "buffers": "drop"},
            ValueError,
            "buffers must be one of 'copy', 'average', 'leave'; got 'drop'",
        ),
        ({"decay": 0.9, "nonfinite": "raise"}, ValueError, "nonfinite must be one of 'skip', 'propagate'"),
    ],
)
def test_bad_arguments(small: Small, arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ewma.ModelEMA(small, **arguments)


def test_bad_models(small: Small) -> None:
    with pytest.raises(ValueError, match="ReLU has no parameters to average"):
        ewma.ModelEMA(nn.ReLU(), decay=DECAY)
    with pytest.raises(TypeError, match="ModelEMA averages an nn.Module; got OrderedDict"):
        ewma.ModelEMA(small.state_dict(), decay=DECAY)


def test_bad_calls(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, SEVERAL)
    for elapsed in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="elapsed must be a finite number above 0"):
            ema.update(elapsed)
        with pytest.raises(ValueError, match="elapsed must be a finite number above 0"):
            ema.attach(sgd, elapsed=elapsed)
    with pytest.raises(ValueError, match="every must be a whole number of steps"):
        ema.attach(sgd, every=0)
    with pytest.raises(KeyError, match="no profile is called 'slow'; there are 'fast', 'wide'"):
        ema["slow"]
    train(small, sgd)
    assert ema.count == 0


def test_it_prints_as_what_it_is(small: Small) -> None:
    ema = ewma.ModelEMA(small, SEVERAL)
    assert repr(ema) == "ModelEMA(Small, Exponential(half_life=20000), Power(sigma_rel=0.1), count=0)"
    assert repr(ema["wide"]) == "View('wide', Power(sigma_rel=0.1), count=0)"


def test_a_weight_that_was_nan_when_looked_at_before_the_first_update(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    averages(ema)
    with torch.no_grad():
        small.first.weight[0, 0], small.first.weight[0, 1] = torch.nan, torch.inf
    averages(ema)
    ema.update()
    with torch.no_grad():
        small.first.weight[0, :2] = 5.0
    ema.update()
    assert averages(ema)["first.weight"][0, :2].tolist() == [5.0, 5.0]


def test_loading_one_profile_leaves_the_others_right(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    several = {"fast": ewma.Exponential(decay=DECAY), "slow": ewma.Exponential(decay=0.99)}
    ema = ewma.ModelEMA(model, several)
    alone = ewma.ModelEMA(model, several["slow"])
    ema.update()
    ema["fast"].save(tmp_path / "fast")
    alone.update()
    ema["fast"].load(tmp_path / "fast")
    with torch.no_grad():
        model.weight += torch.randn_like(model.weight)
    ema.update()
    alone.update()
    torch.testing.assert_close(averages(ema["slow"])["weight"], averages(alone)["weight"])


def test_loading_a_later_profile_alone(small: Small, sgd, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(small, SEVERAL).attach(sgd)
    train(small, sgd, 3)
    ema["wide"].save(tmp_path / "wide")
    fresh = ewma.ModelEMA(small, SEVERAL)
    fresh["wide"].load(tmp_path / "wide")
    assert same(averages(fresh["wide"]), averages(ema["wide"]))
    assert torch.equal(averages(fresh["fast"])["first.weight"], small.first.weight)
    fresh.update()
    assert (fresh["wide"].count, fresh["fast"].count) == (4, 1)


def test_a_file_brings_the_buffers_along(small: Small, sgd, tmp_path: Path) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd)
    train(small, sgd, 3)
    ema.save(tmp_path / "ema.safetensors")
    fresh = ewma.ModelEMA(Small(), decay=DECAY)
    fresh.load(tmp_path / "ema.safetensors")
    with ema.swapped():
        expected = bits(small)
    with fresh.swapped():
        assert same(bits(fresh.model), expected)


def test_attaching_anew_with_a_smaller_every(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd, every=5)
    train(small, sgd, 4)
    ema.detach()
    ema.attach(sgd, every=2)
    train(small, sgd, 5)
    assert ema.count == 3


@pytest.mark.parametrize("change", ["load", "reset"])
def test_a_teacher_stays_right_whatever_happens(small: Small, sgd, change: str) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd)
    train(small, sgd, 2)
    teacher = ema.module()
    if change == "load":
        ema.load_state_dict(copy.deepcopy(ema.state_dict()))
    else:
        ema.reset()
    train(small, sgd, 2)
    with ema.swapped():
        assert same(bits(teacher), bits(small))


def test_skipped_is_not_counted_again_by_copies(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    with torch.no_grad():
        small.first.weight[0, :2] = torch.nan
    ema.update()
    assert copy.deepcopy(ema).skipped == 2
    assert pickle.loads(pickle.dumps(ema)).skipped == 2
    assert ema.skipped == 2


def test_a_copy_made_while_swapped_is_refused(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    ema.update()
    with ema.swapped(), pytest.raises(RuntimeError, match="Leave the with block first"):
        copy.deepcopy(ema)


def test_what_is_left_out_may_be_anything(small: Small) -> None:
    small.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r'graph: expected a dense tensor; .* Leave it out with buffers="leave".'):
        ewma.ModelEMA(small, decay=DECAY).update()
    ema = ewma.ModelEMA(small, decay=DECAY, buffers="leave")
    ema.update()
    with ema.swapped():
        pass


def test_late_tensors_share_a_clock(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    ema.update()
    small.late = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    ema.update()
    assert len(ema.state_dict()["tracks"]["average"]["clocks"]) == 2


@pytest.mark.parametrize("view", [lambda weight: weight.t(), lambda weight: weight[:4]], ids=["transposed", "cut"])
def test_another_view_of_the_same_storage_is_noticed(view) -> None:
    model = nn.Embedding(6, 6)
    ema = ewma.ModelEMA(model, decay=DECAY)
    ema.update()
    model.weight.data = view(model.weight.data)
    if model.weight.shape == (6, 6):
        truth = Truth(DECAY)
        truth.update(averages(ema)["weight"])
        truth.update(model.weight)
        ema.update()
        torch.testing.assert_close(averages(ema)["weight"].double(), truth.mean, rtol=0, atol=1e-6)
    else:
        with pytest.raises(ValueError, match=r"weight: expected shape \[6, 6\]"):
            ema.update()


def test_tied_and_untied_models_load_each_others_files(tmp_path: Path) -> None:
    def model(tied: bool) -> nn.Module:
        made = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        if tied:
            made[1].weight = made[0].weight
        return made

    tied = ewma.ModelEMA(model(True), decay=DECAY)
    tied.update()
    tied.save(tmp_path / "tied")
    for load in (lambda ema: ema.load(tmp_path / "tied"), lambda ema: ema.load_state_dict(tied.state_dict())):
        untied = ewma.ModelEMA(model(False), decay=DECAY)
        load(untied)
        assert torch.equal(averages(untied)["1.weight"], averages(tied)["0.weight"])


def test_a_tie_made_midway_is_one_average_under_every_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    ema = ewma.ModelEMA(model, decay=DECAY)
    ema.update()
    model[1].weight = model[0].weight
    ema.update()
    state = ema.state_dict()
    assert state["averages"]["average"]["1.weight"] is state["averages"]["average"]["0.weight"]
    other = ewma.ModelEMA(model, decay=DECAY)
    other.load_state_dict(state)
    assert torch.equal(averages(other)["0.weight"], averages(ema)["0.weight"])


def test_buffers_of_another_shape_are_refused(small: Small, sgd) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY).attach(sgd)
    train(small, sgd, 2)
    state = copy.deepcopy(ema.state_dict())
    state["copies"]["norm.running_mean"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"the saved buffers: of another shape: norm.running_mean \[7\] for \[6\]"):
        ema.load_state_dict(state)


def test_nothing_to_average_yet() -> None:
    with pytest.raises(ValueError, match="no floating parameters yet; a lazy layer gets its own in its first forward"):
        ewma.ModelEMA(nn.Sequential(nn.LazyLinear(3)), decay=DECAY).update()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"profile": ewma.Uniform(), "debias": False}, TypeError, "debias= belongs to the profile"),
        ({"decay": 0.9, "only": 5}, TypeError, "only must be globs"),
        ({"decay": 0.9, "seed": 1.5}, TypeError, "seed must be a whole number; got 1.5"),
        ({"profile": {1: ewma.Uniform()}}, TypeError, "several profiles go by names, .*; got 1 as one"),
        ({"decay": 0.9, "dtype": "bfloat16"}, ValueError, "torch.bfloat16 or torch.float16; got 'bfloat16'"),
    ],
)
def test_more_bad_arguments(small: Small, arguments: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ewma.ModelEMA(small, **arguments)


def test_a_whole_checkpoint_in_place_of_its_part(small: Small) -> None:
    ema = ewma.ModelEMA(small, decay=DECAY)
    with pytest.raises(ValueError, match=r"Its part 'ema' was probably meant: state\['ema'\]"):
        ema.load_state_dict({"model": small.state_dict(), "ema": ema.state_dict()})
    with pytest.raises(TypeError, match="elapsed must be a number: .* got Small"):
        ema.update(small)


def test_coarse_averages_are_kept_finer_from_loading_on() -> None:
    model = nn.Linear(4, 4)
    coarse = ewma.ModelEMA(model, decay=DECAY, dtype=torch.bfloat16)
    coarse.update()
    fine = ewma.ModelEMA(model, decay=DECAY)
    fine.load_state_dict(coarse.state_dict())
    assert averages(fine)["weight"].dtype == torch.float32
    assert torch.equal(averages(fine)["weight"], averages(coarse)["weight"].float())


def test_loading_one_of_two_profiles_afresh_in_another_layout(tmp_path: Path) -> None:
    several = {"fast": ewma.Exponential(decay=DECAY), "slow": ewma.Exponential(decay=0.99)}
    plain = ewma.ModelEMA(nn.Conv2d(3, 5, 3), several)
    plain.update()
    plain["fast"].save(tmp_path / "fast")
    fresh = ewma.ModelEMA(nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), several)
    fresh["fast"].load(tmp_path / "fast")
    assert same(averages(fresh["fast"]), averages(plain["fast"]))
    fresh.update()
    assert torch.equal(averages(fresh["slow"])["weight"], fresh.model.weight)


def test_an_absent_parameter_keeps_its_time_even_where_all_that_began_with_it_are_absent() -> None:
    model = nn.Module()
    model.early = nn.Parameter(torch.zeros(1))
    ema = ewma.ModelEMA(model, decay=DECAY)
    ema.update()
    early, model.early, model.late = model.early, None, nn.Parameter(torch.ones(1))
    for _ in range(20):
        ema.update()
    model.early = early
    with torch.no_grad():
        early.fill_(1.0)
    ema.update()
    assert averages(ema)["early"].item() == pytest.approx(1 / (1 + DECAY))
