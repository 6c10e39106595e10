"""`fedrec unlearn --verify` and `--recover`: is the evidence whole, and what became of unfinished requests?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from fedrec.errors import DataError
from fedrec.experiment.unlearn.place import Place
from unlearning.audit import AuditLog, audit_key, open_requests, verify
from unlearning.purge import wipe
from unlearning.state import State


def verify_logs(run_dir: Path) -> tuple[str, bool]:
    """What there is to say of all audit logs of a run directory, and whether they can be believed.

    The lengths and last hashes are held against ``summary.json``, where there is one: without it a log whose end was
    cut off looks like a shorter log.

    Raises:
        DataError: no log is there.
    """
    known = _heads(run_dir)
    lines, whole = [], True
    for log in _logs(run_dir):
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
                f"did not finish; the state that counts is {_current(log.parent)} (fedrec unlearn --recover {run_dir})"
            )
        whole &= found.ok and not found.open
    return "\n".join(lines), whole


def recover_logs(run_dir: Path, key_file: Path | None = None) -> str:
    """Close the requests that a crash left open, and wipe what they left lying about; what was done, in words.

    The log gets a line for each: the state that counts is the old one where its hash is the one that was logged when
    the request was started, the new one otherwise.

    Raises:
        DataError: no log is there, or one is broken, or was written with another key.
    """
    said = []
    for log in _logs(run_dir):
        audit = AuditLog.open(log, audit_key(key_file))
        place = Place(log.parent)
        for left in open_requests(log):
            state = _which(place, log, left.request)
            why = "the process ended in the middle of the request"
            audit.recovered(left.request, left.strategy, why, state)
            said.append(f"{log.relative_to(run_dir)}: {left.request} was not finished; the {state} state counts")
        leftovers = [*log.parent.glob("work*"), *run_dir.parent.glob(f".{run_dir.name}.scratch")]
        leftovers += [path for path in log.parent.glob("state-*") if path.name != place.current]
        for path in leftovers:
            wipe(path)
            said.append(f"{path.name}: wiped")
    return "\n".join(said) or "nothing was left open"


def _which(place: Place, log: Path, request: str) -> Literal["old", "new"]:
    if place.current is None:
        return "old"
    lines = [line for line in verify(log).lines if line["event"] == "started" and line["request"] == request]
    state = State.load(place.folder / place.current)
    return "old" if place.hashes(state)[1] == lines[-1]["before"]["checkpoint"] else "new"


def _logs(run_dir: Path) -> list[Path]:
    logs = sorted(run_dir.rglob("requests.jsonl")) if run_dir.is_dir() else []
    if not logs:
        raise DataError(f"{run_dir}: no requests.jsonl below it; name the directory that `fedrec unlearn` printed")
    return logs


def _heads(run_dir: Path) -> dict[str, dict[str, Any]]:
    try:
        strategies = json.loads((run_dir / "summary.json").read_text())["unlearning"]["strategies"]
        return {entry["audit"]["log"]: entry["audit"] for entry in strategies.values()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _current(folder: Path) -> str:
    head = folder / "current.json"
    return str(json.loads(head.read_text())["state"]) if head.exists() else "none: training was not over"
