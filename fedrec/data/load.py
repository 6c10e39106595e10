"""The door to all data: a catalogue name or a dataset configuration in, ``Interactions`` out."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedrec.data.catalogue import catalogue, entry_named, obtain, read_entry
from fedrec.data.download import Say
from fedrec.data.features import ItemSource, UserSource
from fedrec.data.filters import filter_interactions
from fedrec.data.interactions import Interactions
from fedrec.data.readers import Columns, InteractionSource, read_interactions
from fedrec.data.tables import TableFormat
from fedrec.errors import ConfigError

_FORMAT: dict[str, Any] = {"format": "auto", "separator": None, "header": True, "encoding": "utf-8"}
_FILTERS: dict[str, Any] = {
    "min_user_interactions": 0,
    "min_item_interactions": 0,
    "min_rating": None,
    "filter": "iterative",
}
_COLUMNS: dict[str, Any] = {"user": "user_id", "item": "item_id", "rating": None, "timestamp": None}
_ITEMS: dict[str, Any] = {
    "path": None,
    **_FORMAT,
    "columns": {"id": "item_id", "title": None, "genres": None, "year": None},
    "genre_separator": "|",
}
_USERS: dict[str, Any] = {
    "path": None,
    **_FORMAT,
    "columns": {"id": "user_id", "gender": None, "age": None, "occupation": None},
}
_TABLES: dict[str, Any] = {
    "label": None,
    **_FORMAT,
    "columns": _COLUMNS,
    "ids": "auto",
    "duplicates": "error",
    "items": _ITEMS,
    "users": _USERS,
}


def defaults(name: str) -> dict[str, Any]:
    """Every key that a dataset configuration of this name knows (synthetic's own apart), with its default value."""
    if name == "file":
        return {"name": name, "path": None, **_TABLES, **_FILTERS}
    if name == "given":
        return {"name": name, "train": None, "validation": None, "test": None, **_TABLES, "unknown": "error"}
    return {"name": name, **_FILTERS}


def load_dataset(config: str | Mapping[str, Any], *, say: Say | None = None, **overrides: Any) -> Interactions:
    """Loads a data set.

    Args:
        config: A name: one of the catalogue's (``ml-100k``, ``ml-1m``, ``ml-latest-small``, ``amazon-instant-video``)
            or ``synthetic``. Or a mapping with the keys of the files in ``configs/dataset/``, whose ``name`` is one of
            these, ``file`` or ``given``; keys left out have the defaults written there.
        say: Receives one line before anything is fetched; by default the line goes to stderr.
        overrides: Keys of the configuration, ``min_user_interactions=10``.

    Raises:
        ConfigError: a key or value that is not known, with the nearest one.
        DataError: data that cannot be got or read, with file, line and remedy.

    Example:
        >>> data = load_dataset("synthetic", users=50, items=40, seed=1)
        >>> data.n_users, data.name
        (50, 'synthetic')
    """
    given: dict[str, Any] = {"name": config} if isinstance(config, str) else _plain(config, "dataset")
    given.update(overrides)
    name = given.get("name")
    if not isinstance(name, str):
        raise ConfigError("dataset.name is missing; write a catalogue name, file, given or synthetic")
    if name == "synthetic":
        return _filtered(_synthetic(given), given)
    if name not in ("file", "given") and name not in catalogue():
        known = [*catalogue(), "synthetic", "file", "given"]
        near = difflib.get_close_matches(name, known, 1)
        file = isinstance(config, str) and Path(config).is_file()
        raise ConfigError(
            f"dataset.name={name} is not known; "
            + (f"to read that file write {{'name': 'file', 'path': {name!r}}}; " if file else "")
            + (f"did you mean {near[0]}? " if near else "")
            + f"There are {', '.join(known)}"
        )
    settings = _merged(defaults(name), given, "dataset")
    if name == "file":
        return _filtered(_read((_path(settings, "path", "dataset"),), settings, "error"), settings)
    if name == "given":
        paths = tuple(_path(settings, key, "dataset") for key in ("train", "validation", "test"))
        return _read(paths, settings, settings["unknown"])
    entry = entry_named(name)
    return _filtered(read_entry(entry, obtain(entry, say or _to_stderr)), settings)


def _synthetic(given: Mapping[str, Any]) -> Interactions:
    from fedrec.data.synthetic import SyntheticConfig, generate

    options = {key: value for key, value in given.items() if key != "name" and key not in _FILTERS}
    return generate(SyntheticConfig.from_mapping(options))


def _filtered(data: Interactions, settings: Mapping[str, Any]) -> Interactions:
    for key in ("min_user_interactions", "min_item_interactions"):
        _expect(settings.get(key, 0), lambda v: type(v) is int and v >= 0, f"dataset.{key}", "a whole number from 0")
    threshold = settings.get("min_rating")
    _expect(threshold, lambda v: v is None or type(v) in (int, float), "dataset.min_rating", "a number or null")
    return filter_interactions(
        data,
        min_user_interactions=settings.get("min_user_interactions", 0),
        min_item_interactions=settings.get("min_item_interactions", 0),
        min_rating=threshold,
        rule=settings.get("filter", "iterative"),
    )


def _read(paths: tuple[Path, ...], settings: Mapping[str, Any], unknown: str) -> Interactions:
    columns = settings["columns"]
    for key, value in columns.items():
        _expect_column(value, f"dataset.columns.{key}", optional=key in ("rating", "timestamp"))
    source = InteractionSource(
        paths=paths,
        format=_format(settings, "dataset"),
        columns=Columns(**columns),
        ids=settings["ids"],
        duplicates=settings["duplicates"],
        unknown=unknown,
        items=_items(settings["items"]),
        users=_users(settings["users"]),
    )
    label = settings["label"]
    _expect(label, lambda v: v is None or (isinstance(v, str) and v != ""), "dataset.label", "a name or null")
    return read_interactions(source, label or paths[0].name.split(".")[0])


def _items(settings: Mapping[str, Any]) -> ItemSource | None:
    if settings["path"] is None:
        return None
    for key, value in settings["columns"].items():
        _expect_column(value, f"dataset.items.columns.{key}", optional=key != "id")
    separator = settings["genre_separator"]
    _expect(separator, lambda v: isinstance(v, str) and v != "", "dataset.items.genre_separator", "the character used")
    path = _path(settings, "path", "dataset.items")
    return ItemSource(path, _format(settings, "dataset.items"), **settings["columns"], genre_separator=separator)


def _users(settings: Mapping[str, Any]) -> UserSource | None:
    if settings["path"] is None:
        return None
    for key, value in settings["columns"].items():
        _expect_column(value, f"dataset.users.columns.{key}", optional=key != "id")
    return UserSource(
        _path(settings, "path", "dataset.users"), _format(settings, "dataset.users"), **settings["columns"]
    )


def _format(settings: Mapping[str, Any], where: str) -> TableFormat:
    separator, header, encoding = settings["separator"], settings["header"], settings["encoding"]
    _expect(separator, lambda v: v is None or isinstance(v, str), f"{where}.separator", "the characters used, or null")
    _expect(header, lambda v: isinstance(v, bool), f"{where}.header", "true or false")
    _expect(encoding, lambda v: isinstance(v, str), f"{where}.encoding", "utf-8 or latin-1, say")
    return TableFormat(settings["format"], separator, header, encoding)


def _path(settings: Mapping[str, Any], key: str, where: str) -> Path:
    value = settings[key]
    if not isinstance(value, str | Path) or str(value) == "":
        raise ConfigError(f"{where}.{key}={value!r}: write the file's path, {where}.{key}=ratings.csv")
    return Path(value).expanduser()


def _expect(value: Any, holds: Callable[[Any], bool], key: str, wanted: str) -> None:
    if not holds(value):
        raise ConfigError(f"{key}={value!r}: write {wanted}")


def _expect_column(value: Any, key: str, *, optional: bool) -> None:
    given = isinstance(value, str) or (type(value) is int and value >= 1)
    _expect(
        value,
        lambda v: given or (optional and (v is None or v is False)),
        key,
        "a column's name, or its number from 1" + (", or null" if optional else ""),
    )


def _plain(config: Any, where: str) -> Any:
    """Hydra's containers as plain ones, without importing Hydra."""
    if isinstance(config, Mapping):
        return {str(key): _plain(value, f"{where}.{key}") for key, value in config.items()}
    return config


def _merged(known: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    merged = dict(known)
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{where}.{key} is not a known key; {hint}The keys are {', '.join(known)}")
        if isinstance(known[key], Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}.{key}={value!r}: write a mapping with the keys {', '.join(known[key])}")
            value = _merged(known[key], value, f"{where}.{key}")
        merged[key] = value
    return merged


def _to_stderr(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)
