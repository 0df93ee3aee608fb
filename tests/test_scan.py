"""The scan: in blocks it is what it is step by step; and its gradients, of first and second order, are the loop's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import TRITON_MISSING
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ewma import ewm, kernels, smooth
from ewma.kernels import blocked, differentiable, reference
from ewma.profiles import Power, Uniform, inverse_gamma

NAN, INF = math.nan, math.inf

KINDS: dict[str, Callable[[np.ndarray], Any]] = {"numpy": np.array, "torch": torch.tensor}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

# ---- in blocks and step by step

# Around the lengths of blocks, of what is done whole, and of blocks of blocks.
LENGTHS = [0, 1, 2, 31, 32, 33, 63, 127, 128, 129, 1000, 16323]
SERIES = [(1, 1), (3, 1), (1, 3), (3, 3), (300, 1), (1, 300), (3, 300), (300, 3)]
LANES = {0: 1000, 2: 1000, 33: 1000, 129: 1000, 1000: 8, 16323: 2}  # how many series at most; else 300
CASES = [(n, series) for n in LENGTHS for series in SERIES if math.prod(series) <= LANES.get(n, 300)]
each_case = pytest.mark.parametrize(
    ("n", "series"), CASES, ids=lambda x: "x".join(map(str, x)) if type(x) is tuple else None
)

LOSSES: dict[str, Any] = {"0": 0.0, "1e-8": 1e-8, ".3": 0.3, "1": 1.0}
SHAPES = {
    "each step": lambda outer, n, inner: (1, n, 1),
    "each channel": lambda outer, n, inner: (outer, 1, inner),
    "each outer channel": lambda outer, n, inner: (outer, 1, 1),
    "each inner channel and step": lambda outer, n, inner: (1, n, inner),
    "each": lambda outer, n, inner: (outer, n, inner),
}


@functools.lru_cache(maxsize=256)
def coefficients(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What steps lose and what they keep, both with all their digits: next to nothing, next to all, none and all."""
    rng = np.random.default_rng(shape)
    forgetting = 10.0 ** rng.uniform(-12.0, 2.5, size=shape)  # -log(kept)
    lost, kept = -np.expm1(-forgetting), np.exp(-forgetting)
    special = rng.random(shape)
    lost[special < 0.05], kept[special < 0.05] = 0.0, 1.0
    lost[special > 0.95], kept[special > 0.95] = 1.0, 0.0
    return lost, kept


@functools.lru_cache(maxsize=256)
def inputs(n: int, series: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """u and the initial y. Many steps keep all, so that u has to change its sign for y to stay small."""
    rng = np.random.default_rng((n, *series))
    return rng.normal(size=(series[0], n, series[1])), rng.normal(size=(series[0], 1, series[1])) * 10.0


def scanned(kernel: Any, kind: Callable, u: np.ndarray, lost: Any, initial: np.ndarray, kept: Any = None) -> np.ndarray:
    """What a kernel writes to a place that held NaN."""
    out = kind(np.full(u.shape, NAN))
    lost, kept = (x if x is None or isinstance(x, float) else kind(x) for x in (lost, kept))
    kernel.scan(kind(u.copy()), lost, kind(initial.copy()), out, kept)
    return np.asarray(out)


@functools.lru_cache(maxsize=512)
def truth(n: int, series: tuple[int, int], loss: str, with_kept: bool = False) -> np.ndarray:
    u, initial = inputs(n, series)
    if loss in LOSSES:
        return scanned(reference, np.array, u, LOSSES[loss], initial)
    lost, kept = coefficients(SHAPES[loss](series[0], n, series[1]))
    return scanned(reference, np.array, u, lost, initial, kept if with_kept else None)


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    """To 1e-12 of the largest in each series."""
    scale = np.abs(expected).max(axis=1, keepdims=True, initial=1.0)
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0.0, atol=1e-12)


@each_kind
@each_case
def test_blocks_are_the_steps_where_all_lose_alike(n: int, series: tuple[int, int], kind):
    for name, lost in LOSSES.items():
        u, initial = inputs(n, series)
        close(scanned(blocked, kind, u, lost, initial), truth(n, series, name))


@each_kind
@pytest.mark.parametrize("with_kept", [False, True], ids=["", "kept"])
@each_case
def test_blocks_are_the_steps_where_each_loses_its_own(n: int, series: tuple[int, int], with_kept: bool, kind):
    for name, shape in SHAPES.items():
        u, initial = inputs(n, series)
        lost, kept = coefficients(shape(series[0], n, series[1]))
        result = scanned(blocked, kind, u, lost, initial, kept if with_kept else None)
        close(result, truth(n, series, name, with_kept))


