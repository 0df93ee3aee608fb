"""nn.EMA, the running mean inside a network, in buffers; nn.Smooth, along time with a learned half-life."""

from __future__ import annotations

import copy
import functools
import io
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import ewma
from ewma.nn import EMA
from ewma.profiles import (
    Exponential,
    Power,
    Uniform,
    after,
    cosine,
    fraction,
    from_lr_decay,
    inverse_gamma,
    linear,
    mean_teacher,
    ramp,
    tensorflow,
)

approx = pytest.approx
NAN, INF = math.nan, math.inf
identical = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-13)
double = functools.partial(torch.tensor, dtype=torch.float64)

ELAPSED = [1.0, 0.5, 3.0, 1.0, 0.125, 7.0, 2.0, 1.0]
PROFILES = [
    Exponential(half_life=3),
    Exponential(alpha=1),
    Exponential(half_life=3, debias=False),
    Power(sigma_rel=0.1),
    Uniform(),
    inverse_gamma(decay=0.9),
    tensorflow(decay=0.5),
    cosine(first=0.5, steps=4),
    ramp(tau=5, debias=False),
    mean_teacher(decay=0.7),
    linear(first=0.2, last=0.9, steps=4),
    linear(first=1, last=0.5, steps=4),
    fraction(share=0.5),
    after(start=2.5, profile=Uniform()),
    from_lr_decay(shape="cosine", steps=20),
]
each_profile = pytest.mark.parametrize("profile", PROFILES, ids=str)


def values(*shape: int) -> torch.Tensor:
    """As many values as there are elapsed times."""
    return torch.randn(len(ELAPSED), *shape, generator=torch.Generator().manual_seed(1))


def run(ema: EMA, xs, elapsed=None) -> list[torch.Tensor]:
    return [ema(x, passed) for x, passed in zip(xs, elapsed or [1.0] * len(xs), strict=True)]


def series(profile, xs, elapsed=None) -> list:
    """What `ewma.EMA` makes of the same values by time."""
    ema, means = ewma.EMA(profile, weigh="time"), []
    for x, passed in zip(xs, elapsed or [1.0] * len(xs), strict=True):
        ema.update(x, passed)
        means.append(ema.get())
    return means


# ---- the mean


@each_profile
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)], ids=str)
def test_it_is_the_mean_of_the_series_by_time(profile, shape: tuple[int, ...]):
    xs = values(*shape).double()
    close(run(EMA(shape, profile, dtype=torch.float64), xs, ELAPSED), series(profile, xs, ELAPSED))


@each_profile
def test_the_values_weigh_what_the_profile_says(profile):
    xs = values(3).double()
    mean = run(EMA(3, profile, dtype=torch.float64), xs)[-1]
    close(mean, (double(profile.weights(len(xs)))[:, None] * xs).sum(dim=0))


@each_profile
@pytest.mark.parametrize("constant", [0.1, -1e300, 5e-324])
def test_a_constant_stays_exactly_constant(profile, constant: float):
    x = double([constant, -constant])
    identical(run(EMA(2, profile, dtype=torch.float64), [x] * len(ELAPSED), ELAPSED), [x] * len(ELAPSED))


def test_the_widest_floats_do_not_overflow():
    mean = run(EMA((), alpha=0.5, dtype=torch.float64), [double(1e308), double(-1e308), double(1e308)])[-1]
    assert mean.item() == approx(1e308 * (3 / 7), rel=1e-14)


