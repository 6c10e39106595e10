"""Values of a request file: ids, shares, moments. Files give text, an inline configuration numbers and dates too.

``where`` and ``key`` are what a ConfigError calls the place of a value that cannot be used.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, time
from typing import Any

from fedrec.errors import ConfigError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: Any) -> str:
    """A value in an error: as written, but never longer than a line."""
    return _SHORT.repr(value)


def hint(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """``did you mean …?`` with the nearest of ``known``, else ``otherwise``, else all of them."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {near[0]}?" if near else otherwise or f"there are {', '.join(names)}"


def moment(where: str, key: str, value: Any, of_day: time) -> datetime:
    """A point in time; a date alone is ``of_day``, and what has no zone is UTC."""
    try:
        read = value
        if isinstance(value, str):
            read = date.fromisoformat(value) if len(value) <= 10 else datetime.fromisoformat(value)
        if isinstance(read, date) and not isinstance(read, datetime):
            read = datetime.combine(read, of_day)
        if isinstance(read, datetime):
            return read.replace(tzinfo=UTC) if read.tzinfo is None else read.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{where}: {key}={shown(value)}: write a date or a time, 2025-01-31 or 2025-01-31T12:00:00+01:00")


def share(where: str, key: str, value: Any, *, whole: bool) -> float:
    part = number(value, float)
    if part is None or not 0.0 < part <= 1.0 or (part == 1.0 and not whole):
        most = "above 0 and at most 1" if whole else "between 0 and 1, neither included"
        raise ConfigError(f"{where}: {key}={shown(value)}: write a share {most}, for example {key}: 0.05")
    return part


def number(value: Any, make: Callable[[Any], float]) -> float | None:
    """``value`` as an int or a float; None if it is none. Files give text, a configuration numbers."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        made = make(value)
    except (ValueError, OverflowError):
        return None
    exact = isinstance(value, str) or made == value
    return made if exact and math.isfinite(made) else None


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def one_id(where: str, key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ConfigError(f"{where}: {key}={shown(value)}: write text or a whole number, as the data set has it")
    return str(value)


def id_list(where: str, key: str, value: Any) -> tuple[str, ...]:
    if not is_list(value):
        raise ConfigError(f"{where}: {key}={shown(value)}: write a list, {key}: [id, id]")
    if not value:
        raise ConfigError(f"{where}: {key} is empty; write at least one id, or delete the entry")
    ids = tuple(one_id(where, key, one) for one in value)
    _once(where, key, ids)
    return ids


def pair_list(where: str, value: Any) -> tuple[tuple[str, str], ...]:
    if not is_list(value):
        raise ConfigError(f"{where}: pairs={shown(value)}: write a list of pairs, pairs: [[user, item], [user, item]]")
    if not value:
        raise ConfigError(f"{where}: pairs is empty; write at least one pair, or delete the entry")
    pairs = []
    for one in value:
        if not is_list(one) or len(one) != 2:
            raise ConfigError(
                f"{where}: pairs: {shown(one)} is not a pair; write [user, item], so pairs: [[user, item]]"
            )
        pairs.append((one_id(where, "pairs", one[0]), one_id(where, "pairs", one[1])))
    _once(where, "pairs", pairs)
    return tuple(pairs)


def _once(where: str, key: str, values: Sequence[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise ConfigError(f"{where}: {key}: {shown(value)} is listed twice; delete one of them")
        seen.add(value)
