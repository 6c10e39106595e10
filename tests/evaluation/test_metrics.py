"""The metric definitions against torchmetrics, and the pessimistic rule under ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional import retrieval

from fedrec.evaluation import metrics


@settings(max_examples=120, deadline=None)
@given(st.integers(2, 30), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_definitions_equal_torchmetrics_where_nothing_is_tied(n_items: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(n_items).astype(np.float32) + 1  # torchmetrics takes a score ≤ 0 for "not retrieved"
    relevant = rng.choice(n_items, rng.integers(1, n_items), replace=False)
    k = min(k, n_items)
    target = torch.zeros(n_items, dtype=torch.bool)
    target[torch.from_numpy(relevant)] = True
    preds = torch.from_numpy(scores)
    ranks = metrics.pessimistic_ranks(scores, relevant, np.arange(n_items))
    assert metrics.hit_rate(ranks, k) == pytest.approx(float(retrieval.retrieval_hit_rate(preds, target, top_k=k)))
    assert metrics.recall(ranks, k) == pytest.approx(float(retrieval.retrieval_recall(preds, target, top_k=k)))
    assert metrics.ndcg(ranks, k) == pytest.approx(
        float(retrieval.retrieval_normalized_dcg(preds, target.long(), top_k=k)), abs=1e-6
    )
    assert metrics.reciprocal_rank(ranks, k) == pytest.approx(
        float(retrieval.retrieval_reciprocal_rank(preds, target, top_k=k))
    )


def test_a_constant_scorer_ranks_the_held_out_item_last() -> None:
    ranks = metrics.pessimistic_ranks(np.zeros(100), [17], np.arange(100))
    assert ranks.tolist() == [100]


def test_tied_relevant_items_are_ordered_among_themselves() -> None:
    scores = np.array([1.0, 1.0, 1.0, 2.0, 0.0])
    assert metrics.pessimistic_ranks(scores, [0, 1], np.arange(5)).tolist() == [3, 4]
    assert metrics.pessimistic_ranks(scores, [3, 4], np.arange(5)).tolist() == [1, 5]


def test_ndcg_of_two_relevant_items_by_hand() -> None:
    # DCG = 1/log2(2) + 1/log2(5), ideal = 1/log2(2) + 1/log2(3)
    found = metrics.ndcg(np.array([1, 4]), 5)
    assert found == pytest.approx((1 + 1 / np.log2(5)) / (1 + 1 / np.log2(3)))
    assert metrics.ndcg(np.array([1, 4]), 3) == pytest.approx(1 / (1 + 1 / np.log2(3)))


def test_coverage_and_popularity_by_hand() -> None:
    assert metrics.coverage([3, 0, 1, 0]) == 0.5
    assert metrics.average_recommendation_popularity([3, 0, 1, 0], [10, 99, 2, 99]) == pytest.approx(32 / 4)
