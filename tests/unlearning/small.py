"""A small federation at rest, and requests on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedrec.algorithms.base import Problem
from fedrec.data.split import Split
from server.settings import EvaluationSettings, FederationSettings, RunnerSettings
from unlearning.federation import Federation
from unlearning.forget import ForgetSet
from unlearning.state import State, stores
from unlearning.strategies import Task

FEDMF = {"_target_": "fedrec.algorithms.fedmf.FedMF", "dim": 8, "user_learning_rate": 10.0}
FEDRAP = {"_target_": "fedrec.algorithms.fedrap.FedRAP", "dim": 4}
ADAM = {"server_optimizer": "adam", "server_learning_rate": 0.05, "server_tau": 1e-8, "server_bias_correction": True}


def federation(
    split: Split, algorithm: Mapping[str, Any] = FEDMF, *, nodes: int = 1, joined: Any = None, **settings: Any
) -> Federation:
    """FedMF with a server Adam, seed 5, on the inline runner."""
    problem = Problem(split.n_users, split.n_items, 5)
    return Federation(
        algorithm_config=algorithm, protocol={"name": "clean"},
        settings={"seed": 5, "n_nodes": nodes, "upload": {"kind": "touched"}, "download": {"kind": "dense"}},
        federation=FederationSettings(**{**ADAM, **settings}), evaluation=EvaluationSettings(every=1000),
        runner=RunnerSettings(name="inline"), problem=problem, joined=joined,
    )  # fmt: skip


def trained(made: Federation, folder: Path, split: Split, rounds: int) -> State:
    return made.train(made.begin(folder, split), split, rounds).state


def task(made: Federation, state: State, split: Split, forget: ForgetSet, **more: Any) -> Task:
    kinds = frozenset(["user" if forget.users.size else "item" if forget.items.size else "interaction"])
    return Task(
        number=1, kinds=kinds, state=state, before=split, after=forget.remove_from(split), forget=forget,
        forgotten=forget, federation=made, seed=5, **more,
    )  # fmt: skip


def vectors(state: State, name: str = "user") -> np.ndarray[Any, Any]:
    """All users' private vectors."""
    return np.concatenate(
        [store.vectors(np.asarray(store.users))[name].numpy() for store in stores(state.devices, scratch=True)]
    )
