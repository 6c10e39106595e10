"""The file format of ``ledger.json``: typed entries, the hash chain through them, the seal over the file.

Every hash is the SHA-256 of canonical JSON: sorted keys, no spaces, floats as their shortest exact decimal. An entry's
covers all its fields, the hash of the entry before it among them (the first one's: of the subject). The seal covers the
head, the composed results, the last entry's hash and how many entries there are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedrec.errors import ConfigError
from privacy.accountants import Release, check_accountant, check_delta

SCHEMA = 1
NAME = "ledger.json"
_KIND = "fedrec privacy ledger"
_HEAD = ("schema", "kind", "subject", "delta", "accountant", "private", "composed")
_T = TypeVar("_T", bound="Subject | Entry")


@dataclass(frozen=True)
class Subject:
    """The data that the guarantee is about. ``sha256`` is that of its source, whatever was filtered or held out: the
    same people stand behind it, so releases about any part of it compose."""

    name: str
    sha256: str
    users: int
    interactions: int


@dataclass(frozen=True)
class Entry:
    """One noisy release (or ``steps`` of the same kind).

    ``noise_multiplier`` is relative to the sensitivity: ``max_grad_norm``, or twice that where the adjacency replaces a
    unit.
    """

    index: int
    run: str
    round: int
    unit: str
    adjacency: str
    mechanism: str
    what: tuple[str, ...]
    sampler: str
    sample_rate: float
    noise_multiplier: float
    max_grad_norm: float | None
    steps: int
    trust: str
    survivors: int | None
    group: str | None
    accountant: str
    noise_seed: str
    previous: str
    hash: str

    @property
    def release(self) -> Release:
        return Release(self.noise_multiplier, self.sample_rate, self.steps)

    def check(self) -> None:
        """ConfigError for a release that no accountant here covers; names the setting and the remedy."""
        Release(self.noise_multiplier, self.sample_rate, self.steps)
        if not self.noise_multiplier < float("inf") or self.steps < 1:
            raise ConfigError(f"ledger: noise multiplier {self.noise_multiplier}, {self.steps} steps: not a release")
        if self.unit not in ("user", "interaction"):
            raise ConfigError(f"ledger: unit {self.unit}: write user or interaction")
        known = ("add/remove one", "add or remove one", "replace one")
        if not self.adjacency.startswith(tuple(f"{change} {self.unit}" for change in known)):
            raise ConfigError(
                f"ledger: adjacency {self.adjacency!r}: write 'add or remove one {self.unit}' or "
                f"'replace one {self.unit}'"
            )
        if self.mechanism != "gaussian":
            raise ConfigError(f"ledger: mechanism {self.mechanism}: only gaussian noise is accounted for here")
        if self.sampler not in ("poisson", "all"):
            raise ConfigError(
                f"federation.sampler={self.sampler}: no amplification by sampling is known for it, and the number for "
                "Poisson sampling would be wrong; write federation.sampler=poisson or federation.sampler=all"
            )
        if self.sampler == "all" and self.sample_rate != 1.0:
            raise ConfigError(f"ledger: sampler all with sample rate {self.sample_rate}: everybody takes part: write 1")
        if self.adjacency.startswith("replace") and self.sample_rate < 1.0:
            raise ConfigError(
                f"ledger: '{self.adjacency}' with sampling at {self.sample_rate}: the accountants know sampling for "
                "add/remove only; write federation.sampler=all, or noise relative to adding or removing one"
            )


@dataclass(frozen=True)
class Document:
    """A ledger that was read and verified."""

    subject: Subject
    delta: float
    accountant: str
    entries: tuple[Entry, ...]


def ledger_file(path: Path) -> Path:
    """``path`` itself, or the ledger of the run directory that it names."""
    path = Path(path)
    return path if path.suffix == ".json" else path / NAME


def render(
    subject: Subject, delta: float, accountant: str, private: bool, composed: dict[str, Any], lines: Sequence[str],
    last: str,
) -> str:  # fmt: skip
    """The file's text. ``lines`` are the entries as JSON, one line each; ``last`` is the last one's hash."""
    values = (SCHEMA, _KIND, asdict(subject), delta, accountant, private, composed)
    head = dict(zip(_HEAD, values, strict=True))
    text = json.dumps(head, indent=1, allow_nan=False)[:-2]
    entries = ",\n  ".join(lines)
    return f'{text},\n "entries": [\n  {entries}\n ],\n "seal": "{digest([head, last, len(lines)])}"\n}}\n'


def parse(path: Path) -> Document:
    """The document in the file, every hash verified.

    Raises:
        ConfigError: not readable, not a ledger, another schema, a broken chain: names the file, the entry, the remedy.
    """
    found = _load(path)
    try:
        subject = typed(Subject, found["subject"])
        delta, accountant, contents = float(found["delta"]), str(found["accountant"]), list(found["entries"])
        check_delta(delta)
        check_accountant(accountant)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise _broken(path, f"its head is not one of ours ({error})") from None
    entries: list[Entry] = []
    last = subject_hash(subject)
    for position, content in enumerate(contents):
        entries.append(_verified(path, content, position, last))
        last = entries[-1].hash
    if set(found) != {*_HEAD, "entries", "seal"}:
        raise _broken(path, "its fields are not those of schema 1")
    if found["seal"] != digest([{key: found[key] for key in _HEAD}, last, len(entries)]):
        raise _broken(path, "entries are missing at its end, or its head or composed result was edited")
    return Document(subject, delta, accountant, tuple(entries))


def subject_hash(subject: Subject) -> str:
    """What the first entry continues."""
    return digest(asdict(subject))


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise ConfigError(
            f"privacy.ledger={path}: cannot be read ({error.strerror or error}); name the directory of a finished run "
            "with a ledger.json, or write privacy.ledger=null"
        ) from None
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"it is not a ledger ({error})") from None
    if not isinstance(document, dict) or document.get("kind") != _KIND:
        raise _broken(path, "it is not a ledger of fedrec")
    if document.get("schema") != SCHEMA or isinstance(document.get("schema"), bool):
        raise ConfigError(
            f"privacy.ledger={path}: schema {document.get('schema')!r}, this version reads {SCHEMA}; read it with the "
            "version of fedrec that wrote it"
        )
    return document


def _verified(path: Path, content: Any, position: int, previous: str) -> Entry:
    """The entry, if its fields are whole, its hash is that of its content, and it continues the chain."""
    try:
        entry = typed(Entry, content)
        hashed = digest({key: value for key, value in content.items() if key != "hash"})
        entry.check()
    except (TypeError, ValueError, ConfigError) as error:
        raise _broken(path, f"entry {position} is not one of ours ({error})") from None
    if entry.hash != hashed:
        raise _broken(path, f"entry {position} was changed after it was written")
    if entry.previous != previous or entry.index != position:
        raise _broken(path, f"entry {position} does not continue the one before it")
    return entry


def typed(cls: type[_T], content: Any) -> _T:
    """``content`` as the dataclass, its fields neither more nor less nor of another type. TypeError otherwise."""
    fields = {one.name: str(one.type) for one in dataclasses.fields(cls)}
    if not isinstance(content, dict) or set(content) != set(fields):
        raise TypeError("its fields are not those of schema 1")
    return cls(**{name: _value(name, content[name], kind) for name, kind in fields.items()})


def _value(name: str, value: Any, kind: str) -> Any:
    plain = {"int": int, "float": float, "str": str}.get(kind.removesuffix(" | None"))
    if value is None and kind.endswith("| None"):
        return None
    if plain is None and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    if plain is None or type(value) is not plain:
        raise TypeError(f"{name}={value!r}, expected {kind}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return dict(pairs)


def digest(value: Any) -> str:
    """SHA-256 of the value's canonical JSON: sorted keys, no spaces, floats as their shortest exact decimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _broken(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"privacy.ledger={path}: {reason}; restore the file that the run wrote. Without it what was spent on these "
        "data is unknown: write privacy.ledger=null only for data that no run has used"
    )
