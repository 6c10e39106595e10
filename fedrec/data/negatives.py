"""Negative sampling by address: which untouched items a user is trained or ranked against.

The ``r``-th untouched item is found by mapping ``r`` through the user's sorted touched items, so every draw costs one
random word and one binary search, is exactly uniform, and needs no rejection loop however much a user has touched.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit, uint64

from fedrec.data.interactions import Int32, Int64, UserItems
from fedrec.errors import ConfigError
from fedrec.random import U64, draw64

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@njit(uint64(uint64, uint64), cache=True, inline="always")
def _below(word: np.uint64, n: np.uint64) -> np.uint64:
    """``floor(word · n / 2^64)`` for n < 2^32: a uniform integer below ``n`` from one word (bias < n · 2^-64)."""
    return ((word >> _HALF) * n + (((word & _LOW) * n) >> _HALF)) >> _HALF


@njit(cache=True)
def _ascending(indptr: Int64, items: Int32, users: Int64, n_items: int) -> int:
    """Position in ``users`` of the first whose row is not strictly ascending inside ``range(n_items)``; -1 if none."""
    for b in range(users.size):
        previous = -1
        for at in range(indptr[users[b]], indptr[users[b] + 1]):
            if items[at] <= previous or items[at] >= n_items:
                return b
            previous = items[at]
    return -1


@njit(cache=True)
def _sample(
    indptr: Int64, items: Int32, users: Int64, draws: Int64, n_items: int, keys: U64, distinct: int, out: Int32
) -> None:
    taken = np.empty(distinct, dtype=np.int64)  # ranks drawn in the current group, ascending
    written = 0
    for b in range(users.size):
        start = indptr[users[b]]
        touched = indptr[users[b] + 1] - start
        free = n_items - touched
        in_group = 0
        for position in range(draws[b]):
            if in_group == distinct:
                in_group = 0
            word = draw64(keys[b], np.uint64(position))
            rank = np.int64(_below(word, np.uint64(free - in_group)))
            # Map past the ranks that this group already holds, as below past the touched items: uniform over the rest.
            slot, end = 0, in_group
            while slot < end:
                middle = (slot + end) >> 1
                if taken[middle] - middle <= rank:
                    slot = middle + 1
                else:
                    end = middle
            rank += slot
            for back in range(in_group, slot, -1):
                taken[back] = taken[back - 1]
            taken[slot] = rank
            in_group += 1
            # items[j] - j untouched items lie below the j-th touched one, and that never decreases with j.
            low, high = 0, touched
            while low < high:
                middle = (low + high) >> 1
                if items[start + middle] - middle <= rank:
                    low = middle + 1
                else:
                    high = middle
            out[written] = rank + low
            written += 1


def sample_negatives(
    exclude: UserItems,
    users: npt.ArrayLike,
    draws: npt.ArrayLike,
    n_items: int,
    keys: npt.ArrayLike,
    *,
    distinct: int = 1,
) -> Int32:
    """Items drawn uniformly from those that a user did not touch.

    Args:
        exclude: touched items; every row strictly ascending (``UserItems.sorted``, ``Split.negatives_exclude``).
        users: int64[B], rows of ``exclude``; the same user may occur several times.
        draws: int64[B], how many items to draw for each.
        n_items: size of the catalogue, below 2^31.
        keys: uint64[B]; draw ``k`` of user ``b`` is position ``k`` of the stream ``keys[b]`` (``fedrec.random``), so
            it does not depend on who else is in the batch.
        distinct: each consecutive group of so many draws is without replacement inside the group (FedRAP and
            PFedRec draw 4 different negatives for every positive); 1 draws independently.

    Returns:
        int32[sum(draws)], in the order of ``users``.

    Raises:
        ConfigError: a user has fewer untouched items than one group needs.
        ValueError: a row of ``exclude`` is not ascending, or the arrays do not fit together.
    """
    user = np.ascontiguousarray(users, dtype=np.int64).ravel()
    count = np.ascontiguousarray(draws, dtype=np.int64).ravel()
    key = np.ascontiguousarray(keys, dtype=np.uint64).ravel()
    if not user.size == count.size == key.size:
        raise ValueError(f"users, draws and keys differ in length: {user.size}, {count.size}, {key.size}")
    if distinct < 1:
        raise ConfigError(f"distinct negatives per group must be at least 1, got {distinct}")
    if user.size == 0:
        return np.empty(0, dtype=np.int32)
    if user.min() < 0 or user.max() >= exclude.n_users or count.min() < 0:
        raise ValueError("users must be rows of `exclude`, and draws must not be negative")
    bad = int(_ascending(exclude.indptr, exclude.items, user, n_items))
    if bad >= 0:
        raise ValueError(f"excluded items of user {user[bad]} are not strictly ascending in range({n_items})")
    free = n_items - (exclude.indptr[user + 1] - exclude.indptr[user])
    short = np.flatnonzero(free < np.minimum(count, distinct))
    if short.size:
        b = int(short[0])
        raise ConfigError(
            f"user {user[b]} has touched all but {free[b]} of the {n_items} items, too few to draw "
            f"{min(int(count[b]), distinct)} different negatives ({short.size} such user(s)); ask for at most "
            f"{int(free[short].min())} negatives at a time, or filter those users out of the data set"
        )
    out = np.empty(int(count.sum()), dtype=np.int32)
    _sample(exclude.indptr, exclude.items, user, count, n_items, key, distinct, out)
    return out
