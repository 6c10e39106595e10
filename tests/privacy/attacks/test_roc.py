"""The areas, thresholds and intervals behind every attack's numbers."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import ks_2samp, mannwhitneyu
from torchmetrics.functional.classification import binary_auroc

from privacy.attacks.roc import advantage, auc, delong, tpr_at_fpr

Float64 = npt.NDArray[np.float64]
# Few different values, so that there are ties.
groups = arrays(np.float64, st.integers(1, 40), elements=st.integers(-4, 4).map(float))


@settings(max_examples=50)
@given(groups, groups)
def test_auc_is_that_of_torchmetrics_and_of_mann_whitney(positive: Float64, negative: Float64) -> None:
    scores = torch.from_numpy(np.concatenate([positive, negative]))
    labels = torch.cat([torch.ones(positive.size), torch.zeros(negative.size)]).long()
    # Scores outside [0, 1] would be squashed by a sigmoid first, which merges no two of these values.
    assert auc(positive, negative) == pytest.approx(float(binary_auroc(scores, labels)), abs=1e-6)
    u = mannwhitneyu(positive, negative).statistic
    assert auc(positive, negative) == pytest.approx(u / (positive.size * negative.size), abs=1e-12)


@settings(max_examples=50)
@given(groups, groups)
def test_advantage_is_the_one_sided_kolmogorov_smirnov_statistic(positive: Float64, negative: Float64) -> None:
    # "less": the positives' distribution function lies below, i.e. they score higher.
    expected = ks_2samp(positive, negative, alternative="less", method="asymp").statistic
    assert advantage(positive, negative) == pytest.approx(expected, abs=1e-12)


@given(groups, groups, st.floats(0.0, 1.0))
def test_tpr_at_fpr_is_the_best_threshold_that_keeps_the_promise(
    positive: Float64, negative: Float64, fpr: float
) -> None:
    thresholds = [-math.inf, *np.concatenate([positive, negative]), math.inf]
    allowed = [
        float((positive > t).mean())
        for t in thresholds
        if (negative > t).sum() <= math.floor(fpr * negative.size + 1e-9)
    ]
    assert tpr_at_fpr(positive, negative, fpr) == max(allowed)


def test_an_empty_group_has_no_area() -> None:
    empty, some = np.zeros(0), np.ones(3)
    for function in (auc, advantage, tpr_at_fpr):
        assert math.isnan(function(empty, some))
        assert math.isnan(function(some, empty))


def test_delongs_interval_has_the_bootstraps_width() -> None:
    draw = np.random.default_rng(0)
    positive, negative = draw.normal(0.8, 1.0, 150), draw.normal(0.0, 1.0, 90)
    area = delong(positive, negative)
    resampled = [auc(draw.choice(positive, 150), draw.choice(negative, 90)) for _ in range(2000)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert area.auc == auc(positive, negative)
    assert area.high - area.low == pytest.approx(high - low, rel=0.1)


def test_delongs_interval_covers_the_true_area() -> None:
    draw = np.random.default_rng(1)
    truth = 0.7602499  # P(N(1, 1) > N(0, 1)) = Φ(1/√2)
    covered = 0
    for _ in range(600):
        area = delong(draw.normal(1.0, 1.0, 60), draw.normal(0.0, 1.0, 60))
        covered += area.low <= truth <= area.high
    assert 0.92 < covered / 600 < 0.98


def test_delong_says_when_it_cannot_know() -> None:
    assert math.isnan(delong(np.ones(1), np.zeros(5)).low)
    assert delong(np.ones(5), np.zeros(5)) == (1.0, 1.0, 1.0)
