"""The compiled inner loops of ranking. Ranks are counted, not sorted: one sweep of a row per held-out item.

Ragged tables travel as (indptr int64[rows + 1], items int32[n]). Nothing here allocates per item.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fedrec.data.interactions import Float32, Int32, Int64

Rows = tuple[Int64, Int32]
Floats = npt.NDArray[np.float64]


@njit(cache=True)
def _at_least(row: Float32, bound: np.float32) -> int:
    """How many scores are ≥ ``bound``."""
    count = 0
    for i in range(row.size):
        count += row[i] >= bound
    return count


@njit(cache=True)
def _at_least_of(row: Float32, items: Int32, bound: np.float32) -> int:
    """How many of ``items`` score ≥ ``bound``."""
    count = 0
    for item in items:
        count += row[item] >= bound
    return count


@njit(cache=True)
def _top(row: Float32, ids: Int32, best: Float32) -> None:
    """Fill ``ids`` with the items of the highest scores, best first; equal scores by item number, −inf never."""
    k = ids.size
    filled = 0
    threshold = -np.float32(np.inf)
    for i in range(row.size):
        score = row[i]
        if score > threshold:
            at = filled if filled < k else k - 1
            while at > 0 and best[at - 1] < score:
                best[at] = best[at - 1]
                ids[at] = ids[at - 1]
                at -= 1
            best[at] = score
            ids[at] = i
            if filled < k:
                filled += 1
            if filled == k:
                threshold = best[k - 1]


@njit(cache=True)
def _highest(row: Float32, items: Int32, best: Float32) -> int:
    """The highest scores among ``items``, descending, into ``best``; returns how many (at most ``best.size``)."""
    filled = 0
    for item in items:
        score = row[item]
        if filled == best.size:
            if score <= best[filled - 1]:
                continue
            filled -= 1
        at = filled
        while at > 0 and best[at - 1] < score:
            best[at] = best[at - 1]
            at -= 1
        best[at] = score
        filled += 1
    return filled


@njit(cache=True)
def _score_user(ranks: Int64, relevant: int, ks: Int64, discount: Floats, ideal: Floats, out: Floats) -> None:
    """HR, NDCG, recall and MRR at every k from ascending ``ranks`` (those beyond the largest k may be missing)."""
    for i in range(ks.size):
        k = ks[i]
        hits = 0
        gain = 0.0
        while hits < ranks.size and ranks[hits] <= k:
            gain += discount[ranks[hits] - 1]
            hits += 1
        if hits > 0:
            out[0, i] = 1.0
            out[1, i] = gain / ideal[min(relevant, k) - 1]
            out[2, i] = hits / relevant
            out[3, i] = 1.0 / ranks[0]


@njit(cache=True)
def rank_users(
    users: Int64,
    scores: Float32,
    train: Rows,
    validation: Rows,
    test: Rows,
    validation_negatives: Rows,
    test_negatives: Rows,
    ks: Int64,
    discount: Floats,
    ideal: Floats,
    primary: int,
    histogram_k: int,
    values: Floats,
    ndcg: Floats,
    lists: Int32,
) -> int:
    """Rank every user's held-out items; overwrites ``scores``.

    Args:
        users: int64[B], rows of train, validation and test. scores: float32[B, I].
        validation_negatives, test_negatives: row b belongs to ``users[b]``; an empty row skips the sampled ranking.
        discount: 1/log2(rank + 1) for rank 1 …; ideal: its cumulative sum.
        primary: 0 full, 1 sampled, the ranking whose NDCG at ``histogram_k`` goes to ``ndcg``.
        values: float64[B, part, ranking, metric, k]. ndcg: float64[B, part]. lists: int32[B, part, list_k]; -1 is none.

    Returns:
        -1, or b·I + i of a NaN score.
    """
    n_items = scores.shape[1]
    largest = histogram_k
    for k in ks:
        largest = max(largest, k)
    found = np.empty(largest, dtype=np.int64)
    ordered = np.empty(largest, dtype=np.float32)  # no held-out item beyond the largest cut-off can count
    best = np.empty(lists.shape[2], dtype=np.float32)
    histogram_ks = np.array([histogram_k])
    histogram_values = np.empty((4, 1))
    for b in range(users.size):
        row = scores[b]
        unordered = 0
        for i in range(n_items):
            unordered += row[i] != row[i]
        if unordered > 0:
            for i in range(n_items):
                if row[i] != row[i]:
                    return int(b * n_items + i)
        user = users[b]
        trained = train[1][train[0][user] : train[0][user + 1]]
        first = validation[1][validation[0][user] : validation[0][user + 1]]
        second = test[1][test[0][user] : test[0][user + 1]]
        for part in range(2):
            relevant = first if part == 0 else second
            if relevant.size == 0:
                continue
            table = validation_negatives if part == 0 else test_negatives
            negatives = table[1][table[0][b] : table[0][b + 1]]
            n_ordered = _highest(row, relevant, ordered)
            for ranking in range(2):
                if ranking == 1 and negatives.size == 0:
                    continue
                count = 0
                for j in range(n_ordered):
                    bound = ordered[j]
                    if ranking == 0:
                        above = _at_least(row, bound) - _at_least_of(row, trained, bound)
                        above -= _at_least_of(row, relevant, bound)
                        if part == 1:
                            above -= _at_least_of(row, first, bound)
                    else:
                        above = _at_least_of(row, negatives, bound)
                    rank = 1 + above + j
                    # Ranks ascend with j, and none beyond the largest cut-off counts in any metric.
                    if rank > largest:
                        break
                    found[count] = rank
                    count += 1
                _score_user(found[:count], relevant.size, ks, discount, ideal, values[b, part, ranking])
                if ranking == primary:
                    histogram_values[:] = 0.0
                    _score_user(found[:count], relevant.size, histogram_ks, discount, ideal, histogram_values)
                    ndcg[b, part] = histogram_values[1, 0]
        for item in trained:
            row[item] = -np.inf
        if first.size > 0:
            _top(row, lists[b, 0], best)
        if second.size > 0:
            for item in first:
                row[item] = -np.inf
            _top(row, lists[b, 1], best)
    return -1


@njit(cache=True)
def _insert(items: Int32, start: int, end: int, item: int) -> int:
    """Insert ``item`` into the ascending ``items[start:end]`` unless it is there; returns the new end."""
    at = end
    while at > start and items[at - 1] > item:
        at -= 1
    if at > start and items[at - 1] == item:
        return end
    for back in range(end, at, -1):
        items[back] = items[back - 1]
    items[at] = item
    return end + 1


@njit(cache=True)
def touched_rows(users: Int64, train: Rows, validation: Rows, test: Rows) -> Rows:
    """Per user of ``users``, the union of the three rows, ascending; the training rows come ascending."""
    size = 0
    for user in users:
        size += train[0][user + 1] - train[0][user]
        size += validation[0][user + 1] - validation[0][user]
        size += test[0][user + 1] - test[0][user]
    indptr = np.zeros(users.size + 1, dtype=np.int64)
    items = np.empty(size, dtype=np.int32)
    end = 0
    for b in range(users.size):
        user = users[b]
        start = end
        for at in range(train[0][user], train[0][user + 1]):
            items[end] = train[1][at]
            end += 1
        for at in range(validation[0][user], validation[0][user + 1]):
            end = _insert(items, start, end, validation[1][at])
        for at in range(test[0][user], test[0][user + 1]):
            end = _insert(items, start, end, test[1][at])
        indptr[b + 1] = end
    return indptr, items[:end]