@pytest.mark.parametrize("with_kept", [False, True], ids=["", "kept"])
@pytest.mark.parametrize("loss", [*LOSSES, *SHAPES])
def test_step_by_step_is_the_definition_in_numpy_and_torch(loss: str, with_kept: bool):
    for n in (0, 1, 2, 40):
        u, initial = inputs(n, (2, 3))
        lost, kept = (LOSSES[loss], None) if loss in LOSSES else coefficients(SHAPES[loss](2, n, 3))
        kept = kept if with_kept else None
        y, every = initial[:, 0], np.broadcast_to(lost, u.shape)
        for t in range(n):
            y = (1.0 - every[:, t] if kept is None else np.broadcast_to(kept, u.shape)[:, t]) * y + u[:, t]
            for kind in KINDS.values():
                close(scanned(reference, kind, u, lost, initial, kept)[:, t : t + 1], y[:, None])


@each_kind
def test_next_to_nothing_that_is_kept_still_counts(kind):
    """1 - lost has no digits left of a kept of 1e-20: what was 1e25 before must leave 1e5."""
    for shape in SHAPES.values():
        for n in (1, 2, 70):
            lost, kept = np.ones(shape(2, n, 3)), np.full(shape(2, n, 3), 1e-20)
            u, initial = np.zeros((2, n, 3)), np.full((2, 1, 3), 1e25)
            for kernel in (blocked, reference):
                np.testing.assert_allclose(scanned(kernel, kind, u, lost, initial, kept)[:, 0], 1e5, rtol=1e-14)


@each_kind
def test_next_to_nothing_that_is_lost_still_counts(kind):
    """A million steps that lose 1e-17 each: 1 - lost would be 1."""
    n = 2**20
    ones = np.zeros((1, n, 1))
    for lost in (1e-17, np.full((1, 1, 1), 1e-17), np.full((1, n, 1), 1e-17)):
        y = scanned(blocked, kind, ones, lost, np.ones((1, 1, 1)))[0, -1, 0]
        assert 1.0 - y == pytest.approx(n * 1e-17, rel=0.05)


@each_kind
@pytest.mark.parametrize("loss", [".3", "each", "each step", "each channel"])
@pytest.mark.parametrize("n", [1, 33, 129, 1000])
def test_the_layout_in_memory_does_not_matter(n: int, loss: str, kind):
    series = (3, 4)
    u, initial = inputs(n, series)
    lost, kept = (LOSSES[loss], None) if loss in LOSSES else coefficients(SHAPES[loss](3, n, 4))
    expected = scanned(blocked, kind, u, lost, initial, kept)

    def turned(x: Any) -> Any:
        """The same numbers with time outermost in memory."""
        order = (1, 0, 2)
        x = kind(np.ascontiguousarray(x.transpose(order)))
        return x.transpose(order) if isinstance(x, np.ndarray) else x.permute(order)

    def spread(x: Any) -> Any:
        """The same numbers, every second one in memory."""
        return kind(np.repeat(np.repeat(x, 2, 1), 2, 2))[:, ::2, ::2]

    def as_given(x: Any) -> Any:
        return kind(x)

    for lay in (turned, spread):
        for ways in ((lay, as_given), (as_given, lay), (lay, lay)):
            out = ways[1](np.full(u.shape, NAN))
            rest = [x if x is None or isinstance(x, float) else ways[0](x) for x in (lost, initial, kept)]
            blocked.scan(ways[0](u), rest[0], rest[1], out, rest[2])
            np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-11, atol=1e-12)


@each_kind
def test_coefficients_and_start_are_only_read(kind):
    for n in (5, 200):
        u, initial = inputs(n, (2, 3))
        for lost, kept in (coefficients((2, n, 3)), coefficients((1, n, 1)), coefficients((2, 1, 3))):
            given = [kind(x.copy()) for x in (lost, initial, kept)]
            blocked.scan(kind(u.copy()), given[0], given[1], kind(u.copy()), given[2])
            for now, before in zip(given, (lost, initial, kept), strict=True):
                np.testing.assert_array_equal(np.asarray(now), before)