@pytest.mark.parametrize("cast", [nn.Module.float, nn.Module.half, nn.Module.bfloat16])
def test_a_long_half_life_does_not_stall(cast):
    """2,000 updates at half-life 1e6 move as far as float64 says, in steps that float32 would round away."""
    ema = cast(EMA((), half_life=1e6, debias=False, dtype=torch.float64))
    run(ema, [torch.tensor(1.0)] + [torch.tensor(1.0005)] * 2000)
    moved = (torch.tensor(1.0005).item() - 1) * -math.expm1(-2000 * math.log(2) / 1e6)
    assert ema.get().item() - 1 == approx(moved, rel=1e-9)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_values_of_any_dtype_give_the_wanted_dtype(dtype: torch.dtype):
    xs = (values(5) > 0).to(dtype)
    for wanted in (torch.float32, torch.bfloat16, torch.float64):
        mean = run(EMA(5, half_life=3, dtype=wanted), xs)[-1]
        assert (mean.dtype, mean.shape) == (wanted, (5,))
        tolerance = {"rtol": 2 * torch.finfo(wanted).eps, "atol": 1e-15}
        torch.testing.assert_close(mean.double(), series(Exponential(half_life=3), xs.double())[-1], **tolerance)


def test_the_defaults_are_float32_and_a_bare_size():
    ema = EMA(4, half_life=3)
    assert ema(torch.ones(4, dtype=torch.float64)).dtype == torch.float32
    assert repr(ema) == "EMA((4,), Exponential(half_life=3))"
    assert EMA(torch.Size([2, 3]), half_life=3).get().shape == (2, 3)


@pytest.mark.parametrize("elapsed", [np.int64(16), np.float32(16), 16, torch.tensor(16), torch.tensor(16.0)], ids=repr)
def test_elapsed_may_be_any_number_or_a_tensor(elapsed):
    xs = values(3)
    close(run(EMA(3, half_life=20), xs, [elapsed] * 8), run(EMA(3, half_life=20), xs, [16.0] * 8))


def test_an_elapsed_of_0_on_the_device_is_a_step_not_taken():
    ema = EMA(2, half_life=3)
    run(ema, [torch.ones(2), torch.zeros(2)])
    before = copy.deepcopy(ema.state_dict())
    ema(torch.full((2,), 9.0), torch.tensor(0.0))
    identical(ema.state_dict(), before)


# ---- modes, the first update, aliases


def test_in_evaluation_it_only_looks():
    ema = EMA(2, half_life=3)
    seen = ema(torch.ones(2))
    before = copy.deepcopy(ema.eval().state_dict())
    identical(ema(torch.zeros(2)), seen)
    identical(ema.state_dict(), before)
    ema.train()(torch.zeros(2))
    assert ema.count == 2


def test_update_takes_in_whatever_the_mode():
    ema = EMA(2, half_life=3).eval()
    ema.update(torch.ones(2))
    assert (ema.count, ema.get().tolist()) == (1, [1.0, 1.0])


