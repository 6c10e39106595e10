"""Who or what is forgotten when a request names a fraction: random, core, edge or sensitive.

Core and edge follow CURE4Rec (Chen et al. 2024): the most and the least active users, the most and the least popular
items. Random order and ties are addressed by (seed, request id, subject): a selection depends on nothing but the data
at hand, and a larger fraction of the same request contains a smaller one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fedrec.data.interactions import Interactions, UserItems
from fedrec.errors import DataError
from fedrec.random import bits, stream, streams
from unlearning.requests_values import hint

Policy = Literal["random", "core", "edge", "sensitive"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def choose(counts: Int64, policy: Policy, fraction: float, key: np.uint64) -> Int64:
    """``fraction`` of the subjects (users, or items) with training interactions, int64 codes, ascending.

    ``counts`` int64[n] are each subject's training interactions; those with 0 are not eligible. The number of the
    chosen is rounded to the nearest, so it may be 0. ``sensitive`` chooses at random; its caller masks ``counts``.
    """
    eligible = np.flatnonzero(counts)
    words = bits(streams(key, eligible), 1)[:, 0]
    order = np.lexsort((words, _rank(policy, counts[eligible])))
    return np.sort(eligible[order[: how_many(fraction, eligible.size)]])


def choose_interactions(
    train: UserItems, policy: Policy, fraction: float, key: np.uint64, eligible: Mask | None = None
) -> tuple[Int64, Int64]:
    """``fraction`` of the training interactions (of those that ``eligible``, bool[n], marks): user codes, item codes.

    ``core`` and ``edge`` take half of a user's interactions (rounded down), which ones at random, from the most or the
    least active user on, until there are enough: so a set is spread over such users and empties none of them. Only a
    fraction that this cannot fill takes the other halves too, in the same order.
    """
    user, item = train.users, train.items.astype(np.int64)
    at = np.flatnonzero(eligible) if eligible is not None else np.arange(user.size)
    user, item = user[at], item[at]
    words = bits(streams(key, (user << 32) | item), 1)[:, 0]
    if policy in ("core", "edge"):
        counts = np.bincount(user, minlength=train.n_users).astype(np.int64)
        ties = bits(streams(key, -1 - np.arange(train.n_users)), 1)[:, 0]  # negative: never an interaction's address
        rank = np.empty(train.n_users, dtype=np.int64)
        rank[np.lexsort((ties, _rank(policy, counts)))] = np.arange(train.n_users)
        within = np.lexsort((words, user))
        place = np.empty(user.size, dtype=np.int64)
        place[within] = np.arange(user.size) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.lexsort((words, rank[user], place >= counts[user] // 2))
    else:
        order = np.argsort(words, kind="stable")
    chosen = np.sort(order[: how_many(fraction, user.size)])
    return user[chosen], item[chosen]


def how_many(fraction: float, n: int) -> int:
    """``fraction`` of ``n``, to the nearest whole number, halves up."""
    return min(n, int(np.floor(fraction * n + 0.5)))


def selection_key(seed: int, purpose: str, request_id: str) -> np.uint64:
    """What the random draws of one request are addressed by."""
    digest = hashlib.sha256(request_id.encode()).digest()
    return stream(seed, f"forget {purpose}", int.from_bytes(digest[:8], "little"))


def items_of_genre(data: Interactions, genre: str, where: str) -> Mask:
    """bool[n_items]: the items of one genre. DataError (named ``where``) where the data does not know it."""
    table = data.item_table
    if table is None or "genres" not in table.columns:
        columns = [] if table is None else table.columns
        raise DataError(
            f"{where}: genre={genre}: {data.name} has no genres{_has('items', columns)}; write another policy"
        )
    known = sorted(table["genres"].explode().drop_nulls().unique().to_list())
    if genre not in known:
        raise DataError(f"{where}: genre={genre}: no item of {data.name} has it; {hint(genre, known)}")
    mask: Mask = table["genres"].list.contains(genre).fill_null(False).to_numpy().astype(bool)
    return mask


def users_with(data: Interactions, attribute: Sequence[tuple[str, Sequence[str]]], where: str) -> Mask:
    """bool[n_users]: the users who have one of the values of every attribute. DataError as :func:`items_of_genre`."""
    table = data.user_table
    found = np.ones(data.n_users, dtype=bool)
    for name, values in attribute:
        if table is None or name not in table.columns:
            columns = table.columns if table is not None else []
            near = f"; {hint(name, columns)}" if columns else f"{_has('users', columns)}; write another policy"
            raise DataError(f"{where}: attribute={name}: {data.name} has no such user attribute{near}")
        column = table[name].cast(str)
        known = sorted(column.drop_nulls().unique().to_list())
        for value in values:
            if value not in known:
                raise DataError(
                    f"{where}: attribute.{name}={value}: no user of {data.name} has it; {hint(value, known)}"
                )
        found &= column.is_in(list(values)).fill_null(False).to_numpy().astype(bool)
    return found


def _rank(policy: Policy, counts: Int64) -> Int64:
    """What comes first when sorted ascending."""
    if policy == "core":
        return -counts
    return counts if policy == "edge" else np.zeros_like(counts)


def _has(what: str, columns: Sequence[str]) -> str:
    return f", only {', '.join(columns)}" if columns else f", and nothing else is known of its {what}"
