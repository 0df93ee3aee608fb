"""EMA, the running mean of a series: the article's class made right, for floats, arrays, tensors and dicts of them."""

from __future__ import annotations

import copy
import functools
import io
import json
import math

import numpy as np
import pytest
import torch
from tests.streams import (
    DATA,
    ELAPSED,
    GAPPY,
    INF,
    KINDS,
    NAN,
    STREAMS,
    double,
    each_array,
    each_kind,
    each_weigh,
    fed,
    map_kind,
    unchanged,
)

import ewma
from ewma import EMA
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
identical = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)

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
    linear(first=1, last=0.5, steps=4),  # the first weighs nothing: all there is until the second comes
    fraction(share=0.5),
    after(start=2.5, profile=Uniform()),
    from_lr_decay(shape="cosine", steps=12),
]


def truth(values, elapsed=None, *, decay: float, weigh: str = "value", debias: bool = True) -> float:
    """The weighted mean written out: what is not finite drops, and its elapsed with it (pandas' ignore_na=True)."""
    every = zip(values, elapsed or [1.0] * len(values), strict=True)
    kept = [(float(x), passed) for x, passed in every if math.isfinite(x)]
    age, weights = 0.0, []
    for position, (_, passed) in reversed(list(enumerate(kept))):
        first = position == 0 and not debias
        by_value = weigh == "value" and debias
        weights.append(decay**age * (1.0 if first or by_value else 1.0 - decay**passed))
        age += passed
    terms = [weight * x for weight, (x, _) in zip(reversed(weights), kept, strict=True)]
    return math.fsum(terms) / math.fsum(weights) if kept else NAN


def element_truths(values, elapsed=None, **rule) -> np.ndarray:
    """`truth` for each element of arrays."""
    stacked = np.stack([double(x) for x in values])
    return np.array([truth(column, elapsed, **rule) for column in stacked.reshape(len(values), -1).T]).reshape(
        stacked.shape[1:]
    )


# ---- the article


def test_the_articles_example_runs_unchanged():
    data = [10, 12, 11, 15, 14, 13]
    ema = EMA(alpha=0.5)
    for value in data:
        ema.update(torch.tensor(value))
    smoothed = ema.get()
    assert isinstance(smoothed, torch.Tensor)
    assert smoothed.item() == approx(truth(data, decay=0.5), rel=1e-15)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.5, 0.9])
def test_the_articles_division_is_right_for_one_half_only(alpha: float):
    ema, average = EMA(alpha=alpha), 0.0
    for count, x in enumerate(DATA, 1):
        ema.update(x)
        average = alpha * x + (1 - alpha) * average  # zero-initialised, as the article has it
        article, right = average / (1 - alpha**count), average / (1 - (1 - alpha) ** count)
        assert ema.get() == approx(truth(DATA[:count], decay=1 - alpha), rel=1e-13)
        assert ema.get() == approx(right, rel=1e-13)
        assert (article == approx(right, rel=1e-4)) is (alpha == 0.5)


def test_it_has_the_articles_names_and_is_the_package_s():
    assert ewma.EMA is EMA
    assert all(hasattr(EMA(alpha=0.5), name) for name in ("update", "get", "count"))
    assert repr(fed(EMA(half_life=3), DATA)) == "EMA(Exponential(half_life=3), weigh='value', count=6)"


# ---- every kind of value agrees with float64 truth


@pytest.mark.parametrize(
    "number",
    [int, float, np.float16, np.float32, np.float64, np.longdouble, np.int8, np.int64, np.uint16, bool, np.bool_],
)
def test_numbers_and_numpy_scalars_are_numbers(number: type):
    values = [number(x) for x in (5, 2, 8, 0, 3)]
    mean = fed(EMA(alpha=0.3), values, ELAPSED[:5]).get()
    assert type(mean) is float
    assert mean == approx(truth(values, ELAPSED[:5], decay=0.7), rel=1e-15)


SHAPES = [(), (0,), (1,), (7,), (2, 3), (2, 0, 3)]
NUMPY_DTYPES = ["float16", "float32", "float64", ">f4", "int8", "uint16", "int32", "int64", "bool"]
TORCH_DTYPES = ["float16", "bfloat16", "float32", "float64", "uint8", "int32", "int64", "bool"]


