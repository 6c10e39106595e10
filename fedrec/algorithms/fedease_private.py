"""Private FedEASE: an item-item model from two noisy sums, the strongest user-level private method that we know of.

Every device answers twice, each time with statistics of L2 norm at most 1, so that Gaussian noise on both sums gives
user-level differential privacy (Dwork & Roth 2014, appendix A; the exact curve is Balle & Wang, ICML 2018):

1. *Popularity*: x_u / max(√n_u, √50). The server keeps the m items of the largest noisy sums; noise on an item-item
   matrix grows with m, and a rare item's row would be nothing else.
2. *One Gram matrix* of the kept items, K_u / ‖K_u‖_F, K_u[a, b] = γ^|pos_a − pos_b|, pos an item's position among the
   user's kept items. Bounding a device by scaling its whole matrix, rather than by dropping items, keeps all pairs;
   the decay γ spends the bounded norm on pairs that were chosen close together (γ = 1: order-free).

The server then removes the noise that it can see in the spectrum and solves EASE (Steck, WWW 2019, equation 8). A
symmetric noise of off-diagonal variance σ²/2 has its spectrum within the edge σ√(2m) (Wigner's semicircle); what stands
out is shrunk to √(w² − edge²), optimal in Frobenius norm (as singular values of a square matrix are: Gavish & Donoho,
IEEE Trans. Inf. Theory 63(4), 2017). That only reads noisy sums: post-processing, free of further privacy cost.
The query, the user's own history, never leaves the device and needs no noise: what is guaranteed is *joint*
differential privacy (Kearns et al. 2014), against everybody but the user who gets the recommendations.

The rules behind settings of 0 read public numbers only (users, items, μ). They and the defaults were found by measuring
on MovieLens-100K and MovieLens-1M; what that choice reveals of these two data sets, no run's epsilon covers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np
import numpy.typing as npt
import scipy.linalg
import scipy.sparse
import torch
from numba import njit
from torch import Tensor

from fedrec.algorithms.base import Collected, Problem, StatisticsRecommender, Tensors, TensorSpec
from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

_SHORT = 50.0  # histories shorter than this weigh the same per item in the popularity
# Statistics are rounded towards zero to multiples of 2⁻¹⁴: a norm can only shrink, and float32 sums below 1024, so all
# but extreme ones, are exact: the same for any grouping of the devices, and apart by exactly what one device adds.
_GRID = 2.0**14


@dataclass(frozen=True)
class PrivateFedEASE(StatisticsRecommender):
    """Score = q_u B over the kept items; all others rank below every kept one, by noisy popularity.

    Attributes:
        popularity_share: the first round's share of the budget (in μ²), 0 < share < 1; 0: 0.1 where μ < 0.8 (about
            epsilon 2), else 0.05.
        top_items: m; 0: :func:`items_to_keep`.
        decay: γ in (0, 1]; 1 is order-free.
        recency: τ of the local query exp(−age/τ), age in positions among the kept items from the newest one; 0: an
            even query.
        regularization: the ridge λ in multiples of the noise's spectral edge plus the Gram matrix's mean diagonal.
        solver: ``ease``, or ``low_rank``: ridge regression on the directions that stand out of the noise.

    Raises:
        ConfigError: a setting outside its range.
    """

    name = "fedease_private"
    sensitivity: ClassVar[float | None] = 1.0

    problem: Problem
    popularity_share: float = 0.0
    top_items: int = 0
    decay: float = 0.9
    recency: float = 3.0
    regularization: float = 2.0
    solver: Literal["ease", "low_rank"] = "ease"

    def __post_init__(self) -> None:
        n_items = self.problem.n_items
        if not 0.0 <= self.popularity_share < 1.0:
            raise ConfigError(
                f"algorithm.popularity_share={self.popularity_share}: write a share of the budget between 0 and 1, "
                "or 0 (chosen by rule)"
            )
        if isinstance(self.top_items, bool) or not isinstance(self.top_items, int) or self.top_items < 0:
            raise ConfigError(
                f"algorithm.top_items={self.top_items!r}: write how many items to keep, or 0 (chosen by rule)"
            )
        if self.top_items > n_items:
            raise ConfigError(
                f"algorithm.top_items={self.top_items}: the catalogue has {n_items} items; write at most that, or 0 "
                "(chosen by rule)"
            )
        if not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"algorithm.decay={self.decay}: write 1 (order-free) or a number between 0 and 1")
        if not 0.0 <= self.recency < math.inf:
            raise ConfigError(f"algorithm.recency={self.recency}: write 0 (an even query) or a number of positions")
        if not 0.0 < self.regularization < math.inf:
            raise ConfigError(f"algorithm.regularization={self.regularization}: write a positive number, for example 2")
        if self.solver not in ("ease", "low_rank"):
            raise ConfigError(f"algorithm.solver={self.solver!r}: write ease or low_rank")

    # -- the seam -------------------------------------------------------------------------------------------------

    @property
    def kept_items(self) -> int:
        """m, the number of items that the second round is about."""
        problem = self.problem
        return self.top_items or items_to_keep(problem.privacy_mu, problem.n_users, problem.n_items)

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        """``popularity``: the noisy sum; ``kept``: the items of the weights' rows, most popular first."""
        m = self.kept_items
        return {
            "popularity": TensorSpec((self.problem.n_items,)),
            "kept": TensorSpec((m,), value=torch.arange(m, dtype=torch.float32)),
            "weights": TensorSpec((m, m)),
        }

    @property
    def statistics(self) -> Mapping[str, TensorSpec]:
        m = self.kept_items
        return {"popularity": TensorSpec((self.problem.n_items,)), "gram": TensorSpec((m, m), symmetric=True)}

    def statistics_in(self, round_index: int) -> Mapping[str, TensorSpec]:
        name = ("popularity", "gram")[round_index]
        return {name: self.statistics[name]}

    @property
    def max_rounds(self) -> int:
        return 2

    @property
    def budget_shares(self) -> tuple[float, ...]:
        share = self.popularity_share or (0.1 if self.problem.privacy_mu < 0.8 else 0.05)
        return share, 1.0 - share

    def contribute(self, shared: Tensors, history: UserItems, round_index: int) -> Tensors:
        """The sums over these devices, float64; an item that a history names twice counts once, at its newest place."""
        n_items = self.problem.n_items
        if round_index == 0:
            return {"popularity": torch.from_numpy(_popularity(history.indptr, history.items, n_items))}
        place = _places(shared["kept"], n_items)
        reach = max(int(history.counts.max(initial=1)) - 1, 0)
        if self.decay < 1.0:
            # Pairs further apart would be rounded to nothing: neither uploaded nor counted in the norm.
            reach = min(reach, math.ceil(-math.log(_GRID) / math.log(self.decay)))
        powers = self.decay ** np.arange(reach + 1, dtype=np.float64)
        return {"gram": torch.from_numpy(_gram(history.indptr, history.items, place, self.kept_items, powers))}

    def solve(self, shared: Tensors, collected: Collected) -> Tensors:
        """Round 1: the kept items. Round 2: their weights, float64 inside."""
        if collected.round_index == 0:
            popularity = collected.sums["popularity"]
            order = np.argsort(-popularity.double().numpy(), kind="stable")
            kept = torch.from_numpy(order[: self.kept_items].astype(np.float32))
            return {**shared, "popularity": popularity.float(), "kept": kept}
        gram = collected.sums["gram"].double().numpy()
        weights = item_weights(gram, collected.noise, self.regularization, ease=self.solver == "ease")
        return {**shared, "weights": torch.from_numpy(weights.astype(np.float32))}

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        """A user without kept items, and everybody before round 2, gets the noisy popularity."""
        n_items, device = self.problem.n_items, params["weights"].device
        kept = params["kept"].cpu().numpy().astype(np.int64)
        popularity = params["popularity"].cpu().numpy().astype(np.float32)
        place = _places(params["kept"], n_items)
        found = self._query(history, place) @ params["weights"].cpu().numpy()
        empty = ~found.any(axis=1)
        found[empty] = popularity[kept]
        scores = np.empty((history.n_users, n_items), dtype=np.float32)
        scores[:, kept] = found
        order = np.argsort(-popularity, kind="stable")
        rest = order[place[order] < 0]
        # Steps of the row's own size: they stay apart in float32, whatever the weights' scale.
        step = np.maximum(np.abs(found).max(axis=1, keepdims=True), np.float32(1e-30)) / np.float32(n_items)
        scores[:, rest] = found.min(axis=1, keepdims=True) - step * np.arange(1, rest.size + 1, dtype=np.float32)
        return torch.from_numpy(scores).to(device)

    def _query(self, history: UserItems, place: Int64) -> scipy.sparse.csr_matrix:
        """float32[users, m] over the kept items of the histories."""
        kept = place[history.items] >= 0
        before = np.concatenate(([0], np.cumsum(kept)))
        ends = before[history.indptr[1:]]
        indptr = before[history.indptr]
        columns = place[history.items[kept]]
        age = np.repeat(ends, np.diff(indptr)) - 1 - np.arange(columns.size)
        values = np.exp(-age / self.recency) if self.recency else np.ones(columns.size)
        shape = (history.n_users, self.kept_items)
        return scipy.sparse.csr_matrix((values.astype(np.float32), columns, indptr), shape=shape)