def test_before_the_first_update_the_average_is_0():
    ema = EMA((2, 2), half_life=3)
    assert ema.count == 0
    assert ema.get().tolist() == ema.eval()(torch.ones(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_reset_makes_the_next_update_the_first():
    ema = EMA(2, Power(sigma_rel=0.1))
    run(ema, values(2), ELAPSED)
    assert ema.count == 8
    ema.reset()
    identical(ema.state_dict(), EMA(2, Power(sigma_rel=0.1)).state_dict())
    assert ema.count == 0
    identical(run(ema, values(2)), run(EMA(2, Power(sigma_rel=0.1)), values(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_outside_shares_its_memory(dtype: torch.dtype):
    """Neither values that change afterwards, nor results that do, nor results in a list."""
    ema, x, results, copies = EMA(2, half_life=3, dtype=dtype), torch.ones(2, dtype=dtype), [], []
    for _ in range(3):
        results.append(ema(x))
        copies.append(results[-1].clone())
        x += 100
    identical(results, copies)
    results[-1].add_(100)
    ema.get().add_(100)
    identical(ema.get(), copies[-1])


def test_no_gradient_goes_through():
    weight = torch.ones(2, requires_grad=True)
    ema = EMA(2, half_life=3)
    centre = ema(weight * 3)
    assert (centre.requires_grad, list(ema.parameters())) == (False, [])
    ((weight * 3 - centre) ** 2 + weight).sum().backward()
    assert weight.grad.tolist() == [1.0, 1.0]


def test_a_result_in_a_graph_may_be_followed_by_updates():
    weight, ema = torch.ones(2, requires_grad=True), EMA(2, half_life=3, dtype=torch.float64)
    loss = (weight * ema(torch.ones(2))).sum()
    ema(torch.zeros(2))
    loss.backward()
    assert weight.grad.tolist() == [1.0, 1.0]


def test_inference_mode_is_left_outside():
    ema, weight = EMA(2, half_life=3), torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        run(ema, values(2))
    (weight * ema(torch.ones(2))).sum().backward()
    identical(ema.get(), run(EMA(2, half_life=3), [*values(2), torch.ones(2)])[-1])


def test_nothing_is_read_on_the_host():
    """A tensor on the meta device has no value: to read one, as count must, is an error."""
    ema = EMA(2, half_life=3).to("meta")
    results = run(ema, [torch.ones(2, device="meta")] * 3, [1.0, 2.0, torch.ones((), device="meta")])
    assert [result.device.type for result in results] == ["meta"] * 3
    with pytest.raises(RuntimeError, match="meta"):
        _ = ema.count


def test_the_buffers_stay_where_they_are():
    """What a captured graph or a data-parallel wrapper holds on to."""
    ema = EMA(2, half_life=3)
    before = [(name, id(buffer), buffer.data_ptr()) for name, buffer in ema.named_buffers()]
    run(ema, values(2), ELAPSED)
    ema.reset()
    ema.load_state_dict(EMA(2, half_life=3).state_dict())
    ema.half()
    assert [(name, id(buffer), buffer.data_ptr()) for name, buffer in ema.named_buffers()] == before


# ---- what is not finite


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_an_element_that_is_not_finite_is_left_out(bad: float):
    ema = EMA(2, alpha=0.5, debias=False)
    means = run(ema, [torch.tensor([1.0, 1.0]), torch.tensor([bad, 3.0]), torch.tensor([2.0, 2.0])])
    assert [mean.tolist() for mean in means] == [[1.0, 1.0], [1.0, 2.0], [1.5, 2.0]]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@each_profile
def test_an_element_takes_its_first_finite_value(profile, bad: float):
    ema, bads = EMA(2, profile), torch.tensor([bad, bad])
    assert [mean.tolist() for mean in run(ema, [bads, bads])] == [[0.0, 0.0], [0.0, 0.0]]
    assert ema(torch.tensor([bad, 4.0])).tolist() == [0.0, 4.0]
    assert ema(torch.tensor([5.0, bad])).tolist() == [5.0, 4.0]


# ---- errors


@pytest.mark.parametrize(("shape", "came"), [((3,), (8, 3)), ((3,), ()), ((2, 3), (3,)), ((), (1,))], ids=str)
def test_a_batch_is_to_be_averaged_first(shape: tuple[int, ...], came: tuple[int, ...]):
    ema = EMA(shape, half_life=3)
    ema(torch.ones(shape))
    before = copy.deepcopy(ema.state_dict())
    text = rf"expected a value of shape \{list(shape)}; got \{list(came)}\. Average over the batch first, .*dim=0"
    with pytest.raises(ValueError, match=text):
        ema(torch.zeros(came))
    identical(ema.state_dict(), before)


@pytest.mark.parametrize("elapsed", [0, -1, NAN, INF, np.int64(0)], ids=repr)
def test_elapsed_must_be_a_finite_number_above_0(elapsed):
    ema = EMA(2, half_life=3)
    ema(torch.ones(2))
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match="elapsed must be a finite number above 0"):
        ema(torch.zeros(2), elapsed)
    identical(ema.state_dict(), before)


@pytest.mark.parametrize(
    ("positional", "named", "text"),
    [
        (
            (0.9,),
            {},
            r"nn\.EMA\(shape, 0\.9\) could be read two ways\. Write nn\.EMA\(shape, decay=0\.9\) .*alpha=0\.9",
        ),
        (
            (100,),
            {},
            r"nn\.EMA\(shape, 100\) could be read two ways\. Write nn\.EMA\(shape, half_life=100\) .*span=100",
        ),
        ((), {}, "expected exactly one of half_life, decay, alpha, span, com; got none"),
        ((), {"alpha": 0.5, "span": 3}, "expected exactly one of .*; got alpha=0.5 and span=3"),
        ((Uniform(),), {"alpha": 0.5}, r"got Uniform\(\) and alpha=: keep one of them"),
    ],
)
def test_construction_errors(positional: tuple, named: dict, text: str):
    with pytest.raises(TypeError, match=text):
        EMA(3, *positional, **named)


def test_a_name_of_torchs_is_pointed_there():
    with pytest.raises(
        AttributeError, match=r"'ewma\.nn' has no attribute 'Linear'; it has EMA and Smooth\. torch's own are in"
    ):
        _ = ewma.nn.Linear


# ---- in a model: state, casts, copies


class Centred(nn.Module):
    def __init__(self, profile=None, **options) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.centre = EMA(2, profile or Exponential(half_life=3), **options)

    def forward(self, x: torch.Tensor, elapsed: float = 1.0) -> torch.Tensor:
        x = self.layer(x)
        return x - self.centre(x.mean(dim=0), elapsed)


def through_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_profile
@pytest.mark.parametrize("way", [copy.deepcopy, through_file])
@pytest.mark.parametrize("assign", [False, True])
def test_a_resumed_model_equals_the_uninterrupted_one_bit_for_bit(profile, way, assign: bool):
    whole, resumed = Centred(profile), Centred(profile)
    run(whole, values(5, 3)[:4], ELAPSED[:4])
    resumed.load_state_dict(way(whole.state_dict()), assign=assign)
    assert resumed.centre.count == 4
    identical(run(resumed, values(5, 3), ELAPSED), run(whole, values(5, 3), ELAPSED))
    identical(resumed.state_dict(), whole.state_dict())


def test_the_state_are_buffers_saved_with_the_model():
    model = Centred()
    assert {name for name in model.state_dict() if "centre" in name} == {"centre.average", "centre.numbers"}
    assert not [name for name, _ in model.named_parameters() if "centre" in name]


CASTS = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "float": nn.Module.float,
    "to": lambda module: module.to(torch.bfloat16),
    "to device and dtype": lambda module: module.to("cpu", torch.float16),
}
each_cast = pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)


@each_cast
def test_a_cast_leaves_what_is_kept_in_float64_bit_for_bit(cast):
    model = Centred(dtype=torch.float64)
    run(model, values(5, 3))
    kept = copy.deepcopy(model.centre.state_dict())
    cast(model)
    identical(model.centre.state_dict(), kept)
    assert model.centre.state_dict()["average"].dtype == torch.float64
    plain = EMA(2, half_life=3, dtype=torch.float64)
    plain.load_state_dict(kept)
    identical(run(model.centre, values(2)), run(plain, values(2)))


@each_cast
def test_a_cast_leaves_the_output_dtype_that_was_asked_for(cast):
    assert cast(EMA(2, half_life=3, dtype=torch.bfloat16))(torch.ones(2)).dtype == torch.bfloat16


@each_cast
def test_a_model_made_on_meta_and_cast_there_is_float64_too(cast):
    if cast is CASTS["to device and dtype"]:
        cast = functools.partial(nn.Module.to, device="meta", dtype=torch.float16)
    ema = cast(EMA(2, half_life=3).to("meta")).to_empty(device="cpu")
    ema.reset()
    assert (ema.average.dtype, ema.numbers.dtype) == (torch.float64, torch.int64)
    identical(run(ema, values(2)), run(EMA(2, half_life=3), values(2)))


def test_a_model_made_on_meta_takes_a_state_and_goes_on():
    whole = Centred()
    run(whole, values(5, 3), ELAPSED)
    with torch.device("meta"):
        model = Centred()
    model.to_empty(device="cpu").load_state_dict(whole.state_dict())
    identical(run(model, values(5, 3)), run(whole, values(5, 3)))


def test_a_copy_goes_its_own_way():
    ema = EMA(2, half_life=3)
    run(ema, values(2))
    before, twin = copy.deepcopy(ema.state_dict()), copy.deepcopy(ema)
    results = run(twin, values(2))
    identical(ema.state_dict(), before)
    identical(run(ema, values(2)), results)


# ---- compiled


@pytest.fixture
def compiled():
    """A module compiled as one graph, and how often it was."""
    from torch._dynamo.testing import CompileCounter  # slow, and the ranks below import this file too

    torch._dynamo.reset()
    counter = CompileCounter()
    yield lambda module: torch.compile(module, backend=counter, fullgraph=True), counter
    torch._dynamo.reset()


@each_profile
def test_compiled_it_is_the_same_and_is_compiled_once(profile, compiled):
    compile_, counter = compiled
    ema = EMA(3, profile)
    fast = compile_(ema)
    identical(run(fast, values(3)), run(EMA(3, profile), values(3)))
    assert counter.frame_count == 1
    assert ema.count == 8


def test_an_elapsed_that_changes_on_the_device_is_compiled_once(compiled):
    compile_, counter = compiled
    fast = compile_(EMA(3, half_life=3))
    identical(run(fast, values(3), [double(x) for x in ELAPSED]), run(EMA(3, half_life=3), values(3), ELAPSED))
    assert counter.frame_count == 1


def test_an_elapsed_that_changes_on_the_host_compiles(compiled):
    compile_, counter = compiled
    fast = compile_(EMA(3, half_life=3))
    close(run(fast, values(3), ELAPSED), run(EMA(3, half_life=3), values(3), ELAPSED))
    assert counter.frame_count <= 2


def test_a_model_around_it_compiles_through_its_gradient(compiled):
    compile_, counter = compiled
    model = Centred()
    twin = copy.deepcopy(model)
    fast = compile_(model)
    for x in values(5, 3):
        fast(x).square().sum().backward()
        twin(x).square().sum().backward()
    identical([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert counter.frame_count == 1


# ---- over ranks


def on_a_rank(rank: int, folder: str) -> None:
    """Two averages over all ranks, one over a group of this rank only, one that reduces nothing."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    alone = [dist.new_group([each]) for each in range(2)][rank]
    means = {}
    for name, group in {"default": True, "world": dist.group.WORLD, "alone": alone, "off": False}.items():
        ema = EMA(3, half_life=3, all_reduce=group)
        means[name] = run(ema, [*values(2, 3)[:, rank], rank_gap(rank)], [*ELAPSED, 1.0])
    torch.save(means, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def rank_gap(rank: int) -> torch.Tensor:
    """A value whose first element only the second rank misses."""
    return torch.tensor([NAN if rank else 1.0, 2.0, 3.0])


def test_all_reduce_keeps_the_mean_over_ranks(tmp_path):
    torch.multiprocessing.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    xs = values(2, 3)
    expected = run(EMA(3, half_life=3), [*xs.mean(dim=1), torch.tensor([NAN, 2.0, 3.0])], [*ELAPSED, 1.0])
    for name in ("default", "world"):
        identical(first[name], second[name])
        torch.testing.assert_close(first[name], expected)
    for rank, means in enumerate((first, second)):
        identical(means["alone"], means["off"])
        identical(means["off"], run(EMA(3, half_life=3), [*xs[:, rank], rank_gap(rank)], [*ELAPSED, 1.0]))


def test_all_reduce_without_a_process_group_is_the_plain_mean():
    identical(run(EMA(3, half_life=3, all_reduce=True), values(3)), run(EMA(3, half_life=3), values(3)))


# ---- Smooth


def plain(x: torch.Tensor, half_life: torch.Tensor) -> torch.Tensor:
    """mean = mean + c * (x - mean), step by step, along dimension 1."""
    decay, mean, weight, means = 2.0 ** (-1.0 / half_life.double()), 0.0, 0.0, []
    for step in x.double().unbind(1):
        weight = decay * weight + 1.0
        mean = mean + (step - mean) / weight
        means.append(mean)
    return torch.stack(means, 1)


def test_smooth_is_the_recurrence_for_each_channel():
    x = torch.randn(3, 50, 2, dtype=torch.float64)
    smooth = ewma.nn.Smooth(2, [1.5, 20.0])
    torch.testing.assert_close(smooth(x), plain(x, smooth.half_life), rtol=1e-12, atol=1e-12)


def test_smooth_without_debiasing_starts_at_the_first_value():
    x = torch.randn(1, 30, 1, dtype=torch.float64)
    smooth, mean = ewma.nn.Smooth(1, 3.0, debias=False), x[:, 0]
    alpha = 1.0 - 2.0 ** (-1.0 / smooth.half_life.double())
    for step, y in zip(x.unbind(1), smooth(x).unbind(1), strict=True):
        mean = mean + alpha * (step - mean)
        torch.testing.assert_close(y, mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_smooth_goes_along_any_dimension_but_the_channels(dim: int):
    x = torch.randn(4, 5, 6, 2, dtype=torch.float64)
    smooth = ewma.nn.Smooth(2, [1.0, 9.0], dim=dim)
    right = plain(x.movedim(dim, 1), smooth.half_life).movedim(1, dim)
    torch.testing.assert_close(smooth(x), right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("cuts", [(1, 1, 28), (10, 20), (29, 1)])
def test_decoding_piece_by_piece_is_the_whole_with_its_gradients(debias: bool, cuts: tuple[int, ...]):
    x = torch.randn(2, 30, 3, dtype=torch.float64, requires_grad=True)
    smooth, state, pieces = ewma.nn.Smooth(3, [1.0, 5.0, 40.0], debias=debias), None, []
    weights = torch.randn_like(x)
    whole = torch.autograd.grad((smooth(x) * weights).sum(), [x, smooth.log_half_life])
    for piece in x.split(cuts, 1):
        y, state = smooth.decode(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), smooth(x), rtol=1e-13, atol=1e-13)
    pieced = torch.autograd.grad((torch.cat(pieces, 1) * weights).sum(), [x, smooth.log_half_life])
    torch.testing.assert_close(pieced, whole, rtol=1e-6, atol=1e-9)


def test_smooth_learns_the_half_lives_that_made_its_targets():
    x, right = torch.randn(4, 300, 2), torch.tensor([3.0, 30.0])
    targets, smooth = plain(x, right).float(), ewma.nn.Smooth(2, 8.0)
    optimizer = torch.optim.Adam(smooth.parameters(), lr=0.15)
    for _ in range(110):
        optimizer.zero_grad()
        (smooth(x) - targets).pow(2).mean().backward()
        optimizer.step()
    torch.testing.assert_close(smooth.half_life.float().detach(), right, rtol=0.02, atol=0)


def test_smooth_leaves_out_what_is_missing_and_lets_no_gradient_reach_it():
    x = torch.tensor([[[1.0], [float("nan")], [3.0]]], requires_grad=True)
    y = ewma.nn.Smooth(1, 1.0)(x)
    y.sum().backward()
    assert y.flatten().tolist() == pytest.approx([1.0, 1.0, 7 / 3])
    assert x.grad.flatten().tolist() == pytest.approx([2 + 1 / 3, 0.0, 2 / 3])


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("cuts", [(9,), (1, 8), (4, 5), (2, 2, 5)])
def test_smooth_is_0_before_the_first_value_whatever_comes_later(learn: bool, debias: bool, cuts: tuple[int, ...]):
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    x[0, 0, 0] = x[:, :3, 2] = x[1, 5, 1] = NAN
    x[1, :, 0] = -math.inf
    smooth, state, pieces = ewma.nn.Smooth(3, [0.5, 5.0, 100.0], learn=learn, debias=debias), None, []
    for piece in x.split(cuts, 1):
        y, state = smooth.decode(piece, state)
        pieces.append(y)
    channels = [
        [ewma.smooth(x[row, :, k], half_life=smooth.half_life[k].item(), debias=debias) for k in range(3)]
        for row in range(2)
    ]
    right = torch.stack([torch.stack(row, 1) for row in channels]).nan_to_num(0.0)
    torch.testing.assert_close(torch.cat(pieces, 1), right, rtol=1e-13, atol=1e-13)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own, where a graph ends
def test_smooth_in_a_compiled_model_is_what_it_is_and_is_not_traced():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    model = nn.Sequential(nn.Linear(3, 3), ewma.nn.Smooth(3, 5.0), nn.Linear(3, 3))
    fast = torch.compile(model, backend=counter)
    for n in (5, 7, 9):
        x = torch.randn(2, n, 3)
        torch.testing.assert_close(fast(x), model(x))
    gradients = [torch.autograd.grad(each(x).sum(), [*model.parameters()]) for each in (model, fast)]
    torch.testing.assert_close(*gradients)
    assert counter.op_count < 20
    torch._dynamo.reset()


@pytest.mark.parametrize("module", [ewma.nn.Smooth(2, 5.0), ewma.nn.EMA((3, 2), half_life=5.0)], ids=["Smooth", "EMA"])
def test_what_would_lose_its_imaginary_part_is_refused(module):
    text = r"expected a tensor of floating-point numbers; got torch\.complex64\. Average x\.real and x\.imag\."
    with pytest.raises(TypeError, match=text):
        module(torch.ones(3, 2, dtype=torch.complex64))


def test_smooth_refuses_integers_which_could_not_hold_a_mean():
    with pytest.raises(TypeError, match=r"nn\.Smooth: expected .*; got torch\.int64\. Convert it: x\.float\(\)"):
        ewma.nn.Smooth(2, 5.0)(torch.ones(3, 2, dtype=torch.int64))


def test_smooth_gives_the_dtype_it_was_given_and_may_be_kept_from_learning():
    smooth = ewma.nn.Smooth(2, 5.0, learn=False)
    assert smooth(torch.randn(1, 4, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not list(smooth.parameters())
    assert list(smooth.state_dict()) == ["log_half_life"]
    assert repr(smooth) == "Smooth(channels=2, dim=-2, debias=True)"


@pytest.mark.parametrize(
    ("half_life", "text"),
    [
        ([1.0, 2.0], r"expected one half-life, or one for each of 3 channels; got shape \[2\]"),
        (0.0, "half-lives must be finite and above 0, in steps; got 0.0"),
        ([1.0, float("nan"), 2.0], "must be finite and above 0"),
    ],
)
def test_smooth_refuses_half_lives_that_mean_nothing(half_life, text: str):
    with pytest.raises(ValueError, match=text):
        ewma.nn.Smooth(3, half_life)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, 5, 4), r"expected 3 channels along the last dimension and time along dim=-2; got shape \[2, 5, 4\]"),
        ((2, 0, 3), "expected one step or more along dim=-2; got none"),
    ],
)
def test_smooth_refuses_other_shapes(shape: tuple[int, ...], text: str):
    with pytest.raises(ValueError, match=text):
        ewma.nn.Smooth(3, 2.0)(torch.randn(shape))
