"""Interaction inference on uploads that real devices made."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_f1_score, binary_precision, binary_recall

from clients.workspace import Workspace
from fedrec.data.split import Split
from privacy.attacks.attribute import score_features
from privacy.attacks.interaction import Guess, from_rows, report, sign_attack, without_decay
from privacy.attacks.separation import best_f1, posterior
from privacy.attacks.views import UserView
from tests.conftest import WorkspaceFactory
from tests.evaluation.movielens import movielens_100k
from tests.privacy.attacks.uploads import FEDMF, dense, train, uploads

USERS = np.arange(40, dtype=np.int64)


def _popularity(split: Split) -> np.ndarray[Any, Any]:
    return np.bincount(split.train.items, minlength=split.n_items)


def _truths(split: Split, views: list[UserView]) -> list[np.ndarray[Any, Any]]:
    return [split.train.row(view.user) for view in views]


def _sign_report(split: Split, views: list[UserView], typical: int | None = None) -> dict[str, float]:
    guesses = [sign_attack(view, _popularity(split), typical) for view in views]
    return report(guesses, _truths(split, views), split.n_items)


@pytest.mark.parametrize("negatives", [1, 4])
def test_a_sparse_upload_names_its_items_among_its_negatives(workspace: WorkspaceFactory, negatives: int) -> None:
    space = workspace({**FEDMF, "negatives": negatives})
    views = uploads(space, USERS, space.algorithm.initial_shared())
    found = report([from_rows(v) for v in views], _truths(space.split, views), space.split.n_items)
    assert found["users"] == USERS.size
    assert found["recall"] == 1.0
    # Every row of the upload is named, so precision is that of blind guessing inside it, yet far above the catalogue's.
    assert found["precision"] == pytest.approx(found["random_precision"])
    assert found["auc_rows"] == 0.5
    assert found["f1"] > 1.2 * found["catalogue_f1"]
    assert found["auc"] > 0.7


@pytest.mark.parametrize(("epochs", "rounds"), [(1, 0), (5, 0), (1, 15)])
def test_the_sign_attack_reads_bce_uploads_without_an_error(
    workspace: WorkspaceFactory, epochs: int, rounds: int
) -> None:
    space = workspace({**FEDMF, "local_epochs": epochs, "user_learning_rate": 5.0})
    everybody = np.arange(space.split.n_users, dtype=np.int64)
    shared = train(space, rounds, everybody)
    views = uploads(space, USERS, shared, rounds + 1)
    found = _sign_report(space.split, views)
    sides = [set(sign_attack(v, _popularity(space.split)).items) for v in views]
    truths = [set(t) for t in _truths(space.split, views)]
    # Sides are told apart for everybody; the more popular one is the right one but for a few short histories.
    wrong = [s for s, t, v in zip(sides, truths, views, strict=True) if s != t and s != set(v.rows) - t]
    assert not wrong
    assert found["f1"] > 0.9
    assert found["random_f1"] < 0.5


def test_on_movielens_the_sign_attack_is_perfect_and_blind_guessing_is_not(tmp_path: Path) -> None:
    from tests.clients import small

    split = small.make_split(movielens_100k(), small.Protocol(), 0)
    space: Workspace = small.workspace(tmp_path, {**FEDMF, "negatives": 1}, split)
    chosen = np.arange(0, 943, 19, dtype=np.int64)
    views = uploads(space, chosen, space.algorithm.initial_shared())
    found = _sign_report(split, views)
    assert found["f1"] == found["auc"] == 1.0
    assert found["random_f1"] == pytest.approx(0.5, abs=0.03)


def test_noise_reduces_the_attack_step_by_step_down_to_blind_guessing(workspace: WorkspaceFactory) -> None:
    space = workspace({**FEDMF, "negatives": 1})
    views = uploads(space, USERS, space.algorithm.initial_shared())
    size = float(np.median([np.linalg.norm(view.values) for view in views]))
    typical = round(float(space.split.train.counts.mean()))
    found = []
    for noise in (0.0, 0.01, 0.1, 0.3, 1.0):
        generator = np.random.default_rng(0)
        noisy = [dense(v, space.split.n_items, noise * size, generator) for v in views]
        found.append(_sign_report(space.split, noisy, typical))
    f1, area = [f["f1"] for f in found], [f["auc"] for f in found]
    assert f1[0] > 0.95
    assert all(a > b - 0.02 for a, b in pairwise(f1))
    assert all(a > b - 0.02 for a, b in pairwise(area))
    assert f1[1] > 0.8 > 0.5 > f1[3]
    assert f1[-1] == pytest.approx(found[-1]["random_f1"], abs=0.05)
    assert area[-1] == pytest.approx(0.5, abs=0.06)


def test_a_dense_upload_without_noise_hides_nothing(workspace: WorkspaceFactory) -> None:
    space = workspace({**FEDMF, "negatives": 1})
    views = uploads(space, USERS[:5], space.algorithm.initial_shared())
    for view in views:
        whole = dense(view, space.split.n_items, 0.0, np.random.default_rng(0))
        assert np.array_equal(from_rows(whole).items, view.rows)
        for typical in (None, 7):
            guess = sign_attack(whole, _popularity(space.split), typical)
            assert np.array_equal(guess.items, sign_attack(view, _popularity(space.split)).items)


def test_known_weight_decay_is_taken_off_a_dense_upload() -> None:
    draw = np.random.default_rng(0)
    view = draw.normal(size=(50, 4)).astype(np.float32)
    moved = np.zeros_like(view)
    moved[[3, 10, 20]] = draw.normal(size=(3, 4))
    rows = np.arange(50, dtype=np.int32)
    found = without_decay((moved - 0.01 * view).astype(np.float32), rows, view)
    np.testing.assert_allclose(found, moved, atol=1e-5)
    assert np.array_equal(np.flatnonzero(found.any(axis=1)), [3, 10, 20])


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_precision_recall_and_f1_are_those_of_torchmetrics(named: int, wanted: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = np.sort(draw.permutation(60)[:40]).astype(np.int32)
    items = np.sort(draw.choice(rows, min(named, 40), replace=False)).astype(np.int32)
    truth = draw.permutation(60)[:wanted]
    found = report([Guess(0, 1, rows, draw.normal(size=40), items)], [truth], 60)
    guessed, label = torch.zeros(60), torch.zeros(60, dtype=torch.long)
    guessed[torch.from_numpy(items.astype(np.int64))] = 1.0
    label[torch.from_numpy(truth)] = 1
    assert found["precision"] == pytest.approx(float(binary_precision(guessed, label)), abs=1e-6)
    assert found["recall"] == pytest.approx(float(binary_recall(guessed, label)), abs=1e-6)
    assert found["f1"] == pytest.approx(float(binary_f1_score(guessed, label)), abs=1e-6)


def test_the_blind_baselines_are_what_blind_guessing_gets() -> None:
    draw = np.random.default_rng(0)
    rows, truth = np.arange(10, 50, dtype=np.int32), np.arange(0, 30)

    def guess(pool: np.ndarray[Any, Any]) -> Guess:
        return Guess(0, 1, rows, draw.normal(size=rows.size), draw.choice(pool, 12, replace=False).astype(np.int32))

    claimed = report([guess(rows)], [truth], 100)
    inside = report([guess(rows) for _ in range(1500)], [truth] * 1500, 100)
    outside = report([guess(np.arange(100)) for _ in range(1500)], [truth] * 1500, 100)
    for name in ("precision", "recall", "f1"):
        assert inside[name] == pytest.approx(claimed[f"random_{name}"], abs=0.015)
    assert outside["f1"] == pytest.approx(claimed["catalogue_f1"], abs=0.015)
    assert inside["auc_rows"] == pytest.approx(0.5, abs=0.01)


def test_users_without_interactions_are_not_counted() -> None:
    guess = Guess(0, 1, np.array([1], dtype=np.int32), np.ones(1), np.array([1], dtype=np.int32))
    assert report([guess, guess], [np.array([1]), np.array([], dtype=np.int64)], 4)["users"] == 1.0
    assert report([guess], [np.array([], dtype=np.int64)], 4) == {"users": 0.0}


@given(st.integers(120, 300), st.integers(5, 20), st.floats(15.0, 100.0), st.integers(0, 2**32 - 1))
def test_labels_far_out_of_the_noise_are_told_from_it_exactly(n: int, labels: int, far: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    centre = np.zeros(n)
    centre[:labels], centre[labels : 2 * labels] = far, -far
    projection = centre + np.clip(draw.normal(size=n), -3, 3)
    found = best_f1(posterior(projection, 1.0, max(1, labels // 2)))
    assert np.array_equal(found, np.arange(labels))


def test_pure_noise_gives_probabilities_and_names_something() -> None:
    projection = np.random.default_rng(0).normal(size=500)
    probability = posterior(projection, 1.0, 50)
    assert ((probability >= 0.0) & (probability <= 1.0)).all()
    assert 0 < best_f1(probability).size <= 500
    assert best_f1(np.zeros(0)).size == 0


def test_score_features_have_unit_norm(workspace: WorkspaceFactory) -> None:
    space = workspace(FEDMF)
    views = uploads(space, USERS[:3], space.algorithm.initial_shared())
    features = score_features([sign_attack(v, _popularity(space.split)) for v in views], space.split.n_items)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-5)
    for row, view in zip(features, views, strict=True):
        assert np.array_equal(np.flatnonzero(row), view.rows)
