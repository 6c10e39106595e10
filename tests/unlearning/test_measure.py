"""What is measured of a model, against independent definitions."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import mannwhitneyu
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_recall

from fedrec.algorithms import Problem, build
from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from fedrec.data.synthetic import SyntheticConfig, generate
from fedrec.errors import ConfigError, RunFailed
from fedrec.evaluation.metrics import pessimistic_ranks, recall
from fedrec.evaluation.protocols import Protocol, make_split
from privacy.attacks.roc import delong
from tests.unlearning.als import Factors, train
from unlearning.forget import ForgetSet
from unlearning.verification import MeasureSettings, Scene, measure, measured, percentile_histograms
from unlearning.verification.areas import Group, difference_error, evidence
from unlearning.verification.bystanders import choose_bystanders
from unlearning.verification.distance import divergence, overlap, standardise
from unlearning.verification.ranks import rank_pairs


@pytest.fixture(scope="module")
def split() -> Split:
    protocol = Protocol(split="random", random_ratios=(0.6, 0.1, 0.3))
    return make_split(generate(SyntheticConfig(users=80, items=120, seed=1, mean_activity=22)), protocol, 0)


@pytest.fixture(scope="module")
def model(split: Split) -> Factors:
    found = train(split, 0, dim=16)
    # Items that nobody has in training all score 0; that libraries break ties otherwise is tested elsewhere.
    return found.with_items(np.arange(120), found.items + np.random.default_rng(0).normal(0, 1e-3, (120, 16)))


def _scene(split: Split, forget: ForgetSet, kind: Any, **settings: Any) -> Scene:
    return Scene(frozenset({kind}), split, forget.remove_from(split), forget, 0, MeasureSettings(**settings))


def _some_pairs(split: Split, share: float = 0.1) -> ForgetSet:
    chosen = np.random.default_rng(3).random(split.train.items.size) < share
    return ForgetSet.of(split.train, pairs=(split.train.users[chosen], split.train.items[chosen]))


def test_retained_metrics_are_those_of_an_independent_library(split: Split, model: Factors) -> None:
    scene = _scene(split, ForgetSet.of(split.train, users=[3, 9]), "user")
    found = measure(model, scene).values
    recalls, gains = [], []
    for user in range(split.n_users):
        if user in (3, 9) or not split.test.row(user).size:
            continue
        free = np.ones(split.n_items, dtype=bool)
        free[np.concatenate([split.train.row(user), split.validation.row(user)])] = False
        scores = torch.from_numpy(model.raw_scores(np.array([user]))[0, free])
        wanted = torch.from_numpy(np.isin(np.flatnonzero(free), split.test.row(user)))
        recalls.append(float(retrieval_recall(scores, wanted, top_k=20)))
        gains.append(float(retrieval_normalized_dcg(scores, wanted, top_k=20)))
    assert found["retain_recall@20"] == pytest.approx(np.mean(recalls), abs=1e-6)
    assert found["retain_ndcg@20"] == pytest.approx(np.mean(gains), abs=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_forget_recall_and_percentiles_follow_their_definitions_also_under_ties(seed: int) -> None:
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, 6, (1, 40)).astype(np.float32)
    order = draw.permutation(40)
    forgotten, retained = order[: draw.integers(1, 8)], order[8 : 8 + draw.integers(0, 10)]

    def row(items: Any) -> UserItems:
        return UserItems.from_pairs(np.zeros(len(items)), items, 1)

    withdrawn = np.isin(np.arange(40), order[draw.integers(0, 20, 3)])
    recalls, places = rank_pairs(scores, scores, row(retained), row(forgotten), withdrawn, 5)
    candidates = np.setdiff1d(np.arange(40), retained)
    assert recalls[0] == recall(pessimistic_ranks(scores[0], forgotten, candidates), 5)
    others = scores[0, np.setdiff1d(candidates, np.append(forgotten, np.flatnonzero(withdrawn)))]
    judged = forgotten[~withdrawn[forgotten]]
    assert places[0] == pytest.approx([np.mean((others < s) + 0.5 * (others == s)) for s in scores[0, judged]])
    hidden = np.full((1, 40), -np.inf, dtype=np.float32)  # however short the list would be without it
    assert rank_pairs(hidden, scores, row(retained), row(forgotten), withdrawn, 40)[0] == 0.0


def test_withdrawn_items_that_are_masked_have_no_recall_and_keep_their_percentile(split: Split, model: Factors) -> None:
    gone = np.array([4, 17, 60])
    scene = _scene(split, ForgetSet.of(split.train, items=gone), "item")
    masked, open_ = (measure(replace(model, masked=items), scene) for items in ((4, 17, 60), ()))
    assert masked.values["forget_recall@20"] == 0.0
    assert open_.values["forget_recall@20"] > 0.5
    kept = np.setdiff1d(np.arange(split.n_items), gone)
    expected = []
    for item in gone:
        rows = model.raw_scores(scene.staying)
        expected.append(np.mean(rows[:, kept] < rows[:, item : item + 1]))
    for found in (masked, open_):
        assert found.percentiles == pytest.approx(expected, abs=1e-6)
        assert found.values["percentile"] == found.values["percentile_items"] == pytest.approx(np.mean(expected))


def _alone(scores: Any, first: int) -> Group:
    """Every score of a user and an item of its own, numbered from ``first``."""
    return Group(np.asarray(scores, dtype=np.float64), *(first + np.arange(len(scores)) for _ in range(2)))


@given(st.integers(0, 2**32 - 1))
def test_areas_are_mann_whitney_and_their_error_is_delongs(seed: int) -> None:
    draw = np.random.default_rng(seed)
    p, n = (int(x) for x in draw.integers(30, 60, 2))
    positive, negative = np.round(draw.normal(0.4, 1, p), 1), np.round(draw.normal(0, 1, n), 1)
    found = evidence([(_alone(positive, 0), _alone(negative, p))])
    assert found.auc == pytest.approx(mannwhitneyu(positive, negative).statistic / (p * n))
    assert float(found.weight @ found.below) == pytest.approx(found.auc)
    # Against an area that is known, the paired error is DeLong's own.
    known = dataclasses.replace(found, above=np.full(p, 0.5), below=np.full(n, 0.5))
    low, high = delong(positive, negative)[1:]
    if low > 0.0 and high < 1.0:
        assert difference_error(found, [known]) == pytest.approx((high - low) / 2 / 1.95996, rel=0.05)
    assert difference_error(found, [found]) == 0.0


def test_an_area_of_two_folds_is_their_mean_and_empty_folds_say_nothing() -> None:
    one, two = (_alone([1, 2], 0), _alone([1.5], 2)), (_alone([3, 4], 0), _alone([0], 2))
    none = (_alone([3], 0), _alone([], 1))
    assert evidence([one, two, none]).auc == 0.75
    assert math.isnan(evidence([none]).auc)
    assert math.isnan(difference_error(evidence([none]), [evidence([none])]))


@pytest.mark.parametrize("together", ["users", "items"])
def test_the_error_of_an_area_knows_that_scores_hang_together(together: str) -> None:
    draw = np.random.default_rng(1)
    unit, loner = np.repeat(np.arange(40), 10), np.arange(400)
    labels = (unit, loner) if together == "users" else (loner, unit)

    def model() -> Any:
        groups = [Group(draw.normal(0, 1, 400) + draw.normal(0, 1, 40)[unit], *labels) for _ in range(2)]
        return evidence([(groups[0], groups[1]._replace(users=400 + labels[0], items=400 + labels[1]))])

    models = [model() for _ in range(300)]
    errors = [difference_error(one, [other]) for one, other in zip(models[::2], models[1::2], strict=True)]
    differences = [one.auc - other.auc for one, other in zip(models[::2], models[1::2], strict=True)]
    assert np.mean(errors) == pytest.approx(np.std(differences), rel=0.15)


def test_membership_is_attacked_with_centred_scores_of_the_same_users(split: Split, model: Factors) -> None:
    forget = _some_pairs(split)
    found = measure(model, _scene(split, forget, "interaction"))
    scores = model.raw_scores(np.arange(split.n_users))
    scores = scores - scores.mean(axis=1, keepdims=True)
    unseen = split.validation.union(split.test)
    keep = np.isin(unseen.users, forget.affected)
    positive = scores[forget.pairs.users, forget.pairs.items]
    negative = scores[unseen.users[keep], unseen.items[keep]]
    expected = mannwhitneyu(positive, negative).statistic / (positive.size * negative.size)
    assert found.values["mia_auc"] == pytest.approx(expected, abs=1e-4)
    # A shift of one user's scores is no evidence.
    shifted = replace(
        model,
        users=np.column_stack([model.users, np.arange(80)]).astype(np.float32),
        items=np.column_stack([model.items, np.ones(120)]).astype(np.float32),
    )
    again = measure(shifted, _scene(split, forget, "interaction")).values
    assert again["mia_auc"] == pytest.approx(expected, abs=1e-3)


def test_divergence_is_scipys_and_ignores_shift_and_scale() -> None:
    draw = np.random.default_rng(0)
    one, other = (draw.normal(size=(5, 30)).astype(np.float32) for _ in range(2))
    p, q = (np.exp(standardise(x).astype(np.float64)) for x in (one, other))
    expected = np.mean([jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, q, strict=True)])
    assert divergence(standardise(one), standardise(other)) == pytest.approx(expected, abs=1e-6)
    assert divergence(standardise(one), standardise(3.0 * one + 7.0)) < 1e-6
    one[:, :15], other[:, 15:] = -np.inf, -np.inf
    assert divergence(standardise(one), standardise(other)) == pytest.approx(1.0)
    lists = np.array([[1, 2, 3, -1], [-1, -1, -1, -1]], dtype=np.int32)
    assert overlap(lists, np.array([[3, 2, 9, 8], [1, 2, 3, 4]], dtype=np.int32)) == pytest.approx(2 / 3)


def test_bystanders_are_the_most_similar_users_who_asked_for_nothing(split: Split) -> None:
    forget = ForgetSet.of(split.train, users=[0, 1])
    scene = _scene(split, forget, "user", bystander_share=0.1)

    def similarity(user: int) -> float:
        mine = set(split.train.row(user).tolist())
        theirs = [set(split.train.row(u).tolist()) for u in (0, 1)]
        return max(len(mine & other) / len(mine | other) for other in theirs)

    rest = range(2, split.n_users)
    expected = sorted(sorted(rest, key=lambda u: (-round(similarity(u), 9), u))[:8])
    assert scene.bystanders.tolist() == expected
    some = _some_pairs(split, 0.003)
    beside = _scene(split, some, "interaction").bystanders
    assert beside.size == 8
    assert not np.isin(beside, some.affected).any()
    owners = np.unique(split.train.users[split.train.items == 7])
    withdrawn = ForgetSet.of(split.train, items=[7])
    everybody = np.arange(split.n_users)
    assert choose_bystanders(split.train, split.n_items, withdrawn, everybody, 0.1, 0).tolist() == owners.tolist()


def test_a_model_is_measured_the_same_whoever_else_is_there(split: Split, model: Factors) -> None:
    scene = _scene(split, ForgetSet.of(split.train, users=[2, 40], items=[5]), "user_item", distance_users=30)
    whole = measure(model, scene)
    parts = measure(model, replace(scene, settings=replace(scene.settings, chunk_values=7 * split.n_items)))
    assert parts.values == pytest.approx(whole.values, abs=1e-6, nan_ok=True)
    assert np.array_equal(parts.predictions.top, whole.predictions.top)
    assert whole.predictions.scores.shape == (30, split.n_items - 1)
    assert not np.isin(scene.compared, [2, 40]).any()


def test_fold_in_attacks_methods_that_solve_statistics_too(split: Split) -> None:
    ease: Any = build({"_target_": "fedrec.algorithms.fedease.FedEASE", "regularization": 5.0}, Problem(80, 120, 0))

    class Ease:
        algorithm = ease

        def __init__(self, of: Split) -> None:
            gram = ease.contribute({}, of.train, 0)["gram"].double()
            inverse = torch.linalg.inv(gram + 5.0 * torch.eye(120))
            self.shared = {"weights": (inverse / -inverse.diag()).fill_diagonal_(0.0).float()}
            self.of = of

        def scores(self, users: Any) -> Any:
            return ease.score(self.shared, self.of.train.take(users)).numpy()

    scene = _scene(split, ForgetSet.of(split.train, users=np.arange(0, 80, 4)), "user")
    remembers, gold = (measure(Ease(of), scene).values for of in (split, scene.after))
    assert remembers["fold_in_auc"] > gold["fold_in_auc"] + 0.05
    assert remembers["fold_in_percentile"] > gold["fold_in_percentile"] + 0.05


def test_folding_in_treats_held_out_items_as_it_treats_the_tested_half() -> None:
    # All items but one are in the history or held out: were held-out items drawn as negatives, they would sink.
    draw = np.random.default_rng(0)
    rows = np.array([draw.permutation(40) for _ in range(60)])

    def table(columns: slice) -> UserItems:
        return UserItems.from_pairs(np.repeat(np.arange(60), rows[:, columns].shape[1]), rows[:, columns].ravel(), 60)

    train_items, none = table(slice(0, 12)), UserItems(np.zeros(61, dtype=np.int64), np.zeros(0, dtype=np.int32))
    whole = Split("all seen", 40, train_items, none, table(slice(12, 39)), train_items.sorted)
    blank = Factors(*(draw.normal(0, 0.3, (n, 8)).astype(np.float32) for n in (60, 40)))
    found = measure(blank, _scene(whole, ForgetSet.of(train_items, users=np.arange(60)), "user"))
    assert found.values["fold_in_auc"] == pytest.approx(0.5, abs=0.05)


def test_what_cannot_be_measured_is_nan(split: Split, model: Factors) -> None:
    none = UserItems(np.zeros(81, dtype=np.int64), np.zeros(0, dtype=np.int32))
    bare = replace(split, validation=none, test=none)
    found = measure(model, _scene(bare, ForgetSet.of(split.train, users=[1, 2]), "user")).values
    for name in ("retain_recall@20", "retain_ndcg@20", "mia_auc", "fold_in_auc", "bystander_ndcg@20"):
        assert math.isnan(found[name]), name
    assert 0.0 <= found["forget_recall@20"] <= 1.0
    assert 0.0 <= found["fold_in_percentile"] <= 1.0
    empty = measure(model, _scene(split, ForgetSet.nothing(80), "interaction")).values
    assert math.isnan(empty["forget_recall@20"])
    assert math.isnan(empty["percentile"])
    everybody = measure(model, _scene(split, ForgetSet.of(split.train, users=np.arange(80)), "user"))
    assert math.isnan(everybody.values["retain_recall@20"])
    assert measured(everybody, everybody, [everybody])["after"]["distance"] is None


def test_a_diverged_model_is_refused(split: Split, model: Factors) -> None:
    broken = replace(model, users=model.users.copy())
    broken.users[5] = np.nan
    with pytest.raises(RunFailed, match=r"score of item 0 for user 5 is not a number.*lower"):
        measure(broken, _scene(split, _some_pairs(split), "interaction"))


def test_the_summary_holds_every_model_and_the_whole_histogram(split: Split, model: Factors) -> None:
    forget = _some_pairs(split)
    scene = _scene(split, forget, "interaction")
    golds = [measure(train(scene.after, seed, dim=16), scene) for seed in (1, 2)]
    before = measure(model, scene)
    table = measured(before, golds[0], golds)
    assert table["golds"][0]["distance"] == pytest.approx(table["golds"][0]["noise_floor"])
    assert table["before"]["fold_in_auc"] is None
    assert table["after"]["forget_recall@20"] == pytest.approx(golds[0].values["forget_recall@20"])
    drawn = percentile_histograms(before, golds[0], golds)
    assert len(drawn["edges"]) == 21
    assert sum(drawn["before"]) == sum(drawn["gold"]) == forget.size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance_user": 3}, r"unlearning.measure.distance_user is unknown; did you mean .*distance_users"),
        ({"distance_users": 0}, r"unlearning.measure.distance_users=0: write a number of at least 1"),
        ({"bystander_share": 2}, r"bystander_share=2: write a number from 0 to 1"),
        ({"fold_in": {"step": 3}}, r"fold_in=.*it has steps"),
    ],
)
def test_wrong_settings_name_the_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeasureSettings.from_config(options, "unlearning.measure")
    assert MeasureSettings.from_config({"fold_in": {"steps": 3}}, "x").fold_in.steps == 3


class Redrawn:
    """A model whose deleted users' devices are drawn anew: the ``draw``-th is the plain model with other vectors."""

    def __init__(self, model: Factors, newcomers: np.ndarray[Any, Any]) -> None:
        self.model, self.newcomers = model, newcomers
        self.algorithm, self.shared = model.algorithm, model.shared

    def scores(self, users: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self.model.scores(users)

    def fresh_scores(self, users: np.ndarray[Any, Any], draw: int) -> np.ndarray[Any, Any]:
        return np.roll(self.model.scores(users), draw, axis=1)


def test_what_is_said_of_deleted_users_is_a_mean_over_draws_of_their_new_devices(split: Split, model: Factors) -> None:
    forget = ForgetSet.of(split.train, users=[3, 9, 30])
    scene = _scene(split, forget, "user", fresh_draws=4)
    found = measure(Redrawn(model, forget.users), scene)

    class One(Redrawn):
        def fresh_scores(self, users: np.ndarray[Any, Any], draw: int) -> np.ndarray[Any, Any]:
            return super().fresh_scores(users, self.only)

    singles = []
    for draw in range(4):
        one = One(model, forget.users)
        one.only = draw
        singles.append(measure(one, _scene(split, forget, "user", fresh_draws=1)))
    for name in ("percentile", "forget_recall@20", "mia_auc"):
        values = [single.values[name] for single in singles]
        assert found.values[name] == pytest.approx(np.mean(values), abs=1e-6)
        assert np.std(values) > 0.0 or name == "forget_recall@20"
    assert found.values["retain_ndcg@20"] == singles[0].values["retain_ndcg@20"]
