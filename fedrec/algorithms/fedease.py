"""FedEASE: EASE from the sum of the devices' Gram contributions, in one round.

Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019, equation 8. Its only statistic is XᵀX = Σ_u
x_u x_uᵀ, a sum over users, so it federates exactly and under secure aggregation; the query x_u stays on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from scipy.linalg import lapack
from torch import Tensor

from fedrec.algorithms.base import Collected, Problem, StatisticsRecommender, Tensors, TensorSpec
from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError


@dataclass(frozen=True)
class FedEASE(StatisticsRecommender):
    """B = I − P·diag(1/P_jj), P = (XᵀX + λI)⁻¹; score = x_u B.

    ``recency`` τ > 0 weighs the query locally by exp(−age/τ), age in positions from the newest item: no further byte
    leaves the device. ``recency=0`` is plain EASE.
    """

    name = "fedease"

    problem: Problem
    regularization: float = 300.0
    recency: float = 0.0

    def __post_init__(self) -> None:
        if self.regularization <= 0:
            raise ConfigError(f"algorithm.regularization={self.regularization}: the Gram matrix needs a positive ridge")
        if self.recency < 0:
            raise ConfigError(
                f"algorithm.recency={self.recency}: write 0 (plain EASE) or a positive number of positions"
            )

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        return {"weights": TensorSpec((self.problem.n_items, self.problem.n_items))}

    @property
    def statistics(self) -> Mapping[str, TensorSpec]:
        return {"gram": TensorSpec((self.problem.n_items, self.problem.n_items), symmetric=True)}

    @property
    def max_rounds(self) -> int:
        return 1

    def contribute(self, shared: Tensors, history: UserItems, round_index: int) -> Tensors:
        x = self._matrix(history, np.ones(history.items.size, dtype=np.float32))
        return {"gram": torch.from_numpy((x.T @ x).toarray())}

    def solve(self, shared: Tensors, collected: Collected) -> Tensors:
        """float64 inside; counts in the Gram matrix are whole numbers, exact in float32 below 2²⁴."""
        gram = collected.sums["gram"].double().numpy()
        gram[np.diag_indices_from(gram)] += self.regularization
        factor, info = lapack.dpotrf(gram, lower=True, overwrite_a=True)
        if info:
            raise ConfigError("algorithm.regularization: XᵀX + λI is not positive definite; write a larger value")
        lower, _ = lapack.dpotri(factor, lower=True, overwrite_c=True)
        inverse = np.tril(lower) + np.tril(lower, -1).T
        weights = inverse / -np.diag(inverse)
        np.fill_diagonal(weights, 0.0)
        return {"weights": torch.from_numpy(weights.astype(np.float32))}

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        age = np.repeat(history.indptr[1:], history.counts) - 1 - np.arange(history.items.size)
        query = np.exp(-age / self.recency) if self.recency else np.ones(history.items.size)
        weights = params["weights"]
        scores = self._matrix(history, query.astype(np.float32)) @ weights.cpu().numpy()
        return torch.from_numpy(scores).to(weights.device)

    def _matrix(
        self, history: UserItems, values: np.ndarray[tuple[int], np.dtype[np.float32]]
    ) -> scipy.sparse.csr_matrix:
        return scipy.sparse.csr_matrix(
            (values, history.items, history.indptr), shape=(history.n_users, self.problem.n_items)
        )
