"""What ``summary.json`` says of unlearning, as the tables, the plots and the report see it.

Whatever the document does not say is None or empty here, and shown as a dash or left out; nothing is made up for it.
``reading`` makes these from the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import fmean, stdev
from typing import Any

LABELS = {
    "retain_recall@20": "retain Recall@20",
    "retain_ndcg@20": "retain NDCG@20",
    "forget_recall@20": "forget Recall@20",
    "mia_auc": "membership AUC",
    "fold_in_auc": "fold-in AUC",
    "percentile": "percentile",
    "distance": "distance to gold",
    "noise_floor": "gold-to-gold distance",
    "overlap@20": "top 20 shared",
    "fold_in_percentile": "fold-in percentile",
    "percentile_items": "percentile, items",
    "bystander_ndcg@20": "bystander NDCG@20",
    "relearn_rounds": "rounds to relearn",
    "time": "time / retraining",
    "traffic": "traffic / retraining",
}
_KINDS = {"user": "users", "item": "items", "interaction": "interactions", "user_item": "users and items"}


def label_of(name: str) -> str:
    """A measure's name for people."""
    return LABELS.get(name, name.replace("_", " "))


def is_about_forgetting(name: str) -> bool:
    """Whether a gate asks for what is left of the data, and not for what is kept of the model or what it cost."""
    return not name.startswith(("retain", "bystander", "time", "traffic"))


@dataclass(frozen=True)
class GateRow:
    """One gate. ``passed`` None: reported only. ``low`` and ``high`` bound ``value`` where the limit says numbers."""

    name: str
    value: float | None
    gold: float | None
    spread: float | None
    limit: str
    passed: bool | None
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class RequestRow:
    """One request; times are timezone-aware where the document's are."""

    id: str
    kind: str
    selector: str
    reason: str
    received: datetime | None
    deadline: datetime | None
    finished: datetime | None
    in_time: bool | None


@dataclass(frozen=True)
class Row:
    """One measure of one batch: before, after (and its deviation over seeds), golds' mean and deviation, the gate."""

    name: str
    before: float | None
    after: float | None
    after_sd: float | None
    gold: float | None
    gold_sd: float | None
    limit: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class BatchRecord:
    """Requests that one strategy honoured together. ``number`` counts from 1 within the strategy."""

    number: int
    round: int | None
    kinds: tuple[str, ...]
    returning: int
    requests: tuple[RequestRow, ...]
    forgotten: Mapping[str, float]
    verdict: str
    fallback: str | None
    guarantee: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    after_sd: Mapping[str, float]
    golds: tuple[Mapping[str, float], ...]
    gates: tuple[GateRow, ...]
    cost: Mapping[str, float]
    retraining: Mapping[str, float]
    percentiles: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    trace: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """``r1, r2``, or how many where that would be long."""
        ids = [request.id for request in self.requests]
        if not ids:
            return f"batch {self.number}"
        return ", ".join(ids) if len(ids) <= 3 else f"{ids[0]} … {ids[-1]} ({len(ids)} requests)"

    @property
    def late(self) -> tuple[RequestRow, ...]:
        return tuple(request for request in self.requests if request.in_time is False)

    @property
    def failures(self) -> list[GateRow]:
        return [gate for gate in self.gates if gate.passed is False]

    @property
    def failed(self) -> bool:
        return self.verdict == "failed" or bool(self.failures)

    @property
    def remembers(self) -> bool:
        """Whether it failed at forgetting, and not only at usefulness or cost."""
        return self.failed and (not self.failures or any(is_about_forgetting(gate.name) for gate in self.failures))

    def gate(self, name: str) -> GateRow | None:
        return next((gate for gate in self.gates if gate.name == name), None)

    def value(self, name: str) -> float | None:
        """``name`` after unlearning: as measured, otherwise as its gate saw it."""
        found = self.after.get(name)
        gate = self.gate(name)
        return found if found is not None else gate.value if gate else None

    def gold(self, name: str) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation over the golds; those that the gate used where it says them."""
        found = [gold[name] for gold in self.golds if name in gold]
        gate = self.gate(name)
        mean = fmean(found) if found else None
        sd = stdev(found) if len(found) > 1 else None
        if gate is None:
            return mean, sd
        return (gate.gold if gate.gold is not None else mean, gate.spread if gate.spread is not None else sd)

    def of_gold(self, name: str, which: str = "after") -> float | None:
        """``name`` divided by the golds' mean."""
        value = self.value(name) if which == "after" else self.before.get(name)
        return _divided(value, self.gold(name)[0])

    def ratio(self, name: str = "cpu_s") -> float | None:
        """A cost divided by retraining's."""
        return _divided(self.cost.get(name), self.retraining.get(name))

    def rows(self) -> list[Row]:
        """The gates in their order, then whatever else was measured."""
        measured = [*self.after, *self.before, *(name for gold in self.golds for name in gold)]
        rows = []
        names = dict.fromkeys([*(gate.name for gate in self.gates), *measured])
        if "distance" in names:  # whose gold is the noise floor
            names.pop("noise_floor", None)
        for name in names:
            gate, (gold, gold_sd) = self.gate(name), self.gold(name)
            value = gate.value if gate and gate.value is not None else self.value(name)
            limit, passed, text = (gate.limit, gate.passed, gate.text) if gate else ("", None, "")
            rows.append(Row(name, self.before.get(name), value, self.after_sd.get(name), gold, gold_sd, limit, passed,
                            text))  # fmt: skip
        return rows


