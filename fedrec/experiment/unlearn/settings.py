"""The ``unlearning`` section of a configuration, checked before anything starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrec.errors import ConfigError
from unlearning.strategies import Strategy, build
from unlearning.verification import Thresholds

_KEYS = (
    "requests", "batching", "run_dir", "purge_source", "late_users", "late_round", "golds", "gold_workers",
    "gold_cache", "relearn_rounds", "on_gate_fail", "audit_key", "gates", "strategies",
)  # fmt: skip
_ON_FAIL = ("report", "retrain", "error")


@dataclass(frozen=True)
class UnlearnSettings:
    """What to forget, how, and how it is judged. ``run_dir`` is a finished run to start from; None trains one."""

    requests: Any
    strategies: Mapping[str, Strategy]
    thresholds: Thresholds
    batching: str
    run_dir: Path | None
    purge_source: bool
    late_users: float
    late_round: int
    golds: int
    gold_workers: int
    gold_cache: bool
    relearn_rounds: int
    on_gate_fail: str
    audit_key: Path | None

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> UnlearnSettings:
        """ConfigError for whatever is missing, unknown or out of range, naming the key."""
        for key in section:
            if key not in _KEYS:
                raise ConfigError(f"unlearning.{key}: no such setting; there are {', '.join(_KEYS)}")
        chosen = section["strategies"]
        if not isinstance(chosen, Mapping) or not chosen:
            raise ConfigError(
                "unlearning.strategies: none is chosen; write unlearning=reverse_bpr, or unlearning=all to compare"
            )
        if not section["requests"]:
            raise ConfigError(
                "unlearning.requests: nothing is asked for; write unlearning.requests=FILE.yaml, or choose a recipe, "
                "experiment=unlearn_ml100k"
            )
        for key, least in (("golds", 1), ("gold_workers", 0), ("relearn_rounds", 0), ("late_round", 0)):
            if section[key] < least:
                raise ConfigError(f"unlearning.{key}={section[key]}: write a whole number, {least} or more")
        late, since = float(section["late_users"]), int(section["late_round"])
        if not 0.0 <= late < 1.0 or (late > 0.0) != (since > 1):
            raise ConfigError(
                f"unlearning.late_users={late}, late_round={since}: write a share of the users below 1 and the round "
                "in which they join, 2 or later; or 0 and 0"
            )
        if section["on_gate_fail"] not in _ON_FAIL:
            raise ConfigError(f"unlearning.on_gate_fail={section['on_gate_fail']}: write one of {', '.join(_ON_FAIL)}")
        strategies = {str(name): build(str(name), options or {}) for name, options in chosen.items()}
        for name in strategies:
            if "/" in name or name.startswith("."):
                raise ConfigError(f"unlearning.strategies.{name}: names a folder; write it without / or a leading dot")
        return cls(
            requests=section["requests"],
            strategies=strategies,
            thresholds=Thresholds.from_config(section["gates"], "unlearning.gates"),
            batching=str(section["batching"]),
            run_dir=_path(section["run_dir"]),
            purge_source=bool(section["purge_source"]),
            late_users=late,
            late_round=since,
            golds=int(section["golds"]),
            gold_workers=int(section["gold_workers"]) or max(1, os.cpu_count() or 1),
            gold_cache=bool(section["gold_cache"]),
            relearn_rounds=int(section["relearn_rounds"]),
            on_gate_fail=str(section["on_gate_fail"]),
            audit_key=_path(section["audit_key"]),
        )


def _path(value: Any) -> Path | None:
    return None if value is None else Path(str(value)).expanduser()
