"""What the audit log takes from other rooms: hashes, scopes, gates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Hashes:
    """SHA-256 of what a request changes: the data, the model's checkpoint, the update store (None: there is none)."""

    data: str | None
    checkpoint: str | None
    store: str | None = None


@dataclass(frozen=True)
class Scope:
    """How much a request is about, and nothing more."""

    users: int
    items: int
    interactions: int


class GateResult(Protocol):
    """A gate as the log keeps it."""

    @property
    def name(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def gold(self) -> float: ...
    @property
    def spread(self) -> float: ...
    @property
    def limit(self) -> str: ...
    @property
    def passed(self) -> bool | None: ...


def finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def gate_fields(gate: GateResult) -> dict[str, Any]:
    """The gate as a line holds it; numbers that are not finite are null."""
    numbers = {"value": finite(gate.value), "gold": finite(gate.gold), "spread": finite(gate.spread)}
    return {
        **numbers,
        "name": gate.name,
        "limit": gate.limit,
        "passed": None if gate.passed is None else bool(gate.passed),
    }
