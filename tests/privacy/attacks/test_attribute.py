"""Gender and age group from what a server sees."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from fedrec.data.load import load_dataset
from fedrec.errors import DataError
from privacy.attacks.attribute import age_labels, gender_labels, infer_attribute, row_features
from tests.evaluation.movielens import movielens_100k


def test_movielens_row_sets_tell_gender_and_age() -> None:
    """Full row sets give .785 for gender and .870 for age ≥ 35 with ten folds; five folds learn from a little less."""
    movielens_100k()  # skips without the data
    data = load_dataset("ml-100k")
    features = row_features(data.histories, data.n_items)
    for read, expected in ((gender_labels, 0.785), (age_labels, 0.870)):
        known, label = read(data.user_table)
        assert known.all()
        found = infer_attribute(features, label, seed=0, folds=5)
        assert found.area.auc == pytest.approx(expected, abs=0.02)
        assert found.area.low > 0.7
        assert (found.users, found.positives) == (943, int(label.sum()))


def _planted(users: int, items: int, strength: float, seed: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    draw = np.random.default_rng(seed)
    label = draw.random(users) < 0.4
    direction = draw.normal(size=items) / np.sqrt(items)
    return draw.normal(size=(users, items)) + strength * label[:, None] * direction, label


def test_a_planted_attribute_is_found_and_an_absent_one_is_not() -> None:
    features, label = _planted(200, 30, 6.0, 0)
    assert infer_attribute(features, label, 0).area.auc > 0.95
    blank = [_planted(200, 30, 0.0, seed) for seed in range(8)]
    chance = [infer_attribute(features, label, seed, folds=4).area.auc for seed, (features, label) in enumerate(blank)]
    assert np.mean(chance) == pytest.approx(0.5, abs=0.06)


def test_the_attack_does_not_depend_on_the_features_unit_or_offset_but_on_the_seed() -> None:
    features, label = _planted(120, 20, 2.0, 1)
    first = infer_attribute(features, label, 7)
    np.testing.assert_allclose(
        infer_attribute(features * 1e-4 + 3.0, label, 7).scores, first.scores, rtol=1e-4, atol=1e-4
    )
    assert not np.allclose(infer_attribute(features, label, 8).scores, first.scores)


def test_a_user_is_never_scored_by_a_classifier_that_saw_its_label() -> None:
    features, label = _planted(60, 200, 0.0, 3)  # more features than users: seen labels would be fitted perfectly
    scores = infer_attribute(features, label, 0).scores
    flipped = label.copy()
    flipped[np.flatnonzero(label)[0]] = False
    flipped[np.flatnonzero(~label)[0]] = True
    assert infer_attribute(features, label, 0).area.auc < 0.75
    assert not np.allclose(infer_attribute(features, flipped, 0).scores, scores)


def test_labels_come_from_the_user_table_and_unknown_ones_are_marked() -> None:
    table = pl.DataFrame({"gender": ["F", "male", None, "x"], "age": [34, 35, None, 60]})
    known, female = gender_labels(table)
    assert known.tolist() == [True, True, False, False]
    assert female.tolist() == [True, False, False, False]
    known, old = age_labels(table)
    assert known.tolist() == [True, True, False, True]
    assert old.tolist() == [False, True, False, True]


def test_what_cannot_be_attacked_is_said_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"column gender .* no user table; name it in dataset.users.columns.gender"):
        gender_labels(None)
    with pytest.raises(DataError, match="the data set has city"):
        age_labels(pl.DataFrame({"city": ["a"]}))
    with pytest.raises(DataError, match="not a number"):
        age_labels(pl.DataFrame({"age": ["young"]}))
    with pytest.raises(DataError, match="3 of 50 users have the attribute"):
        infer_attribute(np.zeros((50, 2)), np.arange(50) < 3, 0)