@dataclass(frozen=True)
class StrategyRecord:
    """What one strategy did. ``store`` is where it keeps updates and how many bytes; ``test`` of its final model."""

    name: str
    guarantee: str
    store_where: str
    store_bytes: float | None
    seconds: float | None
    test: Mapping[str, float]
    batches: tuple[BatchRecord, ...]

    @property
    def gates(self) -> list[tuple[BatchRecord, GateRow]]:
        """Every gate that decides, with its batch."""
        return [(batch, gate) for batch in self.batches for gate in batch.gates if gate.passed is not None]

    @property
    def failures(self) -> list[tuple[BatchRecord, GateRow]]:
        return [(batch, gate) for batch, gate in self.gates if gate.passed is False]

    @property
    def failed(self) -> bool:
        return any(batch.failed for batch in self.batches)


@dataclass(frozen=True)
class UnlearningRecord:
    """The whole of it. ``gold`` and ``audit`` are as the document has them; ``seeds`` only for means over seeds."""

    strategies: tuple[StrategyRecord, ...]
    golds: int | None
    gold: Mapping[str, Any]
    audit: Mapping[str, Any]
    seeds: tuple[int, ...] = ()

    @property
    def requests(self) -> list[RequestRow]:
        """Every request once; of several strategies, finished when the last of them was."""
        found: dict[str, RequestRow] = {}
        for strategy in self.strategies:
            for request in (one for batch in strategy.batches for one in batch.requests):
                known = found.setdefault(request.id, request)
                times = [one.finished for one in (known, request) if one.finished is not None]
                if known is not request and known.in_time is not False and len(times) == 2 and max(times) == times[1]:
                    found[request.id] = request
        return list(found.values())

    def groups(self) -> dict[tuple[str, ...], dict[str, list[BatchRecord]]]:
        """Batches that can be compared: by what was forgotten (kinds), then by strategy."""
        found: dict[tuple[str, ...], dict[str, list[BatchRecord]]] = {}
        for strategy in self.strategies:
            for batch in strategy.batches:
                found.setdefault(batch.kinds, {}).setdefault(strategy.name, []).append(batch)
        return found


def kinds_label(kinds: Sequence[str]) -> str:
    """``users``, ``users, interactions``; ``returning users`` where nothing is forgotten."""
    return ", ".join(_KINDS.get(kind, kind) for kind in kinds) or "returning users"


def _divided(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def mean_of(values: Iterable[float | None]) -> float | None:
    """The mean of what is there."""
    found = [value for value in values if value is not None]
    return fmean(found) if found else None
