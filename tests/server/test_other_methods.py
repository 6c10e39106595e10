"""The seam, whole: methods that fedrec does not ship, as real federations through both Flower apps.

FedNCF, PFedRec and GPFedRec are written in ``tests/algorithms/test_seam.py`` against ``fedrec.algorithms.base`` alone.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from server.settings import EvaluationSettings
from tests.conftest import WorkspaceFactory
from tests.server.federations import federate, largest_difference

METHODS = ["FedNCF", "PFedRec", "GPFedRec", "FedALS"]


def target(name: str) -> dict[str, str]:
    return {"_target_": f"tests.algorithms.test_seam.{name}"}


@pytest.mark.parametrize("name", METHODS)
def test_other_published_methods_run_as_federations_of_any_layout(workspace: WorkspaceFactory, name: str) -> None:
    one, three = (federate(workspace(target(name), nodes), rounds=4) for nodes in (1, 3))
    assert one.status == "finished", one.reason
    assert three.status == "finished", three.reason
    assert [line["round"] for line in one.rounds] == [1, 2, 3, 4]
    assert not any("failures" in line for line in [*one.rounds, *three.rounds])
    assert largest_difference(one, three) < 1e-4
    losses = [line["loss"] for line in one.rounds if line["loss"] is not None]
    assert losses == sorted(losses, reverse=True)
    assert one.best_evaluation is not None
    assert 0 < one.best_evaluation.metrics("test")["coverage@10"] <= 1


def test_a_personal_view_is_downloaded_beside_the_shared_one_and_counted(workspace: WorkspaceFactory) -> None:
    space = workspace(target("GPFedRec"), 2)
    outcome = federate(space, rounds=3)
    view = 4 * int(np.prod(space.algorithm.shared["item"].shape))
    assert [line["download_bytes_per_user"] for line in outcome.rounds] == [2 * view] * 3


def test_a_personal_view_reaches_devices_that_are_evaluated_and_not_trained(workspace: WorkspaceFactory) -> None:
    outcome = federate(
        workspace(target("GPFedRec"), 2),
        rounds=3,
        sampler="fixed",
        fraction=0.3,
        evaluation=EvaluationSettings(users=20),
    )
    assert outcome.status == "finished", outcome.reason
    assert [line["users"] for line in outcome.rounds] == [18, 18, 18]
    assert {line["evaluated_users"] for line in outcome.rounds} == {20}
    assert all(torch.isfinite(value).all() for value in outcome.final_shared.values())
