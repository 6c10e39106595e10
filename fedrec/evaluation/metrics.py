"""Ranking metrics of one user, one pure function each: the definitions that the fused pass is tested against.

``ranks`` are the 1-based places of a user's relevant items in the ranking, any order, with score ties resolved
pessimistically (``pessimistic_ranks``). All values lie in [0, 1]. A data set's metric is the mean over the users with
at least one relevant item.

Ranking against a few sampled negatives is inconsistent with ranking against all items: it can reverse the order of two
methods (Krichene and Rendle, KDD 2020). It is kept for comparison with papers that report nothing else.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ranks = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
METRICS = ("hr", "ndcg", "recall", "mrr")


def pessimistic_ranks(scores: npt.ArrayLike, relevant: npt.ArrayLike, candidates: npt.ArrayLike) -> Ranks:
    """Ranks of ``relevant`` items among ``candidates`` and themselves, worst case under ties.

    A relevant item's rank is 1 + the number of non-relevant candidates that score at least as much + the number of
    relevant items placed before it (relevant items are ordered by score; equal ones in any order, which changes no
    metric). A scorer that gives every item the same score therefore gets no credit.

    Args:
        scores: float[I]. relevant: int[R] items. candidates: int[C] items; relevant ones among them are ignored.

    Returns:
        int64[R], ascending.
    """
    score = np.asarray(scores)
    wanted = np.asarray(relevant, dtype=np.int64)
    others = score[np.setdiff1d(np.asarray(candidates, dtype=np.int64), wanted)]
    ordered = np.sort(score[wanted])[::-1]
    return np.array([1 + int((others >= s).sum()) + j for j, s in enumerate(ordered)], dtype=np.int64)


def hit_rate(ranks: Ranks, k: int) -> float:
    """1 if a relevant item is among the first k, else 0 (Deshpande and Karypis, TOIS 2004, "hit rate")."""
    return float((ranks <= k).any())


def ndcg(ranks: Ranks, k: int) -> float:
    """Normalised discounted cumulative gain with binary relevance (Järvelin and Kekäläinen, TOIS 2002).

    DCG@k = Σ_{rank ≤ k} 1/log2(rank + 1), divided by the DCG@k of the ideal ranking of the R relevant items.
    """
    gain = (1.0 / np.log2(ranks[ranks <= k] + 1.0)).sum()
    ideal = (1.0 / np.log2(np.arange(1, min(ranks.size, k) + 1) + 1.0)).sum()
    return float(gain / ideal)


def recall(ranks: Ranks, k: int) -> float:
    """Share of the relevant items that are among the first k: |{rank ≤ k}| / R. With R = 1 it equals the hit rate."""
    return float((ranks <= k).sum() / ranks.size)


def reciprocal_rank(ranks: Ranks, k: int) -> float:
    """1 / rank of the first relevant item if that is at most k, else 0 (Voorhees, TREC-8 1999); its mean is MRR@k."""
    first = int(ranks.min())
    return 1.0 / first if first <= k else 0.0


def coverage(recommended: npt.ArrayLike) -> float:
    """Catalogue coverage: share of the items recommended to at least one user (Ge et al., RecSys 2010).

    ``recommended`` int64[I]: how often each item of the catalogue was recommended.
    """
    return float((np.asarray(recommended) > 0).mean())


def average_recommendation_popularity(recommended: npt.ArrayLike, popularity: npt.ArrayLike) -> float:
    """ARP: mean number of training interactions of a recommended item (Yin et al., PVLDB 5(9) 2012).

    Σ_i recommended[i]·popularity[i] / Σ_i recommended[i]; in interactions, not normalised by the catalogue. The
    published form averages within each user's list first, which is the same when all lists are equally long.
    """
    counts = np.asarray(recommended, dtype=np.float64)
    return float(counts @ np.asarray(popularity, dtype=np.float64) / counts.sum())
