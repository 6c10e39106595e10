"""Unlearning in sentences: the verdict, what a batch was about, what a store holds, what the proof leaves open."""

from __future__ import annotations

from collections.abc import Sequence

from fedrec.experiment.console import format_bytes, format_count
from fedrec.experiment.unlearn.record import (
    BatchRecord,
    RequestRow,
    StrategyRecord,
    UnlearningRecord,
    kinds_label,
    label_of,
)

NOT_COVERED = (
    "A gate compares measurements with those of retrained models: it can refute forgetting, never prove it for every "
    "possible attack. Only a strategy whose guarantee is exact, or which states an (ε, δ), promises more.",
    "Whoever kept an earlier release of the model, or the recommendations it made, still has them. Comparing two "
    "releases tells what was removed between them, even when the second one was retrained from scratch.",
    "Copies outside of the run directory (backups, logs of other systems, what a file system keeps after a file was "
    "overwritten) are not searched.",
    "A device that is asked to forget deletes its own copy in this simulation; a real one has to be trusted to.",
    "The measurements use the held-out items of this data set. Few forgotten interactions give wide margins.",
)


def verdict_sentence(record: UnlearningRecord) -> str:
    """The whole result in a sentence or two."""
    if len(record.strategies) == 1:
        return _one(record, record.strategies[0])
    count = len(record.requests)
    passed = [strategy.name for strategy in record.strategies if not strategy.failed]
    text = f"{counted(count, 'request')} put to {len(record.strategies)} strategies: "
    if not passed:
        return text + "none passed all gates." + _late(record)
    text += f"{listed(passed)} passed all {'their' if len(passed) > 1 else 'its'} gates"
    failed = [strategy for strategy in record.strategies if strategy.failed]
    told = [f"{strategy.name} ({_failures(strategy)})" if len(failed) <= 3 else strategy.name for strategy in failed]
    return text + (f"; {listed(told)} did not." if failed else ".") + _late(record)


def _one(record: UnlearningRecord, strategy: StrategyRecord) -> str:
    requests, gates, failures = record.requests, strategy.gates, strategy.failures
    fallen = [batch for batch in strategy.batches if batch.fallback]
    text = f"{counted(len(requests), 'request')} {'put to' if strategy.failed else 'honoured by'} {strategy.name}: "
    if not gates:
        text += "no gate could decide"
    elif not failures:
        text += f"all {len(gates)} gates passed" if len(gates) > 1 else "its gate passed"
    else:
        text += f"{len(failures)} of {counted(len(gates), 'gate')} failed ({_failures(strategy)})"
    if fallen:
        text += f"; {fallen[0].fallback} took over in {listed([batch.title for batch in fallen])}"
    return f"{text}.{_late(record)}"


def failure_lines(record: UnlearningRecord) -> list[str]:
    """Of several strategies, what each of those that failed failed at."""
    return [f"{strategy.name} failed: {_failures(strategy, 99)}." for strategy in record.strategies if strategy.failed]


def _failures(strategy: StrategyRecord, most: int = 4) -> str:
    """``fold-in AUC in r1, r3``: each failed measure once, with the batches where it failed."""
    found: dict[str, list[str]] = {}
    for batch, gate in strategy.failures:
        found.setdefault(label_of(gate.name), []).append(batch.title)
    if not found:
        return "gates not met"
    if len(found) > most:
        return f"{len(found)} measures"
    alone = len(strategy.batches) == 1
    return "; ".join(name if alone else f"{name} in {', '.join(titles)}" for name, titles in found.items())


def _late(record: UnlearningRecord) -> str:
    late = [request.id for request in record.requests if request.in_time is False]
    if not late:
        return ""
    return f" {len(late)} late ({', '.join(late[:4])}{', …' if len(late) > 4 else ''})."


def scope(batch: BatchRecord) -> str:
    """What was asked: the selectors of the batch's requests, and who came back."""
    said = list(dict.fromkeys(request.selector for request in batch.requests if request.selector))
    if len(said) > 3:
        said = [*said[:2], f"{len(said) - 2} more"]
    said = said or [kinds_label(batch.kinds)]
    if batch.returning and "back" not in " ".join(said):
        said.append(f"{counted(batch.returning, 'user')} coming back")
    return ", ".join(said)


def forgotten_text(batch: BatchRecord) -> str:
    """``47 users, 4,930 interactions``, zeros left out."""
    said = [
        counted(int(value), name.removesuffix("s"))
        for name in ("users", "items", "interactions")
        if (value := batch.forgotten.get(name))
    ]
    return ", ".join(said) or "nothing"


def store_text(strategy: StrategyRecord) -> str:
    """Where updates are kept for this strategy and how many bytes."""
    if strategy.store_where == "none":
        return "none"
    where = {"client": "on the devices", "server": "on the server"}.get(strategy.store_where, strategy.store_where)
    return f"{format_bytes(strategy.store_bytes)} {where}"


def answer_text(request: RequestRow) -> str:
    """How long a request took and how much of its time was left, or how late it was."""
    if request.finished is None or request.received is None:
        return "not finished" if request.finished is None else "finished"
    took = _duration((request.finished - request.received).total_seconds())
    if request.deadline is None:
        return f"after {took}"
    left = (request.deadline - request.finished).total_seconds()
    late = request.in_time is False or left < 0
    return f"after {took}, " + (f"{_duration(-left)} late" if late else f"{_duration(left)} to spare")


def _duration(seconds: float) -> str:
    seconds = abs(seconds)
    for unit, size in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0)):
        if seconds >= 1.995 * size or (unit != "day" and seconds >= size):
            value = seconds / size
            text = f"{value:.0f}" if value >= 9.95 or abs(value - round(value)) < 0.05 else f"{value:.1f}"
            return f"{text} {unit}{'' if text == '1' else 's'}"
    return f"{seconds:.0f} s"


def counted(value: int, noun: str) -> str:
    """``1 request``, ``3 requests``."""
    return f"{format_count(value)} {noun}{'' if value == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
