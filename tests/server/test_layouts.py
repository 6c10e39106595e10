"""One seed, one result: the number of nodes, the runner and the workers change nothing."""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.data.split import Split
from privacy.samplers import Sampler
from server.settings import EvaluationSettings
from tests.conftest import WorkspaceFactory
from tests.server.federations import FEDEASE, FEDMF, FEDRAP, federate, largest_difference, metrics, view_bytes

ALGORITHMS = {"fedmf": FEDMF, "fedrap": FEDRAP, "fedease": FEDEASE}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_any_number_of_nodes_gives_the_same_metrics(workspace: WorkspaceFactory, name: str) -> None:
    one = federate(workspace(ALGORITHMS[name]))
    assert one.status == "finished"
    for nodes in (2, 7):
        many = federate(workspace(ALGORITHMS[name], nodes))
        assert one.best_round == many.best_round
        assert largest_difference(one, many) < 1e-4


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_device_per_node_gives_the_same_metrics(workspace: WorkspaceFactory, few_users: Split, name: str) -> None:
    cohort = federate(workspace(ALGORITHMS[name], split=few_users))
    devices = federate(workspace(ALGORITHMS[name], 16, few_users), users_per_node=1)
    assert largest_difference(cohort, devices) < 1e-4
    for a, b in zip(cohort.rounds, devices.rounds, strict=True):
        assert a["upload_bytes_per_user"] == b["upload_bytes_per_user"]
        assert a["download_bytes_per_user"] == b["download_bytes_per_user"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_same_layout_twice_is_bit_identical(workspace: WorkspaceFactory, name: str) -> None:
    first, second = (federate(workspace(ALGORITHMS[name], 3)) for _ in range(2))
    assert view_bytes(first) == view_bytes(second)
    assert metrics(first) == metrics(second)


def test_another_seed_gives_another_result(workspace: WorkspaceFactory) -> None:
    first, second = (federate(workspace(FEDMF, seed=seed)) for seed in (3, 4))
    assert largest_difference(first, second) > 1e-3


@pytest.mark.parametrize("sampler", ["fixed", "poisson"])
def test_sampled_rounds_are_the_same_in_any_layout(
    workspace: WorkspaceFactory, few_users: Split, sampler: Sampler
) -> None:
    outcomes = [federate(workspace(FEDMF, nodes, few_users), 5, sampler=sampler, fraction=0.3) for nodes in (1, 4, 16)]
    assert len({tuple(line["users"] for line in outcome.rounds) for outcome in outcomes}) == 1
    assert 0 < sum(line["users"] for line in outcomes[0].rounds) < 5 * 12
    assert all(largest_difference(outcomes[0], other) < 1e-4 for other in outcomes[1:])


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "yogi"])
def test_server_optimisers_do_not_depend_on_the_layout(workspace: WorkspaceFactory, optimizer: str) -> None:
    options = {"server_optimizer": optimizer, "server_learning_rate": 0.02, "server_tau": 1e-2}
    one, five = (federate(workspace(FEDMF, nodes), 2, **options) for nodes in (1, 5))
    assert largest_difference(one, five) < 1e-4


@pytest.mark.parametrize(
    "upload",
    [{"kind": "topk", "fraction": 0.05}, {"kind": "touched", "precision": "float16"}],
    ids=["topk", "float16"],
)
def test_lossy_codecs_lose_the_same_in_cohorts_and_on_single_devices(
    workspace: WorkspaceFactory, few_users: Split, upload: dict[str, object]
) -> None:
    exact = federate(workspace(FEDMF, split=few_users), 2)
    cohort, devices = (federate(workspace(FEDMF, nodes, few_users, upload=upload), 2) for nodes in (1, 16))
    assert largest_difference(cohort, devices) < 1e-7 < 1e-6 < largest_difference(exact, cohort)
    for a, b in zip(cohort.rounds, devices.rounds, strict=True):
        assert a["upload_bytes_per_user"] == b["upload_bytes_per_user"] < exact.rounds[0]["upload_bytes_per_user"]


def test_mean_over_contributors_does_not_depend_on_the_layout(workspace: WorkspaceFactory) -> None:
    one, five = (federate(workspace(FEDMF, nodes, aggregation_counts=True), 2, mean="contributors") for nodes in (1, 5))
    assert largest_difference(one, five) < 1e-4


def test_values_per_user_leave_a_node_only_when_asked_and_are_the_same_in_any_layout(
    workspace: WorkspaceFactory,
) -> None:
    assert federate(workspace(FEDEASE, 5), 1).best_per_user == []
    asked = EvaluationSettings(per_user=True)
    one, five = (federate(workspace(FEDEASE, n, per_user_metrics=True), 1, evaluation=asked) for n in (1, 5))
    assert len(one.best_per_user) == 1
    assert len(five.best_per_user) == 5
    for name, values in one.best_per_user[0].items():
        joined = np.concatenate([part[name] for part in five.best_per_user])
        np.testing.assert_array_equal(values, joined)
