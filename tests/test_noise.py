"""The random bits: a pure function, spread over 32 bits; and the rounding that they drive."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ewma.kernels import noise
from ewma.kernels.noise import word

ROUNDED = [torch.float32, torch.bfloat16, torch.float16]
MANY = 1 << 18
EDGES = [0, 1, 2, 1 << 15, 1 << 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]


def bits(seed: int = 1, count: int = 2, stream: int = 3, n: int = 10_000) -> Tensor:
    return noise.bits(torch.arange(n), word(seed, count), stream)


def random_words(n: int = 100_000) -> Tensor:
    return torch.randint(0, 1 << 32, (n,), generator=torch.Generator().manual_seed(0))


def unmix(x: Tensor) -> Tensor:
    """`mix` backwards: each of its steps has an inverse."""
    x = ((x ^ (x >> 16)) * pow(noise.SECOND, -1, 1 << 32)) & noise.MASK
    x = ((x ^ (x >> 15) ^ (x >> 30)) * pow(noise.FIRST, -1, 1 << 32)) & noise.MASK
    return x ^ (x >> 16)


def chi_square(x: Tensor) -> float:
    """Of 256 equally likely classes: about 255, with a standard deviation of 22.6."""
    expected = x.numel() / 256
    return float(((torch.bincount(x, minlength=256) - expected) ** 2 / expected).sum())


def test_mix_undone_gives_every_word_back() -> None:
    x = torch.cat([torch.tensor(EDGES), random_words(), torch.arange(MANY)])
    assert torch.equal(unmix(noise.mix(x)), x)


@pytest.mark.parametrize("x", EDGES)
def test_mix_is_the_same_for_integers_and_tensors(x: int) -> None:
    assert noise.mix(x) == int(noise.mix(torch.tensor(x)))
    assert 0 <= noise.mix(x) <= noise.MASK


@pytest.mark.parametrize("place", range(32))
def test_each_input_bit_flips_about_half_of_the_output_bits(place: int) -> None:
    x = random_words(20_000)
    flipped = noise.mix(x) ^ noise.mix(x ^ (1 << place))
    share = torch.stack([(flipped >> out & 1).double().mean() for out in range(32)])
    assert share.mean().item() == pytest.approx(0.5, abs=0.01)
    assert 0.4 < share.min() < share.max() < 0.6


def test_the_same_four_give_the_same_bits() -> None:
    assert torch.equal(bits(), bits())
    assert torch.equal(bits(n=100), bits()[:100])
    assert bits().min() >= 0
    assert bits().max() <= noise.MASK


@pytest.mark.parametrize("changed", [{"seed": 2}, {"count": 3}, {"stream": 4}, {"seed": -1}, {"count": 2 + 2**31}])
def test_another_seed_count_or_stream_gives_unrelated_bits(changed: dict[str, int]) -> None:
    one, other = bits(), bits(**changed)
    assert not (one == other).any()
    flipped = torch.stack([((one ^ other) >> place & 1).double().mean() for place in range(32)])
    assert (flipped - 0.5).abs().max() < 6 * 0.5 / math.sqrt(one.numel())


def test_no_two_of_many_elements_have_the_same_bits() -> None:
    assert bits(n=MANY).unique().numel() == MANY


@pytest.mark.parametrize("first", [0, 2**31 - 5, 2**31, 3 * 2**30, 2**32 + 7, 10**10])
def test_far_elements_and_streams_are_taken_modulo_32_bits(first: int) -> None:
    for stream in (0, 2**31 + 3, 2**32 - 1):
        got = noise.bits(torch.arange(first, first + 20), word(1, 2), stream)
        expected = [noise.mix((e * noise.GOLDEN + word(1, 2) + stream) % 2**32) for e in range(first, first + 20)]
        assert got.tolist() == expected


@pytest.mark.parametrize("place", [0, 8, 16, 24])
def test_every_byte_is_uniform_over_the_elements(place: int) -> None:
    assert chi_square(bits(n=MANY) >> place & 255) == pytest.approx(255, abs=6 * math.sqrt(2 * 255))


@pytest.mark.parametrize("place", [0, 8, 16, 24])
def test_every_byte_is_uniform_over_the_updates(place: int) -> None:
    words = word(7, torch.arange(MANY, dtype=torch.float64))
    for element in (0, 12345):
        over_time = noise.bits(torch.tensor(element), words, 99)
        assert chi_square(over_time >> place & 255) == pytest.approx(255, abs=6 * math.sqrt(2 * 255))


def test_mean_and_variance_are_those_of_uniform_numbers() -> None:
    uniform = bits(n=MANY).double() / 2**32
    assert uniform.mean().item() == pytest.approx(1 / 2, abs=6 * math.sqrt(1 / 12 / MANY))
    assert uniform.var().item() == pytest.approx(1 / 12, abs=6 * math.sqrt(1 / 180 / MANY))


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 1000])
def test_neighbours_are_not_correlated(lag: int) -> None:
    elements = bits(n=MANY).double()
    updates = noise.bits(torch.tensor(5), word(7, torch.arange(MANY, dtype=torch.float64)), 99).double()
    for x in (elements, updates):
        correlation = torch.corrcoef(torch.stack([x[lag:], x[:-lag]]))[0, 1]
        assert abs(correlation) < 6 / math.sqrt(MANY)


@pytest.mark.parametrize("seed", [0, 1, -3, 2**32 + 1, 2**63])
@pytest.mark.parametrize("count", [0, 1, 4000, 2**31, 2**33 + 1, 2**52 + 1])
def test_a_count_that_only_the_device_knows_gives_the_same_word(seed: int, count: int) -> None:
    known = word(seed, count)
    unknown = word(seed, torch.tensor(count, dtype=torch.float64))
    assert isinstance(known, int)
    assert unknown.dtype == torch.int64
    assert known == int(unknown) == word(seed, float(count))
    assert 0 <= known <= noise.MASK


def test_words_of_successive_updates_all_differ() -> None:
    words = torch.cat([word(seed, torch.arange(10_000, dtype=torch.float64)) for seed in range(10)])
    assert words.unique().numel() >= 100_000 - 12  # two of 1e5 in 2**32 coincide 1.2 times on average


MAGNITUDES = {torch.float32: (-30, 30), torch.bfloat16: (-30, 30), torch.float16: (-8, 4)}
"""Of numbers, as powers of ten."""


def numbers(dtype: torch.dtype, magnitudes: tuple[int, int]) -> Tensor:
    """Of all magnitudes and both signs, and the special ones."""
    finfo, scales = torch.finfo(dtype), 10 ** torch.linspace(*magnitudes, 100_000)
    special = [0.0, -0.0, 1, -1, finfo.max, finfo.min, finfo.tiny, -finfo.tiny, math.inf, -math.inf]
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    return torch.cat([(normal * scales).to(dtype), torch.tensor(special, dtype=dtype)])


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("drawn", [0, noise.MASK, None])
def test_numbers_that_need_no_rounding_never_change(dtype: torch.dtype, drawn: int | None) -> None:
    x = numbers(dtype, MAGNITUDES[dtype])
    words = random_words(x.numel()) if drawn is None else torch.full(x.shape, drawn)
    rounded = noise.round_stochastically(x.double(), dtype, words)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, x)
    assert torch.equal(rounded.signbit(), x.signbit())


@pytest.mark.parametrize("dtype", ROUNDED)
def test_subnormal_numbers_that_need_no_rounding_never_change(dtype: torch.dtype) -> None:
    x = torch.arange(1, 100, dtype=torch.float64) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for signed in (x, -x):
        assert torch.equal(noise.round_stochastically(signed, dtype, random_words(99)).double(), signed)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_nan_stays_nan(dtype: torch.dtype) -> None:
    nan = torch.tensor([math.nan, -math.nan]).repeat(50_000)
    assert noise.round_stochastically(nan.double(), dtype, random_words()).isnan().all()


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("drawn", [0, noise.MASK, None])
def test_the_result_is_one_of_the_two_neighbours(dtype: torch.dtype, drawn: int | None) -> None:
    x = numbers(torch.float32, MAGNITUDES[dtype]).double()[:100_000] * (1 + 1e-9)
    words = random_words(x.numel()) if drawn is None else torch.full(x.shape, drawn)
    rounded = noise.round_stochastically(x, dtype, words)
    beyond = torch.nextafter(rounded, torch.copysign(torch.tensor(math.inf), x - rounded.double()).to(dtype)).double()
    assert torch.where(x > rounded.double(), beyond > x, beyond < x).all()
    if drawn is not None:
        towards_zero = rounded.double().abs() < x.abs()
        assert towards_zero.all() if drawn == 0 else (~towards_zero).all()


BELOW = {
    torch.float32: [1.0, -1.0, 1.9921875, -3e30, 2.0**-126],
    torch.bfloat16: [1.0, -1.0, 1.9921875, -3e30, 2.0**-126, 254 * 2.0**120],
    torch.float16: [
        1.0,
        -1.0,
        1.9921875,
        -3e4,
        65472.0,
        2.0**-14,
        2.0**-14 - 2.0**-24,
        -(2.0**-20),
        2.0**-24,
        0.0,
        -0.0,
    ],
}


@pytest.mark.parametrize(("dtype", "start"), [(dtype, start) for dtype in ROUNDED for start in BELOW[dtype]])
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.25, 0.5, 0.9, 0.999])
def test_the_share_that_goes_up_is_the_distance_to_below(dtype: torch.dtype, start: float, share: float) -> None:
    low = torch.tensor(start, dtype=dtype)
    high = torch.nextafter(low, torch.tensor(math.copysign(math.inf, start), dtype=dtype))
    exact = torch.lerp(low.double(), high.double(), share).repeat(1 << 16)
    rounded = noise.round_stochastically(exact, dtype, torch.arange(1 << 16) << 16)
    assert set(rounded.tolist()) <= {low.item(), high.item()}
    assert (rounded == high).double().mean().item() == pytest.approx(share, abs=2**-16)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_on_average_over_many_seeds_nothing_is_lost(dtype: torch.dtype) -> None:
    """However small beside the spacing, which float16 has in steps of 6e-8 even at 0."""
    for exact in (1e-9, -1e-9, 4e-8, 1e-7, -3.3e-6, 6.102e-5, 6.2e-5, 0.1, -1.0003, 1 + 2.0**-40, 2e4 / 3, 65503.0):
        draws = noise.round_stochastically(
            torch.full((MANY,), exact, dtype=torch.float64), dtype, bits(n=MANY)
        ).double()
        assert draws.mean().item() == pytest.approx(exact, abs=6 * draws.std().item() / math.sqrt(MANY), rel=1e-9)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_beyond_the_largest_number_it_is_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    step = largest - torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(0.0, dtype=dtype)).item()
    for share, expected in ((0.0, largest), (2.0**-20, largest), (0.49, largest), (0.51, math.inf), (1.0, math.inf)):
        for exact, right in ((largest + share * step, expected), (-largest - share * step, -expected)):
            rounded = noise.round_stochastically(torch.full((1000,), exact, dtype=torch.float64), dtype, bits(n=1000))
            assert set(rounded.tolist()) == {right}
            assert noise.fits(rounded.new_tensor(exact, dtype=torch.float64), dtype) == math.isfinite(right)


@pytest.mark.parametrize("dtype", ROUNDED[1:])
def test_of_all_numbers_in_16_bits_none_changes(dtype: torch.dtype) -> None:
    x = torch.arange(1 << 16).to(torch.int16).view(dtype)
    x = x[~x.isnan()]
    rounded = noise.round_stochastically(x.double(), dtype, random_words(x.numel()))
    assert torch.equal(rounded.view(torch.int16), x.view(torch.int16))
