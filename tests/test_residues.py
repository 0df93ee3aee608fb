"""What rounding leaves out of a running mean, beside exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy
import pytest
import torch

from ewma.series.averaging import scan
from ewma.series.residues import hides, left_out


@pytest.mark.parametrize("kind", [numpy.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.99, 1e-6])
def test_mean_and_residue_together_have_twice_the_digits(share: float, kind) -> None:
    rng = numpy.random.default_rng(0)
    x = 1e8 + rng.normal(size=(1, 300, 1))
    start, mean, means, exact = numpy.full((1, 1, 1), 3.0), 3.0, [], []
    right = Fraction(3)
    for value in x[0, :, 0]:
        mean = mean + share * (value - mean)
        right += Fraction(share) * (Fraction(float(value)) - right)
        means.append(mean)
        exact.append(float(right - Fraction(mean)))
    computed = kind(numpy.array(means).reshape(x.shape))
    residue = left_out(kind(x), computed, kind(start), share, scan)
    numpy.testing.assert_allclose(numpy.asarray(residue)[0, :, 0], exact, rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("kind", [numpy.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_a_large_mean_hides_what_lies_near_it(kind) -> None:
    mean = numpy.full((1, 1000, 2), 1e8)
    distance = numpy.random.default_rng(0).normal(size=mean.shape)
    assert hides(kind(distance), kind(mean))
    assert not hides(kind(distance), kind(mean / 1e8))
    assert not hides(kind(distance), kind(0.0 * mean))
    one_of_two = numpy.where([True, False], mean, 1.0)
    assert hides(kind(distance), kind(one_of_two))


def test_behind_a_jump_the_variance_has_more_digits_than_the_mean() -> None:
    import ewma

    x = numpy.concatenate([[0.5, -0.5], 1e8 + numpy.random.default_rng(0).normal(size=60)])
    late = ewma.ewm(x[2:] - 1e8, alpha=0.99).var(unbiased=False)[40:]
    numpy.testing.assert_allclose(ewma.ewm(x, alpha=0.99).var(unbiased=False)[42:], late, rtol=1e-12)