def items_to_keep(mu: float, n_users: int, n_items: int) -> int:
    """How many items a private Gram matrix should be about, from public numbers: 38 · N^(1/3) · √μ, all without noise.

    An item's co-occurrence counts grow with the users, the noise's spectral edge with √m/μ. Found by measuring on
    MovieLens-100K and MovieLens-1M at epsilon 1 to 16, where halving or doubling it costs little.
    """
    if math.isinf(mu):
        return n_items
    return min(n_items, max(1, round(38.0 * math.cbrt(n_users) * math.sqrt(mu))))


def item_weights(gram: Float64, noise: float, regularization: float, *, ease: bool = True) -> Float64:
    """Item-item weights B, float64[m, m], from a symmetric Gram matrix of noise as ``Collected.noise`` describes.

    With L = G(G + λI)⁻¹ of the denoised G (``ease=False``), EASE's −P_ij / P_jj of P = (G + λI)⁻¹ is L_ij / (1 − L_jj)
    off the diagonal, 0 on it. λ = ``regularization`` · (edge + mean diagonal of G).
    """
    edge = noise * math.sqrt(2.0 * len(gram))
    ridge = regularization * (edge + max(float(np.trace(gram)) / len(gram), 0.0))
    if ridge == 0.0:  # nobody contributed
        return np.zeros_like(gram)
    if noise > 0.0:
        values, vectors = scipy.linalg.eigh(gram)
        out = values > edge
        kept = np.sqrt(values[out] ** 2 - edge**2)
        weights = (vectors[:, out] * (kept / (kept + ridge))) @ vectors[:, out].T
    else:
        system = gram + ridge * np.eye(len(gram))
        weights = np.eye(len(gram)) - ridge * scipy.linalg.inv(system)
    if ease:
        weights = weights / (1.0 - np.diag(weights))
        np.fill_diagonal(weights, 0.0)
    return cast(Float64, weights)


