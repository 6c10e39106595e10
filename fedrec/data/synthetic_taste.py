"""Who likes what: one weight per cluster and item, with popularity fitted so that the marginals hold.

A user picks ``n`` items without replacement with weights ``p`` (Plackett-Luce; the same as Gumbel top-k on ``log p``,
Yellott 1977), where ``p(i) ∝ era(i) · Σ_c blend(c) w(c, i)`` and ``w(c, i) ∝ exp(b_i + β_i m_c·q_i)``. The chance that
item ``i`` is among them is close to ``1 - exp(-t p(i))`` with ``t`` such that the chances add up to ``n`` (Rosén 1972);
``b`` is fitted with it. No user × item matrix is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from numba import njit

from fedrec.data.synthetic_config import SyntheticConfig
from fedrec.data.synthetic_items import ERA_APPEAL, Catalogue
from fedrec.data.synthetic_marginals import popularity_targets
from fedrec.data.synthetic_users import Users, make_users
from fedrec.random import normal, permutation, stream, streams

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_ROUNDS = 12
_DECAY = 0.5
_PAIRS = 8_000_000  # user × item pairs per fitting round, at most; memory does not grow with it


@dataclass(frozen=True)
class Taste:
    """Items are in ``order`` (int32[items]: code at each position), sorted by era; era ``e`` holds the positions
    ``starts[e] … starts[e + 1] - 1``. ``weight`` float32[clusters, items] sums to 1 per cluster; ``mass``
    float64[clusters, 5] is its sum per era; ``accept`` float32 and ``alias`` int32[clusters, items] are Walker's alias
    tables, one per cluster and era. ``log_popularity`` float32[items], by code, is the log
    of the expected share of users."""

    order: Int32
    starts: Int64
    weight: Float32
    mass: Float64
    accept: Float32
    alias: Int32
    log_popularity: Float32


@njit(cache=True)
def _expected(
    weight: Float32, starts: Int64, activity: Int64, clusters: Int64, blend: Float64, era: Float64, time: Float64
) -> Float64:
    """Expected interactions per position, float64[items]. ``time`` float64[users] is t, carried between rounds."""
    items = weight.shape[1]
    total = np.zeros(items)
    p = np.empty(items)
    for u in range(activity.size):
        first, second = clusters[u, 0], clusters[u, 1]
        norm = 0.0
        for e in range(starts.size - 1):
            for i in range(starts[e], starts[e + 1]):
                p[i] = era[u, e] * (blend[u, 0] * weight[first, i] + blend[u, 1] * weight[second, i])
                norm += p[i]
        t = time[u]
        if t == 0.0:
            t = float(activity[u])
        for _ in range(30):
            # Newton from below: the count is concave in t, so t grows to the solution.
            count, slope = 0.0, 0.0
            for i in range(items):
                rest = np.exp(-t * p[i] / norm)
                count += 1.0 - rest
                slope += rest * p[i] / norm
            step = (activity[u] - count) / slope
            t = max(t + step, 0.25 * t)
            if abs(activity[u] - count) < 1e-2 * activity[u]:
                break
        time[u] = t
        for i in range(items):
            total[i] += 1.0 - np.exp(-t * p[i] / norm)
    return total


@njit(cache=True)
def _alias_tables(weight: Float32, starts: Int64) -> tuple[Float32, Int32]:
    """Walker's alias tables (Vose 1991) for every row and every range of ``starts``."""
    accept = np.ones(weight.shape, dtype=np.float32)
    alias = np.empty(weight.shape, dtype=np.int32)
    scaled = np.empty(weight.shape[1])
    small = np.empty(weight.shape[1], dtype=np.int32)
    large = np.empty(weight.shape[1], dtype=np.int32)
    for c in range(weight.shape[0]):
        for e in range(starts.size - 1):
            lo, hi = starts[e], starts[e + 1]
            total = 0.0
            for i in range(lo, hi):
                alias[c, i] = i
                total += weight[c, i]
            n_small, n_large = 0, 0
            for i in range(lo, hi):
                scaled[i] = weight[c, i] * (hi - lo) / total
                if scaled[i] < 1.0:
                    small[n_small] = i
                    n_small += 1
                else:
                    large[n_large] = i
                    n_large += 1
            while n_small > 0 and n_large > 0:
                n_small -= 1
                s, g = small[n_small], large[n_large - 1]
                accept[c, s] = scaled[s]
                alias[c, s] = g
                scaled[g] -= 1.0 - scaled[s]
                if scaled[g] < 1.0:
                    n_large -= 1
                    small[n_small] = g
                    n_small += 1
    return accept, alias


def _weights(tilt: Float64, bias: Float64) -> Float32:
    """Softmax over the items of ``tilt + bias``, float32[clusters, items]."""
    score = tilt + bias
    weight = np.exp(score - score.max(axis=1, keepdims=True))
    # A floor keeps every item within reach of float32 alias tables.
    weight = np.maximum(weight / weight.sum(axis=1, keepdims=True), 1e-12)
    result: Float32 = weight.astype(np.float32)
    return result


def make_taste(config: SyntheticConfig, catalogue: Catalogue) -> Taste:
    """Fit the item biases ``b`` to the popularity targets and make the tables users draw from."""
    order = np.argsort(catalogue.era, kind="stable")
    starts = np.searchsorted(catalogue.era[order], np.arange(ERA_APPEAL.size + 1)).astype(np.int64)
    centres = normal(streams(stream(config.seed, "synthetic/clusters"), np.arange(config.clusters)), config.factors)
    # A few directions of taste matter more than the rest, as the leading singular values of real data do.
    scale = np.arange(1, config.factors + 1) ** -_DECAY
    centres *= scale * np.sqrt(config.factors / (scale**2).sum())
    rank = permutation(stream(config.seed, "synthetic/popularity"), config.items)[order]
    # Everybody has seen the hits; what is rare is what tells clusters apart.
    strength = config.beta * (1 + config.niche_strength * (1 - 2 * (rank + 0.5) / config.items))
    tilt = strength * (centres @ catalogue.factors[order].T)

    sample: Users = make_users(config, 0, min(config.users, max(64, _PAIRS // config.items)))
    most = 0.95 * sample.activity.size
    target = popularity_targets(config.items, float(sample.activity.sum()), most)[rank]

    bias = np.log(target)
    time = np.zeros(sample.activity.size)
    for _ in range(_ROUNDS):
        expected = _expected(
            _weights(tilt, bias), starts, sample.activity, sample.clusters, sample.blend, sample.era, time
        )
        odds = np.log(target / (sample.activity.size - target)) - np.log(
            expected / np.maximum(sample.activity.size - expected, 1e-3)
        )
        bias += np.clip(odds, -2, 2)

    weight = _weights(tilt, bias)
    mass = np.stack([weight[:, a:b].sum(axis=1, dtype=np.float64) for a, b in pairwise(starts.tolist())], 1)
    accept, alias = _alias_tables(weight, starts)
    log_popularity = np.empty(config.items, dtype=np.float32)
    log_popularity[order] = np.log(target / sample.activity.size)
    return Taste(order.astype(np.int32), starts, weight, mass, accept, alias, log_popularity)