@each_kind
def test_a_scan_goes_on_from_where_another_ended(kind):
    u, initial = inputs(1000, (3, 1))
    for lost in (0.3, 1e-8, coefficients((3, 1000, 1))[0]):
        whole = scanned(blocked, kind, u, lost, initial)
        for cut in (1, 32, 500, 999):
            parts = [lost, lost] if isinstance(lost, float) else [lost[:, :cut], lost[:, cut:]]
            first = scanned(blocked, kind, u[:, :cut], parts[0], initial)
            second = scanned(blocked, kind, u[:, cut:], parts[1], first[:, -1:])
            close(np.concatenate((first, second), axis=1), whole)


@pytest.mark.parametrize("kernel", [None, "foreach", "reference", "native", "triton"])
@each_kind
def test_the_environment_chooses_the_kernel_and_all_say_the_same(kind, kernel: str | None, monkeypatch):
    if kernel == "native" and kernels.missing():
        pytest.skip("the compiled kernel was not built")
    if kernel == "triton" and TRITON_MISSING:
        pytest.skip(TRITON_MISSING)
    if kernel is None:
        monkeypatch.delenv("EWMA_KERNEL", raising=False)
    else:
        monkeypatch.setenv("EWMA_KERNEL", kernel)
    (u, initial), expected, steps, called = inputs(129, (3, 1)), truth(129, (3, 1), ".3"), reference.scan, []
    monkeypatch.setattr(reference, "scan", lambda *given: called.append(given) or steps(*given))
    close(scanned(kernels, kind, u, 0.3, initial), expected)
    assert bool(called) == (kernel == "reference")


def test_a_kernel_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("EWMA_KERNEL", "fast")
    with pytest.raises(ValueError, match="EWMA_KERNEL=fast: no kernel has that name; there are reference, foreach"):
        scanned(kernels, np.array, np.zeros((1, 2, 1)), 0.3, np.zeros((1, 1, 1)))


# ---- gradients of the scan itself

# Along random directions, which is many times faster than element by element.
first_order = functools.partial(gradcheck, fast_mode=True)
second_order = functools.partial(gradgradcheck, fast_mode=True)