def _places(kept: Tensor, n_items: int) -> Int64:
    """int64[n_items]: where an item stands among the kept ones, −1 for the others."""
    place = np.full(n_items, -1, dtype=np.int64)
    items = kept.cpu().numpy().astype(np.int64)
    place[items] = np.arange(items.size)
    return place


@njit(cache=True)
def _popularity(indptr: Int64, items: Int32, n_items: int) -> Float64:
    """float64[n_items]: the sum of x_u / max(√n_u, √50), n_u the user's different items."""
    total = np.zeros(n_items)
    last = np.full(n_items, -1, dtype=np.int64)
    for user in range(indptr.size - 1):
        count = 0
        for at in range(indptr[user], indptr[user + 1]):
            if last[items[at]] != user:
                last[items[at]] = user
                count += 1
        value = math.floor(_GRID / math.sqrt(max(float(count), _SHORT))) / _GRID
        for at in range(indptr[user], indptr[user + 1]):
            if last[items[at]] == user:
                last[items[at]] = -1
                total[items[at]] += value
    return total


@njit(cache=True)
def _gram(indptr: Int64, items: Int32, place: Int64, size: int, powers: Float64) -> Float64:
    """float64[size, size]: the sum of K_u / ‖K_u‖_F; ``powers[d]`` is what a pair d positions apart weighs.

    Entries of one distance are equal, so a user's norm and rounded entries are one short table: ‖K‖² = n powers[0]² +
    2 Σ_d (n − d) powers[d]² over the n kept items.
    """
    total = np.zeros((size, size))
    last = np.full(size, -1, dtype=np.int64)
    row = np.empty(items.size, dtype=np.int64)
    entry = np.empty(powers.size)
    for user in range(indptr.size - 1):
        n = 0  # the user's different kept items, newest first
        for at in range(indptr[user + 1] - 1, indptr[user] - 1, -1):
            a = place[items[at]]
            if a >= 0 and last[a] != user:
                last[a] = user
                row[n] = a
                n += 1
        reach = min(n, powers.size)
        squares = 0.0
        for d in range(reach):
            squares += (n - d) * powers[d] ** 2 * (1.0 if d == 0 else 2.0)
        for d in range(reach):
            entry[d] = math.floor(_GRID * (powers[d] / math.sqrt(squares))) / _GRID
        for i in range(n):
            a = row[i]
            for d in range(min(reach, n - i)):
                b = row[i + d]
                total[min(a, b), max(a, b)] += entry[d]
    for a in range(size):  # pairs were counted in one triangle
        for b in range(a):
            total[a, b] = total[b, a]
    return total
