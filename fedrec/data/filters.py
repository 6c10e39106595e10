"""Leaves out ratings below a threshold, and users and items with too few interactions."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import polars as pl

from fedrec.data.interactions import Interactions
from fedrec.errors import ConfigError

RULES = ("iterative", "once")


def filter_interactions(
    interactions: Interactions,
    *,
    min_user_interactions: int = 0,
    min_item_interactions: int = 0,
    min_rating: float | None = None,
    rule: str = "iterative",
) -> Interactions:
    """The interactions left by the thresholds, with codes without gaps (their order is kept).

    ``min_rating`` acts first: rows rated below it are not interactions. Then ``rule="iterative"`` removes users and
    items below their thresholds until none is left (the (k, k')-core); ``once`` removes users by their counts in the
    whole data, then items by their counts in what is left, and stops, so that some users may end below the threshold.
    With a threshold for users alone the two agree: FedRAP's "at least 10" on Amazon Instant Video is
    ``min_user_interactions=10``.

    Raises:
        ConfigError: a threshold on ratings where the data has none, or an unknown rule.
        DataError: nothing is left.
    """
    if rule not in RULES:
        raise ConfigError(f"dataset.filter={rule} is not one of {', '.join(RULES)}")
    keep = np.ones(len(interactions), dtype=np.bool_)
    if min_rating is not None:
        if interactions.rating is None:
            raise ConfigError(f"dataset.min_rating={min_rating}, but {interactions.name} has no ratings; write null")
        keep &= interactions.rating >= min_rating
    if min_user_interactions > 1 or min_item_interactions > 1:
        keep = _core(interactions, keep, min_user_interactions, min_item_interactions, rule == "once")
    return interactions if keep.all() else select(interactions, keep)


def _core(
    data: Interactions, keep: npt.NDArray[np.bool_], min_user: int, min_item: int, once: bool
) -> npt.NDArray[np.bool_]:
    keep = keep.copy()
    while True:
        before = int(keep.sum())
        keep &= np.bincount(data.user[keep], minlength=data.n_users)[data.user] >= min_user
        keep &= np.bincount(data.item[keep], minlength=data.n_items)[data.item] >= min_item
        if once or int(keep.sum()) == before:
            return keep


def select(interactions: Interactions, keep: npt.NDArray[np.bool_]) -> Interactions:
    """The rows where ``keep`` (bool[n]) is true; users and items without rows leave the vocabularies and tables."""

    def compact(codes: npt.NDArray[np.int32], size: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        used = np.bincount(codes[keep], minlength=size) > 0
        return (np.cumsum(used) - 1).astype(np.int32)[codes[keep]], np.flatnonzero(used)

    def rows(table: pl.DataFrame | None, kept: npt.NDArray[np.int64]) -> pl.DataFrame | None:
        return None if table is None else table[kept]

    user, users = compact(interactions.user, interactions.n_users)
    item, items = compact(interactions.item, interactions.n_items)
    return dataclasses.replace(
        interactions,
        user=user,
        item=item,
        user_ids=[interactions.user_ids[code] for code in users],
        item_ids=[interactions.item_ids[code] for code in items],
        timestamp=None if interactions.timestamp is None else interactions.timestamp[keep],
        rating=None if interactions.rating is None else interactions.rating[keep],
        fold=None if interactions.fold is None else interactions.fold[keep],
        item_table=rows(interactions.item_table, items),
        user_table=rows(interactions.user_table, users),
    )


def without_users(interactions: Interactions, users: npt.NDArray[np.int64]) -> Interactions:
    """The data of all other users. Items keep their codes, also those that only ``users`` interacted with."""
    stays = np.ones(interactions.n_users, dtype=np.bool_)
    stays[users] = False
    keep, kept = stays[interactions.user], np.flatnonzero(stays).tolist()
    table = interactions.user_table
    return dataclasses.replace(
        interactions,
        user=(np.cumsum(stays) - 1).astype(np.int32)[interactions.user[keep]],
        item=interactions.item[keep],
        user_ids=[interactions.user_ids[code] for code in kept],
        timestamp=None if interactions.timestamp is None else interactions.timestamp[keep],
        rating=None if interactions.rating is None else interactions.rating[keep],
        fold=None if interactions.fold is None else interactions.fold[keep],
        user_table=None if table is None else table[kept],
    )
