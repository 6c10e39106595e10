"""The one form in which data travels: interactions, and ragged rows of items per user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import polars as pl

from fedrec.errors import DataError

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class UserItems:
    """One ragged row of items per user (CSR without values).

    ``indptr`` int64[users + 1]; ``items`` int32[n], row ``u`` is ``items[indptr[u]:indptr[u + 1]]``, oldest first
    unless the maker says otherwise. A user without items has an empty row.
    """

    indptr: Int64
    items: Int32

    def __post_init__(self) -> None:
        if self.indptr.dtype != np.int64 or self.items.dtype != np.int32:
            raise TypeError(
                f"UserItems needs int64 indptr and int32 items, got {self.indptr.dtype}, {self.items.dtype}"
            )
        if self.indptr.size == 0 or self.indptr[0] != 0 or self.indptr[-1] != self.items.size:
            raise ValueError("UserItems.indptr must start at 0 and end at len(items)")

    @classmethod
    def from_pairs(cls, users: npt.ArrayLike, items: npt.ArrayLike, n_users: int) -> UserItems:
        """Rows from parallel arrays; the order of a user's items is kept."""
        user = np.asarray(users, dtype=np.int64)
        order = np.argsort(user, kind="stable")
        indptr = np.zeros(n_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(user, minlength=n_users), out=indptr[1:])
        return cls(indptr, np.ascontiguousarray(np.asarray(items, dtype=np.int32)[order]))

    @property
    def n_users(self) -> int:
        return self.indptr.size - 1

    @property
    def counts(self) -> Int64:
        """int64[users]: items per user."""
        return np.diff(self.indptr)

    @property
    def users(self) -> Int64:
        """int64[n]: the user of every entry of ``items``."""
        return np.repeat(np.arange(self.n_users, dtype=np.int64), self.counts)

    def row(self, user: int) -> Int32:
        return self.items[self.indptr[user] : self.indptr[user + 1]]

    def take(self, users: npt.ArrayLike) -> UserItems:
        """The rows of ``users``, in that order, as a new ragged table."""
        user = np.asarray(users, dtype=np.int64)
        counts = self.indptr[user + 1] - self.indptr[user]
        indptr = np.zeros(user.size + 1, dtype=np.int64)
        np.cumsum(counts, out=indptr[1:])
        within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], counts)
        return UserItems(indptr, np.ascontiguousarray(self.items[np.repeat(self.indptr[user], counts) + within]))

    @cached_property
    def sorted(self) -> UserItems:
        """The same rows with ascending item numbers, as membership tests and complement sampling need them."""
        order = np.lexsort((self.items, self.users))
        return UserItems(self.indptr, np.ascontiguousarray(self.items[order]))

    def union(self, *others: UserItems) -> UserItems:
        """Row-wise concatenation (this table's items first)."""
        tables = (self, *others)
        return UserItems.from_pairs(
            np.concatenate([t.users for t in tables]), np.concatenate([t.items for t in tables]), self.n_users
        )


@dataclass(frozen=True)
class Interactions:
    """Who interacted with what, when.

    ``user`` int32[n] and ``item`` int32[n] are dense codes, any of ``range(users)`` and ``range(items)``; ``timestamp``
    int64[n] in the source's unit, or None; ``rating`` float32[n], or None; ``fold`` int8[n], for data that came split,
    says 0 train, 1 validation, 2 test. Rows are sorted by (user, timestamp, original row order), and a (user, item)
    pair occurs once. ``user_ids`` and ``item_ids`` are the source's ids by code. ``item_table`` and
    ``user_table``, where the source has them, hold one row per code, in code order: ``title`` (str), ``genres``
    (list of str), ``year`` for items; ``gender``, ``age``, ``occupation`` and the like for users.
    """

    name: str
    user: Int32
    item: Int32
    user_ids: Sequence[str]
    item_ids: Sequence[str]
    timestamp: Int64 | None = None
    rating: Float32 | None = None
    fold: npt.NDArray[np.int8] | None = None
    item_table: pl.DataFrame | None = None
    user_table: pl.DataFrame | None = None
    sha256: str = ""
    licence: str = ""
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        n = self.user.size
        if n == 0:
            raise DataError(f"{self.name}: no interactions left; check the file and the minimum-interaction filters")
        for label, column in (
            ("item", self.item),
            ("timestamp", self.timestamp),
            ("rating", self.rating),
            ("fold", self.fold),
        ):
            if column is not None and column.shape != (n,):
                raise ValueError(f"{self.name}: column {label} has shape {column.shape}, expected ({n},)")
        if (
            self.user.min() < 0
            or self.user.max() >= self.n_users
            or self.item.min() < 0
            or self.item.max() >= self.n_items
        ):
            raise ValueError(f"{self.name}: a user or item code lies outside the vocabularies")
        step = np.diff(self.user)
        if (step < 0).any():
            raise ValueError(f"{self.name}: rows are not sorted by user")
        if self.timestamp is not None and ((np.diff(self.timestamp) < 0) & (step == 0)).any():
            raise ValueError(f"{self.name}: rows are not sorted by time within a user")
        pairs = np.sort(self.user.astype(np.int64) * self.n_items + self.item)
        if (pairs[1:] == pairs[:-1]).any():
            raise ValueError(f"{self.name}: a (user, item) pair occurs twice")
        for label, table, size in (("item", self.item_table, self.n_items), ("user", self.user_table, self.n_users)):
            if table is not None and table.height != size:
                raise ValueError(f"{self.name}: {label}_table has {table.height} rows, expected {size}")

    @property
    def n_users(self) -> int:
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    def __len__(self) -> int:
        return int(self.user.size)

    @cached_property
    def histories(self) -> UserItems:
        """Each user's items, oldest first."""
        return UserItems.from_pairs(self.user, self.item, self.n_users)
