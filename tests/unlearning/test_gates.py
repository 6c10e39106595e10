"""The gates, on real models that forgot, forgot badly, or not at all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from fedrec.data.synthetic import SyntheticConfig, generate
from fedrec.errors import ConfigError
from fedrec.evaluation.protocols import Protocol, make_split
from tests.unlearning.als import Factors, train
from unlearning.forget import ForgetSet
from unlearning.strategies.base import Cost, Guarantee
from unlearning.verification import (
    Gate,
    Measurement,
    Scene,
    Thresholds,
    failed,
    forgetting_was_judged,
    judge,
    measure,
    relearn_rounds,
    relearn_target,
)
from unlearning.verification.noise import mean_noise
from unlearning.verification.scene import Mean

CHEAP, DEAR = Cost(cpu_s=1.0, upload_bytes=2e6), Cost(cpu_s=1000.0, upload_bytes=8e6)


class Case:
    """A request on the same data, the model before it, and models that never saw what it names."""

    def __init__(self, split: Split, forget: ForgetSet, kind: Any, golds: int = 4) -> None:
        self.forget = forget
        self.scene = Scene(frozenset({kind}), split, forget.remove_from(split), forget, 0)
        self.original = train(split, 0)
        self.golds = [self.honoured(train(self.scene.after, seed), seed) for seed in range(1, golds + 1)]
        self.before = self.look(self.original)
        self.measured = [self.look(gold) for gold in self.golds]

    def honoured(self, model: Factors, seed: int) -> Factors:
        """Deleted users start afresh, withdrawn items are reset and masked."""
        found = replace(model.without_rows(self.forget.users, seed), masked=tuple(self.forget.items.tolist()))
        rows = np.random.default_rng(seed).normal(0.0, 0.1, (self.forget.items.size, model.items.shape[1]))
        return found.with_items(self.forget.items, rows)

    def look(self, model: Factors) -> Measurement:
        return measure(model, self.scene)

    def judge(
        self, model: Factors | Measurement, thresholds: Thresholds | None = None, **others: Any
    ) -> dict[str, Gate]:
        found = model if isinstance(model, Measurement) else self.look(model)
        golds = others.pop("golds", self.measured[:3])
        gates = judge(self.scene, self.before, found, golds, CHEAP, DEAR, thresholds, **others)
        return {gate.name: gate for gate in gates}


@pytest.fixture(scope="module")
def split() -> Split:
    protocol = Protocol(split="random", random_ratios=(0.6, 0.1, 0.3))
    return make_split(generate(SyntheticConfig(users=200, items=200, seed=1, mean_activity=25)), protocol, 0)


@pytest.fixture(scope="module")
def users(split: Split) -> Case:
    return Case(split, ForgetSet.of(split.train, users=np.random.default_rng(0).choice(200, 20, replace=False)), "user")


@pytest.fixture(scope="module")
def items(split: Split) -> Case:
    return Case(split, ForgetSet.of(split.train, items=np.random.default_rng(0).choice(200, 10, replace=False)), "item")


@pytest.fixture(scope="module")
def pairs(split: Split) -> Case:
    chosen = np.random.default_rng(0).random(split.train.items.size) < 0.08
    forget = ForgetSet.of(split.train, pairs=(split.train.users[chosen], split.train.items[chosen]))
    return Case(split, forget, "interaction")


def _names(gates: dict[str, Gate]) -> set[str]:
    return {gate.name for gate in failed(gates.values())}


@pytest.mark.parametrize("kind", ["users", "items", "pairs"])
def test_a_model_that_never_saw_the_data_passes_every_gate(kind: str, request: Any) -> None:
    case: Case = request.getfixturevalue(kind)
    for gold in case.measured:  # the last one is not among those that it is compared with
        gates = case.judge(gold)
        assert not _names(gates), {name: gates[name] for name in _names(gates)}
        assert forgetting_was_judged(gates.values())
        assert gates["forget_recall@20"].passed is True


@pytest.mark.parametrize(
    ("kind", "caught_by"),
    [
        ("users", {"forget_recall@20", "mia_auc", "fold_in_auc", "percentile"}),
        ("items", {"forget_recall@20", "mia_auc"}),
        ("pairs", {"forget_recall@20", "mia_auc", "percentile"}),
    ],
)
def test_a_model_that_forgot_nothing_is_caught(kind: str, caught_by: set[str], request: Any) -> None:
    case: Case = request.getfixturevalue(kind)
    gates = case.judge(case.original)
    assert caught_by <= _names(gates)
    assert "give the forgotten items away" in gates["mia_auc"].text
    assert f"({case.before.values['forget_recall@20']:.3f} before)" in gates["forget_recall@20"].text


def test_deleting_the_users_rows_alone_fails_the_fold_in_attack_and_nothing_else(users: Case) -> None:
    gates = users.judge(users.original.without_rows(users.forget.users, 50))
    assert gates["mia_auc"].passed is True
    assert gates["forget_recall@20"].passed is True
    assert gates["percentile"].passed is True
    assert _names(gates) == {"fold_in_auc"}
    assert gates["fold_in_auc"].value > 0.64
    assert 0.45 < gates["fold_in_auc"].gold < 0.55
    assert "released item tensors" in gates["fold_in_auc"].text


def test_pushing_what_was_forgotten_to_the_bottom_fails(items: Case, pairs: Case) -> None:
    gold = items.golds[3]
    mean = -gold.users.mean(axis=0)
    pushed = items.judge(gold.with_items(items.forget.items, mean / np.linalg.norm(mean)))
    assert _names(pushed) >= {"percentile", "mia_auc"}
    assert "over-forgetting" in pushed["percentile"].text
    assert pushed["forget_recall@20"].passed is True
    # A second table that every user reads with a vector of its own: −1 for exactly the forgotten pairs.
    below = np.zeros((200, 200), dtype=np.float32)
    below[pairs.forget.pairs.users, pairs.forget.pairs.items] = -1.0
    model = pairs.golds[3]
    drowned = Factors(np.hstack([model.users, np.eye(200, dtype=np.float32)]), np.hstack([model.items, below.T]))
    gates = pairs.judge(drowned)
    assert _names(gates) == {"mia_auc", "percentile"}
    assert "avoid" in gates["mia_auc"].text


def test_a_withdrawn_item_that_is_still_recommended_fails(items: Case) -> None:
    masked = replace(items.original, masked=items.golds[0].masked)
    assert items.judge(masked)["forget_recall@20"].passed is True
    shown = replace(items.golds[3], masked=())
    assert shown.scores(items.scene.staying)[:, items.forget.items].max() > -np.inf
    boosted = shown.with_items(items.forget.items, items.original.items[items.forget.items])
    assert items.judge(boosted)["forget_recall@20"].passed is False


def test_a_model_that_is_ruined_fails_on_those_who_stay(users: Case) -> None:
    noise = np.random.default_rng(0).normal(0.0, 0.6, users.golds[3].items.shape).astype(np.float32)
    ruined = replace(users.golds[3], items=users.golds[3].items + noise)
    gates = users.judge(ruined, Thresholds(distance=2.0))
    assert {"retain_recall@20", "retain_ndcg@20"} <= _names(gates)
    assert gates["distance"].value > gates["distance"].gold
    assert gates["overlap@20"].value < gates["overlap@20"].gold
    assert gates["distance"].limit == "≤ 2 × noise floor"
    assert users.judge(ruined, Thresholds(distance=1.0))["distance"].passed is False
    assert users.judge(users.golds[3], Thresholds(distance=1.2))["distance"].passed is True


def test_seed_noise_widens_limits_unless_told_not_to(pairs: Case) -> None:
    worst = min(pairs.measured[:3], key=lambda m: m.values["retain_recall@20"])
    assert worst.values["retain_recall@20"] < 0.97 * np.mean([m.values["retain_recall@20"] for m in pairs.measured[:3]])
    default, strict = pairs.judge(worst), pairs.judge(worst, Thresholds(seed_sds=0.0))
    assert default["retain_recall@20"].passed is True
    assert "one run cannot tell" in default["retain_recall@20"].text
    assert strict["retain_recall@20"].passed is False
    assert strict["mia_auc"].limit.endswith("± 0.020")


def test_fewer_than_three_golds_are_said_to_be_few(pairs: Case) -> None:
    two, one, none = (pairs.judge(pairs.measured[3], golds=pairs.measured[:count]) for count in (2, 1, 0))
    assert "only 2 models retrained" in two["mia_auc"].text
    assert two["mia_auc"].passed is True
    assert "only 1 model retrained" in one["forget_recall@20"].text
    assert one["forget_recall@20"].passed is True
    assert one["distance"].passed is None
    judged = {name: gate for name, gate in none.items() if gate.passed is not None}
    assert set(judged) == {"time"}
    assert "no golds" in none["mia_auc"].text
    assert not forgetting_was_judged(none.values())
    assert pairs.judge(pairs.original, golds=pairs.measured[:1])["mia_auc"].passed is False


def test_a_request_of_one_interaction_is_not_judged_by_an_area(split: Split) -> None:
    forget = ForgetSet.of(split.train, pairs=([split.train.users[77]], [split.train.items[77]]))
    case = Case(split, forget, "interaction", golds=3)
    for model in (case.original, *case.golds):
        gates = case.judge(model)
        assert gates["mia_auc"].passed is None
        assert "cannot tell" in gates["mia_auc"].text
        assert gates["forget_recall@20"].passed is None
        assert model is case.original or not _names(gates)
    # With golds that agree on where the item belongs, one interaction is enough.
    low = [_with_percentile(m, 0.30 + 0.005 * i) for i, m in enumerate(case.measured)]
    gates = case.judge(_with_percentile(case.before, 0.99), golds=low)
    assert gates["percentile"].passed is False
    assert case.judge(_with_percentile(case.before, 0.33), golds=low)["percentile"].passed is True


def _with_percentile(found: Measurement, value: float) -> Measurement:
    means = {**found.means, "percentile": Mean.of(np.array([value]))}
    return replace(found, means=means, values={**found.values, "percentile": value})


def test_a_single_deleted_user_without_enough_held_out_items_is_judged_by_percentiles(split: Split) -> None:
    user = int(split.train.counts.argmax())
    none = np.zeros(201, dtype=np.int64), np.zeros(0, dtype=np.int32)
    one = UserItems.from_pairs(np.arange(200), np.array([split.test.row(u)[0] for u in range(200)]), 200)
    thin = replace(split, validation=UserItems(*none), test=one)
    case = Case(thin, ForgetSet.of(thin.train, users=[user]), "user", golds=4)
    gates = case.judge(case.golds[3])
    assert gates["fold_in_auc"].passed is None
    assert gates["fold_in_percentile"].passed is True
    assert not _names(gates)
    kept = case.judge(case.original.without_rows(case.forget.users, 9))
    assert kept["fold_in_percentile"].passed is False, kept["fold_in_percentile"]
    assert "remembered" in kept["fold_in_percentile"].text


def test_what_cannot_be_measured_is_not_judged_and_says_why(split: Split) -> None:
    none = UserItems(np.zeros(201, dtype=np.int64), np.zeros(0, dtype=np.int32))
    bare = replace(split, validation=none, test=none)
    gates = Case(bare, ForgetSet.of(split.train, users=[1, 2, 3]), "user", golds=3)
    found = gates.judge(gates.golds[0])
    for name in ("retain_recall@20", "retain_ndcg@20", "mia_auc", "fold_in_auc", "bystander_ndcg@20"):
        assert found[name].passed is None
        assert found[name].text.startswith("not judged: ")
    assert "held-out item" in found["mia_auc"].text
    assert found["mia_auc"].as_dict()["value"] is None
    json.dumps([gate.as_dict() for gate in found.values()], allow_nan=False)


def test_time_is_judged_by_kind_and_never_of_exact_retraining(users: Case, items: Case) -> None:
    def time(case: Case, seconds: float, **others: Any) -> Gate:
        gates = judge(
            case.scene,
            case.before,
            case.measured[3],
            case.measured[:3],
            Cost(cpu_s=seconds),
            Cost(cpu_s=100.0),
            **others,
        )
        return next(gate for gate in gates if gate.name == "time")

    assert (time(users, 30.0).passed, time(users, 31.0).passed) == (True, False)
    assert (time(items, 1.0).passed, time(items, 1.1).passed) == (True, False)
    assert time(users, 100.0, guarantee=Guarantee("exact")).passed is None
    assert time(users, 31.0, thresholds=Thresholds(time_user=None)).passed is None
    assert Thresholds().time({"item", "interaction"}) == 0.15
    assert Thresholds(time_item=None).time({"item", "interaction"}) is None
    traffic = users.judge(users.measured[3])["traffic"]
    assert (traffic.value, traffic.passed) == (0.25, None)
    assert users.judge(users.measured[3], Thresholds(traffic=0.2))["traffic"].passed is False


@pytest.mark.parametrize(
    ("after", "golds", "passed"),
    [
        ([0.1, 0.5, 0.5, 0.5, 0.5], [[0.1, 0.1, 0.1, 0.3, 0.5]] * 3, False),  # back at once: it was hidden
        ([0.1, 0.2, 0.3, 0.5, 0.5], [[0.1, 0.2, 0.3, 0.4, 0.5]] * 3, True),
        ([0.1] * 5, [[0.1, 0.2, 0.3, 0.4, 0.5]] * 3, True),  # slower than gold
        ([0.1] * 5, [[0.1] * 5] * 3, True),
        ([0.1, 0.1, 0.1, 0.1, 0.5], [[0.1] * 5] * 3, None),  # gold may take twice as long, or not
        ([0.5] * 5, [[0.1] * 5] * 3, False),
    ],
)
def test_relearning_faster_than_half_of_gold_fails(
    users: Case, after: list[float], golds: list[list[float]], passed: bool | None
) -> None:
    gate = users.judge(users.measured[3], relearn=relearn_rounds(after, golds, 0.45))["relearn_rounds"]
    assert gate.passed is passed
    if passed is False:
        assert "hidden, not forgotten" in gate.text


def test_rounds_to_relearn_are_interpolated() -> None:
    assert relearn_target(0.5, 0.1) == pytest.approx(0.46)
    found = relearn_rounds([0.0, 0.2, 0.6], [[0.0, 0.1, 0.2]], 0.4)
    assert (found.after, found.golds, found.horizon) == (pytest.approx(1.5), (math.inf,), 2)
    with pytest.raises(ValueError, match="same number of rounds"):
        relearn_rounds([0.0, 0.2], [[0.0]], 0.4)


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 40))
def test_no_gold_is_farther_from_the_golds_than_their_noise(seed: int, count: int, units: int) -> None:
    draw = np.random.default_rng(seed)
    golds = [Mean.of(draw.random(units)) for _ in range(count)]
    middle = np.mean([gold.value for gold in golds])
    assert all(abs(gold.value - middle) <= mean_noise(gold, golds, 2.0) for gold in golds)


def test_what_a_seed_does_to_all_users_alike_is_noise_too() -> None:
    golds = [Mean.of(np.full(500, value)) for value in (0.1, 0.2, 0.3)]
    assert mean_noise(golds[0], golds, 2.0) == pytest.approx(0.2)
    assert mean_noise(golds[0], golds, 0.0) < 1e-5


def test_the_noise_of_a_mean_is_that_of_new_retrainings() -> None:
    draw = np.random.default_rng(0)
    fresh, strayed = 2000, 0
    for _ in range(fresh):
        golds = [Mean.of(row) for row in draw.normal(0.3, 0.2, (3, 60))]
        after = Mean.of(draw.normal(0.3, 0.2, 60))
        strayed += abs(after.value - np.mean([g.value for g in golds])) > mean_noise(after, golds, 2.0)
    assert strayed / fresh < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mia": 0.1}, r"unlearning.gates.mia is unknown; did you mean unlearning.gates.mia_auc"),
        ({"retain_recall": "high"}, r"unlearning.gates.retain_recall='high': write a number of at least 0"),
        ({"seed_sds": None}, r"seed_sds=None: write a number"),
        ({"time_user": -0.1}, r"time_user=-0.1: write a number of at least 0"),
        ({"distance": True}, r"distance=True"),
    ],
)
def test_wrong_thresholds_name_the_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Thresholds.from_config(options, "unlearning.gates")


def test_a_threshold_of_null_reports_without_judging(users: Case) -> None:
    lenient = Thresholds.from_config(
        {"mia_auc": None, "fold_in_auc": None, "forget_recall_sds": None, "percentile_pairs": None,
         "retain_recall": None, "retain_ndcg": None, "bystander_ndcg": None},
        "unlearning.gates",
    )  # fmt: skip
    gates = users.judge(users.original, lenient)
    assert not _names(gates)
    assert gates["mia_auc"].limit == "reported"
    assert gates["mia_auc"].value == users.before.values["mia_auc"]
