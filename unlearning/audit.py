"""``requests.jsonl``: the evidence of what was asked, when, what was done about it, and how it was judged.

One line an event, appended and synced to disk before the call returns, chained by hashes
(:mod:`unlearning.audit_lines`), checked by :func:`verify`. Subjects appear as keyed hashes, data as SHA-256, forgotten
interactions as counts. The id of a request is logged as its author wrote it, so it must not name the person.

The order of a request's life: ``received``; per strategy ``started`` and then one of ``finished``, ``failed``,
``recovered`` (after a crash). A request that was started and has no end is what :func:`open_requests` names.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from fedrec.errors import ConfigError, DataError
from unlearning.audit_key import audit_key
from unlearning.audit_lines import FIRST, SCHEMA, canonical, content_hash, faults, key_name, seal
from unlearning.audit_parts import GateResult, Hashes, Scope, gate_fields
from unlearning.audit_verify import OpenRequest, Problem, VerifyResult, log_file, open_requests, verify
from unlearning.purge import PurgeProof
from unlearning.strategies.base import Guarantee, Kind

__all__ = [
    "AuditLog", "GateResult", "Hashes", "OpenRequest", "Problem", "Scope", "VerifyResult", "audit_key", "open_requests",
    "verify",
]  # fmt: skip


class AuditLog:
    """The log of one run, open for appending by one process. ``head`` is the last line's hash, ``count`` how many."""

    def __init__(self, path: Path, key: bytes, lines: Sequence[Mapping[str, Any]], size: int) -> None:
        self.path, self._key, self._size = path, key, size
        self.count = len(lines)
        self.head = str(lines[-1]["hash"]) if lines else FIRST
        self._deadlines = {
            str(line["request"]): datetime.fromisoformat(line["deadline"])
            for line in lines
            if line["event"] == "received"
        }
        self._raw_ids: set[str] = set()

    @classmethod
    def start(
        cls, path: Path, key: bytes, *, run: str, dataset: str, data: str, seed: int, strategies: Sequence[str],
        versions: Mapping[str, str],
    ) -> Self:  # fmt: skip
        """A new log (``…/requests.jsonl``, or its run directory) whose first line says what it is about.

        ``data`` is the data set's SHA-256. DataError where there is one already, or the folder cannot be written.
        """
        path = log_file(path)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            raise DataError(
                f"{path}: there is a log already; AuditLog.open continues it, or choose another run directory"
            ) from None
        except OSError as error:
            raise DataError(
                f"{path}: cannot be made ({error.strerror or error}); choose another run directory"
            ) from None
        log = cls(path, key, (), 0)
        log.append(
            "opened", schema=SCHEMA, run=run, dataset=dataset, data=data, seed=seed, strategies=list(strategies),
            versions=dict(versions), key=key_name(key),
        )  # fmt: skip
        return log

    @classmethod
    def open(cls, path: Path, key: bytes) -> Self:
        """The log of an earlier process, to be continued. A last line that a crash cut short is taken off, and a
        line ``repaired`` says so in the same step.

        Raises:
            DataError: not readable, written with another key, or its chain is broken (names the line).
        """
        path = log_file(path)
        found = verify(path, key=key)
        for problem in found.problems:
            if not problem.torn:
                raise DataError(
                    f"{path}: {problem}. A broken log is not continued: restore the file that the run wrote, or start "
                    "a new run directory and keep this one as it is"
                )
        whole = path.read_bytes()
        good = whole[: whole.rfind(b"\n") + 1]
        log = cls(path, key, found.lines, len(good))
        if len(good) < len(whole):
            torn = whole[len(good) :]
            line = log._line("repaired", cut_bytes=len(torn), cut=hashlib.sha256(torn).hexdigest())
            temporary = path.with_suffix(".new")
            with temporary.open("wb") as file:
                file.write(good + canonical(line) + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            log._took(line)
        return log

    # -- events ---------------------------------------------------------------------------------------------------

    def received(
        self, request: str, kind: Kind, raw_ids: Sequence[str], scope: Scope, received: datetime, deadline: datetime,
        *, at_round: int | None = None, rejoin: bool = False,
    ) -> str:  # fmt: skip
        """A request came in. ``raw_ids`` are the data source's ids of its subjects (users, or the items of an item
        request); they are hashed here and go no further. ConfigError where the request's own id holds one of them."""
        unmistakable = {raw for raw in raw_ids if _unmistakable(raw)}
        for raw in unmistakable:
            if _as_token(raw).search(request):
                raise ConfigError(
                    f"unlearning.requests: the id {request!r} holds the id of one of its subjects, and request ids are "
                    "logged; write another, a ticket number say"
                )
        self._raw_ids |= unmistakable
        line = self.append(
            "received", request=request, kind=kind, rejoin=rejoin, subject=self.subject(raw_ids),
            subjects=sorted(self.subject([raw]) for raw in raw_ids), scope=asdict(scope), at_round=at_round,
            received=_utc(received), deadline=_utc(deadline),
        )  # fmt: skip
        self._deadlines[request] = datetime.fromisoformat(_utc(deadline))
        return line

    def withdrawn(self, request: str, reason: str) -> str:
        """Whoever asked took the request back before it was carried out."""
        return self.append("withdrawn", request=request, reason=self._clean(reason))

    def started(self, request: str, strategy: str, *, seed: int, round: int, before: Hashes) -> str:
        """``strategy`` begins to honour ``request`` after training round ``round``."""
        return self.append("started", request=request, strategy=strategy, seed=seed, round=round, before=asdict(before))

    def finished(
        self, request: str, strategy: str, *, after: Hashes, guarantee: Guarantee, gates: Sequence[GateResult],
        seconds: Mapping[str, float], purge: PurgeProof | None, fallback: str | None = None, notes: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """It is done, and judged. ``seconds`` by phase; whether it was in time is read off the clock here."""
        now = datetime.fromisoformat(_utc(datetime.now(UTC)))  # as it will be read
        return self.append(
            "finished", now, request=request, strategy=strategy, after=asdict(after), guarantee=asdict(guarantee),
            gates=[gate_fields(gate) for gate in gates],
            seconds={name: float(value) for name, value in seconds.items()},
            purge=purge.to_dict() if purge else None, fallback=fallback, in_time=now <= self._deadline(request),
            notes=[self._clean(note) for note in notes],
        )  # fmt: skip

    def failed(self, request: str, strategy: str, reason: str, state: Literal["old", "new"] = "old") -> str:
        """It could not be done; the federation is in its old state (or, where that was asked for, in the new one)."""
        return self.append("failed", request=request, strategy=strategy, reason=self._clean(reason), state=state)

    def recovered(self, request: str, strategy: str, reason: str, state: Literal["old", "new"]) -> str:
        """A crash had left it open: which state the run directory is in."""
        return self.append("recovered", request=request, strategy=strategy, reason=self._clean(reason), state=state)

    # -- lines ----------------------------------------------------------------------------------------------------

    def append(self, event: str, at: datetime | None = None, /, **fields: Any) -> str:
        """Write one event; the line is on disk when its hash is returned. The methods above are the way to call it.

        Raises:
            ValueError: fields that the event does not have, or that could hold raw data.
            DataError: somebody else wrote to the file meanwhile, or it cannot be written; nothing of the line stays.
        """
        line = self._line(event, at, **fields)
        text = canonical(line) + b"\n"
        try:
            with self.path.open("r+b") as file:
                if file.seek(0, os.SEEK_END) != self._size:
                    raise DataError(
                        f"{self.path}: another process wrote to it; run one fedrec unlearn at a time in a run directory"
                    )
                try:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(self._size)
                    raise
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be written ({error.strerror or error}); nothing is honoured without a record: "
                "make room or set its permissions, then run again"
            ) from None
        self._took(line)
        return self.head

    def subject(self, raw_ids: Sequence[str]) -> str:
        """The keyed hash (HMAC-SHA256) of one subject, or of several as a set, whatever their order."""
        return hmac.new(self._key, b"subject:" + canonical(sorted(set(raw_ids))), hashlib.sha256).hexdigest()

    def find(self, raw_id: str) -> tuple[str, ...]:
        """The ids of all requests that had this subject: what is asked when a person asks again."""
        mine = self.subject([raw_id])
        lines = verify(self.path).lines
        return tuple(line["request"] for line in lines if mine in line.get("subjects", ()))

    def _line(self, event: str, at: datetime | None = None, /, **fields: Any) -> dict[str, Any]:
        line: dict[str, Any] = {
            **fields, "event": event, "index": self.count, "previous": self.head,
            "time": _utc(at or datetime.now(UTC)), "hash": FIRST,
        }  # fmt: skip
        line["seal"] = seal(line, self._key)
        line["hash"] = content_hash(line)
        if fault := faults(line):
            raise ValueError(f"audit log: {fault}")
        return line

    def _took(self, line: Mapping[str, Any]) -> None:
        self.head = str(line["hash"])
        self.count += 1
        self._size += len(canonical(line)) + 1

    def _deadline(self, request: str) -> datetime:
        if request not in self._deadlines:
            raise ValueError(f"audit log: request {request!r} was not received")
        return self._deadlines[request]

    def _clean(self, text: str) -> str:
        """Free text as it may be logged: one line, its length bounded, no id of a subject in it."""
        for raw in self._raw_ids:
            if raw in text:
                text = _as_token(raw).sub("[subject]", text)
        return "".join(c if c.isprintable() else " " for c in text)[:400]


def _unmistakable(raw: str) -> bool:
    """Whether the id in a text can only be the id. "7" is also a count."""
    return (len(raw) >= 4 and not raw.isdigit()) or len(raw) >= 7


def _as_token(raw: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^\W_]){re.escape(raw)}(?![^\W_])")


def _utc(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise ValueError(f"audit log: {moment} has no time zone")
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")
