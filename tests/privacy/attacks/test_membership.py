"""Who trained? Asked of released tensors alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedrec.algorithms import Problem, build
from fedrec.algorithms.base import GradientRecommender, Recommender, Tensors
from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from fedrec.errors import ConfigError, DataError
from privacy.attacks.fold_in import FoldIn, folded_scores
from privacy.attacks.membership import by_fold_in, by_score, choose_nonmembers, membership_report, split_halves
from tests.conftest import WorkspaceFactory
from tests.privacy.attacks.uploads import FEDMF, train

FEDRAP: dict[str, Any] = {"_target_": "fedrec.algorithms.fedrap.FedRAP", "dim": 8}
QUICK = FoldIn(steps=25)


def _random_histories(users: int, items: int, seed: int) -> UserItems:
    """Histories without any structure: whatever is predicted about them was memorised."""
    draw = np.random.default_rng(seed)
    rows = [draw.permutation(items)[: draw.integers(6, 12)] for _ in range(users)]
    return UserItems.from_pairs(np.repeat(np.arange(users), [r.size for r in rows]), np.concatenate(rows), users)


def _split(train_items: UserItems, n_items: int) -> Split:
    none = UserItems(np.zeros(train_items.n_users + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
    return Split("members", n_items, train_items, none, none, train_items.sorted)


@pytest.mark.parametrize("objective", ["bce", "bpr"])
@pytest.mark.parametrize("attack", [by_fold_in, by_score])
def test_an_item_view_that_memorised_its_users_gives_them_away_and_a_fresh_one_does_not(
    workspace: WorkspaceFactory, objective: str, attack: Any
) -> None:
    everybody = _random_histories(80, 150, 0)
    members, others = everybody.take(np.arange(40)), everybody.take(np.arange(40, 80))
    config = {**FEDMF, "objective": objective, "user_learning_rate": 20.0}
    space = workspace(config, split=_split(members, 150))
    before = space.algorithm.initial_shared()
    after = train(space, 60, np.arange(40, dtype=np.int64))
    kept = {name: value.clone() for name, value in after.items()}

    def report(shared: Tensors) -> dict[str, float]:
        scores = [attack(space.algorithm, shared, group, 0, QUICK) for group in (members, others)]
        return membership_report(*scores)

    trained, fresh = report(after), report(before)
    assert trained["auc_low"] > 0.6
    assert trained["auc"] > 0.8
    assert trained["advantage"] > 0.5
    assert fresh["auc_low"] < 0.5 < fresh["auc_high"]
    assert (trained["members"], trained["nonmembers"]) == (40.0, 40.0)
    assert all(torch.equal(after[name], kept[name]) for name in after)  # the released tensors were not touched


def test_ease_is_attacked_without_fitting_anything() -> None:
    everybody = _random_histories(120, 100, 1)
    members, others = everybody.take(np.arange(60)), everybody.take(np.arange(60, 120))
    algorithm: Any = build(
        {"_target_": "fedrec.algorithms.fedease.FedEASE", "regularization": 5.0}, Problem(60, 100, 0)
    )
    gram = torch.zeros(100, 100)
    gram[:] = algorithm.contribute({}, members, 0)["gram"]
    weights = torch.linalg.inv(gram.double() + 5.0 * torch.eye(100))
    weights = (weights / -weights.diag()).fill_diagonal_(0.0).float()
    found = membership_report(*(by_fold_in(algorithm, {"weights": weights}, g, 0) for g in (members, others)))
    assert found["auc"] > 0.95


def _algorithm(config: dict[str, Any], items: int = 60) -> Recommender:
    return build(config, Problem(20, items, 4))


@pytest.mark.parametrize("config", [FEDMF, FEDRAP, {**FEDMF, "objective": "bpr"}], ids=["fedmf", "fedrap", "bpr"])
def test_a_folded_in_user_is_the_same_whoever_else_is_scored(config: dict[str, Any]) -> None:
    algorithm = _algorithm(config)
    histories = _random_histories(9, 60, 2)
    shared = algorithm.initial_shared()

    def scores(chunk: int) -> np.ndarray[Any, Any]:
        out = np.zeros((9, 60), dtype=np.float32)
        settings = FoldIn(steps=10, chunk_values=chunk)
        for users, found in folded_scores(algorithm, shared, histories, histories.sorted, 5, settings):
            out[users] = found
        return out

    np.testing.assert_allclose(scores(1), scores(10**7), atol=2e-4)
    assert np.abs(scores(1)).max() > 0.1


@pytest.mark.parametrize("config", [FEDMF, FEDRAP], ids=["fedmf", "fedrap"])
def test_folding_in_ranks_the_given_items_first(config: dict[str, Any]) -> None:
    algorithm = _algorithm(config)
    assert isinstance(algorithm, GradientRecommender)
    histories = _random_histories(20, 60, 3)
    fitted = by_score(algorithm, algorithm.initial_shared(), histories, 0)
    # 16 numbers cannot learn nine random items out of 60 by heart, but they learn most.
    assert np.mean(fitted) > 0.7


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 2**32))
def test_halves_share_a_history_evenly_and_keep_its_order(counts: list[int], seed: int) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.permutation(50)[:n] for n in counts]
    table = UserItems.from_pairs(np.repeat(np.arange(len(rows)), counts), np.concatenate(rows), len(rows))
    first, second = split_halves(table, seed)
    for user, row in enumerate(rows):
        a, b = first.row(user), second.row(user)
        assert a.size == (row.size + 1) // 2
        assert sorted([*a, *b]) == sorted(row)
        for half in (a, b):
            at = [row.tolist().index(item) for item in half]
            assert at == sorted(at)


def test_halves_differ_between_users_and_seeds() -> None:
    table = UserItems.from_pairs(np.repeat(np.arange(2), 20), np.tile(np.arange(20), 2), 2)
    first, _ = split_halves(table, 0)
    assert not np.array_equal(first.row(0), first.row(1))
    assert not np.array_equal(first.row(0), split_halves(table, 1)[0].row(0))


def test_the_report_is_right_for_known_scores_and_leaves_out_what_could_not_be_tested() -> None:
    members, others = np.array([3.0, 2.0, np.nan]), np.array([1.0, 2.0, 0.0])
    found = membership_report(members, others)
    assert found["auc"] == pytest.approx(5.5 / 6)
    assert (found["members"], found["nonmembers"]) == (2.0, 3.0)
    assert found["advantage"] == pytest.approx(2 / 3)
    assert found["tpr_at_fpr_1pct"] == 0.5
    with pytest.raises(DataError, match="2 members and 0 non-members"):
        membership_report(members, np.array([np.nan]))


def test_histories_too_short_to_test_score_nan() -> None:
    algorithm = _algorithm(FEDMF)
    short = UserItems.from_pairs([1, 2, 2], [4, 5, 6], 3)
    shared = algorithm.initial_shared()
    assert np.isnan(by_fold_in(algorithm, shared, short, 0, QUICK)).tolist() == [True, True, False]
    assert np.isnan(by_score(algorithm, shared, short, 0, QUICK)).tolist() == [True, False, False]


def test_nonmembers_are_held_out_by_address_and_never_everybody() -> None:
    chosen = choose_nonmembers(100, 0.2, 3)
    assert chosen.size == 20
    assert np.array_equal(chosen, choose_nonmembers(100, 0.2, 3))
    assert not np.array_equal(chosen, choose_nonmembers(100, 0.2, 4))
    for share in (0.0, 1.0, 0.001):
        with pytest.raises(ConfigError, match=r"attack.holdout=.* write a share such as"):
            choose_nonmembers(100, share, 3)
    with pytest.raises(ConfigError, match=r"fold_in.steps=0"):
        FoldIn(steps=0)
    with pytest.raises(ConfigError, match=r"fold_in.learning_rate=0"):
        FoldIn(learning_rate=0.0)
