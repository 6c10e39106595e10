"""The ``unlearning`` part of ``summary.json``, read carefully: what is missing or no number becomes None or empty."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fedrec.experiment.console import number, part
from fedrec.experiment.unlearn.record import BatchRecord, GateRow, RequestRow, StrategyRecord, UnlearningRecord


def read_unlearning(document: Mapping[str, Any]) -> UnlearningRecord | None:
    """The ``unlearning`` part of a summary; None where there is none or no strategy ran."""
    said = part(document, "unlearning")
    strategies = tuple(_strategy(str(name), part(entry)) for name, entry in part(said, "strategies").items())
    if not strategies:
        return None
    count = number(said.get("golds"))
    seeds = tuple(int(value) for value in _numbers(said.get("seeds")))
    return UnlearningRecord(
        strategies, None if count is None else int(count), part(said, "gold"), part(said, "audit"), seeds
    )


def _strategy(name: str, entry: Mapping[str, Any]) -> StrategyRecord:
    store = part(entry, "store")
    batches = [one for one in _list(entry.get("batches")) if isinstance(one, Mapping)]
    promise = guarantee_text(entry.get("guarantee"))
    return StrategyRecord(
        name, promise, str(store.get("where") or "none"), number(store.get("bytes")), number(entry.get("seconds")),
        _finite(part(entry, "test")),
        tuple(_batch(place, one, promise) for place, one in enumerate(batches, 1)),
    )  # fmt: skip


def _batch(place: int, entry: Mapping[str, Any], promise: str) -> BatchRecord:
    measured, round_ = part(entry, "measured"), number(entry.get("round"))
    percentiles = {key: tuple(_numbers(value)) for key, value in part(entry, "percentiles").items()}
    return BatchRecord(
        number=place,
        round=None if round_ is None else int(round_),
        kinds=tuple(str(kind) for kind in _list(entry.get("kinds"))),
        returning=int(number(entry.get("returning")) or 0),
        requests=tuple(_request(one) for one in _list(entry.get("requests")) if isinstance(one, Mapping)),
        forgotten=_finite(part(entry, "forgotten")),
        verdict=str(entry.get("verdict") or ""),
        fallback=str(entry["fallback"]) if entry.get("fallback") else None,
        guarantee=guarantee_text(entry["guarantee"]) if entry.get("guarantee") else promise,
        before=_finite(part(measured, "before")),
        after=_finite(part(measured, "after")),
        after_sd=_finite(part(measured, "spread")),
        golds=tuple(_finite(one) for one in _list(measured.get("golds")) if isinstance(one, Mapping)),
        gates=tuple(_gate(one) for one in _list(entry.get("gates")) if isinstance(one, Mapping)),
        cost=_finite(part(entry, "cost")),
        retraining=_finite(part(entry, "retraining")),
        percentiles=percentiles,
        trace=tuple(one for one in _list(entry.get("trace")) if isinstance(one, Mapping)),
        notes=tuple(str(note) for note in _list(entry.get("notes"))),
    )


def _gate(entry: Mapping[str, Any]) -> GateRow:
    value, gold, spread = (_real(entry.get(key)) for key in ("value", "gold", "spread"))
    limit, passed = str(entry.get("limit") or ""), entry.get("passed")
    low, high = (_real(entry.get(key)) for key in ("low", "high"))
    if low is None and high is None:
        low, high = bounds_of(limit, gold)
    name, text = str(entry.get("name") or "gate"), str(entry.get("text") or "")
    return GateRow(name, value, gold, spread, limit, passed if isinstance(passed, bool) else None, text, low, high)


_NUMBER = r"(-?\d*\.?\d+(?:e-?\d+)?)"
_SIDE = re.compile(rf"^([≥≤]) {_NUMBER}(?: of (gold|retraining))?")
_AROUND = re.compile(rf"^{_NUMBER} ± {_NUMBER}")


def bounds_of(limit: str, gold: float | None) -> tuple[float | None, float | None]:
    """Lowest and highest value that a gate's ``limit`` allows, as far as its words say numbers.

    ``≤ 0.136 (gold + 2 sd)`` and ``≥ 0.329 (0.95 of gold)`` bound by the first number, ``≥ 0.5 of gold`` by that share
    of ``gold``, ``0.506 ± 0.020`` on both sides; ``reported``, ``not judged`` and other units bound nothing.
    """
    if found := _AROUND.match(limit):
        return float(found[1]) - float(found[2]), float(found[1]) + float(found[2])
    found = _SIDE.match(limit)
    if found is None or limit[found.end() :].lstrip().startswith("×"):
        return None, None
    bound = float(found[2])
    if found[3] == "gold":
        if gold is None:
            return None, None
        bound *= gold
    return (bound, None) if found[1] == "≥" else (None, bound)


def _request(entry: Mapping[str, Any]) -> RequestRow:
    said = entry.get("in_time")
    return RequestRow(
        id=str(entry.get("id") or ""),
        kind=str(entry.get("kind") or ""),
        selector=str(entry.get("selector") or ""),
        reason=str(entry.get("reason") or ""),
        received=_time(entry.get("received")),
        deadline=_time(entry.get("deadline")),
        finished=_time(entry.get("finished")),
        in_time=said if isinstance(said, bool) else None,
    )


def _time(value: object) -> datetime | None:
    """A time with its zone; UTC where it states none."""
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return found.replace(tzinfo=UTC) if found is not None and found.tzinfo is None else found


def guarantee_text(value: object) -> str:
    """``exact``, ``approximate``, ``filter only`` or ``certified (ε = …, δ = …)``: that word never without both."""
    if isinstance(value, Mapping):
        kind, epsilon, delta = str(value.get("kind") or ""), _real(value.get("epsilon")), _real(value.get("delta"))
        if kind == "certified" and epsilon is not None and delta is not None:
            return f"certified (ε = {epsilon:.3g}, δ = {delta:.2g})"
        value = kind
    text = "filter only" if value == "filter" else str(value or "none stated")
    if "certified" in text and not ("ε" in text and "δ" in text):
        return "none (no ε and δ recorded)"
    return text


def _list(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _numbers(value: object) -> list[float]:
    return [found for one in _list(value) if (found := _real(one)) is not None]


def _real(value: object) -> float | None:
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def _finite(entry: Mapping[str, Any]) -> dict[str, float]:
    return {str(key): found for key, value in entry.items() if (found := _real(value)) is not None}
