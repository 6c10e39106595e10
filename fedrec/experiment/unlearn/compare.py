"""Strategies side by side: one line a strategy, gold and the model before above them, all as shares of gold or as AUCs.

Only batches that forget the same kind of thing are compared; a strategy's line is the mean over its batches of a kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedrec.experiment.console import format_bytes
from fedrec.experiment.unlearn.record import BatchRecord, StrategyRecord, UnlearningRecord, mean_of

_DASH = "–"
COLUMNS = ("strategy", "retain R@20", "retain N@20", "forget R@20", "member AUC", "fold-in AUC", "percentile",
           "time", "store", "guarantee", "verdict")  # fmt: skip
MEASURES = ("forget_recall@20", "mia_auc", "fold_in_auc", "percentile")
RETAIN = ("retain_recall@20", "retain_ndcg@20")


@dataclass(frozen=True)
class Compared:
    """One line. ``retain`` are shares of gold; ``values`` those of ``MEASURES``, ``time`` a share of retraining."""

    label: str
    retain: tuple[float | None, ...]
    values: tuple[float | None, ...]
    time: float | None
    store: str
    guarantee: str
    verdict: str
    reference: bool = False

    def cells(self) -> tuple[str, ...]:
        """The texts under ``COLUMNS``."""
        shown = [_DASH if value is None else f"{value:.3f}" for value in (*self.retain, *self.values)]
        time = _DASH if self.time is None else f"{self.time:.2g}" if self.time < 0.0995 else f"{self.time:.2f}"
        return (self.label, *shown, time, self.store, self.guarantee, self.verdict)


def compare(record: UnlearningRecord) -> list[tuple[tuple[str, ...], list[Compared], int]]:
    """For every kind of request: its kinds, the lines, and how many batches a strategy had at most."""
    by_name = {strategy.name: strategy for strategy in record.strategies}
    found = []
    for kinds, batches in record.groups().items():
        everything = [batch for own in batches.values() for batch in own]
        rows = [_gold(everything), _before(everything)]
        rows += [_line(by_name[name], own) for name, own in batches.items()]
        found.append((kinds, rows, max(len(own) for own in batches.values())))
    return found


def _gold(batches: Sequence[BatchRecord]) -> Compared:
    values = tuple(mean_of(batch.gold(name)[0] for batch in batches) for name in MEASURES)
    retain = tuple(1.0 if any(batch.gold(name)[0] is not None for batch in batches) else None for name in RETAIN)
    return Compared("gold (retrained)", retain, values, 1.0, _DASH, "exact", "", reference=True)


def _before(batches: Sequence[BatchRecord]) -> Compared:
    retain = tuple(mean_of(batch.of_gold(name, "before") for batch in batches) for name in RETAIN)
    values = tuple(mean_of(batch.before.get(name) for batch in batches) for name in MEASURES)
    return Compared("before", retain, values, None, _DASH, _DASH, "", reference=True)


def _line(strategy: StrategyRecord, batches: Sequence[BatchRecord]) -> Compared:
    failed = sum(gate.passed is False for batch in batches for gate in batch.gates)
    decided = sum(gate.passed is not None for batch in batches for gate in batch.gates)
    verdict = "passed" if decided and not failed else f"{failed} of {decided} failed" if decided else "not judged"
    if not failed and any(batch.failed for batch in batches):
        verdict = "failed"
    if any(batch.fallback for batch in batches):
        verdict += f", {batches[-1].fallback or 'retrain'} instead"
    stored = strategy.store_bytes if strategy.store_where != "none" else None
    return Compared(
        strategy.name,
        tuple(mean_of(batch.of_gold(name) for batch in batches) for name in RETAIN),
        tuple(mean_of(batch.value(name) for batch in batches) for name in MEASURES),
        mean_of(batch.ratio() for batch in batches),
        "none" if strategy.store_where == "none" else format_bytes(stored),
        ", ".join(dict.fromkeys(batch.guarantee for batch in batches)),
        verdict,
    )
