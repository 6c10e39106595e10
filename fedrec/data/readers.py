"""Reads files into ``Interactions``: one file, or one each for training, validation and test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from fedrec.data.columns import id_column, rating_column, shown_id, timestamp_column, vocabulary
from fedrec.data.features import ItemSource, UserSource, read_item_table, read_user_table
from fedrec.data.interactions import Float32, Int32, Int64, Interactions
from fedrec.data.tables import Table, TableFormat, read_table
from fedrec.errors import ConfigError, DataError

DUPLICATES = ("error", "first", "last")
UNKNOWN = ("error", "drop")


@dataclass(frozen=True)
class Columns:
    """Which column is which: a header's name or, 1-based, a number.

    ``rating`` and ``timestamp``: None takes the column of that name where there is one, False goes without.
    """

    user: str | int = "user_id"
    item: str | int = "item_id"
    rating: str | int | bool | None = None
    timestamp: str | int | bool | None = None


@dataclass(frozen=True)
class InteractionSource:
    """Files of interactions and how to read them.

    ``paths`` holds one file, or three (train, validation, test) for data that came split. ``duplicates`` says what
    happens when a (user, item) pair occurs again: ``error``, or the ``first`` or ``last`` in file order stays.
    ``unknown`` says what happens to a held-out row whose user or item is not in the training file: ``error`` or
    ``drop``.
    """

    paths: tuple[Path, ...]
    format: TableFormat = field(default_factory=TableFormat)
    columns: Columns = field(default_factory=Columns)
    ids: str = "auto"
    duplicates: str = "error"
    unknown: str = "error"
    items: ItemSource | None = None
    users: UserSource | None = None
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class _Rows:
    """The typed rows of the source's files, one after the other; ``starts`` are the files' first row numbers."""

    tables: tuple[Table, ...]
    starts: Int64
    user: Int32
    item: Int32
    user_ids: list[str]
    item_ids: list[str]
    rating: Float32 | None
    timestamp: Int64 | None

    def where(self, row: int) -> str:
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.tables[file].where(row - int(self.starts[file]))

    def pair(self, row: int) -> str:
        return f"user {shown_id(self.user_ids[self.user[row]])}, item {shown_id(self.item_ids[self.item[row]])}"


def read_interactions(source: InteractionSource, name: str, licence: str = "", digest: str = "") -> Interactions:
    """The source's interactions, sorted by (user code, timestamp, row order in the file).

    Codes are assigned in numeric order where all ids of a column are whole numbers, else in code-point order.
    ``digest`` replaces the SHA-256 of the file (of several files: of their digests, one a line).

    Raises:
        DataError: an unreadable or malformed file (with its line), a pair that occurs twice, a held-out user or item
            that training does not know.
        ConfigError: a setting that is not one of its choices.
    """
    if source.duplicates not in DUPLICATES:
        raise ConfigError(f"dataset.duplicates={source.duplicates} is not one of {', '.join(DUPLICATES)}")
    if source.unknown not in UNKNOWN:
        raise ConfigError(f"dataset.unknown={source.unknown} is not one of {', '.join(UNKNOWN)}")
    rows = _read_rows(source)
    fold = np.repeat(np.arange(len(rows.tables), dtype=np.int8), np.diff(np.append(rows.starts, rows.user.size)))
    keep, notes = _without_duplicates(rows, source.duplicates)
    if len(rows.tables) > 1:
        known, dropped = _known_in_training(rows, fold, keep, source.unknown)
        keep, notes = known, notes + dropped
    rank = np.flatnonzero(keep)
    time = rows.timestamp
    order = rank[np.lexsort((rank, rows.user[rank]) if time is None else (rank, time[rank], rows.user[rank]))]
    user, user_ids = _compact(rows.user[order], rows.user_ids)
    item, item_ids = _compact(rows.item[order], rows.item_ids)
    digests = [table.sha256 for table in rows.tables]
    return Interactions(
        name=name,
        user=user,
        item=item,
        user_ids=user_ids,
        item_ids=item_ids,
        timestamp=None if time is None else time[order],
        rating=None if rows.rating is None else rows.rating[order],
        fold=fold[order] if len(rows.tables) > 1 else None,
        item_table=None if source.items is None else read_item_table(source.items, item_ids),
        user_table=None if source.users is None else read_user_table(source.users, user_ids),
        sha256=digest or (digests[0] if len(digests) == 1 else sha256("\n".join(digests).encode()).hexdigest()),
        licence=licence,
        notes=source.notes + notes,
    )


def _read_rows(source: InteractionSource) -> _Rows:
    tables = tuple(read_table(path, source.format) for path in source.paths)
    users, items, ratings, times = [], [], [], []
    for table in tables:
        users.append(id_column(table, table.index(source.columns.user, "dataset.columns.user"), "user", source.ids))
        items.append(id_column(table, table.index(source.columns.item, "dataset.columns.item"), "item", source.ids))
        if (at := _optional(table, source.columns.rating, "rating")) is not None:
            ratings.append(rating_column(table, at))
        if (at := _optional(table, source.columns.timestamp, "timestamp")) is not None:
            times.append(timestamp_column(table, at))
    for label, found in (("rating", ratings), ("timestamp", times)):
        if 0 < len(found) < len(tables):
            raise DataError(
                f"{' and '.join(str(t.path) for t in tables)}: only some have a {label} column; "
                f"set dataset.columns.{label}=false to read without"
            )
    user_ids, user = vocabulary(_stack(users))
    item_ids, item = vocabulary(_stack(items))
    starts = np.cumsum([0] + [table.frame.height for table in tables[:-1]], dtype=np.int64)
    rating = np.concatenate(ratings) if ratings else None
    return _Rows(tables, starts, user, item, user_ids, item_ids, rating, np.concatenate(times) if times else None)


def _optional(table: Table, column: str | int | bool | None, label: str) -> int | None:
    if column is False:
        return None
    if column is None:
        return table.names.index(label) if label in table.names else None
    return table.index(column, f"dataset.columns.{label}")


def _stack(parts: Sequence[pl.Series]) -> pl.Series:
    return parts[0] if len(parts) == 1 else pl.concat([part.alias("id") for part in parts])


def _without_duplicates(rows: _Rows, rule: str) -> tuple[npt.NDArray[np.bool_], tuple[str, ...]]:
    n = rows.user.size
    pair = rows.user.astype(np.int64) * len(rows.item_ids) + rows.item
    last = rule == "last"
    _, kept = np.unique(pair[::-1] if last else pair, return_index=True)
    keep = np.zeros(n, dtype=np.bool_)
    keep[n - 1 - kept if last else kept] = True
    if keep.all():
        return keep, ()
    if rule == "error":
        again = int(np.argmin(keep))
        before = int(np.argmax(pair == pair[again]))
        raise DataError(
            f"{rows.where(again)}: {rows.pair(again)} occurs again (first: {rows.where(before)}); "
            "delete one, or set dataset.duplicates=last (or first) to keep one of them"
        )
    return keep, (f"{n - int(keep.sum()):,} repeated (user, item) rows dropped, the {rule} of each pair kept",)


def _known_in_training(
    rows: _Rows, fold: npt.NDArray[np.int8], keep: npt.NDArray[np.bool_], rule: str
) -> tuple[npt.NDArray[np.bool_], tuple[str, ...]]:
    training = keep & (fold == 0)
    known = np.ones(keep.size, dtype=np.bool_)
    for label, codes, ids in (("item", rows.item, rows.item_ids), ("user", rows.user, rows.user_ids)):
        trained = np.bincount(codes[training], minlength=len(ids)) > 0
        unknown = keep & ~trained[codes]
        if unknown.any() and rule == "error":
            row = int(np.argmax(unknown))
            raise DataError(
                f"{rows.where(row)}: {label} {shown_id(ids[codes[row]])} is not in the training file "
                f"{rows.tables[0].path}; add it there, or set dataset.unknown=drop to leave such rows out"
            )
        known &= ~unknown
    dropped = int((keep & ~known).sum())
    note = (f"{dropped:,} held-out rows dropped: their user or item is not in the training file",) if dropped else ()
    return keep & known, note


def _compact(codes: Int32, ids: list[str]) -> tuple[Int32, list[str]]:
    """Codes without gaps, in the same order."""
    used = np.bincount(codes, minlength=len(ids)) > 0
    if used.all():
        return codes, ids
    new = (np.cumsum(used) - 1).astype(np.int32)
    return new[codes], [name for name, there in zip(ids, used, strict=True) if there]
