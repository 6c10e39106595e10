"""Poisson mini-batches of the devices' own interactions, for example-level differential privacy.

Whether an interaction is in a batch, and its negatives, are a function of (seed, round, user, step, item) alone: an
interaction more or less changes no other example. For the same reason negatives come from the whole catalogue, the
user's own items included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from clients.cohort import below32
from fedrec import random
from fedrec.data.interactions import UserItems

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ExampleBatches:
    """The batches of B devices in one round, steps · B of them, many of which may be empty.

    Device b's examples of step s are ``[example_ptr[b·steps + s], example_ptr[b·steps + s + 1])``; example e is
    ``items[e]`` int32[1 + k], the positive first. ``rows[row_ptr[b]:row_ptr[b + 1]]`` are the distinct items of all of
    device b's examples, and ``slot[e]`` says which of them (from 0) the items of an example are.
    """

    steps: int
    example_ptr: Int64
    items: Int32
    row_ptr: Int64
    rows: Int32
    slot: Int32

    @property
    def devices(self) -> int:
        return self.row_ptr.size - 1

    @property
    def owner(self) -> Int64:
        """int64[E]: the device (0…B-1) of each example."""
        per_device = np.diff(self.example_ptr[:: self.steps])
        return np.repeat(np.arange(self.devices, dtype=np.int64), per_device)

    @property
    def step(self) -> Int64:
        """int64[E]: the local step of each example."""
        return np.repeat(np.tile(np.arange(self.steps, dtype=np.int64), self.devices), np.diff(self.example_ptr))


@njit(cache=True)
def _count(
    indptr: Int64, items: Int32, users: Int64, keys: npt.NDArray[np.uint64], steps: int, threshold: int
) -> Int64:
    ptr = np.zeros(users.size * steps + 1, dtype=np.int64)
    for b in range(users.size):
        for s in range(steps):
            key = random.child64(keys[b], np.uint64(s))
            ptr[b * steps + s + 1] = ptr[b * steps + s]
            for at in range(indptr[users[b]], indptr[users[b] + 1]):
                word = random.draw64(random.child64(key, np.uint64(items[at])), np.uint64(0))
                ptr[b * steps + s + 1] += np.int64(word >> np.uint64(11)) < threshold
    return ptr


@njit(cache=True)
def _fill(
    indptr: Int64, items: Int32, users: Int64, keys: npt.NDArray[np.uint64], steps: int, threshold: int,
    n_items: int, out: Int32, slot: Int32, row_ptr: Int64, rows: Int32,
) -> None:  # fmt: skip
    e, filled = 0, 0
    place = np.full(n_items, -1, dtype=np.int32)
    for b in range(users.size):
        for s in range(steps):
            step_key = random.child64(keys[b], np.uint64(s))
            for at in range(indptr[users[b]], indptr[users[b] + 1]):
                key = random.child64(step_key, np.uint64(items[at]))
                if np.int64(random.draw64(key, np.uint64(0)) >> np.uint64(11)) >= threshold:
                    continue
                for t in range(out.shape[1]):
                    item = np.int64(items[at])
                    if t:
                        item = np.int64(below32(random.draw64(key, np.uint64(t)), np.uint64(n_items)))
                    if place[item] < 0:
                        place[item] = filled - row_ptr[b]
                        rows[filled] = item
                        filled += 1
                    out[e, t], slot[e, t] = item, place[item]
                e += 1
        row_ptr[b + 1] = filled
        for at in range(row_ptr[b], filled):
            place[rows[at]] = -1


def draw_batches(
    train: UserItems,
    users: Int64,
    *,
    n_items: int,
    negatives: int,
    seed: int,
    round_number: int,
    sample_rate: float,
    steps: int,
) -> ExampleBatches:
    """The Poisson batches of ``users`` in round ``round_number``: every interaction is in every batch with probability
    ``sample_rate``, independently, with ``negatives`` items drawn uniformly, with replacement, from ``n_items``."""
    keys = random.streams(random.stream(seed, "example_dp", round_number), users)
    threshold = round(sample_rate * 2**53)
    ptr = _count(train.indptr, train.items, users, keys, steps, threshold)
    items = np.empty((int(ptr[-1]), 1 + negatives), dtype=np.int32)
    slot, row_ptr = np.empty_like(items), np.zeros(users.size + 1, dtype=np.int64)
    rows = np.empty(items.size, dtype=np.int32)
    _fill(train.indptr, train.items, users, keys, steps, threshold, n_items, items, slot, row_ptr, rows)
    return ExampleBatches(steps, ptr, items, row_ptr, rows[: row_ptr[-1]].copy(), slot)
