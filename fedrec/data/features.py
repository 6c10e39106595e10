"""Reads what is known about items and users beside the interactions: titles, genres, years; gender, age, occupation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from fedrec.data.columns import id_column, shown_id, text_column
from fedrec.data.tables import Table, TableFormat, read_table
from fedrec.errors import DataError

# "Toy Story (1995)", "Fawlty Towers (1975-1979)", "Land Before Time III: … (1995) (V)"
_TITLED_YEAR = r"^(?s)(.*?)\s*\((\d{4})(?:[-–]\d{0,4})?\)\s*(?:\(V\))?\s*$"
_NO_GENRE = ("", "unknown", "(no genres listed)")


@dataclass(frozen=True)
class ItemSource:
    """A file with one row an item. Columns are header names or 1-based numbers, None where there is none.

    ``genre_separator`` splits the genres column; ``genre_flags`` are the names of 0/1 columns that start at the genres
    column instead. Without a year column, a title that ends in ``(1995)`` gives the year and loses the ending.
    """

    path: Path
    format: TableFormat = field(default_factory=TableFormat)
    id: str | int = "item_id"
    title: str | int | None = None
    genres: str | int | None = None
    year: str | int | None = None
    genre_separator: str = "|"
    genre_flags: tuple[str, ...] = ()
    titles_mended: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class UserSource:
    """A file with one row a user. ``occupations`` gives a coded occupation its name."""

    path: Path
    format: TableFormat = field(default_factory=TableFormat)
    id: str | int = "user_id"
    gender: str | int | None = None
    age: str | int | None = None
    occupation: str | int | None = None
    occupations: Mapping[str, str] = field(default_factory=dict)


def read_item_table(source: ItemSource, item_ids: Sequence[str]) -> pl.DataFrame:
    """One row per code, in code order: ``title`` (str), ``genres`` (list of str), ``year`` (int32), as far as mapped.

    An item that the file does not list has a null title and year and no genres. DataError: a malformed file, or an
    item listed twice.
    """
    table = read_table(source.path, source.format)
    columns = []
    if source.title is not None:
        raw = text_column(table, table.index(source.title, "dataset.items.columns.title"))
        parts = raw.str.extract_groups(_TITLED_YEAR).struct.unnest()
        title = parts[:, 0].fill_null(raw).str.strip_chars()
        if source.titles_mended:
            title = title.replace(dict(source.titles_mended))
        year = parts[:, 1].cast(pl.Int32, strict=False)
        if source.year is not None:
            given = text_column(table, table.index(source.year, "dataset.items.columns.year"))
            year = given.cast(pl.Int32, strict=False).fill_null(year)
        columns += [title.alias("title"), year.alias("year")]
    elif source.year is not None:
        given = text_column(table, table.index(source.year, "dataset.items.columns.year"))
        columns.append(given.cast(pl.Int32, strict=False).alias("year"))
    if source.genres is not None:
        columns.append(_genres(table, source))
    joined = _by_code(table, source.id, "item", columns, item_ids)
    if "genres" in joined.columns:
        joined = joined.with_columns(pl.col("genres").fill_null([]))
    return joined


def read_user_table(source: UserSource, user_ids: Sequence[str]) -> pl.DataFrame:
    """One row per code, in code order: ``gender`` (str), ``age`` (int32), ``occupation`` (str), as far as mapped.

    Ages are text where some age is no number. A user that the file does not list has nulls. DataError: a malformed
    file, or a user listed twice.
    """
    table = read_table(source.path, source.format)
    columns = []
    if source.gender is not None:
        columns.append(text_column(table, table.index(source.gender, "dataset.users.columns.gender")).alias("gender"))
    if source.age is not None:
        raw = text_column(table, table.index(source.age, "dataset.users.columns.age")).alias("age")
        age = raw.cast(pl.Int32, strict=False)
        columns.append(age if age.null_count() == raw.null_count() else raw)
    if source.occupation is not None:
        raw = text_column(table, table.index(source.occupation, "dataset.users.columns.occupation"))
        columns.append((raw.replace(dict(source.occupations)) if source.occupations else raw).alias("occupation"))
    return _by_code(table, source.id, "user", columns, user_ids)


def _genres(table: Table, source: ItemSource) -> pl.Series:
    assert source.genres is not None
    first = table.index(source.genres, "dataset.items.columns.genres")
    if source.genre_flags:
        flags = table.frame[:, first : first + len(source.genre_flags)]
        named = [
            pl.when(pl.col(column) == "1").then(pl.lit(name))
            for column, name in zip(flags.columns, source.genre_flags, strict=True)
            if name not in _NO_GENRE
        ]
        return flags.select(pl.concat_list(named).list.drop_nulls().alias("genres")).to_series()
    raw = text_column(table, first).fill_null("")
    split = raw.str.split(source.genre_separator).alias("genres")
    return split.list.filter(~pl.element().is_in(_NO_GENRE))


def _by_code(table: Table, key: str | int, label: str, columns: list[pl.Series], ids: Sequence[str]) -> pl.DataFrame:
    listed = id_column(table, table.index(key, f"dataset.{label}s.columns.id"), label, "text").alias("id")
    again = ~listed.is_first_distinct()
    if again.any():
        row = int(again.arg_true()[0])
        raise DataError(f"{table.where(row)}: {label} {shown_id(listed[row])} is listed again; delete one of the lines")
    described = pl.DataFrame([listed, *columns])
    return pl.DataFrame({"id": list(ids)}).join(described, on="id", how="left", maintain_order="left").drop("id")
