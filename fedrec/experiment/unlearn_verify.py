"""`fedrec unlearn --verify`: is the evidence whole, and is every request that was started finished?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedrec.errors import DataError
from unlearning.audit import verify


def verify_logs(run_dir: Path) -> tuple[str, bool]:
    """What there is to say of all audit logs of a run directory, and whether they can be believed.

    The lengths and last hashes are held against ``summary.json``, where there is one: without it a log whose end was
    cut off looks like a shorter log.

    Raises:
        DataError: no log is there.
    """
    logs = sorted(run_dir.rglob("requests.jsonl")) if run_dir.is_dir() else []
    if not logs:
        raise DataError(f"{run_dir}: no requests.jsonl below it; name the directory that `fedrec unlearn` printed")
    known = _heads(run_dir)
    lines, whole = [], True
    for log in logs:
        name = str(log.relative_to(run_dir))
        said = known.get(name, {})
        found = verify(log, said.get("head"), said.get("lines"))
        ends = sum(line["event"] == "finished" for line in found.lines)
        state = "whole" if found.ok else "BROKEN"
        against = "" if said else "; no summary.json to hold its length against"
        lines.append(f"{name}: {state}, {len(found.lines)} lines, {ends} requests finished{against}")
        lines += [f"  {problem}" for problem in found.problems]
        for open_one in found.open:
            lines.append(
                f"  {open_one.request}: {open_one.strategy} started it at {open_one.since:%Y-%m-%d %H:%M:%S} UTC and "
                f"did not finish; the state that counts is {_current(log.parent)}"
            )
        whole &= found.ok and not found.open
    return "\n".join(lines), whole


def _heads(run_dir: Path) -> dict[str, dict[str, Any]]:
    try:
        strategies = json.loads((run_dir / "summary.json").read_text())["unlearning"]["strategies"]
        return {entry["audit"]["log"]: entry["audit"] for entry in strategies.values()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _current(folder: Path) -> str:
    head = folder / "current.json"
    return str(json.loads(head.read_text())["state"]) if head.exists() else "none: training was not over"