def quarters(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Small multiples of 1/4, which every float type holds exactly."""
    return list(np.random.default_rng(0).integers(0, 100, size=(6, *shape)) / 4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_numpy_arrays_of_any_dtype_and_shape(dtype: str, shape: tuple[int, ...]):
    values = [np.asarray(x).astype(dtype) for x in quarters(shape)]
    mean = fed(EMA(half_life=2), values, ELAPSED).get()
    assert isinstance(mean, np.ndarray)
    assert mean.shape == shape
    assert mean.dtype == (dtype if np.dtype(dtype).kind == "f" else np.float64)
    tolerance = 2 * np.finfo(mean.dtype).eps
    np.testing.assert_allclose(double(mean), element_truths(values, ELAPSED, decay=2**-0.5), rtol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_tensors_of_any_dtype_and_shape(dtype: str, shape: tuple[int, ...]):
    wanted = getattr(torch, dtype)
    values = [torch.tensor(x).to(wanted) for x in quarters(shape)]
    mean = fed(EMA(half_life=2), values, ELAPSED).get()
    assert (type(mean), mean.shape, mean.device) == (torch.Tensor, shape, values[0].device)
    assert mean.dtype == (wanted if wanted.is_floating_point else torch.float64)
    tolerance = 2 * torch.finfo(mean.dtype).eps
    np.testing.assert_allclose(double(mean), element_truths(values, ELAPSED, decay=2**-0.5), rtol=tolerance)


def test_a_dict_averages_each_name_as_if_alone():
    kinds = {"float": float, "numpy": np.float32, "array": lambda x: np.array([x, 1.0]), "torch": torch.tensor}
    mean = fed(EMA(half_life=2), [{name: kind(x) for name, kind in kinds.items()} for x in DATA], ELAPSED).get()
    assert list(mean) == list(kinds)
    for name, kind in kinds.items():
        identical(mean[name], fed(EMA(half_life=2), [kind(x) for x in DATA], ELAPSED).get())


@each_array
def test_transposed_and_strided_values_are_read_by_their_elements(kind):
    values = [kind(x) for x in np.random.default_rng(1).normal(size=(5, 4, 6))]
    mean = fed(EMA(half_life=2), [x.T[::2] for x in values])
    np.testing.assert_array_equal(double(mean.get()), double(fed(EMA(half_life=2), values).get()).T[::2])


@each_kind
@pytest.mark.parametrize("profile", PROFILES, ids=str)
def test_every_profile_averages_by_its_weights(profile, kind):
    ema = EMA(profile)
    for count, x in enumerate(DATA, 1):
        ema.update(kind(x))
        expected = math.fsum(weight * x for weight, x in zip(profile.weights(count), DATA, strict=False))
        assert float(ema.get()) == approx(expected, rel=1e-13)


@each_kind
@each_weigh
@pytest.mark.parametrize("debias", [True, False])
def test_uneven_elapsed(kind, weigh: str, debias: bool):
    ema = EMA(decay=0.8, debias=debias, weigh=weigh)
    for count, (x, passed) in enumerate(zip(DATA, ELAPSED, strict=True), 1):
        ema.update(kind(x), passed)
        expected = truth(DATA[:count], ELAPSED[:count], decay=0.8, weigh=weigh, debias=debias)
        assert float(ema.get()) == approx(expected, rel=1e-13)


@each_kind
def test_debias_false_starts_at_the_first_value(kind):
    assert float(fed(EMA(alpha=0.1, debias=False), [kind(5.0)]).get()) == 5.0
    assert float(fed(EMA(alpha=0.1, debias=False), [kind(5.0), kind(15.0)]).get()) == approx(6.0, rel=1e-15)


@pytest.mark.parametrize("kind", [np.float32, torch.tensor], ids=["numpy", "torch"])
def test_float32_is_averaged_in_float64(kind):
    """20,000 values around 1000 leave no more error than the last rounding to float32."""
    values = np.random.default_rng(2).normal(1000.0, 1.0, size=20_000).astype(np.float32)
    mean = fed(EMA(alpha=1e-4), [kind(x)[None] for x in values]).get()
    weights = np.exp(np.log1p(-1e-4) * np.arange(len(values))[::-1])
    assert mean.dtype in (np.float32, torch.float32)
    assert float(mean[0]) == np.float32(math.fsum(weights * values) / math.fsum(weights))


@each_kind
@pytest.mark.parametrize("profile", PROFILES, ids=str)
@pytest.mark.parametrize("constant", [0.1, -1e308, 5e-324])
def test_a_constant_stays_exactly_constant(kind, profile, constant: float):
    ema = EMA(profile)
    for passed in ELAPSED:
        ema.update(kind(constant), passed)
        assert float(ema.get()) == constant


@each_kind
@each_weigh
def test_the_widest_floats_do_not_overflow(kind, weigh: str):
    mean = float(fed(EMA(alpha=0.5, weigh=weigh), [kind(1e308), kind(-1e308), kind(1e308)]).get())
    assert mean == approx(1e308 * (3 / 7), rel=1e-14)


# ---- by value and by time


@each_kind
@pytest.mark.parametrize(("weigh", "share"), [("time", 0.609), ("value", 0.163)])
def test_only_by_time_the_batch_size_does_not_matter(kind, weigh: str, share: float):
    """Half-life 100,000 samples; 64,000 in batches of 16, then as many in batches of 128: what the last half weighs."""
    first, last = 64_000 // 16, 64_000 // 128
    ema = EMA(half_life=100_000, weigh=weigh)
    fed(ema, [kind(0.0)] * first + [kind(1.0)] * last, [16] * first + [128] * last)
    assert float(ema.get()) == approx(share, abs=5e-4)


@each_kind
@pytest.mark.parametrize("profile", [Exponential(half_life=3), Power(sigma_rel=0.1), Uniform()], ids=str)
def test_splitting_a_value_changes_nothing_by_time(kind, profile):
    whole = fed(EMA(profile, weigh="time"), [kind(x) for x in DATA], [4.0] * 6)
    split = fed(EMA(profile, weigh="time"), [kind(x) for x in DATA for _ in range(4)])
    assert float(split.get()) == approx(float(whole.get()), rel=1e-13)


@pytest.mark.parametrize(("weigh", "weights"), [("time", ELAPSED), ("value", [1.0] * 6)])
def test_uniform_counts_values_or_time(weigh: str, weights: list[float]):
    expected = math.fsum(weight * x for weight, x in zip(weights, DATA, strict=True)) / math.fsum(weights)
    assert fed(EMA(Uniform(), weigh=weigh), DATA, ELAPSED).get() == approx(expected, rel=1e-14)


@each_kind
def test_equal_steps_make_both_weighings_one_mean(kind):
    by_value, by_time = (fed(EMA(half_life=3, weigh=weigh), map_kind(kind, DATA)) for weigh in ("value", "time"))
    assert float(by_time.get()) == approx(float(by_value.get()), rel=1e-14)


@pytest.mark.parametrize(("profile", "weigh"), [(Exponential(alpha=0.5), "value"), (Power(sigma_rel=0.1), "time")])
def test_the_default_is_by_value_where_the_profile_has_it(profile, weigh: str):
    assert EMA(profile).weigh == weigh


ELAPSED_NUMBERS = [np.int64(16), np.int32(16), np.uint8(16), np.float32(16), np.float64(16), 16, True]


@each_kind
@pytest.mark.parametrize("elapsed", ELAPSED_NUMBERS, ids=lambda x: type(x).__name__)
def test_elapsed_may_be_any_number(kind, elapsed):
    """A batch size often is NumPy's."""
    mean = fed(EMA(half_life=10), map_kind(kind, DATA), [elapsed] * 6).get()
    identical(mean, fed(EMA(half_life=10), map_kind(kind, DATA), [float(elapsed)] * 6).get())


# ---- NaN and infinity


@each_kind
@each_weigh
@pytest.mark.parametrize("debias", [True, False])
def test_what_is_not_finite_drops(kind, weigh: str, debias: bool):
    """As pandas' ignore_na=True: as if it, and the time it came with, had not been."""
    ema = EMA(decay=0.8, weigh=weigh, debias=debias)
    for count, (x, passed) in enumerate(zip(GAPPY, ELAPSED, strict=True), 1):
        ema.update(kind(x), passed)
        expected = truth(GAPPY[:count], ELAPSED[:count], decay=0.8, weigh=weigh, debias=debias)
        assert float(ema.get()) == approx(expected, rel=1e-13, nan_ok=True)
    assert (ema.skipped, ema.count) == (3, 6)


@each_kind
def test_a_gap_is_not_half_of_the_weight(kind):
    """[1, nan, 3] at alpha .5 is (.5 + 3) / 1.5; pandas 3's 2.5 with adjust=False is its special case, not ours."""
    assert float(fed(EMA(alpha=0.5), map_kind(kind, [1.0, NAN, 3.0])).get()) == approx(7 / 3, rel=1e-15)
    assert float(fed(EMA(alpha=0.5, debias=False), map_kind(kind, [1.0, NAN, 3.0])).get()) == approx(2.0, rel=1e-15)


@each_array
@each_weigh
@pytest.mark.parametrize("profile", [Exponential(decay=0.8), Exponential(decay=0.8, debias=False)], ids=str)
def test_each_element_drops_its_own(kind, weigh: str, profile):
    rng = np.random.default_rng(3)
    values = rng.normal(size=(12, 3, 5))
    values[rng.random(values.shape) < 0.4] = NAN
    values[3, 0], values[:, 1, 1] = -INF, NAN
    ema = fed(EMA(profile, weigh=weigh), map_kind(kind, values), ELAPSED * 2)
    expected = element_truths(values, ELAPSED * 2, decay=0.8, weigh=weigh, debias=profile.debias)
    np.testing.assert_allclose(double(ema.get()), expected, rtol=1e-12)
    assert np.isnan(expected).sum() == 1
    assert ema.skipped == int((~np.isfinite(values)).sum())


@each_kind
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_where_all_was_skipped_the_mean_is_nan_until_the_first_value(kind, bad: float):
    ema = fed(EMA(half_life=3), map_kind(kind, [bad, bad]))
    assert math.isnan(float(ema.get()))
    assert float(fed(ema, [kind(4.0)]).get()) == 4.0


@pytest.mark.parametrize("profile", [Power(sigma_rel=0.1), tensorflow(), mean_teacher(decay=0.9)], ids=str)
def test_a_gap_means_the_same_to_every_kind_also_where_the_profile_tells_the_time(profile):
    number, array, tensor = (fed(EMA(profile), map_kind(kind, GAPPY), ELAPSED).get() for kind in KINDS.values())
    assert float(array) == approx(float(tensor), rel=1e-13)
    assert number == approx(float(array), rel=1e-13)


def test_skipped_counts_every_name_and_element():
    ema = EMA(half_life=3)
    ema.update({"a": NAN, "b": np.array([1.0, INF, NAN]), "c": torch.tensor([[NAN], [1.0]]), "d": 1.0})
    assert ema.skipped == 4
    assert EMA(half_life=3).skipped == 0


# ---- detached and alias-free


def test_what_is_kept_and_given_back_has_no_graph():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    ema = fed(EMA(half_life=3), [x * 2, x.exp(), torch.nn.Parameter(x)])
    mean = ema.get()
    assert (mean.requires_grad, mean.grad_fn) == (False, None)
    assert not any(part.requires_grad for part in ema.state_dict()["cells"][""].values() if torch.is_tensor(part))
    assert x.requires_grad


ALIASABLE = {
    "numpy": lambda: np.array([1.0, 2.0]),
    "numpy 0-d": lambda: np.array(1.0),
    "numpy float32": lambda: np.array([1.0, 2.0], dtype=np.float32),
    "torch": lambda: torch.tensor([1.0, 2.0], dtype=torch.float64),
    "torch 0-d": lambda: torch.tensor(1.0, dtype=torch.float64),
    "torch float32": lambda: torch.tensor([1.0, 2.0]),
}
each_aliasable = pytest.mark.parametrize("make", ALIASABLE.values(), ids=ALIASABLE)


def plus(x, shift: float):
    """x itself, moved: a sum of 0-dim arrays would be a number."""
    x += shift
    return x


@each_aliasable
def test_changing_a_value_afterwards_changes_nothing(make):
    ema, x, named = EMA(half_life=3), make(), {"a": make()}
    ema_named = fed(EMA(half_life=3), [named])
    for _ in range(2):
        ema.update(x)
        x += 100
    named["a"] += 100
    identical(ema_named.get(), {"a": make()})
    identical(ema.get(), fed(EMA(half_life=3), [make(), plus(make(), 100)]).get())


@each_aliasable
def test_changing_what_get_gave_changes_nothing(make):
    ema, named = fed(EMA(half_life=3), [make()]), fed(EMA(half_life=3), [{"a": make()}])
    got, got_named = ema.get(), named.get()
    got += 100
    got_named["a"] += 100
    got_named["b"] = 1.0
    identical(ema.get(), make())
    identical(named.get(), {"a": make()})


@each_aliasable
def test_results_in_a_list_stay_as_they_were(make):
    ema, results, copies = EMA(half_life=3), [], []
    for step in range(4):
        ema.update({"a": plus(make(), step)})
        results.append(ema.get())
        copies.append(copy.deepcopy(ema.get()))
    identical(results, copies)


@each_aliasable
def test_a_state_is_not_moved_by_later_updates(make):
    ema = fed(EMA(half_life=3), [make()])
    state, before = ema.state_dict(), copy.deepcopy(ema.state_dict())
    twin = EMA(half_life=3)
    twin.load_state_dict(state)
    fed(ema, [plus(make(), 7)]), fed(twin, [plus(make(), 9)])
    fresh = EMA(half_life=3)
    fresh.load_state_dict(state)
    unchanged(fresh, before)


@each_aliasable
def test_changing_a_state_changes_neither_who_gave_nor_who_took_it(make):
    ema, twin = fed(EMA(half_life=3), [{"a": make()}]), EMA(half_life=3)
    state = ema.state_dict()
    twin.load_state_dict(state)
    for part in ("mean", "weight", "seen"):
        state["cells"]["a"][part] *= 0  # empties a list, and zeroes a tensor where it lies
    identical((ema.get(), twin.get()), ({"a": make()}, {"a": make()}))


def test_a_merged_ema_shares_nothing_with_the_later_one():
    later = fed(EMA(half_life=3), [{"a": torch.ones(2), "b": np.ones(2)}])
    ema = EMA(half_life=3)
    ema.merge(later)
    before = ema.state_dict()
    fed(later, [{"a": torch.zeros(2), "b": np.zeros(2)}])
    unchanged(ema, before)


def test_inference_mode_is_left_outside():
    ema, weight = EMA(half_life=3), torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        fed(ema, [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
        inside = ema.get().tolist()
    assert ema.get().tolist() == inside
    (weight * ema.get()).sum().backward()
    assert weight.grad.tolist() == inside
    identical(
        fed(ema, [torch.zeros(2)]).get(),
        fed(EMA(half_life=3), [torch.tensor(x) for x in ([1.0, 2], [3.0, 4], [0.0, 0])]).get(),
    )


@each_weigh
@pytest.mark.parametrize("debias", [True, False])
def test_update_get_and_merge_read_no_value_on_the_host(weigh: str, debias: bool):
    """A tensor on the meta device has none: to read one, as skipped must, is an error."""
    ema, later = (
        fed(EMA(half_life=3, weigh=weigh, debias=debias), [{"a": torch.ones(2, device="meta")}] * 3, [1, 2, 3])
        for _ in range(2)
    )
    if debias:
        ema.merge(later)
    assert ema.get()["a"].is_meta
    with pytest.raises(RuntimeError, match="meta"):
        _ = ema.skipped


# ---- errors, and what is refused changes nothing


@pytest.mark.parametrize("ema", [EMA(half_life=3), fed(EMA(half_life=3), [1.0])], ids=["new", "after reset"])
def test_there_is_no_average_before_the_first_update(ema: EMA):
    ema.reset()
    with pytest.raises(RuntimeError, match=r"no average before the first update; call ema\.update\(x\) first"):
        ema.get()


@pytest.mark.parametrize(
    ("positional", "readings"),
    [
        (0.9, r"EMA\(0\.9\) could be read two ways\. Write EMA\(decay=0\.9\) .*, or EMA\(alpha=0\.9\)"),
        (100, r"EMA\(100\) could be read two ways\. Write EMA\(half_life=100\) .*, or EMA\(span=100\)"),
    ],
)
def test_a_positional_number_could_be_read_two_ways(positional: float, readings: str):
    with pytest.raises(TypeError, match=readings):
        EMA(positional)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, TypeError, "expected exactly one of half_life, decay, alpha, span, com; got none"),
        ({"alpha": 0.5, "decay": 0.9}, TypeError, r"got decay=0\.9 and alpha=0\.5\. Keep one"),
        ({"profile": Uniform(), "alpha": 0.5}, TypeError, r"got Uniform\(\) and alpha=: keep one of them"),
        ({"profile": "uniform"}, TypeError, r"profile must be a profile, such as Power\(sigma_rel=0\.1\)"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \(0, 1\]; got alpha=1\.5"),
        ({"half_life": NAN}, ValueError, "half_life must be a finite number above 0; got half_life=nan"),
        ({"half_life": 3, "weigh": "times"}, ValueError, """weigh must be "time" or "value"; got 'times'"""),
        (
            {"profile": Power(sigma_rel=0.1), "weigh": "value"},
            ValueError,
            'weigh="value" has a meaning for Exponential',
        ),
    ],
)
def test_construction_errors(arguments: dict, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        EMA(**arguments)


STARTS = {
    "number": 1.0,
    "numpy": np.array([1.0, 2.0]),
    "torch": torch.tensor([1.0, 2.0]),
    "dict": {"a": 1.0, "b": np.array([1.0, 2.0]), "c": torch.tensor([1.0, 2.0])},
}
GOOD = {"a": 2.0, "b": np.array([3.0, 4.0]), "c": torch.tensor([3.0, 4.0])}
EXPECTED_KINDS = "expected a real number, a NumPy array or a torch tensor, or a dict of these; got "
REFUSED = [
    # what was averaged so far, what comes, the error, its text
    (
        "number",
        torch.tensor(1.0),
        TypeError,
        "expected a number value, as at the first update; got Tensor. Use one EMA",
    ),
    ("number", np.array(1.0), TypeError, "expected a number value, as at the first update; got ndarray"),
    ("numpy", torch.ones(2), TypeError, "expected a numpy value, as at the first update; got Tensor"),
    ("torch", np.ones(2), TypeError, "expected a torch value, as at the first update; got ndarray"),
    ("torch", 1.0, TypeError, r"expected a torch value.*got float\. Use one EMA for each, or call ema\.reset\(\)"),
    (
        "number",
        {"a": 1.0},
        TypeError,
        "expected a single value, as at the first update; got dict. Use one EMA for each",
    ),
    ("dict", 1.0, TypeError, "expected a dict, as at the first update; got float. Use one EMA for each, or call"),
    ("numpy", np.ones(3), ValueError, r"expected shape \[2\], as at the first update; got \[3\]\. Use one EMA"),
    ("numpy", np.ones(()), ValueError, r"expected shape \[2\], as at the first update; got \[\]"),
    ("torch", torch.ones(1, 2), ValueError, r"expected shape \[2\], as at the first update; got \[1, 2\]"),
    ("number", [1.0, 2.0], TypeError, EXPECTED_KINDS + r"list.*A list becomes an array with numpy\.asarray\(x\)"),
    ("number", "1.0", TypeError, EXPECTED_KINDS + "str"),
    ("number", None, TypeError, EXPECTED_KINDS + "NoneType"),
    ("number", 1j, TypeError, EXPECTED_KINDS + "complex"),
    ("number", np.complex64(1), TypeError, EXPECTED_KINDS + "complex64"),
    ("numpy", np.ones(2) * 1j, TypeError, EXPECTED_KINDS + "ndarray of complex128"),
    ("numpy", np.array(["a", "b"]), TypeError, EXPECTED_KINDS + "ndarray of <U1"),
    ("numpy", np.array([None, 1.0]), TypeError, EXPECTED_KINDS + "ndarray of object"),
    ("torch", torch.ones(2) * 1j, TypeError, EXPECTED_KINDS + r"Tensor of torch\.complex64"),
    ("dict", {**GOOD, "b": [1.0, 2.0]}, TypeError, "EMA.update, 'b': " + EXPECTED_KINDS + "list"),
    ("dict", {**GOOD, "c": torch.ones(3)}, ValueError, r"EMA\.update, 'c': expected shape \[2\].*got \[3\]"),
    ("dict", {**GOOD, "c": 1.0}, TypeError, "EMA.update, 'c': expected a torch value"),
    ("dict", {**GOOD, "new": {}}, TypeError, "EMA.update, 'new': " + EXPECTED_KINDS + "dict"),
    ("dict", {**GOOD, 3: 1.0}, TypeError, "a dict's names must be strings; got 3"),
    ("dict", {**GOOD, "a": 9.0, "z": 10**400}, (TypeError, ValueError, OverflowError), "large"),
    ("dict", {**GOOD, "c": torch.ones(2, device="meta")}, (TypeError, ValueError, RuntimeError), "device"),
]


@pytest.mark.parametrize(("start", "x", "error", "text"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_refused_value_leaves_everything_as_it_was(start: str, x, error: type[Exception], text: str):
    ema = fed(EMA(half_life=3), [STARTS[start]] * 2)
    before = ema.state_dict()
    with pytest.raises(error, match=text):
        ema.update(x)
    unchanged(ema, before)


@pytest.mark.parametrize("x", [[1.0], "a", 1j, {"a": 1.0, "b": [1.0]}, {1: 1.0}], ids=str)
def test_a_refused_first_value_leaves_nothing(x):
    ema = EMA(half_life=3)
    with pytest.raises(TypeError, match=r"EMA\.update"):
        ema.update(x)
    unchanged(ema, EMA(half_life=3).state_dict())
    assert fed(ema, [torch.ones(2)]).get().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("elapsed", [0, -1, NAN, INF, np.int64(0), np.float32(-1.0)], ids=repr)
def test_elapsed_must_be_a_finite_number_above_0(start: str, elapsed):
    ema = fed(EMA(half_life=3), [STARTS[start]])
    before = ema.state_dict()
    with pytest.raises(ValueError, match="elapsed must be a finite number above 0: steps, samples or seconds since"):
        ema.update(STARTS[start], elapsed)
    unchanged(ema, before)


# ---- names, reset and count


def test_a_missing_name_keeps_its_average_and_a_new_one_starts_when_it_comes():
    ema = fed(EMA(half_life=3), [{"a": 1.0, "b": 4.0}, {"a": 2.0}, {"a": 3.0, "c": 9.0}, {"b": 7.0}])
    alone = {"a": [1.0, 2.0, 3.0], "b": [4.0, 7.0], "c": [9.0]}
    assert ema.get() == {name: fed(EMA(half_life=3), values).get() for name, values in alone.items()}
    assert ema.count == 4


@pytest.mark.parametrize("start", STARTS)
def test_reset_forgets_everything(start: str):
    ema = fed(EMA(half_life=3), [STARTS[start], STARTS[start]])
    assert ema.count == 2
    ema.reset()
    unchanged(ema, EMA(half_life=3).state_dict())
    assert (ema.count, ema.skipped) == (0, 0)
    assert fed(ema, [5.0]).get() == 5.0


# ---- states


RULES = [
    {"half_life": 3},
    {"half_life": 3, "weigh": "time"},
    {"alpha": 0.3, "debias": False},
    {"profile": Power(sigma_rel=0.1)},
    {"profile": Uniform()},
    {"profile": after(start=2, profile=tensorflow())},
]


def through_torch(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_json(state: dict) -> dict:
    return json.loads(json.dumps(state, allow_nan=False))


WAYS = [("asis", copy.deepcopy), ("torch.save", through_torch), ("json", through_json)]
RESUMED = [
    pytest.param(way, values, id=f"{name}, {kind}")
    for name, way in WAYS
    for kind, values in STREAMS.items()
    if name != "json" or kind == "float" or "numpy" in kind
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("way", "values"), RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(way, values: list, rule: dict):
    whole, resumed = fed(EMA(**rule), values[:4], ELAPSED[:4]), EMA(**rule)
    resumed.load_state_dict(way(whole.state_dict()))
    for x in values[4:]:
        identical(resumed.get(), whole.get())
        fed(whole, [x], [2.5]), fed(resumed, [x], [2.5])
    identical(resumed.get(), whole.get())
    unchanged(resumed, whole.state_dict())
    assert (resumed.count, resumed.skipped) == (whole.count, whole.skipped)


@pytest.mark.parametrize("way", [way for _, way in WAYS], ids=[name for name, _ in WAYS])
def test_the_state_of_a_new_ema_resumes_as_new(way):
    ema = fed(EMA(half_life=3), [torch.ones(2)])
    ema.load_state_dict(way(EMA(half_life=3).state_dict()))
    assert fed(ema, [4.0]).get() == 4.0


def leaves(state):
    if isinstance(state, dict | list):
        for part in state.values() if isinstance(state, dict) else state:
            yield from leaves(part)
    else:
        yield state


@pytest.mark.parametrize("values", STREAMS.values(), ids=STREAMS)
def test_a_state_holds_tensors_numbers_and_strings_only(values: list):
    state = fed(EMA(half_life=3), values).state_dict()
    assert {type(leaf) for leaf in leaves(state)} <= {torch.Tensor, int, float, str, bool}
    assert (state["format"], state["kind"]) == (1, "EMA")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 2}, r"written in format 2, and this version of ewma reads up to 1\. Upgrade with pip install"),
        ({"kind": "ModelEMA"}, r"EMA\.load_state_dict: expected the state of EMA; got that of ModelEMA"),
        (
            {"profile": Uniform().to_json()},
            r"saved with Uniform\(\) by value, but this EMA has Exponential\(half_life=3\)",
        ),
        (
            {"profile": Exponential(half_life=4).to_json()},
            r"saved with Exponential\(half_life=4\) by value, but this EMA",
        ),
        ({"weigh": "time"}, r"saved with .* by time, but this EMA has .* by value\. Make it with the saved ones"),
        ({"profile": "{}"}, "no profile is called None"),
    ],
)
def test_a_state_of_another_kind_is_refused_and_changes_nothing(change: dict, text: str):
    ema = fed(EMA(half_life=3), [1.0, 2.0])
    before = ema.state_dict()
    with pytest.raises(ValueError, match=text):
        ema.load_state_dict({**fed(EMA(half_life=3), [torch.ones(2)]).state_dict(), **change})
    unchanged(ema, before)


@pytest.mark.parametrize("state", [{"average": 1.0}, 3, [], torch.nn.Linear(1, 1).state_dict()], ids=str)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match=r"EMA\.load_state_dict: expected what EMA\.state_dict\(\) gives; got"):
        EMA(half_life=3).load_state_dict(state)


def test_equal_profiles_in_other_units_are_one():
    ema = EMA(alpha=0.5)
    ema.load_state_dict(fed(EMA(decay=0.5), [3.0]).state_dict())
    assert ema.get() == 3.0


def test_a_damaged_cell_is_refused_and_changes_nothing():
    ema = fed(EMA(half_life=3), [{"a": 1.0, "b": 2.0}])
    before, damaged = ema.state_dict(), fed(EMA(half_life=3), [{"a": 5.0, "b": 5.0}]).state_dict()
    del damaged["cells"]["b"]["mean"]
    with pytest.raises(KeyError, match="mean"):
        ema.load_state_dict(damaged)
    unchanged(ema, before)


# ---- without torch

WITHOUT_TORCH = """
import json, sys, warnings
import numpy as np
import ewma
warnings.simplefilter("error")
ema, twin, later = (ewma.EMA(half_life=3) for _ in range(3))
for x in (1.0, float("nan"), 4.0):
    ema.update({"a": x, "b": np.array([x, 1.0], dtype=np.float32), "c": np.float32(x)})
twin.load_state_dict(json.loads(json.dumps(ema.state_dict())))
later.merge(twin)
assert (later.get()["a"], later.skipped) == (ema.get()["a"], 3)
ewma.EMA(ewma.Power(sigma_rel=0.1)).update(np.array(3.0))
try:
    ema.update({"a": 1.0, "b": [1.0]})
except TypeError:
    print("torch" in sys.modules, "numpy" in sys.modules)
"""
WITHOUT_NUMPY = """
import sys
import ewma
ema = ewma.EMA(alpha=0.5)
ema.update({"a": 1, "b": 2.0})
ema.get(), ema.state_dict(), ema.merge(ema)
print("torch" in sys.modules, "numpy" in sys.modules)
"""


def test_floats_and_arrays_are_averaged_without_torch(python):
    assert python(WITHOUT_TORCH) == "False True"


def test_floats_are_averaged_without_numpy(python):
    assert python(WITHOUT_NUMPY) == "False False"
