"""What a secure sum still gives away."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrec.data.interactions import UserItems
from fedrec.data.negatives import sample_negatives
from privacy.attacks.aggregate import Singletons, link_report, link_rows, singletons
from tests.conftest import WorkspaceFactory
from tests.evaluation.movielens import movielens_100k
from tests.privacy.attacks.uploads import FEDMF, uploads

row_sets = st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=8)


def _table(rows: list[list[int]]) -> UserItems:
    owner = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    return UserItems.from_pairs(owner, [item for r in rows for item in r], len(rows))


@given(row_sets)
def test_singletons_are_the_items_of_exactly_one_participant(rows: list[list[int]]) -> None:
    found = singletons(_table(rows))
    holders = Counter(item for r in rows for item in set(r))
    alone = sorted(item for item, count in holders.items() if count == 1)
    assert found.items.tolist() == alone
    assert all(item in rows[owner] for item, owner in zip(found.items, found.owners, strict=True))
    assert found.row_share == (len(alone) / len(holders) if holders else 0.0)
    active = [set(r) for r in rows if r]
    exposed = [r for r in active if r & set(alone)]
    assert found.user_share == (len(exposed) / len(active) if active else 0.0)


def test_movielens_rows_and_users_are_exposed_as_published_and_negatives_hide_them() -> None:
    """attack numbers of one draw, .57/.27/.20/.15 of the rows and .99/.73/.55/.33 of the users: within its error."""
    data = movielens_100k()
    draw = np.random.default_rng(0)
    for participants, rows, users in ((10, 0.57, 0.99), (50, 0.27, 0.73), (100, 0.20, 0.55), (200, 0.15, 0.33)):
        cohorts = [draw.choice(data.n_users, participants, replace=False) for _ in range(12)]
        found = [singletons(data.histories.take(cohort)) for cohort in cohorts]
        assert np.mean([f.row_share for f in found]) == pytest.approx(rows, abs=0.04)
        assert np.mean([f.user_share for f in found]) == pytest.approx(users, abs=0.05)
    cohort = draw.choice(data.n_users, 200, replace=False)
    counts = data.histories.counts[cohort]
    negative = sample_negatives(data.histories.sorted, cohort, counts, data.n_items, np.arange(200, dtype=np.uint64))
    hidden = data.histories.take(cohort).union(UserItems.from_pairs(np.repeat(np.arange(200), counts), negative, 200))
    assert singletons(hidden).user_share < 0.02


def test_singleton_rows_of_a_real_sum_are_linked_to_their_participants(workspace: WorkspaceFactory) -> None:
    space = workspace({**FEDMF, "negatives": 1})
    views = uploads(space, np.arange(12, dtype=np.int64), space.algorithm.initial_shared())
    total = np.zeros((space.split.n_items, FEDMF["dim"]), dtype=np.float32)
    for view in views:
        total[view.rows] += view.values
    truth = singletons(_table([view.rows.tolist() for view in views]))
    assert truth.items.size > 10
    found = link_report(link_rows(total), truth)
    assert found["precision"] == found["recall"] == 1.0
    # Noise in the sum breaks the link: at a tenth of the rows' size nothing is linked any more.
    noise = np.random.default_rng(0).normal(size=total.shape) * np.abs(total).mean() * 0.1
    assert (link_rows(total + noise) == -1).all()


def test_rows_of_mixed_company_are_not_linked() -> None:
    draw = np.random.default_rng(0)
    p = draw.normal(size=(2, 8))
    total = np.stack([p[0], -3 * p[0], p[0] + p[1], p[0] - 2 * p[1], 2 * p[1], np.zeros(8)])
    labels = link_rows(total)
    assert labels.tolist() == [0, 0, -1, -1, -1, -1]
    truth = Singletons(np.array([0, 1, 4]), np.array([0, 0, 1]), 5, 2)
    assert link_report(labels, truth) == {"pairs": 1.0, "precision": 1.0, "recall": 1.0}
    wrong = link_report(np.array([0, -1, 0, -1, -1, -1]), truth)
    assert (wrong["precision"], wrong["recall"]) == (0.0, 0.0)


def test_collinearity_needs_two_values_a_row() -> None:
    with pytest.raises(ValueError, match="two or more values"):
        link_rows(np.ones((5, 1)))
    assert (link_rows(np.zeros((4, 3))) == -1).all()
