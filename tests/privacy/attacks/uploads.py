"""Real uploads for the attacks: what the devices of a workspace send in one round, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clients.node import run_task
from clients.workspace import Workspace
from fedrec.algorithms.base import Tensors
from privacy.attacks.views import UserView

FEDMF: dict[str, Any] = {"_target_": "fedrec.algorithms.fedmf.FedMF", "dim": 16}


def train(space: Workspace, rounds: int, users: npt.NDArray[np.int64], rate: float = 0.05) -> Tensors:
    """The shared tensors after ``rounds`` rounds of ``users`` with a server Adam."""
    shared = {name: value.clone().requires_grad_() for name, value in space.algorithm.initial_shared().items()}
    server = torch.optim.Adam(shared.values(), lr=rate)
    for number in range(1, rounds + 1):
        now = {name: value.detach() for name, value in shared.items()}
        update = run_task(space, 0, number, now, users, users[:0]).update
        for name, value in shared.items():
            value.grad = -(update.sums[name] + update.decay[name] * now[name]) / update.devices
        server.step()
    return {name: value.detach() for name, value in shared.items()}


def uploads(space: Workspace, users: npt.NDArray[np.int64], shared: Tensors, first_round: int = 1) -> list[UserView]:
    """The touched rows of the item view as each of ``users`` uploads them, trained on ``shared``."""
    views = []
    for offset, user in enumerate(users):
        # One device a task; a task of its own round, because a repeated round would be rolled back.
        update = run_task(space, 0, first_round + offset, shared, np.array([user]), users[:0]).update
        rows = np.flatnonzero(update.counts.numpy()).astype(np.int32)
        views.append(UserView(int(user), first_round, rows, update.sums["item"].numpy()[rows]))
    return views


def dense(view: UserView, n_items: int, noise: float, generator: np.random.Generator) -> UserView:
    """The same upload as a dense one, with Gaussian noise on every value (local differential privacy)."""
    values = generator.standard_normal((n_items, view.values.shape[1])) * noise
    values[view.rows] += view.values
    return UserView(view.user, view.round, np.arange(n_items, dtype=np.int32), values.astype(np.float32))
