"""The Poisson mini-batches of a silo, and the negatives of their examples.

Whether an interaction is in a batch, and its negatives, are functions of (seed, round, step, user, item) alone: an
interaction more or less changes no other example.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

from clients.cohort import below32
from fedrec import random
from fedrec.data.interactions import UserItems

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SiloBatches:
    """The Poisson batches of one silo and round: step s's interactions are ``chosen[ptr[s]:ptr[s + 1]]``, positions in
    the silo's rows, ascending."""

    ptr: Int64
    chosen: Int64


@njit(cache=True)
def _appearances(
    indptr: Int64, items: npt.NDArray[np.int32], first_user: int, n_items: int, key: np.uint64, rate: float, steps: int,
    fill: bool, place: Int64, out: Int64,
) -> None:  # fmt: skip
    """Count, per step, the interactions in its batch (``place[step + 1]``); or ``fill`` them in from ``place[step]``.

    The gap between two batches that an interaction is in is geometric, so an interaction costs one draw and one more
    for each batch that it is in, not one for every step.
    """
    log_absent = np.log1p(-rate) if rate < 1.0 else -np.inf
    for user in range(indptr.size - 1):
        for at in range(indptr[user], indptr[user + 1]):
            own = random.child64(key, np.uint64((first_user + user) * n_items + items[at]))
            step, position = -1, 0
            while True:
                word = random.draw64(own, np.uint64(position))
                uniform = (np.float64(word >> np.uint64(12)) + 0.5) * 2.0**-52
                gap = np.floor(np.log(uniform) / log_absent)
                if gap >= steps - 1 - step:
                    break
                step += 1 + int(gap)
                position += 1
                if fill:
                    out[place[step]] = at
                    place[step] += 1
                else:
                    place[step + 1] += 1


def draw_silo_batches(
    rows: UserItems, first_user: int, *, n_items: int, seed: int, round_number: int, sample_rate: float, steps: int
) -> SiloBatches:
    """Every interaction is in every batch with probability ``sample_rate``, independently.

    ``rows`` are the items of the silo's users, the first of which is user ``first_user`` of the data set.
    """
    key = random.stream(seed, "silo batches", round_number)
    place, chosen = np.zeros(steps + 1, dtype=np.int64), np.empty(0, dtype=np.int64)
    arguments = rows.indptr, rows.items, first_user, n_items, key, sample_rate, steps
    _appearances(*arguments, False, place, chosen)
    ptr = np.cumsum(place)
    chosen = np.empty(int(ptr[-1]), dtype=np.int64)
    _appearances(*arguments, True, ptr.copy(), chosen)
    return SiloBatches(ptr, chosen)


@njit(cache=True)
def _negatives(key: np.uint64, users: Int64, n_items: int, items: Int64) -> None:
    for e in range(users.size):
        own = random.child64(key, np.uint64(users[e] * n_items + items[e, 0]))
        for k in range(1, items.shape[1]):
            items[e, k] = below32(random.draw64(own, np.uint64(k - 1)), np.uint64(n_items))


def examples_of(
    users: Int64, positives: Int64, *, n_items: int, negatives: int, seed: int, round_number: int, step: int
) -> Tensor:
    """int64[E, 1 + negatives]: each positive and its negatives, independent and uniform over the whole catalogue.

    Neither the user's other items are left out nor repetitions: either would make an example depend on more than
    itself.
    """
    items = np.empty((positives.size, 1 + negatives), dtype=np.int64)
    items[:, 0] = positives
    _negatives(random.stream(seed, "silo negatives", round_number, step), users, n_items, items)
    return torch.from_numpy(items)
