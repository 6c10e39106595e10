"""The deviates are standard normal, as far into the tails as a million of them show, and nobody can repeat them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from privacy.normals import NoiseSource

DRAWS = np.concatenate([NoiseSource(k).normal(2**18).astype(np.float64) for k in range(8)])


def test_they_are_standard_normal() -> None:
    assert stats.kstest(DRAWS, "norm").pvalue > 1e-3
    root = DRAWS.size**0.5
    assert abs(DRAWS.mean()) * root < 3.3
    assert abs((DRAWS**2).mean() - 1.0) * root / 2**0.5 < 3.3
    assert abs((DRAWS**4).mean() - 3.0) * root / 96**0.5 < 3.3


@pytest.mark.parametrize("far", [3.0, 4.0, 4.75])
def test_their_tails_are_as_heavy_as_they_should_be(far: float) -> None:
    for tail in (far < DRAWS, far < -DRAWS):
        assert stats.binomtest(int(tail.sum()), DRAWS.size, float(stats.norm.sf(far))).pvalue > 1e-3


def test_the_two_of_a_pair_are_independent() -> None:
    first, second = np.split(NoiseSource(9).normal(2**20).astype(np.float64), 2)
    for power in (1, 2, 3):
        assert stats.pearsonr(first**power, second**power).pvalue > 1e-3
    assert stats.pearsonr(first[1:] ** 2, first[:-1] ** 2).pvalue > 1e-3
    angle = np.arctan2(second, first)
    assert stats.kstest(angle, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3


def test_any_number_of_them_is_drawn() -> None:
    source = NoiseSource(1)
    for count in (0, 1, 2, 7, 1000, 3):
        assert source.normal(count).shape == (count,)
        assert np.isfinite(source.normal(count)).all()


def test_without_a_seed_nobody_repeats_them_and_with_one_everybody_does() -> None:
    def draw(seed: int | tuple[int, ...] | None) -> list[float]:
        return NoiseSource(seed).normal(8).tolist()

    assert draw(None) != draw(None)
    assert draw(7) == draw(7)
    assert draw((7, 1)) != draw((7, 2))
    # All 256 bits of the operating system's seed count.
    assert len({tuple(draw(1 << bit)) for bit in range(256)}) == 256
