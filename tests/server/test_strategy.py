"""The round loop: who is asked, which round is reported, and how a federation ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clients.messages import named_arrays
from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from privacy.samplers import sample_users
from server.settings import EvaluationSettings
from tests.conftest import WorkspaceFactory
from tests.server.federations import FEDEASE, FEDMF, FaultyGrid, federate, federate_over, view_bytes, with_tables
from tests.server.test_guards import without_training

STILL = {**FEDMF, "item_learning_rate": 0.0, "user_learning_rate": 0.0, "item_weight_decay": 0.0}
PAPER = {
    "name": "paper",
    "negatives_exclude": "all",
    "ranking": "sampled",
    "sampled_negatives": 20,
    "select_on": "test",
    "select_metric": "hr@10",
}


def _values(outcome: Any, part: str, metric: str) -> list[float]:
    return [line[part][metric] for line in outcome.rounds]


def test_the_reported_round_is_the_best_on_validation_and_its_view_is_kept(workspace: WorkspaceFactory) -> None:
    outcome = federate(workspace(FEDMF), 6)
    values = _values(outcome, "validation", "ndcg@10")
    assert len(set(values)) > 1
    best = int(np.argmax(values)) + 1
    assert outcome.best_round == best
    assert outcome.best_evaluation is not None
    assert outcome.best_evaluation.metrics("validation")["ndcg@10"] == values[best - 1]
    stopped_there = federate(workspace(FEDMF), best)
    assert outcome.best_shared["item"].numpy().tobytes() == view_bytes(stopped_there)["item"]


def test_the_test_items_never_choose_the_round_under_the_clean_protocol(
    workspace: WorkspaceFactory, synthetic_split: Split
) -> None:
    held = synthetic_split.train.union(synthetic_split.validation, synthetic_split.test)
    draw = np.random.default_rng(0)
    others = [draw.choice(np.setdiff1d(np.arange(120), held.row(user))) for user in range(60)]
    other = with_tables(synthetic_split, test=UserItems.from_pairs(np.arange(60), others, 60))
    first, second = (federate(workspace(FEDMF, split=split), 6) for split in (synthetic_split, other))
    assert _values(first, "test", "ndcg@20") != _values(second, "test", "ndcg@20")
    assert view_bytes(first) == view_bytes(second)
    assert first.best_round == second.best_round
    assert _values(first, "validation", "ndcg@10") == _values(second, "validation", "ndcg@10")


def test_the_papers_protocol_chooses_on_test_as_it_says(workspace: WorkspaceFactory) -> None:
    outcome = federate(workspace(FEDMF, protocol=PAPER), 6)
    assert outcome.best_round == int(np.argmax(_values(outcome, "test", "hr@10"))) + 1


def test_lines_come_once_each_in_order_as_they_are_completed(workspace: WorkspaceFactory) -> None:
    from server.runners import run_federation
    from server.settings import FederationSettings
    from tests.server.federations import INLINE

    seen: list[int] = []
    space = workspace(FEDMF, 2)
    outcome = run_federation(
        space, FederationSettings(rounds=4), EvaluationSettings(), INLINE, lambda line: seen.append(line["round"])
    )
    assert seen == [1, 2, 3, 4] == [line["round"] for line in outcome.rounds]
    assert all({"loss", "users", "validation", "test", "wall_s", "evaluate_s"} <= set(line) for line in outcome.rounds)


def test_early_stopping_waits_for_its_patience(workspace: WorkspaceFactory) -> None:
    outcome = federate(workspace(STILL), 20, patience=3)
    assert outcome.status == "early_stopped"
    assert outcome.reason == "no better validation ndcg@10 in the 3 evaluations after round 1"
    assert outcome.best_round == 1
    # Three evaluations without a better one are known when round 5 has been trained.
    assert [line["round"] for line in outcome.rounds] == [1, 2, 3, 4, 5]
    assert federate(workspace(STILL), 6).status == "finished"


def test_evaluation_every_so_many_rounds_and_after_the_last(workspace: WorkspaceFactory) -> None:
    outcome = federate(workspace(FEDMF), 7, evaluation=EvaluationSettings(every=3))
    assert [line["round"] for line in outcome.rounds if "validation" in line] == [3, 6, 7]
    every = federate(workspace(FEDMF), 7)
    assert view_bytes(outcome) == view_bytes(every)
    assert [line.get("validation", every.rounds[k]["validation"]) for k, line in enumerate(outcome.rounds)] == [
        line["validation"] for line in every.rounds
    ]


def test_evaluation_on_a_sample_of_users_is_the_same_sample_in_every_round_and_layout(
    workspace: WorkspaceFactory,
) -> None:
    asked: list[tuple[int, ...]] = []
    for nodes in (1, 6):
        grid = FaultyGrid(nodes)
        outcome = federate_over(grid, workspace(FEDMF, nodes), 2, EvaluationSettings(users=10))
        assert [line["evaluated_users"] for line in outcome.rounds] == [10, 10]
        rounds: dict[Any, list[int]] = {}
        for _, m in grid.sent:
            if "cohort" in m.content.array_records:
                number = m.content.config_records["task"]["round"]
                rounds.setdefault(number, []).extend(
                    named_arrays(m.content.array_records["cohort"])["evaluate"].tolist()
                )
        asked += [tuple(sorted(users)) for users in rounds.values() if users]
    assert len(asked) == 4
    assert len(set(asked)) == 1
    assert len(asked[0]) == 10


def test_a_stop_between_rounds_keeps_what_there_is(workspace: WorkspaceFactory) -> None:
    calls = iter([False, False, True])
    outcome = federate(workspace(FEDMF, 2), 10, stop=lambda: next(calls))
    assert (outcome.status, outcome.reason) == ("interrupted", "interrupted in round 3")
    assert [line["round"] for line in outcome.rounds] == [1, 2, 3]
    assert view_bytes(outcome) == view_bytes(federate(workspace(FEDMF, 2), 3))
    assert outcome.best_round in (1, 2)


def test_a_one_shot_method_takes_one_round_however_many_are_configured(workspace: WorkspaceFactory) -> None:
    outcome = federate(workspace(FEDEASE, 3), 50)
    assert (outcome.status, len(outcome.rounds), outcome.best_round) == ("finished", 1, 1)


def _trained_users(grid: FaultyGrid) -> list[list[int]]:
    return [
        named_arrays(m.content.array_records["cohort"])["train"].tolist()
        for _, m in grid.sent
        if m.metadata.message_type == "train"
    ]


def test_users_without_training_items_are_never_asked(workspace: WorkspaceFactory, few_users: Split) -> None:
    split = without_training(without_training(few_users, 0), 9)
    grid = FaultyGrid(2)
    outcome = federate_over(grid, workspace(FEDMF, 2, split), 3)
    assert all(line["users"] == 14 and line["failed_users"] == 0 for line in outcome.rounds)
    asked = [user for users in _trained_users(grid) for user in users]
    assert sorted(set(asked)) == [user for user in range(16) if user not in (0, 9)]


@pytest.mark.parametrize("optimizer", ["average", "momentum", "adam"])
def test_an_empty_poisson_round_leaves_the_view_unchanged(
    workspace: WorkspaceFactory, few_users: Split, optimizer: str
) -> None:
    fraction, seed = 0.08, 3
    sizes = [sample_users("poisson", fraction, 16, seed, number).size for number in range(1, 13)]
    assert 0 in sizes[2:]
    assert sum(sizes[:2]) > 0 or sum(sizes) > 0
    # Rounds after the last participant change nothing, moments of the optimiser or not.
    space = workspace(FEDMF, 2, few_users, seed=seed)
    options = {"sampler": "poisson", "fraction": fraction, "server_optimizer": optimizer}
    outcome = federate(space, 12, **options)
    assert outcome.status == "finished"
    assert [line["users"] for line in outcome.rounds] == sizes
    norms = [line["validation"] for line in outcome.rounds]
    for k in range(1, 12):
        if sizes[k] == 0:
            assert norms[k] == norms[k - 1]
            assert outcome.rounds[k]["loss"] is None
            assert outcome.rounds[k]["sparsity"] == outcome.rounds[k - 1]["sparsity"]
    empty = sizes.index(0)
    shorter, longer = (
        federate(workspace(FEDMF, 2, few_users, seed=seed), n, **options) for n in (max(empty, 1), empty + 1)
    )
    if empty:
        assert view_bytes(shorter) == view_bytes(longer)
    else:
        assert longer.final_shared["item"].equal(space.algorithm.initial_shared()["item"])


def test_the_users_of_a_round_are_the_samplers(workspace: WorkspaceFactory) -> None:
    grid = FaultyGrid(1)
    federate_over(grid, workspace(FEDMF, seed=11), 3, sampler="fixed", fraction=0.25)
    assert _trained_users(grid) == [sample_users("fixed", 0.25, 60, 11, number).tolist() for number in (1, 2, 3)]
