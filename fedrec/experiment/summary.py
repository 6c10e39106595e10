"""``summary.json``: the public account of a run (schema in docs/summary.md)."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedrec.data.split import Split
from fedrec.evaluation.protocols import Protocol
from fedrec.experiment.resources import ResourceMonitor
from server.strategy import Outcome

if TYPE_CHECKING:
    from fedrec.experiment.run import Plan

_PACKAGES = ("fedrec", "flwr", "ray", "torch", "numpy", "numba", "polars")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def summarise(
    plan: Plan, protocol: Protocol, split: Split, outcome: Outcome, baselines: Mapping[str, Any],
    monitor: ResourceMonitor, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """The document of one run."""
    best = outcome.best_evaluation
    lines = outcome.rounds
    data = plan.data
    return {
        "schema": 1,
        "name": plan.name,
        "status": outcome.status,
        "reason": outcome.reason,
        "algorithm": plan.algorithm.name,
        "dataset": {
            "name": data.name, "users": data.n_users, "items": data.n_items, "interactions": len(data),
            "sha256": data.sha256, "licence": data.licence,
        },
        "protocol": {
            "name": protocol.name, "split": protocol.split, "ties": protocol.ties, "tie_seed": protocol.tie_seed,
            "ranking": protocol.ranking, "negatives_exclude": protocol.negatives_exclude, "leaky": protocol.leaky,
        },
        "ranking": protocol.ranking,
        "select_on": f"{protocol.select_on} {protocol.select_metric}",
        "seed": plan.seed,
        "rounds": len(lines),
        "best_round": outcome.best_round,
        "validation": best.metrics("validation") if best else {},
        "test": best.metrics("test") if best else {},
        "histogram": {
            "validation_ndcg@10": best.histogram[0].tolist(), "test_ndcg@10": best.histogram[1].tolist(),
        } if best else {},
        "baselines": dict(baselines),
        "timing": _timing(lines, monitor, outcome),
        "memory": {"peak_rss_mb": monitor.peak_rss_mb},
        "traffic": _traffic(lines, plan),
        "item_view": {"sparsity": lines[-1]["sparsity"] if lines else {}},
        "federation": {"sampler": plan.federation.sampler, "fraction": plan.federation.fraction, "nodes": plan.n_nodes},
        "runner": {"name": plan.runner.name, "workers": plan.runner.worker_count, "device": plan.runner.device},
        "privacy": None,
        "unlearning": None,
        "warnings": [*protocol.caveats(), *split.warnings, *data.notes],
        "versions": versions(),
        "run_dir": str(folder),
    }  # fmt: skip


def _timing(lines: Sequence[Mapping[str, Any]], monitor: ResourceMonitor, outcome: Outcome) -> dict[str, float]:
    def total(key: str) -> float:
        return float(sum(line.get(key) or 0.0 for line in lines))

    walls = [line["wall_s"] for line in lines if "wall_s" in line]
    return {
        "wall_s": monitor.wall_s,
        "cpu_s": monitor.cpu_s,
        "start_s": max(0.0, outcome.ready - outcome.started),
        "seconds_per_round": float(np.median(walls)) if walls else math.nan,
        "sample_s": total("sample_s"),
        "train_s": total("train_s"),
        "evaluate_s": total("evaluate_s"),
        "aggregate_s": total("aggregate_s"),
        "transport_s": total("transport_s"),
    }


def _traffic(lines: Sequence[Mapping[str, Any]], plan: Plan) -> dict[str, float]:
    devices = sum(line["users"] for line in lines)

    def mean(key: str) -> float:
        return sum(line[key] * line["users"] for line in lines) / devices if devices else 0.0

    dense = 4 * sum(math.prod(spec.shape) for spec in plan.algorithm.shared.values())
    return {
        "upload_bytes_per_user_round": mean("upload_bytes_per_user"),
        "download_bytes_per_user_round": mean("download_bytes_per_user"),
        "dense_bytes": float(dense),
    }


def combine(summaries: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """The mean over runs that differ in the order of tied timestamps; ``spread`` holds the standard deviations."""
    first = dict(summaries[0])
    for part in ("validation", "test"):
        first[part] = _mean([s[part] for s in summaries])
    first["spread"] = {
        name: float(np.std([s["test"][name] for s in summaries], ddof=1))
        for name in first["test"]
        if len(summaries) > 1
    }
    for name, entry in first["baselines"].items():
        if "test" in entry:
            entries = [s["baselines"][name] for s in summaries if "test" in s["baselines"].get(name, {})]
            means = {part: _mean([e[part] for e in entries]) for part in ("validation", "test")}
            first["baselines"] = {**first["baselines"], name: {**entry, **means}}
    first["protocol"] = {**first["protocol"], "tie_seeds": [s["protocol"]["tie_seed"] for s in summaries]}
    first["histogram"] = {
        key: [sum(column) for column in zip(*(s["histogram"][key] for s in summaries), strict=True)]
        for key in first["histogram"]
    }
    first["timing"] = {key: float(sum(s["timing"][key] for s in summaries)) for key in first["timing"]}
    first["runs"] = [s["run_dir"] for s in summaries]
    first["run_dir"] = str(folder)
    return first


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0] if all(name in m for m in metrics)}
