"""Turns a table's columns into ids and numbers, and names the first record that is not one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from fedrec.data.interactions import Float32, Int32, Int64
from fedrec.data.tables import Table
from fedrec.errors import ConfigError, DataError

ID_KINDS = ("auto", "integer", "text")
_INTEGER = r"^-?(0|[1-9][0-9]*)$"


def text_column(table: Table, position: int) -> pl.Series:
    """A column as text, null where the file has nothing. Whole floats (a Parquet of 3.0) become whole numbers."""
    column = table.frame[:, position]
    if column.dtype.is_float():
        whole = column.cast(pl.Int64, strict=False)
        if (whole.cast(column.dtype) == column).all():
            column = whole
    try:
        return column.cast(pl.String)
    except pl.exceptions.PolarsError:
        raise DataError(
            f"{table.path}: column {column.name!r} holds {column.dtype}, which is not an id or text"
        ) from None


def id_column(table: Table, position: int, label: str, kind: str = "auto") -> pl.Series:
    """The ids of one column as text, none missing.

    ``kind="auto"``: a column that holds only whole numbers holds integer ids, and then none may be negative or beyond
    int64 (both are what a missing value or an overflow looks like); any other column holds text. ``integer`` demands
    whole numbers, ``text`` takes every id as it is written.
    """
    if kind not in ID_KINDS:
        raise ConfigError(f"dataset.ids={kind} is not one of {', '.join(ID_KINDS)}")
    ids = text_column(table, position)
    empty = (ids.is_null() | (ids == "")).fill_null(True)
    if empty.any():
        raise DataError(f"{table.where(_first(empty))}: no {label} id; mend or delete the line")
    if kind == "text":
        return ids
    distinct = ids.unique()
    whole = distinct.str.contains(_INTEGER)
    if not whole.all():
        if kind == "integer":
            wrong = ~ids.str.contains(_INTEGER)
            raise DataError(
                f"{table.where(_first(wrong))}: {label} id {ids[_first(wrong)]!r} is not a whole number; "
                "mend the line or set dataset.ids=text"
            )
        return ids
    number = distinct.cast(pl.Int64, strict=False)
    unfit = distinct.filter(number.is_null() | (number < 0))
    if unfit.len():
        wrong = ids.is_in(unfit.implode())
        raise DataError(
            f"{table.where(_first(wrong))}: {label} id {ids[_first(wrong)]} is "
            f"{'negative' if ids[_first(wrong)].startswith('-') else 'beyond 64 bits'}; mend the line, "
            "or set dataset.ids=text if the ids are meant so"
        )
    return ids


def vocabulary(ids: pl.Series) -> tuple[list[str], Int32]:
    """Distinct ids in code order, and the code of every row (int32).

    Codes follow numeric order where every id is a whole number, code-point order otherwise, so they do not depend on
    the order of rows.
    """
    distinct = ids.unique()
    if distinct.str.contains(_INTEGER).all() and not (number := distinct.cast(pl.Int64, strict=False)).has_nulls():
        ordered = distinct.gather(number.arg_sort())
    else:
        ordered = distinct.sort()
    codes = ids.cast(pl.Enum(ordered)).to_physical().to_numpy()
    return ordered.to_list(), np.ascontiguousarray(codes, dtype=np.int32)


def rating_column(table: Table, position: int) -> Float32:
    """Finite ratings, float32."""
    raw = table.frame[:, position]
    values = _cast(raw, pl.Float32)
    wrong = values.is_null() | ~values.is_finite().fill_null(False)
    if wrong.any():
        at = _first(wrong)
        raise DataError(
            f"{table.where(at)}: rating {_shown(raw[at])} is not a finite number; "
            "mend the line, or set dataset.columns.rating=false to read without ratings"
        )
    return np.ascontiguousarray(values.to_numpy(), dtype=np.float32)


def timestamp_column(table: Table, position: int) -> Int64:
    """Whole int64 timestamps in the source's unit; ``881250949.0`` is whole. Parquet dates become Unix seconds."""
    raw = table.frame[:, position]
    if isinstance(raw.dtype, pl.Datetime | pl.Date):
        fine = raw.cast(pl.Datetime("us")).dt.epoch("us")
        values = pl.select(pl.when(fine % 1_000_000 == 0).then(fine // 1_000_000)).to_series()
    elif raw.dtype == pl.String:
        values = _cast(raw, pl.Int64)
        if values.has_nulls():
            values = _cast(raw.str.replace(r"\.0*$", ""), pl.Int64)
        if values.has_nulls():  # 8.8e8
            values = values.fill_null(_whole(_cast(raw, pl.Float64)))
    elif raw.dtype.is_float():
        values = _whole(raw.cast(pl.Float64))
    else:
        values = _cast(raw, pl.Int64)
    if values.has_nulls():
        at = _first(values.is_null())
        raise DataError(
            f"{table.where(at)}: timestamp {_shown(raw[at])} is not a whole number within 64 bits; mend the line "
            "(milliseconds, say, instead of fractions), or set dataset.columns.timestamp=false to read without times"
        )
    return np.ascontiguousarray(values.to_numpy(), dtype=np.int64)


def shown_id(identifier: str) -> str:
    """An id as an error shows it: as it is, or escaped where it would break the line."""
    return identifier if identifier.isprintable() else repr(identifier)


def _cast(column: pl.Series, dtype: type[pl.DataType]) -> pl.Series:
    try:
        return column.cast(dtype, strict=False)
    except pl.exceptions.PolarsError:
        return pl.Series(column.name, [None] * column.len(), dtype=dtype)


def _whole(values: pl.Series) -> pl.Series:
    inside = (values == values.floor()) & (values.abs() < 2.0**63)
    return pl.select(pl.when(inside).then(values)).to_series().cast(pl.Int64, strict=False)


def _first(flags: pl.Series | npt.NDArray[np.bool_]) -> int:
    return int(np.argmax(np.asarray(flags)))


def _shown(value: Any) -> str:
    return "(nothing)" if value is None or value == "" else repr(value)
