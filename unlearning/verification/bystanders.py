"""Bystanders: retained users whose recommendations rest on the same taste as what was forgotten."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse

from fedrec import random
from fedrec.data.interactions import UserItems
from unlearning.forget import ForgetSet

Int64 = npt.NDArray[np.int64]
_MOST_AFFECTED = 500  # affected users to whom everybody is compared, an addressed sample where there are more


def choose_bystanders(
    train: UserItems, n_items: int, forget: ForgetSet, staying: Int64, share: float, seed: int
) -> Int64:
    """int64, ascending: of withdrawn items the retained users who had one; else of the users who stay and asked for
    nothing, the ``share`` most similar to any who did (Jaccard similarity of training histories; ties by user code).

    Users with no history in common with the affected ones are never bystanders.
    """
    of_items = np.isin(forget.pairs.items, forget.items)
    had = np.intersect1d(np.unique(forget.pairs.users[of_items]), staying)
    asked = np.unique(np.concatenate([forget.users, forget.pairs.users[~of_items]]))
    asked = asked[train.counts[asked] > 0]
    others = np.setdiff1d(staying, forget.affected)
    wanted = round(share * staying.size)
    if not asked.size or not others.size or not wanted:
        return had
    if asked.size > _MOST_AFFECTED:
        key = random.stream(seed, "bystanders")
        asked = asked[random.sample_without_replacement(key, asked.size, _MOST_AFFECTED)]
    similarity = _most_similar(train.take(others), train.take(asked), n_items)
    order = np.lexsort((others, -similarity))[:wanted]
    return np.union1d(had, others[order[similarity[order] > 0.0]])


def _most_similar(histories: UserItems, to: UserItems, n_items: int) -> npt.NDArray[np.float64]:
    """float64[users]: the largest Jaccard similarity of each of ``histories`` to any of ``to``."""
    rows = _matrix(to, n_items).T.tocsr()
    best = np.zeros(histories.n_users)
    block = max(1, 4_000_000 // max(to.n_users, 1))
    for start in range(0, histories.n_users, block):
        part = np.arange(start, min(start + block, histories.n_users))
        mine = histories.take(part)
        common = (_matrix(mine, n_items) @ rows).toarray()
        either = mine.counts[:, None] + to.counts[None, :] - common
        best[part] = (common / np.maximum(either, 1.0)).max(axis=1)
    return best


def _matrix(table: UserItems, n_items: int) -> scipy.sparse.csr_matrix:
    ones = np.ones(table.items.size, dtype=np.float32)
    return scipy.sparse.csr_matrix((ones, table.items, table.indptr), shape=(table.n_users, n_items))
