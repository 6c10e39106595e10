"""The lines of ``requests.jsonl``: which events there are, what each may say, how they are chained.

A line is canonical JSON (sorted keys, no spaces, ASCII, floats as their shortest exact decimal). ``hash`` is the
SHA-256 of all its other fields, ``previous`` (the line before's hash; 64 zeros in the first) and ``seal`` among them;
``seal`` is an HMAC-SHA256 of the rest with the audit key. Every field of every event is listed here with what it takes:
hashes, counts, times, names, gates. No field takes a list of numbers, an item or a raw identifier, so that neither an
embedding nor a history can get in.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

SCHEMA = 1
FIRST = "0" * 64
_HEAD = ("index", "time", "event", "previous", "seal", "hash")

Check = Callable[[Any], bool]
_HASH = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"\w[\w .:@/+\-]{0,63}")


def _hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _label(value: Any) -> bool:
    """A name that somebody else chose: of a request, a run, a strategy."""
    return isinstance(value, str) and 1 <= len(value) <= 64 and value.isprintable()


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 400 and value.isprintable()


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _whole(value: Any) -> bool:
    return type(value) is int


def _flag(value: Any) -> bool:
    return type(value) is bool


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _moment(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check, most: int) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _record(**fields: Check) -> Check:
    return lambda value: isinstance(value, dict) and set(value) == set(fields) and all(
        check(value[name]) for name, check in fields.items()
    )  # fmt: skip


def _by_name(check: Check, most: int = 32) -> Check:
    return lambda value: isinstance(value, dict) and len(value) <= most and all(
        _name(key) and not key[0].isdigit() and check(inner) for key, inner in value.items()
    )  # fmt: skip


def _one_of(*words: str) -> Check:
    return lambda value: value in words


_HASHES = _record(data=_or_null(_hash), checkpoint=_or_null(_hash), store=_or_null(_hash))
_GATE = _record(
    name=_name, value=_or_null(_number), gold=_or_null(_number), spread=_or_null(_number), limit=_text,
    passed=_or_null(_flag),
)  # fmt: skip
_GUARANTEE = _record(
    kind=_one_of("exact", "approximate", "certified", "filter"), epsilon=_or_null(_number), delta=_or_null(_number)
)
_FOUND = _record(file=_text, offset=_count, what=_text)
_PURGE = _record(
    ok=_flag, files=_count, bytes=_count, needles=_count, undecided=_count, listing=_hash, findings=_count,
    first=_list_of(_FOUND, 20),
)  # fmt: skip
_OF_REQUEST: dict[str, Check] = {"request": _label, "strategy": _label}

#: What each event says, besides its place in the chain.
EVENTS: Mapping[str, Mapping[str, Check]] = {
    "opened": {
        "schema": lambda value: value == SCHEMA, "run": _label, "dataset": _label, "data": _hash, "seed": _whole,
        "strategies": _list_of(_label, 64), "versions": _by_name(_name), "key": _hash,
    },
    "repaired": {"cut_bytes": _count, "cut": _hash},
    "received": {
        "request": _label, "kind": _one_of("user", "item", "interaction", "user_item"), "rejoin": _flag,
        "subject": _hash, "subjects": _list_of(_hash, 10**6), "at_round": _or_null(_count), "received": _moment,
        "scope": _record(users=_count, items=_count, interactions=_count), "deadline": _moment,
    },
    "withdrawn": {"request": _label, "reason": _text},
    "started": {**_OF_REQUEST, "seed": _whole, "round": _count, "before": _HASHES},
    "finished": {
        **_OF_REQUEST, "after": _HASHES, "purge": _or_null(_PURGE), "gates": _list_of(_GATE, 64),
        "seconds": _by_name(_number), "guarantee": _GUARANTEE, "fallback": _or_null(_label), "in_time": _flag,
        "notes": _list_of(_text, 64),
    },
    "failed": {**_OF_REQUEST, "reason": _text, "state": _one_of("old", "new")},
    "recovered": {**_OF_REQUEST, "reason": _text, "state": _one_of("old", "new")},
}  # fmt: skip


def faults(line: Mapping[str, Any]) -> str | None:
    """What is wrong with a line's fields (a clause), or None."""
    event = line.get("event")
    if not isinstance(event, str) or event not in EVENTS:
        return f"no such event: {event!r}"[:80]
    fields = EVENTS[event]
    if set(line) != {*_HEAD, *fields}:
        odd = sorted({*_HEAD, *fields} ^ set(line))
        return f"{event}: its fields are not those of schema {SCHEMA} ({', '.join(map(str, odd))})"[:200]
    checks = {**fields, "index": _count, "time": _moment, "previous": _hash, "seal": _hash, "hash": _hash}
    for name, check in checks.items():
        if not check(line[name]):
            return f"{event}: {name} does not hold what it should"
    if not certified_rightly(line):
        return "it says certified without an (ε, δ)"
    return None


def certified_rightly(line: Mapping[str, Any]) -> bool:
    """Whether the word certified stands in it only beside its ε > 0 and 0 < δ < 1, and every (ε, δ) beside the word."""
    guarantee = line.get("guarantee")
    named = "certified" in canonical(dict(line)).decode().lower()
    if not isinstance(guarantee, dict):
        return not named
    epsilon, delta = guarantee.get("epsilon"), guarantee.get("delta")
    if guarantee.get("kind") != "certified":
        return not named and epsilon is None and delta is None
    if not isinstance(epsilon, int | float) or not isinstance(delta, int | float):
        return False
    return 0 < epsilon < math.inf and 0 < delta < 1


def canonical(value: Any) -> bytes:
    """Canonical JSON, without the newline."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def content_hash(line: Mapping[str, Any]) -> str:
    """The SHA-256 that ``line["hash"]`` must be."""
    return hashlib.sha256(canonical({key: value for key, value in line.items() if key != "hash"})).hexdigest()


def seal(line: Mapping[str, Any], key: bytes) -> str:
    """The HMAC that ``line["seal"]`` must be: only a holder of the key can make a line."""
    content = {name: value for name, value in line.items() if name not in ("hash", "seal")}
    return hmac.new(key, b"line:" + canonical(content), hashlib.sha256).hexdigest()


def key_name(key: bytes) -> str:
    """A fingerprint of the key, to tell one from another."""
    return hmac.new(key, b"fedrec audit key", hashlib.sha256).hexdigest()
