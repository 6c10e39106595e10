"""AUCs of (user, item) pairs: their placements, and how well a difference between two models' AUCs is known.

DeLong, DeLong & Clarke-Pearson (Biometrics 1988) for two correlated areas. The scores of one user are not independent,
nor are those of one item: clusters as in Obuchowski, "Nonparametric analysis of clustered ROC curve data" (Biometrics
1997), in two ways at once as in Cameron, Gelbach & Miller, "Robust inference with multiway clustering" (JBES 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


class Group(NamedTuple):
    """Scores float[n], and the user and the item of each, int64[n]."""

    scores: npt.NDArray[np.floating]
    users: Int64
    items: Int64


@dataclass(frozen=True)
class Evidence:
    """An AUC, taken apart: ``above`` float64[p] is the share of the negatives that each positive beats (ties one half),
    ``below`` float64[n] the share of the positives that beat each negative, ``weight`` float64[n] what each negative
    counts (sums to 1; positives count 1/p each), ``users`` and ``items`` int64[p + n] whose scores these are."""

    auc: float
    above: Float64
    below: Float64
    weight: Float64
    users: Int64
    items: Int64

    @property
    def smaller(self) -> int:
        """The size of the smaller group."""
        return min(self.above.size, self.below.size)


def evidence(folds: Sequence[tuple[Group, Group]]) -> Evidence:
    """The AUC of (positives, negatives), the mean over ``folds`` by their number of positives.

    A fold in which either group is empty says nothing and is left out; NaN when no fold is left.
    """
    told = [(positive, negative) for positive, negative in folds if positive.users.size and negative.users.size]
    total = sum(positive.users.size for positive, _ in told)
    if not total:
        none, nobody = np.zeros(0), np.zeros(0, dtype=np.int64)
        return Evidence(math.nan, none, none, none, nobody, nobody)
    above, below, weight = [], [], []
    for positive, negative in told:
        p, n = positive.users.size, negative.users.size
        ranks = rankdata(np.concatenate([positive.scores, negative.scores]))
        above.append((ranks[:p] - rankdata(positive.scores)) / n)
        below.append(1.0 - (ranks[p:] - rankdata(negative.scores)) / p)
        weight.append(np.full(n, p / total / n))
    groups = [positive for positive, _ in told] + [negative for _, negative in told]
    beats = np.concatenate(above)
    return Evidence(
        float(beats.mean()),
        beats,
        np.concatenate(below),
        np.concatenate(weight),
        np.concatenate([group.users for group in groups]),
        np.concatenate([group.items for group in groups]),
    )


def difference_error(found: Evidence, others: Sequence[Evidence]) -> float:
    """The standard error of ``found``'s AUC less the mean AUC of ``others``, all on the same pairs.

    It is the sampling error of a paired difference: what all models find easy or hard cancels. NaN when a group has
    fewer than two scores, or nothing to compare with.
    """
    if not others or found.smaller < 2 or any(o.above.shape != found.above.shape for o in others):
        return math.nan
    above = found.above - np.mean([o.above for o in others], axis=0)
    below = found.below - np.mean([o.below for o in others], axis=0)
    mean = above.mean()
    influence = np.concatenate([(above - mean) / above.size, (below - mean) * found.weight])
    single = _variance(influence, np.arange(influence.size))
    # Of very few clusters the spread between them is hardly known; the single scores then say at least how much it is.
    return math.sqrt(max(_variance(influence, found.users) + _variance(influence, found.items) - single, single))


def _variance(influence: Float64, cluster: Int64) -> float:
    """Of the sum of ``influence``, when only different clusters are independent; 0 of a single cluster."""
    _, label, counts = np.unique(cluster, return_inverse=True, return_counts=True)
    if counts.size < 2:
        return 0.0
    sums = np.bincount(label, weights=influence)
    return float((sums**2).sum()) * counts.size / (counts.size - 1)
