"""The ``unlearning`` part of a ``summary.json`` in the documented format, for tests of what is drawn from it.

The measures are those of a central prototype on MovieLens-100K; percentiles, traces, NDCG of user requests and costs
are smooth curves. What is tested is that the tables and the report say what the document says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tests.experiment.run_directories import lines_of, summary_of, write_run

Document = dict[str, Any]
# retain Recall@20, retain NDCG@20, forget Recall@20, membership AUC, fold-in AUC, mean percentile, time / retraining
GOLD = {
    "interaction": (0.3280, 0.2768, 0.298, 0.499, None, 0.871, 1.0),
    "user": (0.3465, 0.2891, 0.120, 0.506, 0.503, 0.868, 1.0),
    "item": (0.3608, 0.2952, 0.0, 0.497, None, 0.714, 1.0),
}
BEFORE = {
    "interaction": (0.3228, 0.2600, 0.451, 0.672, None, 0.934, 0.0),
    "user": (0.3406, 0.2811, 0.254, 0.678, 0.675, 0.931, 0.0),
    "item": (0.3601, 0.2944, 0.214, 0.661, None, 0.842, 0.0),
}
AFTER: dict[str, dict[str, tuple[float | None, ...]]] = {
    "interaction": {
        "retrain": (0.3291, 0.2775, 0.291, 0.502, None, 0.869, 1.0),
        "reverse_bpr": (0.3200, 0.2652, 0.234, 0.510, None, 0.850, 0.102),
        "federaser": (0.3171, 0.2644, 0.301, 0.521, None, 0.872, 0.31),
        "fru": (0.3188, 0.2660, 0.299, 0.517, None, 0.871, 0.17),
        "cfru": (0.3102, 0.2571, 0.312, 0.548, None, 0.880, 0.002),
        "finetune": (0.3202, 0.2590, 0.401, 0.634, None, 0.925, 0.29),
        "gradient_ascent": (0.3163, 0.2556, 0.404, 0.642, None, 0.922, 0.004),
        "delete_rows": (0.3228, 0.2600, 0.448, 0.671, None, 0.934, 0.0001),
        "retrieval_filter": (0.2790, 0.2204, 0.297, 0.560, None, 0.881, 0.011),
    },
    "user": {
        "retrain": (0.3471, 0.2899, 0.119, 0.504, 0.501, 0.867, 1.0),
        "reverse_bpr": (0.3356, 0.2788, 0.122, 0.495, 0.478, 0.865, 0.22),
        "federaser": (0.3340, 0.2761, 0.124, 0.510, 0.527, 0.869, 0.31),
        "fru": (0.3372, 0.2802, 0.121, 0.507, 0.519, 0.868, 0.17),
        "cfru": (0.3218, 0.2680, 0.121, 0.508, 0.561, 0.870, 0.002),
        "finetune": (0.3402, 0.2808, 0.121, 0.506, 0.644, 0.869, 0.29),
        "gradient_ascent": (0.3262, 0.2701, 0.098, 0.471, 0.412, 0.802, 0.004),
        "delete_rows": (0.3406, 0.2811, 0.122, 0.507, 0.675, 0.869, 0.0001),
        "retrieval_filter": (0.2790, 0.2204, 0.122, 0.507, 0.675, 0.868, 0.011),
    },
    "item": {
        "retrain": (0.3611, 0.2957, 0.0, 0.498, None, 0.716, 1.0),
        "reverse_bpr": (0.3453, 0.2860, 0.0, 0.493, None, 0.717, 0.0002),
        "delete_rows": (0.3453, 0.2860, 0.0, 0.493, None, 0.717, 0.0001),
    },
}
NAMES = ("retain_recall@20", "retain_ndcg@20", "forget_recall@20", "mia_auc", "fold_in_auc", "percentile")
GUARANTEES = {"retrain": "exact", "retrieval_filter": "filter only"}
STORES = {"federaser": ("server", 214_000_000), "fru": ("client", 31_000_000), "cfru": ("server", 52_000_000)}
TIMES = {"interaction": 0.15, "user": 0.30, "item": 0.01}
SELECTORS = {"interaction": "5 % of interactions, random", "user": "5 % of users, random", "item": "5 % of items, edge"}
REASONS = {"interaction": "records bought from a broker", "user": "erasure, GDPR Art. 17", "item": "licence ended"}
FORGOTTEN = {"interaction": (0, 0, 4906), "user": (47, 0, 4930), "item": (0, 84, 1013)}
TEXTS = {
    "forget_recall@20": "Forgotten pairs are recommended as rarely as by a model that never saw them.",
    "retain_recall@20": "Everybody else is served about as well as by a retrained model.",
    "retain_ndcg@20": "The order of everybody else's recommendations is about as good as a retrained model's.",
    "mia_auc": "Scores do not tell the forgotten interactions from ones that were never trained on.",
    "fold_in_auc": "The item view does not give the deleted history away.",
    "percentile": "Forgotten items stand where a model without them puts them, neither above nor below.",
    "time": "It took a fraction of a retraining's CPU time.",
}
START = datetime(2025, 3, 3, 9, 30, tzinfo=UTC)


def measures(values: Sequence[float | None]) -> dict[str, float | None]:
    return dict(zip(NAMES, values[:-1], strict=True))


def golds(kind: str, count: int = 3) -> list[dict[str, Any]]:
    """Golds around their mean, with the spread between seeds that the prototype had."""
    sizes = {"retain_recall@20": 0.006, "retain_ndcg@20": 0.005, "forget_recall@20": 0.008, "mia_auc": 0.006,
             "fold_in_auc": 0.008, "percentile": 0.003}  # fmt: skip
    steps = np.linspace(-1.0, 1.0, count) if count > 1 else np.zeros(1)
    return [
        {name: None if value is None else round(value + step * sizes[name] * (value > 0), 5)
         for name, value in measures(GOLD[kind]).items()}
        for step in steps
    ]  # fmt: skip


def gates(kind: str, strategy: str) -> list[Document]:
    """The gates that these measures meet or fail, with the limits of the guide."""
    after, gold = measures(AFTER[kind][strategy]), measures(GOLD[kind])
    spread = {name: float(np.std([one[name] for one in golds(kind)], ddof=1)) if gold[name] is not None else None
              for name in NAMES}  # fmt: skip
    found = []
    for name in NAMES:
        value, aim, sd = after[name], gold[name], spread[name]
        if value is None or aim is None or sd is None:
            continue
        share = 0.95 if name.startswith("retain") else None
        width = {"mia_auc": 0.02, "fold_in_auc": 0.03, "percentile": 0.05 if kind == "item" else 0.1}.get(name)
        if share is not None:
            limit, passed = f"≥ {share * aim:.3f} ({share} of gold)", value >= share * aim
        elif width is not None:
            limit, passed = f"{aim:.3f} ± {width:.3f}", abs(value - aim) <= width
        else:
            limit, passed = f"≤ {aim + 2 * sd:.3f} (gold + 2 sd)", value <= aim + 2 * sd + 1e-9
        found.append({"name": name, "value": value, "gold": aim, "spread": sd, "limit": limit, "passed": passed,
                      "text": TEXTS[name]})  # fmt: skip
    ratio = AFTER[kind][strategy][-1]
    assert ratio is not None
    limit, met = f"≤ {TIMES[kind]} of retraining", ratio <= TIMES[kind]
    exact = strategy == "retrain"
    found.append({"name": "time", "value": ratio, "gold": 1.0, "spread": 0.0, "limit": "reported" if exact else limit,
                  "passed": None if exact else met, "text": TEXTS["time"]})  # fmt: skip
    return found


def percentiles(kind: str, strategy: str) -> Document:
    """Histograms whose means are near the measured percentiles."""
    edges = np.linspace(0.0, 1.0, 21)
    middle = (edges[1:] + edges[:-1]) / 2

    def counts(mean: float, total: int) -> list[float]:
        density = middle ** (9 * mean - 1) * (1 - middle) ** (9 * (1 - mean) - 1)
        return [round(float(one), 2) for one in density / density.sum() * total]

    total = FORGOTTEN[kind][2]
    shown = {"before": BEFORE[kind][5], "after": AFTER[kind][strategy][5], "gold": GOLD[kind][5]}
    drawn = {key: counts(float(mean), total) for key, mean in shown.items() if mean is not None}
    return {"edges": [round(float(edge), 3) for edge in edges], **drawn}


def trace(strategy: str) -> list[Document]:
    if strategy != "reverse_bpr":
        return []
    rounds = range(1, 15)
    forget = [1.42 * 0.74**step + 0.05 for step in rounds]
    unseen = [0.21 - 0.004 * step for step in rounds]
    return [
        {"round": step, "phase": "reverse" if step <= 8 else "repair", "forget_margin": round(forget[step - 1], 4)
         if step <= 8 else round(forget[7] + 0.01 * (step - 8), 4), "unseen_margin": round(unseen[step - 1], 4),
         "loss": round(0.69 - 0.01 * step, 4)}
        for step in rounds
    ]  # fmt: skip


def request(number: int, kind: str, *, late: bool = False, days: float = 6.0) -> Document:
    received = START + timedelta(days=4 * (number - 1))
    deadline = received + timedelta(days=30)
    finished = deadline + timedelta(days=3) if late else received + timedelta(days=days)
    return {
        "id": f"r{number}", "kind": kind, "selector": SELECTORS[kind], "reason": REASONS[kind],
        "received": received.isoformat(), "deadline": deadline.isoformat(), "finished": finished.isoformat(),
        "in_time": not late,
    }  # fmt: skip


def batch(number: int, kind: str, strategy: str, *, round_: int = 100, late: bool = False,
          fallback: str | None = None, returning: int = 0) -> Document:  # fmt: skip
    ratio = AFTER[kind][strategy][-1]
    assert ratio is not None
    cost = {"cpu_s": 41.0, "wall_s": 24.0, "rounds": 100, "upload_bytes": 2.4e9, "download_bytes": 2.6e9}
    users, items, interactions = FORGOTTEN[kind]
    judged = gates(kind, strategy)
    return {
        "round": round_, "kinds": [kind], "returning": returning,
        "requests": [request(number, kind, late=late)],
        "forgotten": {"users": users, "items": items, "interactions": interactions},
        "verdict": "passed" if all(gate["passed"] is not False for gate in judged) else "failed",
        "fallback": fallback, "guarantee": "exact" if fallback else GUARANTEES.get(strategy, "approximate"),
        "measured": {"before": measures(BEFORE[kind]), "after": measures(AFTER[kind][strategy]), "golds": golds(kind)},
        "gates": judged,
        "cost": {key: value * ratio for key, value in cost.items()} | {"rounds": round(100 * ratio)},
        "retraining": cost,
        "percentiles": percentiles(kind, strategy),
        "trace": trace(strategy) if kind != "item" else [],
        "notes": ["The stop rule ended the reverse phase after 8 rounds."] if strategy == "reverse_bpr" else [],
    }  # fmt: skip


def strategy_entry(name: str, batches: Sequence[Document]) -> Document:
    where, size = STORES.get(name, ("none", 0))
    return {
        "guarantee": GUARANTEES.get(name, "approximate"), "store": {"where": where, "bytes": size}, "seconds": 12.3,
        "failed_gates": sum(gate["passed"] is False for one in batches for gate in one["gates"]),
        "test": {"hr@10": 0.131, "ndcg@10": 0.0702, "recall@20": 0.214}, "batches": list(batches),
    }  # fmt: skip


def unlearning(strategies: Mapping[str, Sequence[Document]]) -> Document:
    return {
        "golds": 3, "gold": {"cpu_s": 123.0, "cached": 1, "seeds": [101, 102, 103]},
        "audit": {"head": "9f2c" * 16, "count": 12},
        "strategies": {name: strategy_entry(name, batches) for name, batches in strategies.items()},
    }  # fmt: skip


def document(strategies: Mapping[str, Sequence[Document]] | None = None, **changes: Any) -> Document:
    """A whole summary; by default one strategy that honoured users, items and interactions."""
    if strategies is None:
        strategies = {"reverse_bpr": mixed("reverse_bpr")}
    return summary_of("fedmf", name="unlearn_ml100k", unlearning=unlearning(strategies), **changes)


def mixed(strategy: str, *, late: bool = False) -> list[Document]:
    kinds = ("user", "item", "interaction")
    return [batch(number, kind, strategy, late=late and number == 2) for number, kind in enumerate(kinds, 1)]


def comparison(kinds: Sequence[str] = ("user", "interaction"), only: Sequence[str] = ()) -> Document:
    """Several strategies on the same requests; those that do not support a kind have no batch for it."""
    names = dict.fromkeys(name for kind in kinds for name in AFTER[kind] if not only or name in only)
    return document(
        {name: [batch(number, kind, name) for number, kind in enumerate(kinds, 1) if name in AFTER[kind]]
         for name in names}
    )  # fmt: skip


def sequential(strategy: str = "reverse_bpr", count: int = 8) -> Document:
    """Small requests one after the other, each a bit further from gold than the one before."""
    batches = []
    for number in range(1, count + 1):
        one = batch(number, "interaction", strategy, round_=10 * number, late=number == 5, returning=int(number == 6))
        drift = 0.0012 * (number - 1)
        for name, by in (("retain_ndcg@20", -drift), ("retain_recall@20", -drift), ("mia_auc", drift)):
            one["measured"]["after"][name] += by
            gate = next(gate for gate in one["gates"] if gate["name"] == name)
            gate["value"] += by
            if name.startswith("retain"):
                gate["passed"] = gate["value"] >= 0.95 * gate["gold"]
        one["verdict"] = "passed" if all(gate["passed"] is not False for gate in one["gates"]) else "failed"
        batches.append(one)
    return document({strategy: batches})


def write_unlearning_run(folder: Path, summary: Document) -> Path:
    return write_run(folder, summary, lines_of(2))
