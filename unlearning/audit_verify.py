"""Reads an audit log and says whether it can be believed: line by line, with what follows from each fault."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fedrec.errors import DataError
from unlearning.audit_lines import FIRST, canonical, content_hash, faults, key_name, seal


@dataclass(frozen=True)
class Problem:
    """One fault. ``line`` counts from 1; None is the file as a whole. ``torn``: what a crash in an append leaves."""

    line: int | None
    what: str
    follows: str
    torn: bool = False

    def __str__(self) -> str:
        return f"{'the log' if self.line is None else f'line {self.line}'}: {self.what}; {self.follows}"


@dataclass(frozen=True)
class OpenRequest:
    """A request that a strategy has started (in line ``line``, at ``since``) and neither finished nor failed."""

    request: str
    strategy: str
    line: int
    since: datetime


@dataclass(frozen=True)
class VerifyResult:
    """What a log says and whether it is whole. ``head`` is the last line's hash, ``lines`` all that could be read."""

    path: Path
    lines: tuple[Mapping[str, Any], ...]
    head: str
    problems: tuple[Problem, ...]
    open: tuple[OpenRequest, ...]
    sealed: bool  # seals were checked with the key

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: Path, head: str | None = None, count: int | None = None, *, key: bytes | None = None) -> VerifyResult:
    """Check every line of the log at ``path`` (``requests.jsonl``, or its run directory).

    The chain finds every changed, lost, moved, repeated or added line, but who rewrites the whole file can make another
    chain that holds. Two things stand against that: ``head`` and ``count``, the last line's hash and the number of
    lines as noted elsewhere (``summary.json``), which find a missing end too; and ``key``, with which the seals are
    checked, since nobody can seal a line without it.

    Raises:
        DataError: the file cannot be read.
    """
    path = log_file(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); name the run directory of fedrec unlearn, with its "
            "requests.jsonl"
        ) from None
    *whole, rest = raw.split(b"\n")
    lines: list[Mapping[str, Any]] = []
    sound: list[tuple[int, Mapping[str, Any]]] = []
    problems: list[Problem] = []
    previous, index = FIRST, 0
    for number, text in enumerate(whole, start=1):
        line = _parse(text, number, problems)
        if line is None:
            previous, index = "", index + 1
            continue
        found = _check_line(line, number, previous, index, key)
        problems += found
        if not found:
            sound.append((number, line))
        previous = str(line.get("hash", ""))
        index = line["index"] + 1 if type(line.get("index")) is int else index + 1
        lines.append(line)
    if rest:
        problems.append(
            Problem(
                len(whole) + 1, f"cut short after {len(rest)} bytes, as by a crash while it was being written",
                "what it recorded was not confirmed to anybody; the lines before it stand", torn=True,
            )
        )  # fmt: skip
    if not whole:
        problems.append(Problem(None, "it has no whole line", "there is no evidence in it"))
    problems += _check_end(whole, lines, head, count)
    order, still_open = _check_story(sound)
    if len(sound) == len(whole):  # else what is missing in the story is the broken lines
        problems += order
    last = str(lines[-1].get("hash", "")) if lines else FIRST
    ranked = sorted(problems, key=lambda one: (one.line is None, one.line or 0))
    return VerifyResult(path, tuple(lines), last, tuple(ranked), tuple(still_open), key is not None)


def open_requests(path: Path) -> tuple[OpenRequest, ...]:
    """The requests that were started and not finished: after a crash, those to look at."""
    return verify(path).open


def log_file(path: Path) -> Path:
    """``path`` itself, or the log of the run directory that it names."""
    path = Path(path)
    return path if path.suffix == ".jsonl" else path / "requests.jsonl"


def _parse(text: bytes, number: int, problems: list[Problem]) -> dict[str, Any] | None:
    try:
        line = json.loads(text.decode("ascii"))
        same = isinstance(line, dict) and canonical(line) == text
    except (ValueError, RecursionError):
        line, same = None, False
    if not isinstance(line, dict):
        problems.append(
            Problem(number, "it is not JSON any more", "what it recorded is lost, and so is the chain here")
        )
        return None
    if not same:
        problems.append(Problem(number, "it is not written as fedrec writes", "it was edited: it is no evidence"))
    return line


