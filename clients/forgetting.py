"""What unlearning asks of a node: how well its devices remember, and updates that stay on the devices."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from clients.scoring import SCORE_BYTES, chunk_size, scores
from clients.store import DeviceStore
from clients.update import View
from clients.workspace import Workspace
from fedrec.algorithms.base import Tensors

Int64 = npt.NDArray[np.int64]


def margins(
    workspace: Workspace, store: DeviceStore, shared: Tensors, users: Int64, round_index: int
) -> dict[str, float]:
    """Sums of centred scores (score minus the user's mean score), and their counts, over pairs to be forgotten and over
    the same users' validation pairs, which were never trained on."""
    forget, unseen = workspace.forget, workspace.split.validation
    assert forget is not None
    affected = users[forget.counts[users] > 0]
    found = dict.fromkeys(("forget_margin", "forget_pairs", "unseen_margin", "unseen_pairs"), 0.0)
    device = torch.device("cpu")
    size = chunk_size(workspace.algorithm, workspace.split.n_items, SCORE_BYTES)
    for start in range(0, affected.size, size):
        chunk = affected[start : start + size]
        history = workspace.split.train.take(chunk)
        values = scores(workspace.algorithm, store, shared, {}, chunk, history, device, round_index)
        values = values - values.mean(1, keepdims=True, dtype=np.float64)
        for name, table in (("forget", forget.take(chunk)), ("unseen", unseen.take(chunk))):
            found[f"{name}_margin"] += float(values[table.users, table.items].sum())
            found[f"{name}_pairs"] += table.items.size
    return found


def open_recorder(options: Mapping[str, Any] | None, folder: Path, round_number: int) -> Recorder | None:
    """What keeps this round's updates on the devices, where something does (``settings.recorder``)."""
    if options is None:
        return None
    module, _, name = str(options["_target_"]).rpartition(".")
    settings = {key: value for key, value in options.items() if key != "_target_"}
    recorder: Recorder = getattr(importlib.import_module(module), name)(folder, **settings)
    return recorder if recorder.wants(round_number) else None


class Recorder(Protocol):
    """Keeps single devices' updates, in a node's folder."""

    def wants(self, round_number: int) -> bool:
        """Whether updates of this round are kept."""

    def keep(self, round_number: int, views: Sequence[View]) -> None:
        """Keep the updates of one round: (user, rows int32[t], values float32[t, w]) each."""
