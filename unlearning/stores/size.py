"""How large an update history gets, and what to change where that is too much."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fedrec.errors import ConfigError
from unlearning.strategies.base import StoreNeeds

_SHARES = (0.9, 0.75, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.075, 0.05, 0.03, 0.02, 0.01, 0.005)


def check_settings(needs: StoreNeeds) -> None:
    """ConfigError for an interval, share, precision or bound that makes no sense."""
    if needs.interval < 1:
        raise ConfigError(f"update store: interval={needs.interval}: write 1 (every round) or more")
    if not 0.0 < needs.top <= 1.0:
        raise ConfigError(f"update store: top={needs.top}: write a share above 0, at most 1")
    if needs.precision not in ("float32", "float16"):
        raise ConfigError(f"update store: precision={needs.precision!r}: write float32 or float16")
    if needs.max_bytes < 1:
        raise ConfigError(f"update store: max_bytes={needs.max_bytes}: write a number of bytes, for example 2147483648")


def estimate(needs: StoreNeeds, *, devices: float, mean_rows: float, width: int, rounds: int) -> int:
    """Bytes that a history will take: ``devices`` a round, with ``mean_rows`` rows of ``width`` values each."""
    stored = -(-rounds // needs.interval)
    row = 4 + width * (2 if needs.precision == "float16" else 4)
    kept = min(mean_rows, max(1.0, needs.top * mean_rows + 0.5 * (needs.top < 1.0)))
    return math.ceil(stored * (devices * (kept * row + 20) + 700))


def check_size(needs: StoreNeeds, *, devices: float, mean_rows: float, width: int, rounds: int) -> int:
    """The estimate, before training. ConfigError with what to change where it exceeds ``max_bytes``."""
    check_settings(needs)
    size = estimate(needs, devices=devices, mean_rows=mean_rows, width=width, rounds=rounds)
    if size > needs.max_bytes:
        raise ConfigError(
            f"update store: {rounds} rounds need about {size_text(size)}, max_bytes={needs.max_bytes} allows "
            f"{size_text(needs.max_bytes)}; "
            f"{remedy(needs, devices=devices, mean_rows=mean_rows, width=width, rounds=rounds)}"
        )
    return size


def remedy(needs: StoreNeeds, *, devices: float, mean_rows: float, width: int, rounds: int) -> str:
    """Changes each of which would do, by the estimate and with a tenth to spare."""

    def need(**changed: Any) -> int:
        changed_needs = replace(needs, **changed)
        return math.ceil(
            1.1 * estimate(changed_needs, devices=devices, mean_rows=mean_rows, width=width, rounds=rounds)
        )

    ways = []
    for interval in range(needs.interval + 1, rounds + 1):
        if need(interval=interval) <= needs.max_bytes:
            ways.append(f"interval={interval}")
            break
    for share in _SHARES:
        if share < needs.top and need(top=share) <= needs.max_bytes:
            ways.append(f"top={share:g}")
            break
    if needs.precision == "float32" and need(precision="float16") <= needs.max_bytes:
        ways.append("precision=float16")
    return f"write {', '.join([*ways, ''])}or max_bytes={need()}" if ways else f"write max_bytes={need()}"


def size_text(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