def _check_line(
    line: Mapping[str, Any], number: int, previous: str, index: int, key: bytes | None
) -> list[Problem]:  # fmt: skip
    found = []
    request = f" about request {line['request']}" if isinstance(line.get("request"), str) else ""
    try:
        unchanged = line.get("hash") == content_hash(line)
    except (ValueError, RecursionError):
        unchanged = False
    if not unchanged:
        found.append(Problem(number, "it was changed after it was written", f"what it says{request} is no evidence"))
    elif fault := faults(line):
        found.append(Problem(number, fault, f"what it says{request} is no evidence"))
    elif key is not None and line["event"] == "opened" and line["key"] != key_name(key):
        found.append(
            Problem(number, "it was opened with another key", "seals and subjects cannot be checked with this one")
        )
    elif key is not None and not hmac.compare_digest(line["seal"], seal(line, key)):
        found.append(Problem(number, "its seal is not of this key", "somebody without the key wrote it"))
    if line.get("previous") != previous:
        place = line.get("index")
        if type(place) is int and place > index:
            what = f"{place - index} line(s) before it are missing"
        elif type(place) is int and place < index:
            what = f"it belongs to place {place + 1}: it was repeated or moved"
        else:
            what = "it does not continue the line before it"
        found.append(Problem(number, what, "lines were taken out, put in or moved here: the order is no evidence"))
    elif line.get("index") != index:
        found.append(Problem(number, f"it counts itself as {line.get('index')}, not {index}", "it was put in here"))
    return found


def _check_end(
    whole: list[bytes], lines: list[Mapping[str, Any]], head: str | None, count: int | None
) -> list[Problem]:
    if count is not None and len(whole) < count:
        missing = count - len(whole)
        return [
            Problem(None, f"{missing} line(s) are missing at its end", "what happened after its last line is unknown")
        ]
    if count is not None and len(whole) > count:
        return [
            Problem(count + 1, "it was written after the run's summary", "this and what follows is not of that run")
        ]
    if head is not None and (not lines or lines[-1].get("hash") != head):
        return [Problem(None, "its last line is not the one that the run's summary names", "the log is not that run's")]
    return []


def _check_story(lines: list[tuple[int, Mapping[str, Any]]]) -> tuple[list[Problem], list[OpenRequest]]:
    """What no honest run writes: an end without a beginning, a deadline kept that was not."""
    problems: list[Problem] = []
    deadlines: dict[str, datetime] = {}
    still_open: dict[tuple[str, str], OpenRequest] = {}
    for number, line in lines:
        event = line["event"]
        if (event == "opened") != (number == 1):
            problems.append(Problem(number, f"{event} at place {number}", "a log begins with opened, and only begins"))
        elif event == "received":
            if line["request"] in deadlines:
                problems.append(
                    Problem(number, f"request {line['request']} was received before", "two requests have one name")
                )
            deadlines[line["request"]] = datetime.fromisoformat(line["deadline"])
        elif event == "withdrawn":
            if deadlines.pop(line["request"], None) is None:
                problems.append(Problem(number, f"request {line['request']} was not received", "there is none"))
        elif "strategy" in line:
            at = (line["request"], line["strategy"])
            if line["request"] not in deadlines:
                problems.append(Problem(number, f"request {at[0]} was not received", "nobody asked for this"))
            if event == "started":
                still_open[at] = OpenRequest(*at, number, datetime.fromisoformat(line["time"]))
            elif still_open.pop(at, None) is None:
                problems.append(Problem(number, f"{event}: {at[1]} had not started {at[0]}", "there is no beginning"))
            elif event == "finished" and at[0] in deadlines:
                in_time = datetime.fromisoformat(line["time"]) <= deadlines[at[0]]
                if in_time != line["in_time"]:
                    problems.append(Problem(number, f"in_time is {line['in_time']}", "the deadline says otherwise"))
    return problems, list(still_open.values())
