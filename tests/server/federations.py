"""Running whole federations in the tests: the algorithms' settings, one call, and what two runs are compared by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict

from clients.app import app as client_app
from clients.workspace import Workspace
from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from server.app import make_app
from server.inline import InlineGrid
from server.outcome import Outcome
from server.runners import run_federation
from server.settings import EvaluationSettings, FederationSettings, RunnerSettings
from server.strategy import FedRecStrategy

FEDMF: dict[str, Any] = {
    "_target_": "fedrec.algorithms.fedmf.FedMF", "dim": 8, "item_weight_decay": 0.01, "local_epochs": 2,
    "item_learning_rate": 5.0, "user_learning_rate": 5.0,
}  # fmt: skip
FEDRAP: dict[str, Any] = {
    "_target_": "fedrec.algorithms.fedrap.FedRAP", "dim": 8, "item_learning_rate": 5.0, "personal_learning_rate": 3.0,
    "local_epochs": 3, "item_scale": 0.1, "personal_scale": 0.1,
}  # fmt: skip
FEDEASE: dict[str, Any] = {"_target_": "fedrec.algorithms.fedease.FedEASE", "regularization": 20.0}
INLINE = RunnerSettings(name="inline")


def federate(
    space: Workspace,
    rounds: int = 3,
    *,
    evaluation: EvaluationSettings | None = None,
    runner: RunnerSettings = INLINE,
    stop: Callable[[], bool] = lambda: False,
    **federation: Any,
) -> Outcome:
    """A whole federation through the public door."""
    settings = FederationSettings(rounds=rounds, **federation)
    return run_federation(space, settings, evaluation or EvaluationSettings(), runner, stop=stop)


def metrics(outcome: Outcome) -> list[float]:
    """Every metric and loss of every round, in one list."""
    found: list[float] = []
    for line in outcome.rounds:
        found += [line["loss"]] if line["loss"] is not None else []
        for part in ("validation", "test"):
            found += line.get(part, {}).values()
    return found


def view_bytes(outcome: Outcome) -> dict[str, bytes]:
    """The final shared tensors, byte for byte."""
    return {name: value.numpy().tobytes() for name, value in outcome.final_shared.items()}


def largest_difference(first: Outcome, second: Outcome) -> float:
    """Between two runs' metrics and final shared tensors."""
    a, b = metrics(first), metrics(second)
    assert len(a) == len(b) > 0
    tensors = [float((first.final_shared[n] - second.final_shared[n]).abs().max()) for n in first.final_shared]
    return max(*tensors, float(np.abs(np.subtract(a, b)).max()))


class FaultyGrid(InlineGrid):
    """The in-process Grid with a network that fails: nodes that never register, messages that are lost on their way."""

    def __init__(
        self, n_nodes: int, *, absent: Iterable[int] = (), lose: Callable[[int, Message], bool] = lambda node, m: False
    ) -> None:
        super().__init__(client_app, n_nodes)
        self.absent, self.lose = set(absent), lose
        self.sent: list[tuple[int, Message]] = []
        self.replies: list[tuple[int, Message]] = []

    def node_of(self, node_id: int) -> int:
        return int(self._contexts[node_id].node_config["partition-id"])

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in super().get_node_ids() if self.node_of(node) not in self.absent]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        arriving = [m for m in messages if not self.lose(self.node_of(m.metadata.dst_node_id), m)]
        self.sent += [(self.node_of(m.metadata.dst_node_id), m) for m in arriving]
        return super().push_messages(arriving)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.replies += [(self.node_of(m.metadata.src_node_id), m) for m in replies]
        return replies


def federate_over(
    grid: InlineGrid, space: Workspace, rounds: int = 3, evaluation: EvaluationSettings | None = None, **federation: Any
) -> Outcome:
    """A whole federation of the two real apps over ``grid``."""
    strategy = FedRecStrategy(
        space, FederationSettings(rounds=rounds, **federation), evaluation or EvaluationSettings()
    )
    make_app(strategy, parallel=1)(grid, Context(1, 1, {}, RecordDict(), {}))
    return strategy.outcome


def with_tables(split: Split, **tables: UserItems) -> Split:
    """A copy of ``split`` in which some of its tables are replaced."""
    values = {name: getattr(split, name) for name in ("train", "validation", "test", "negatives_exclude")}
    return Split(split.name, split.n_items, **{**values, **tables})


def unequal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return not torch.equal(first, second)
