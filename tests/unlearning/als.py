"""A real recommender for the judges' tests: matrix factorisation by alternating least squares, scored by FedMF.

Hu, Koren & Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (ICDM 2008), equation 4. It trains in
milliseconds, and with few users and many factors it remembers them: what unlearning has to undo.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from fedrec.algorithms.base import Problem, Tensors
from fedrec.algorithms.fedmf import FedMF
from fedrec.data.split import Split

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Factors:
    """A scorer: ``users`` float32[U, d], ``items`` float32[I, d]; ``masked`` items are never recommended."""

    users: Float32
    items: Float32
    masked: tuple[int, ...] = ()

    @property
    def algorithm(self) -> FedMF:
        return FedMF(Problem(len(self.users), len(self.items), 0), dim=self.users.shape[1])

    @property
    def shared(self) -> Tensors:
        return {"item": torch.from_numpy(self.items)}

    def raw_scores(self, users: Int64) -> Float32:
        return self.users[users] @ self.items.T

    def scores(self, users: Int64) -> Float32:
        scores = self.raw_scores(users)
        scores[:, list(self.masked)] = -np.inf
        return scores

    def without_rows(self, users: Int64, seed: int) -> Factors:
        """The devices of ``users`` start afresh; nobody else changes."""
        own = self.users.copy()
        own[users] = np.random.default_rng(seed).normal(0.0, 0.1, (users.size, own.shape[1]))
        return replace(self, users=own)

    def with_items(self, items: Int64, rows: Float32 | Float64 | float) -> Factors:
        other = self.items.copy()
        other[items] = rows
        return replace(self, items=other)


def train(split: Split, seed: int, dim: int = 32, sweeps: int = 4, weight: float = 20.0, ridge: float = 0.5) -> Factors:
    """Factors of the training interactions; ``seed`` draws the initial values, and few sweeps leave some of them."""
    draw = np.random.default_rng(seed)
    seen = np.zeros((split.n_users, split.n_items))
    seen[split.train.users, split.train.items] = 1.0
    users = draw.normal(0.0, 0.1, (split.n_users, dim))
    items = draw.normal(0.0, 0.1, (split.n_items, dim))
    for _ in range(sweeps):
        users = _solve(seen, items, weight, ridge)
        items = _solve(seen.T, users, weight, ridge)
    return Factors(users.astype(np.float32), items.astype(np.float32))


def _solve(seen: Float64, other: Float64, weight: float, ridge: float) -> Float64:
    """Rows x that minimise Σ_i c_i (seen_i − ⟨x, other_i⟩)² + ridge·‖x‖², c = 1 + weight·seen."""
    gram = other.T @ other + ridge * np.eye(other.shape[1])
    own = np.einsum("ui,id,ie->ude", seen * weight, other, other, optimize=True)
    return np.asarray(np.linalg.solve(gram + own, ((1.0 + weight) * seen @ other)[:, :, None])[:, :, 0])
