"""Algorithms whose devices misbehave: real methods, run by the real ClientApp, that go wrong for chosen devices.

A device is chosen by an item that only it holds in training (``bad_item``): methods never learn who a device is.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedrec.algorithms.base import Collected, Examples, StatisticsRecommender, Tensors, TensorSpec
from fedrec.algorithms.fedmf import FedMF
from fedrec.data.interactions import UserItems


@dataclass(frozen=True)
class MisbehavingFedMF(FedMF):
    """FedMF in which the device that holds ``bad_item`` computes ``mode``, from round ``bad_round`` (from 1) on."""

    name = "misbehaving_fedmf"

    bad_item: int = -1
    bad_round: int = 1
    mode: str = "nan"
    marker: str = ""

    def dot_product(self, round_index: int) -> None:  # type: ignore[override]
        return None  # the fused kernel would not ask ``gradients``

    def gradients(self, params: Tensors, examples: Examples) -> tuple[Tensor, Tensors]:
        losses, grads = super().gradients(params, examples)
        bad = ((examples.items == self.bad_item) & (examples.label > 0) & (examples.weight > 0)).any(1)
        if examples.round_index + 1 < self.bad_round or not bool(bad.any()):
            return losses, grads
        if self.mode == "raise":
            raise RuntimeError("this device is out of memory")
        if self.mode == "sleep":
            time.sleep(4.0)
        elif self.mode == "kill_once":
            try:
                Path(self.marker).touch(exist_ok=False)
            except FileExistsError:
                return losses, grads
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.mode == "config":
            raise ValueError("algorithm.mode is wrong")
        else:
            worst = {"nan": float("nan"), "infinity": float("inf"), "huge": 1e38}[self.mode]
            grads["item"] = torch.where(bad.view(-1, 1, 1), worst, grads["item"])
        return losses, grads


@dataclass(frozen=True)
class MisbehavingCounts(StatisticsRecommender):
    """Popularity from summed counts; the node of the device that holds ``bad_item`` answers with ``mode``."""

    name = "misbehaving_counts"

    problem: object  # type: ignore[assignment]
    bad_item: int = -1
    mode: str = "nan"

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        return {"popularity": TensorSpec((self.problem.n_items,))}  # type: ignore[attr-defined]

    @property
    def statistics(self) -> Mapping[str, TensorSpec]:
        return {"count": TensorSpec((self.problem.n_items,))}  # type: ignore[attr-defined]

    @property
    def max_rounds(self) -> int:
        return 1

    def contribute(self, shared: Tensors, history: UserItems, round_index: int) -> Tensors:
        count = torch.bincount(torch.from_numpy(history.items.astype("int64")), minlength=len(shared["popularity"]))
        count = count.float()
        if (history.items == self.bad_item).any():
            if self.mode in ("nan", "inf"):
                count[3] = float(self.mode)
            elif self.mode == "shape":
                count = count[:-1]
        return {"count": count}

    def solve(self, shared: Tensors, collected: Collected) -> Tensors:
        return {"popularity": collected.sums["count"]}

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return params["popularity"].expand(history.n_users, -1)
