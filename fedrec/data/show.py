"""Prints the catalogue, what ``get`` did, and a description: the three ``fedrec data`` commands."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from rich import box
from rich.console import Console
from rich.table import Column, Table

from fedrec.data.catalogue import catalogue, entry_named, find, obtain, read_entry
from fedrec.data.describe import QUANTILES, Description, describe
from fedrec.data.interactions import Interactions


def list_datasets(console: Console) -> None:
    """One row per entry of the catalogue: size, where it is or would come from; then licences."""
    numbers = (_right(label) for label in ("users", "items", "interactions"))
    table = Table(Column("name", no_wrap=True), *numbers, "where", box=box.SIMPLE_HEAD)
    licences: dict[str, list[str]] = {}
    for entry in catalogue().values():
        place = find(entry)
        where = str(place) if place else "fetched on first use" if entry.sources else f"get it from {entry.homepage}"
        size = entry.versions[0]
        table.add_row(entry.name, f"{size.users:,}", f"{size.items:,}", f"{size.interactions:,}", where)
        licences.setdefault(entry.licence, []).append(entry.name)
    console.print(table)
    for licence, names in licences.items():
        _line(console, f"{', '.join(names)}: {licence}")
    _line(console, "dataset=synthetic makes data of any size; dataset=file reads your own; dataset=given reads a split")


def get_dataset(name: str, console: Console) -> None:
    """Fetches a data set of the catalogue where it is not here yet, verifies it and prints where it lies.

    Raises:
        ConfigError: a name that the catalogue does not have.
        DataError: no source could give it, or what lies there is damaged.
    """
    entry = entry_named(name)
    folder = obtain(entry, lambda text: _line(console, text))
    data = read_entry(entry, folder)
    _line(
        console, f"{name}: {len(data):,} interactions of {data.n_users:,} users with {data.n_items:,} items, verified"
    )
    _line(console, f"in {folder}")
    _line(console, f"licence: {data.licence}")
    for note in data.notes:
        _line(console, f"note: {note}")


def describe_dataset(interactions: Interactions, console: Console) -> None:
    """Prints ``describe(interactions)``: sizes, quantiles, Gini, density, time, genres, user attributes, licence."""
    found = describe(interactions)
    _line(
        console,
        f"{found.name}: {found.interactions:,} interactions of {found.users:,} users with {found.items:,} items",
    )
    _line(console, f"density {100 * found.density:.3g} %, SHA-256 {interactions.sha256 or '(none)'}")
    quantiles = (_right(f"{q} %") for q in QUANTILES)
    table = Table(
        Column("interactions", no_wrap=True), *quantiles, _right("Gini"), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for label, values, coefficient in (
        ("per user", found.activity, found.activity_gini),
        ("per item", found.popularity, found.popularity_gini),
    ):
        table.add_row(label, *(f"{values[q]:,.4g}" for q in QUANTILES), f"{coefficient:.3f}")
    console.print(table)
    for text in _time(found):
        _line(console, text)
    if found.rating_mean is not None:
        _line(console, f"mean rating {found.rating_mean:.2f}")
    if found.genres:
        _line(console, f"genres (items): {_top(found.genres, 8)}")
    for attribute, counts in found.attributes.items():
        _line(console, f"{attribute} (users): {_top(counts, 8)}")
    if interactions.licence:
        _line(console, f"licence: {interactions.licence}")
    for note in interactions.notes:
        _line(console, f"note: {note}")


def _time(found: Description) -> list[str]:
    if found.first is None or found.last is None or found.median_user_span is None or found.tied_last is None:
        return ["no timestamps: the order of rows in the file stands for time"]
    if found.unit_seconds is None:
        span = f"timestamps {found.first:,} to {found.last:,} (no clock times), "
        span += f"a user's median span {found.median_user_span:g}"
    else:
        days = [datetime.fromtimestamp(t * found.unit_seconds, UTC).date() for t in (found.first, found.last)]
        length = (found.last - found.first) * found.unit_seconds / 86400
        median = found.median_user_span * found.unit_seconds / 86400
        span = f"{days[0]} to {days[1]} ({length:,.0f} days), a user's median span {median:.3g} days"
    share = 100 * found.tied_last / found.users
    return [span, f"{found.tied_last:,} users ({share:.1f} %) have equal timestamps on their last two interactions"]


def _top(counts: Mapping[str, int], most: int) -> str:
    shown = [f"{value} {count:,}" for value, count in list(counts.items())[:most]]
    return ", ".join(shown) + (f", and {len(counts) - most} more" if len(counts) > most else "")


def _right(label: str) -> Column:
    return Column(label, justify="right", no_wrap=True)


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
