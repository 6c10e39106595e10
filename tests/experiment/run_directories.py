"""Run directories in the documented format, for tests of what is drawn from them.

The numbers are made from smooth curves, not measured: what is tested is that the report and the tables say what the
files say. Reports of real runs are tested where real runs are made.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DATASET = {
    "name": "ml-100k",
    "users": 943,
    "items": 1682,
    "interactions": 100000,
    "sha256": "06416e597f82b7342361e41163890c81036900f4",
}
DATASET["licence"] = "GroupLens: research use, cite Harper and Konstan 2015; no redistribution without permission"
POPULARITY = {"hr@10": 0.0848, "ndcg@10": 0.0421, "recall@20": 0.1389, "mrr@10": 0.0297, "coverage@10": 0.0505}
EASE = {"hr@10": 0.1474, "ndcg@10": 0.0781, "recall@20": 0.2227, "mrr@10": 0.0571, "coverage@10": 0.2901}


def with_sampled(metrics: dict[str, float], factor: float) -> dict[str, float]:
    return metrics | {
        f"sampled_{key}": min(1.0, value * factor) for key, value in metrics.items() if key[:2] in ("hr", "nd")
    }


def metrics_at(share: float, best: float) -> dict[str, float]:
    hr = best * share
    ranked = {"hr@10": hr, "ndcg@10": 0.53 * hr, "recall@20": min(1.0, 1.55 * hr), "mrr@10": 0.38 * hr}
    return ranked | {"coverage@10": 0.4, "popularity@10": 0.2}


def summary_of(
    algorithm: str = "fedmf", rounds: int = 60, best: int = 45, hr: float = 0.133, **changes: Any
) -> dict[str, Any]:
    tested = with_sampled(metrics_at(1.0, hr), 4.6)
    zeros = round(943 * (1 - hr))
    summary: dict[str, Any] = {
        "schema": 1,
        "algorithm": algorithm,
        "dataset": dict(DATASET),
        "protocol": {
            "name": "clean",
            "split": "leave-last-one-out",
            "ties": "file order",
            "ranking": "full",
            "leaky": False,
        },
        "ranking": "full",
        "select_on": "validation ndcg@10",
        "seed": 7,
        "status": "finished",
        "reason": None,
        "warnings": [
            "415 of 943 users have a tied last timestamp: the test item depends on the tie rule (file order)."
        ],
        "rounds": rounds,
        "best_round": best,
        "validation": with_sampled(metrics_at(1.0, hr * 1.08), 4.6),
        "test": tested,
        "baselines": {
            "popularity": {"test": with_sampled(POPULARITY, 4.76), "validation": POPULARITY},
            "ease": {"test": with_sampled(EASE, 4.3)},
            "local_only": {"test": with_sampled(metrics_at(1.0, 0.0042), 22.0), "rounds": 20},
        },
        "histogram": {
            "validation_ndcg@10": [
                zeros - 10,
                0,
                0,
                0,
                0,
                22,
                25,
                14,
                12,
                11,
                0,
                0,
                10,
                0,
                0,
                0,
                0,
                0,
                0,
                943 - zeros - 84,
            ],
            "test_ndcg@10": [zeros, 0, 0, 0, 0, 20, 23, 13, 11, 10, 0, 0, 12, 0, 0, 0, 0, 0, 0, 943 - zeros - 89],
        },
        "timing": {
            "wall_s": 61.4,
            "cpu_s": 83.0,
            "seconds_per_round": 1.02,
            "train_s": 38.2,
            "evaluate_s": 9.4,
            "transport_s": 4.1,
        },
        "federation": {"sampler": "all", "fraction": 1.0, "nodes": 2},
        "runner": {"name": "inline", "workers": 1, "device": "cpu"},
        "memory": {"peak_rss_mb": 1184.0},
        "traffic": {
            "upload_bytes_per_user_round": 55000.0,
            "download_bytes_per_user_round": 215296.0,
            "dense_bytes": 215296,
            "codec": "touched rows, float32",
        },
        "privacy": None,
        "unlearning": None,
        "versions": {"fedrec": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "flwr": "1.41.0"},
        "run_dir": f"outputs/{algorithm}_ml100k/2025-01-31_12-00-00",
    }
    return summary | changes


def lines_of(rounds: int = 60, hr: float = 0.133) -> list[dict[str, Any]]:
    lines = []
    for number in range(1, rounds + 1):
        share = 1 - math.exp(-number / 11) * (1 + 0.2 * math.sin(number)) - max(0, number - 45) * 0.002
        lines.append(
            {
                "round": number,
                "loss": 0.32 + 0.38 * math.exp(-number / 9),
                "users": 943,
                "failed_users": 0,
                "validation": metrics_at(share, hr * 1.08),
                "test": metrics_at(share * (1 + 0.02 * math.cos(number)), hr),
                "wall_s": 1.02,
                "train_s": 0.64,
                "evaluate_s": 0.16,
                "transport_s": 0.07,
                "aggregate_s": 0.012,
                "upload_bytes_per_user": 55000.0,
                "download_bytes_per_user": 215296.0,
                "sparsity": {"item": 0.6 * math.exp(-number / 14) + 0.05},
                "update_norm": {"item": 3.2 * math.exp(-number / 20) + 0.2},
            }
        )
    return lines


def write_run(
    path: Path, summary: dict[str, Any], lines: list[dict[str, Any]] | None = None, config: str = "seed: 7\n"
) -> Path:
    path.mkdir(parents=True)
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in (lines_of() if lines is None else lines))
    )
    (path / "config.yaml").write_text(config)
    return path
