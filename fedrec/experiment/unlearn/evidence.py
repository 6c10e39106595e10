"""What is said of a request: its lines in the audit log, its entry in ``summary.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from fedrec.experiment.unlearn.place import Place
from fedrec.experiment.unlearn.setup import Setup
from unlearning.audit import AuditLog, Hashes, Scope
from unlearning.purge import PurgeProof
from unlearning.requests import Batch, Request, report_fields
from unlearning.state import State
from unlearning.strategies import Cost, Guarantee
from unlearning.verification import Gate


@dataclass(frozen=True)
class Evidence:
    """Writes one strategy's audit log."""

    name: str
    setup: Setup
    log: AuditLog
    place: Place

    def receive(self) -> None:
        """Log every request as received."""
        for batch in self.setup.batches:
            for request in batch.requests:
                forget = request.forget
                users = request.returning if request.rejoin else forget.users
                scope = Scope(int(users.size), int(forget.items.size), forget.size)
                self.log.received(
                    request.id, request.kind, subjects_of(self.setup, request), scope, request.received,
                    request.deadline, at_round=request.at_round, rejoin=request.rejoin,
                )  # fmt: skip

    def started(self, batch: Batch, state: State) -> None:
        hashes = Hashes(*self.place.hashes(state))
        for request in batch.requests:
            self.log.started(request.id, self.name, seed=self.setup.federation.seed, round=batch.round, before=hashes)

    def finished(
        self, batch: Batch, state: State, guarantee: Guarantee, gates: list[Gate], seconds: dict[str, float],
        proof: PurgeProof | None, fallback: str | None, notes: list[str],
    ) -> None:  # fmt: skip
        hashes = Hashes(*self.place.hashes(state))
        for request in batch.requests:
            self.log.finished(
                request.id, self.name, after=hashes, guarantee=guarantee, gates=gates, seconds=seconds, purge=proof,
                fallback=fallback, notes=notes,
            )  # fmt: skip

    def failed(self, batch: Batch, reason: str) -> None:
        for request in batch.requests:
            self.log.failed(request.id, self.name, reason)


def purge_notes(proof: PurgeProof) -> list[str]:
    if proof.ok:
        return []
    where = ", ".join(sorted({finding.file for finding in proof.findings})[:3])
    return [f"the purge is not complete: {len(proof.findings)} places, first in {where}"]


def entry_of(batch: Batch, verdict: str, *, finished: datetime, **more: Any) -> dict[str, Any]:
    requests = [
        {
            **report_fields(request), "finished": finished.isoformat(timespec="seconds"),
            "in_time": finished <= request.deadline,
        }
        for request in batch.requests
    ]  # fmt: skip
    forget = batch.forget
    entry: dict[str, Any] = {
        "round": batch.round, "kinds": sorted(batch.kinds), "returning": int(batch.returning.size),
        "requests": requests, "verdict": verdict, "fallback": None,
        "forgotten": {
            "users": int(forget.users.size), "items": int(forget.items.size), "interactions": forget.size,
            "affected_users": int(forget.affected.size),
        },
    }  # fmt: skip
    for key, value in more.items():
        if key == "gates":
            value = [asdict(gate) for gate in value]
        elif isinstance(value, Cost):
            value = asdict(value)
        entry[key] = value
    return entry


def subjects_of(setup: Setup, request: Request) -> list[str]:
    """The data source's ids of whom or what a request is about; for single interactions, of their users."""
    data, forget = setup.plan.data, request.forget
    if request.rejoin:
        return [str(data.user_ids[user]) for user in request.returning]
    users = forget.users if request.kind != "interaction" else forget.affected
    found = [str(data.user_ids[user]) for user in users]
    return found + [f"item {data.item_ids[item]}" for item in forget.items]