def random(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


def within(*shape: int) -> Tensor:
    """Between 0 and 1, away from both."""
    return (0.1 + 0.8 * torch.rand(shape, dtype=torch.float64)).requires_grad_()


def loop(u: Tensor, lost: float | Tensor, initial: Tensor) -> Tensor:
    """The definition, for autograd to follow step by step."""
    every = torch.as_tensor(lost, dtype=torch.float64).expand(u.shape)
    y, steps = initial.expand(u.shape[0], 1, u.shape[2])[:, 0], []
    for t in range(u.shape[1]):
        y = y + (u[:, t] - every[:, t] * y)
        steps.append(y)
    return torch.stack(steps, dim=1)


STEPS = [(1, 1, 1), (1, 4, 1), (2, 1, 3), (2, 4, 3), (1, 4, 3), (2, 1, 1)]


@pytest.mark.parametrize("constant", [0.0, 0.3, 1.0])
def test_first_and_second_gradients_of_the_scan_where_all_lose_alike(constant: float):
    for n in (1, 4):
        scan = functools.partial(lambda u, initial: differentiable.scan(u, constant, initial))
        for start in ((2, 1, 3), (1, 1, 1)):
            given = (random(2, n, 3), random(*start))
            assert gradcheck(scan, given)
            assert second_order(scan, given)


@pytest.mark.parametrize("shape", STEPS, ids=str)
def test_first_and_second_gradients_of_the_scan_where_each_loses_its_own(shape: tuple[int, int, int]):
    given = (random(2, 4, 3), within(*shape), random(2, 1, 3))
    assert gradcheck(differentiable.scan, given)
    assert second_order(differentiable.scan, given)


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_gradients_at_the_edges_are_those_of_the_loop(edge: float):
    u, initial, weight = random(2, 9, 3), random(2, 1, 3), random(2, 9, 3, grad=False)
    lost = torch.full((2, 9, 3), edge, dtype=torch.float64, requires_grad=True)
    results = [
        torch.autograd.grad((scan(u, lost, initial) * weight).sum(), (u, lost, initial))
        for scan in (differentiable.scan, loop)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("n", [31, 33, 129, 300])
@pytest.mark.parametrize("shape", ["constant", "each step", "each channel", "each"])
@pytest.mark.parametrize("series", [(2, 3), (1, 1)], ids=str)
def test_gradients_across_blocks_are_those_of_the_loop(series: tuple[int, int], shape: str, n: int):
    outer, inner = series
    u, initial, weight = random(outer, n, inner), random(outer, 1, inner), random(outer, n, inner, grad=False)
    lost = 0.2 if shape == "constant" else within(*SHAPES[shape](outer, n, inner))
    wanted = (u, initial) if shape == "constant" else (u, initial, lost)
    first, second = [], []
    for scan in (differentiable.scan, loop):
        gradients = torch.autograd.grad((scan(u, lost, initial) ** 2 * weight).sum(), wanted, create_graph=True)
        first.append(gradients)
        second.append(torch.autograd.grad(sum((g**2).sum() for g in gradients), wanted))
    torch.testing.assert_close(*first, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-8)


def test_only_what_is_asked_for_has_a_gradient():
    u, lost, initial = random(2, 5, 1), within(1, 5, 1), random(2, 1, 1)
    for wanted in ((u,), (lost,), (initial,), (u, initial)):
        given = [x if any(x is one for one in wanted) else x.detach() for x in (u, lost, initial)]
        y = differentiable.scan(*given)
        assert y.requires_grad
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(loop(*given).sum(), wanted)
        )
    assert not differentiable.scan(u.detach(), 0.3, initial.detach()).requires_grad


def test_the_input_of_a_differentiable_scan_stays_as_it_was():
    u, initial = random(2, 200, 1), random(2, 1, 1)
    before = u.detach().clone()
    y = differentiable.scan(u, 0.3, initial)
    y.sum().backward(retain_graph=True)
    first, u.grad = u.grad, None
    y.sum().backward()
    torch.testing.assert_close(u.grad, first, rtol=0, atol=0)
    torch.testing.assert_close(u.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", ["foreach", "reference"])
def test_a_gradient_does_not_depend_on_the_kernel(kernel: str, monkeypatch):
    monkeypatch.setenv("EWMA_KERNEL", kernel)
    u, lost, initial = random(2, 40, 3), within(1, 40, 3), random(2, 1, 3)
    results = [
        torch.autograd.grad(scan(u, lost, initial).sum(), (u, lost, initial)) for scan in (differentiable.scan, loop)
    ]
    torch.testing.assert_close(*results)


# ---- gradients of smooth and ewm

N = 5
SPANS = [0.0, 1.0, 1.0, 3.5, 9.0]
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "not debiased": {"debias": False},
    "by time": {"weigh": "time"},
    "times": {"times": SPANS},
    "times, by time": {"times": SPANS, "weigh": "time"},
    "times, not debiased": {"times": SPANS, "debias": False},
    "min_periods": {"min_periods": 3},
}
GAPS = {f"{rule}, {nan}": {**RULES[rule], "nan": nan} for rule in RULES for nan in ("skip", "decay")}
GAPS["plain, propagate"] = {"nan": "propagate"}
ALL_RULES = {**RULES, **{f"gappy, {name}": rule for name, rule in GAPS.items()}}
each_rule = pytest.mark.parametrize("name", ALL_RULES)

KNOBS = {"scalar": (), "per channel": (2, 1), "per step": (N,)}


def series(name: str) -> Tensor:
    """Two series; one misses its first value, and both miss others, where the rule is for gaps."""
    x = random(2, N, grad=False)
    if name.startswith("gappy"):
        x[0, 0], x[0, 3], x[1, 4], x[1, 2] = NAN, INF, NAN, -INF
    return x.requires_grad_()


def finite(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With 0 where there is no result, which has no gradient."""

    def computed(*given: Any) -> Tensor:
        result = compute(*given)
        return torch.where(result.isnan(), 0.0, result)

    return computed


@each_rule
def test_gradients_in_x(name: str):
    compute, x = finite(lambda x: smooth(x, alpha=0.3, **ALL_RULES[name])), series(name)
    assert gradcheck(compute, (x,))
    assert second_order(compute, (x,))


@pytest.mark.parametrize("knob", KNOBS)
@each_rule
def test_gradients_in_x_and_alpha(name: str, knob: str):
    rule = dict(ALL_RULES[name])
    if knob == "per step":
        rule.pop("weigh", None)
    compute = finite(lambda x, alpha: smooth(x, alpha=alpha, **rule))
    given = (series(name), within(*KNOBS[knob]))
    assert first_order(compute, given)
    assert second_order(compute, given)


@pytest.mark.parametrize("shape", [(), (2,)], ids=["scalar", "per channel"])
@pytest.mark.parametrize(
    "name", [name for name, rule in ALL_RULES.items() if "debias" not in rule and "weigh" not in rule]
)
def test_gradients_in_x_alpha_and_initial(name: str, shape: tuple[int, ...]):
    rule = ALL_RULES[name]
    compute = finite(lambda x, alpha, initial: smooth(x, alpha=alpha, initial=initial, **rule))
    given = (series(name), within(), random(*shape))
    assert first_order(compute, given)
    assert second_order(compute, given)


PROFILES = [Uniform(), Power(sigma_rel=0.1), inverse_gamma(decay=0.9)]


@pytest.mark.parametrize("profile", PROFILES, ids=repr)
@pytest.mark.parametrize("name", ["plain", "gappy, plain, skip", "gappy, plain, decay", "times", "gappy, times, decay"])
def test_gradients_in_x_by_other_profiles(name: str, profile):
    compute, x = finite(lambda x: smooth(x, profile, **ALL_RULES[name])), series(name)
    assert gradcheck(compute, (x,))
    assert second_order(compute, (x,))


SECOND: dict[str, Callable[..., Tensor]] = {
    "var": lambda e, y: e.var(),
    "var, biased": lambda e, y: e.var(unbiased=False),
    "std": lambda e, y: e.std(),
    "cov": lambda e, y: e.cov(y),
    "cov, biased": lambda e, y: e.cov(y, unbiased=False),
    "corr": lambda e, y: e.corr(y),
    "zscore": lambda e, y: e.zscore(),
    "upper band": lambda e, y: e.bands(k=1.5).upper,
    "sum": lambda e, y: e.sum(),
}


@pytest.mark.parametrize("statistic", SECOND)
@pytest.mark.parametrize(
    "name",
    ["plain", "not debiased", "times", "gappy, plain, skip", "gappy, not debiased, decay", "gappy, times, decay"],
)
def test_gradients_of_second_moments(name: str, statistic: str):
    rule = ALL_RULES[name]
    if statistic == "sum" and "debias" in rule:
        rule = {part: value for part, value in rule.items() if part != "debias"}
    compute = finite(lambda x, y, alpha: SECOND[statistic](ewm(x, alpha=alpha, **rule), y))
    given = (series(name), series(name) * 1.0 + random(2, N, grad=False), within())
    given = (given[0], given[1].detach().requires_grad_(), given[2])
    assert first_order(compute, given)
    assert second_order(compute, given)


@pytest.mark.parametrize("name", ["plain", "times", "gappy, plain, skip", "gappy, plain, decay", "gappy, times, skip"])
def test_gradients_of_both_sides(name: str):
    rule = ALL_RULES[name]
    compute = finite(lambda x, alpha: smooth(x, alpha=alpha, two_sided=True, **rule))
    for knob in KNOBS.values():
        given = (series(name), within(*knob))
        assert first_order(compute, given)
        assert second_order(compute, given)


def test_gradients_of_alpha_across_blocks_are_those_of_the_loop():
    x, weight = random(2, 200), random(2, 200, grad=False)
    for alpha in (within(), within(2, 1), within(200), within(2, 200)):
        mean, total, means = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), []
        every = alpha.expand(2, 200)
        by_time = alpha.ndim and alpha.shape[-1] == 200
        for t in range(200):
            gain = every[:, t] if by_time else torch.ones(2, dtype=torch.float64)
            total = (1.0 - every[:, t]) * total + gain
            mean = mean + gain / total * (x[:, t] - mean)
            means.append(mean)
        expected = torch.autograd.grad((torch.stack(means, dim=1) ** 2 * weight).sum(), (x, alpha))
        result = torch.autograd.grad((smooth(x, alpha=alpha) ** 2 * weight).sum(), (x, alpha))
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)


# ---- where gradients go, and where they do not

TO_ALPHA: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "half_life": (5.0, lambda h: 1.0 - 2.0 ** (-1.0 / h)),
    "decay": (0.8, lambda d: 1.0 - d),
    "span": (9.0, lambda s: 2.0 / (s + 1.0)),
    "com": (4.0, lambda c: 1.0 / (1.0 + c)),
}


@pytest.mark.parametrize("shape", [(), (2, 1), (1, 30), (2, 30)], ids=str)
@pytest.mark.parametrize("knob", TO_ALPHA)
def test_every_knob_has_the_gradient_that_alpha_gives_it(knob: str, shape: tuple[int, ...]):
    start, to_alpha = TO_ALPHA[knob]
    value = (start * (1.0 + 0.1 * torch.rand(shape, dtype=torch.float64))).requires_grad_()
    x = random(2, 30, grad=False)
    direct = torch.autograd.grad(smooth(x, **{knob: value}).pow(2).sum(), value)
    through = torch.autograd.grad(smooth(x, alpha=to_alpha(value)).pow(2).sum(), value)
    torch.testing.assert_close(direct, through, rtol=1e-10, atol=1e-12)
    assert (direct[0] != 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_gradient_has_the_dtype_of_its_tensor(dtype: torch.dtype):
    x = torch.randn(2, 9).to(dtype).requires_grad_()
    alpha = torch.tensor([[0.1], [0.5]], dtype=torch.float32, requires_grad=True)
    initial = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    result = smooth(x, alpha=alpha, initial=initial)
    assert result.dtype == dtype
    result.sum().backward()
    assert (x.grad.dtype, alpha.grad.dtype, initial.grad.dtype) == (dtype, torch.float32, torch.bfloat16)
    exact = x.detach().double().requires_grad_()
    smooth(exact, alpha=alpha.detach().double(), initial=initial.detach().double()).sum().backward()
    torch.testing.assert_close(x.grad, exact.grad.to(dtype))


@pytest.mark.parametrize("nan", ["skip", "decay", "propagate"])
@pytest.mark.parametrize("statistic", ["mean", "var", "std", "cov", "corr", "zscore", "sum"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_no_gradient_reaches_a_missing_value_and_none_is_nan(bad: float, statistic: str, nan: str):
    x, y = random(3, 40, grad=False), random(3, 40)
    missing = torch.rand(3, 40) < 0.3
    missing[0, :5], missing[2] = True, True  # one series misses its first values, one all of them
    x[missing] = bad
    x.requires_grad_()
    alpha, given = within(3, 1), {"cov": (y,), "corr": (y,)}
    result = getattr(ewm(x, alpha=alpha, nan=nan), statistic)(*given.get(statistic, ()))
    result[~result.isnan()].sum().backward()
    assert (x.grad[missing] == 0.0).all()
    assert x.grad.isfinite().all()
    assert alpha.grad.isfinite().all()
    if statistic in given:
        assert (y.grad[missing] == 0.0).all()
        assert y.grad.isfinite().all()


def test_the_gradient_of_the_mean_is_its_weights():
    """By value each weighs decay ** age over their sum; in all 1."""
    x = random(50)
    (gradient,) = torch.autograd.grad(smooth(x, half_life=4)[-1], x)
    weights = 2.0 ** (-torch.arange(49, -1, -1, dtype=torch.float64) / 4)
    torch.testing.assert_close(gradient, weights / weights.sum(), rtol=1e-12, atol=0)
    (uniform,) = torch.autograd.grad(smooth(x, Uniform())[-1], x)
    torch.testing.assert_close(uniform, torch.full((50,), 1 / 50, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "rule", [{}, {"debias": False}, {"nan": "decay"}, {"times": range(50)}, {"weigh": "time"}], ids=str
)
def test_a_constant_has_no_gradient_in_alpha_and_no_spread(rule: dict):
    """Where all values are equal, no weights matter; and the deviation's root has no infinite slope there."""
    x, alpha = torch.full((50,), 3.0, dtype=torch.float64, requires_grad=True), within()
    (gradient,) = torch.autograd.grad(smooth(x, alpha=alpha, **rule).sum(), alpha)
    assert abs(gradient) < 1e-12
    deviation = ewm(x, alpha=alpha, **rule).std()
    for gradient in torch.autograd.grad(deviation[1:].sum(), (x, alpha)):
        assert gradient.isfinite().all()


def test_a_half_life_can_be_learned():
    x = random(200, grad=False)
    target, logarithm = smooth(x, half_life=20.0), torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logarithm], lr=0.1)
    for _ in range(90):
        optimizer.zero_grad()
        (smooth(x, half_life=logarithm.exp()) - target).pow(2).sum().backward()
        optimizer.step()
    assert logarithm.exp().item() == pytest.approx(20.0, rel=0.05)


def test_gradients_flow_along_any_axis():
    x, weight = random(3, 20, 4), random(3, 20, 4, grad=False)
    (gradient,) = torch.autograd.grad((smooth(x, half_life=3, dim=1) * weight).sum(), x)
    (turned,) = torch.autograd.grad((smooth(x.movedim(1, -1), half_life=3) * weight.movedim(1, -1)).sum(), x)
    torch.testing.assert_close(gradient, turned, rtol=1e-12, atol=1e-14)
