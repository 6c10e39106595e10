"""Small worlds for the tests of the clients' room: a random data set, a workspace, and a plain server loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.node import NodeResult, run_task
from clients.workspace import Workspace
from fedrec.algorithms.base import Tensors
from fedrec.data.interactions import Interactions
from fedrec.data.split import Split
from fedrec.evaluation.protocols import Protocol, make_split

CLEAN = {"name": "clean"}
FEDMF: dict[str, Any] = {"_target_": "fedrec.algorithms.fedmf.FedMF", "dim": 8}
FEDRAP: dict[str, Any] = {
    "_target_": "fedrec.algorithms.fedrap.FedRAP", "dim": 8, "item_learning_rate": 5.0, "personal_learning_rate": 3.0,
    "local_epochs": 4, "tolerance": 0.0,
}  # fmt: skip


def interactions(users: int = 24, items: int = 90, seed: int = 0) -> Interactions:
    """Between 5 and 30 different random items a user, with distinct times."""
    draw = np.random.default_rng(seed)
    rows = [draw.permutation(items)[: draw.integers(5, 31)] for _ in range(users)]
    user = np.repeat(np.arange(users, dtype=np.int32), [row.size for row in rows])
    item = np.concatenate(rows).astype(np.int32)
    used, item = np.unique(item, return_inverse=True)
    return Interactions(
        "random", user, item.astype(np.int32), [str(u) for u in range(users)], [str(i) for i in used],
        timestamp=np.arange(user.size, dtype=np.int64),
    )  # fmt: skip


def small_split(users: int = 24, items: int = 90, seed: int = 0) -> Split:
    return make_split(interactions(users, items, seed), Protocol.from_config(CLEAN), 0)


def workspace(folder: Path, algorithm: Mapping[str, Any], split: Split | None = None, **settings: Any) -> Workspace:
    """A workspace of one node in ``folder`` (unless ``n_nodes`` says otherwise); settings override the defaults."""
    features = settings.pop("item_features", None)
    chosen = {"seed": 3, "n_nodes": 1, "upload": {"kind": "touched"}, "download": {"kind": "dense"}, **settings}
    Workspace.create(folder, split or small_split(), algorithm, CLEAN, chosen, features)
    return Workspace.open(folder)


def everybody(space: Workspace) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.arange(space.split.n_users, dtype=np.int64)


def averaged(space: Workspace, shared: Tensors, results: list[NodeResult], round_number: int) -> Tensors:
    """The mean over all devices that took part, as a server without an optimiser takes it."""
    n = sum(r.update.devices for r in results)
    found = {}
    for name, value in shared.items():
        decay = sum(r.update.decay.get(name, 0.0) for r in results)
        found[name] = value * (1.0 + decay / n) + sum(r.update.sums[name] for r in results) / n
    return space.algorithm.finish_round(found, round_number - 1)


def train(space: Workspace, rounds: int) -> tuple[Tensors, list[NodeResult]]:
    """``rounds`` rounds of everybody; the shared tensors afterwards and all results."""
    nobody = np.zeros(0, dtype=np.int64)
    shared, results = space.algorithm.initial_shared(), []
    for number in range(1, rounds + 1):
        replies = []
        for node in range(space.settings.n_nodes):
            mine = np.asarray(space.users_of(node), dtype=np.int64)
            replies.append(run_task(space, node, number, shared, mine, nobody))
        shared = averaged(space, shared, replies, number)
        results += replies
    return shared, results


def device_files(folder: Path) -> dict[str, bytes]:
    """The contents of every private file below ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("node-*/*"))}


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference, relative to the scale (largest magnitude) of ``second``."""
    return float((first - second).abs().max() / second.abs().max().clamp_min(1e-30))
