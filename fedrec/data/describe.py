"""What a data set looks like: activity and popularity, concentration, density, time, genres, user attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from fedrec.data.interactions import Interactions

QUANTILES = (0, 5, 25, 50, 75, 90, 95, 99, 100)


@dataclass(frozen=True)
class Description:
    """Numbers about interactions.

    ``activity`` and ``popularity`` map a percentage of ``QUANTILES`` to interactions per user and per item;
    the Gini coefficients are of the same counts (0: all equal). ``density`` is interactions / (users × items).
    ``first`` and ``last`` are timestamps and ``median_user_span`` the median over users of last − first, in the
    source's unit; ``unit_seconds`` is that unit where the timestamps look like clock times, None where not.
    ``tied_last`` is the number of users whose last two interactions have equal timestamps, so that "the last one"
    needs a tie rule. ``genres`` counts items per genre, ``attributes`` users per value (more than ten different ages
    by decade), both most frequent first.
    """

    name: str
    users: int
    items: int
    interactions: int
    density: float
    activity: Mapping[int, float]
    popularity: Mapping[int, float]
    activity_gini: float
    popularity_gini: float
    first: int | None
    last: int | None
    unit_seconds: float | None
    median_user_span: float | None
    tied_last: int | None
    rating_mean: float | None
    genres: Mapping[str, int]
    attributes: Mapping[str, Mapping[str, int]]


def describe(data: Interactions) -> Description:
    """The numbers of ``data``; a pure function, O(n log n)."""
    activity = np.bincount(data.user, minlength=data.n_users)
    popularity = np.bincount(data.item, minlength=data.n_items)
    first = last = span = tied = unit = None
    if data.timestamp is not None:
        first, last = int(data.timestamp.min()), int(data.timestamp.max())
        unit = _unit_seconds(first, last)
        there = np.flatnonzero(activity)
        ends = np.cumsum(activity)[there] - 1
        starts = ends - activity[there] + 1
        span = float(np.median((data.timestamp[ends] - data.timestamp[starts]).astype(np.float64)))
        two = activity[there] > 1
        tied = int((data.timestamp[ends[two]] == data.timestamp[ends[two] - 1]).sum())
    return Description(
        name=data.name,
        users=data.n_users,
        items=data.n_items,
        interactions=len(data),
        density=len(data) / (data.n_users * data.n_items),
        activity=_quantiles(activity),
        popularity=_quantiles(popularity),
        activity_gini=gini(activity),
        popularity_gini=gini(popularity),
        first=first,
        last=last,
        unit_seconds=unit,
        median_user_span=span,
        tied_last=tied,
        rating_mean=None if data.rating is None else float(data.rating.mean(dtype=np.float64)),
        genres=_genres(data.item_table),
        attributes=_attributes(data.user_table),
    )


def gini(counts: npt.NDArray[np.int64]) -> float:
    """Gini coefficient of non-negative counts: Σᵢ (2i − n − 1) xᵢ / (n Σ x), x ascending, i from 1."""
    x = np.sort(counts).astype(np.float64)
    n = x.size
    return float(((2 * np.arange(1, n + 1) - n - 1) * x).sum() / (n * x.sum()))


def _quantiles(counts: npt.NDArray[np.int64]) -> dict[int, float]:
    return {q: float(v) for q, v in zip(QUANTILES, np.percentile(counts, QUANTILES), strict=True)}


def _unit_seconds(first: int, last: int) -> float | None:
    """1, 1e-3, 1e-6 or 1e-9 where both ends are clock times between 1980 and 2100 in that unit."""
    for unit in (1.0, 1e-3, 1e-6, 1e-9):
        if first * unit >= 315_532_800 and last * unit <= 4_102_444_800:
            return unit
    return None


def _genres(table: pl.DataFrame | None) -> dict[str, int]:
    if table is None or "genres" not in table.columns:
        return {}
    return _counts(table["genres"].explode().drop_nulls())


def _attributes(table: pl.DataFrame | None) -> dict[str, dict[str, int]]:
    if table is None:
        return {}
    found = {}
    for column in table.iter_columns():
        values = column.drop_nulls()
        if column.dtype.is_integer() and values.n_unique() <= 10:
            values = values.cast(pl.String)
        elif column.dtype.is_integer():
            decade = values // 10 * 10
            values = decade.cast(pl.String) + "-" + (decade + 9).cast(pl.String)
        if values.len() and values.dtype == pl.String:
            found[column.name] = _counts(values)
    return found


def _counts(values: pl.Series) -> dict[str, int]:
    if values.len() == 0:
        return {}
    table = pl.DataFrame({"value": values.cast(pl.String)}).group_by("value").len()
    return dict(table.sort(["len", "value"], descending=[True, False]).iter_rows())
