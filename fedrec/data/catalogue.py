"""The data sets that fedrec knows by name: where they come from, under what licence, and how large they are."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedrec.data.download import Archive, Say, SourceFailed, Wheel, cache_folder, fetch, verify
from fedrec.data.interactions import Interactions
from fedrec.data.readers import InteractionSource, read_interactions
from fedrec.errors import ConfigError, DataError


@dataclass(frozen=True)
class Statistics:
    """The size of one published version."""

    users: int
    items: int
    interactions: int
    version: str = ""

    def __str__(self) -> str:
        return f"{self.users:,} users, {self.items:,} items, {self.interactions:,} interactions"


@dataclass(frozen=True)
class Entry:
    """A data set of the catalogue.

    ``forms`` are the ways its files may lie in a folder (paths relative to it), the preferred one first; the first of
    a form's files must be there, its side tables may be missing. ``checksums`` are SHA-256 by file name. ``digest``
    stands for the data whichever form they come in. ``versions`` are the sizes known; with ``moving`` another size is
    noted, otherwise it is an error.
    """

    name: str
    title: str
    licence: str
    homepage: str
    versions: tuple[Statistics, ...]
    forms: tuple[InteractionSource, ...]
    sources: tuple[Archive | Wheel, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""
    moving: bool = False


def catalogue() -> dict[str, Entry]:
    """Every entry by name."""
    from fedrec.data.known import ENTRIES

    return {entry.name: entry for entry in ENTRIES}


def entry_named(name: str) -> Entry:
    """The entry; ConfigError with the nearest name where there is none."""
    entries = catalogue()
    if name not in entries:
        near = difflib.get_close_matches(name, entries, 1)
        raise ConfigError(
            f"no data set {name!r} in the catalogue; "
            + (f"did you mean {near[0]}? " if near else "")
            + f"There are {', '.join(entries)}"
        )
    return entries[name]


def find(entry: Entry) -> Path | None:
    """The folder on this machine that holds the data set: ``FEDREC_DATA_DIR/<name>``, else the cache's, else None."""
    places = [cache_folder()]
    if given := os.environ.get("FEDREC_DATA_DIR"):
        places.insert(0, Path(given).expanduser())
        if not places[0].is_dir():
            raise DataError(f"FEDREC_DATA_DIR={given} is not a folder; point it at one, or unset it")
    for place in places:
        if any((place / entry.name / form.paths[0]).is_file() for form in entry.forms):
            return place / entry.name
    return None


def obtain(entry: Entry, say: Say) -> Path:
    """The data set's folder, fetched into the cache where it is not on this machine yet.

    Raises:
        DataError: no source could give it; the message lists what was tried and what to do.
    """
    if there := find(entry):
        return there
    target = cache_folder() / entry.name
    tried: list[str] = []
    for source in entry.sources:
        try:
            fetch(source, target, entry.checksums, lambda text: say(f"{entry.name}: {text}"))
        except SourceFailed as failure:
            tried.append(str(failure))
            say(f"{entry.name}: {failure}")
        else:
            return target
    names = " or ".join(str(form.paths[0]) for form in entry.forms)
    raise DataError(
        f"{entry.name} is not on this machine"
        + (f" and could not be fetched. Tried: {'; '.join(tried)}. " if tried else " and has no public address. ")
        + f"Get it from {entry.homepage} and put {names} into {target}, or point FEDREC_DATA_DIR at a folder that "
        f"holds {entry.name}/"
    )


def read_entry(entry: Entry, folder: Path) -> Interactions:
    """The data set in ``folder``, verified: known files by checksum, all by size.

    Raises:
        DataError: a checksum or a size that differs, or a malformed file.
    """
    form = next((form for form in entry.forms if (folder / form.paths[0]).is_file()), None)
    if form is None:
        names = " or ".join(str(form.paths[0]) for form in entry.forms)
        raise DataError(f"{folder}: no {names} here; run `fedrec data get {entry.name}`")
    items, users = form.items, form.users
    if items is not None:
        items = dataclasses.replace(items, path=folder / items.path) if (folder / items.path).is_file() else None
    if users is not None:
        users = dataclasses.replace(users, path=folder / users.path) if (folder / users.path).is_file() else None
    paths = tuple(folder / path for path in form.paths)
    for path in (*paths, *(side.path for side in (items, users) if side is not None)):
        if path.name in entry.checksums:
            try:
                verify(path, entry.checksums[path.name])
            except SourceFailed as failure:
                raise DataError(
                    f"{path}: {failure}. Delete it and run `fedrec data get {entry.name}`, or read your own version "
                    "with dataset=file"
                ) from None
    source = dataclasses.replace(form, paths=paths, items=items, users=users)
    return _checked(entry, read_interactions(source, entry.name, entry.licence, entry.digest), paths[0])


def _checked(entry: Entry, data: Interactions, path: Path) -> Interactions:
    size = (data.n_users, data.n_items, len(data))
    version = next((v for v in entry.versions if (v.users, v.items, v.interactions) == size), None)
    found = Statistics(*size)
    if version is not None:
        note = f"version of {version.version}" if version.version else ""
    elif entry.moving:
        note = f"a version with {found}, which is none of the known ones: its publisher replaces this data set at times"
    else:
        raise DataError(
            f"{path}: {found}, but {entry.name} has {entry.versions[0]}; the file is cut short or another one. "
            "Fetch it again, or read it with dataset=file"
        )
    return dataclasses.replace(data, notes=(*data.notes, note)) if note else data
