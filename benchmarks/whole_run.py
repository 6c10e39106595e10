"""A whole run as users start it: ``python -m benchmarks.whole_run [--rounds 100]``.

FedRAP with the published train.py settings on MovieLens-100K, all users, evaluation after every round, through Flower
on Ray with one worker per core, and again in one process. Wall and CPU seconds of everything, and the peak memory of
all processes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import table

_COLUMNS = (
    "wall s",
    "start s", "s/round", "sample", "train", "evaluate", "transport s", "CPU-s", "peak MB", "anonymous", "HR@10",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    rows = [[runner, *_row(_summary(runner, rounds))] for runner in ("ray", "inline")]
    table(
        f"FedRAP, train.py settings, ML-100K, {rounds} rounds with evaluation",
        ["runner", *_COLUMNS],
        rows,
        [
            "sample, train, evaluate: CPU-seconds of the nodes; CPU-s and peak memory: all processes together",
            "anonymous: MB that no file backs (not libraries, not the devices' memory-mapped state)",
        ],
    )


def _summary(runner: str, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fedrec-bench-") as folder:
        subprocess.run(
            [
                sys.executable, "-m", "fedrec", "run", "experiment=fedrap_ml100k_paper", f"runner={runner}",
                "evaluation.private_state=after_round", f"federation.rounds={rounds}", "baselines.local_only=false",
                f"output_dir={folder}",
            ],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (found,) = Path(folder).glob("*/*/summary.json")
        summary: dict[str, Any] = json.loads(found.read_text())
        return summary


def _row(summary: dict[str, Any]) -> list[str]:
    timing, memory = summary["timing"], summary["memory"]
    seconds = [f"{timing[key]:.1f}" for key in ("sample_s", "train_s", "evaluate_s", "transport_s", "cpu_s")]
    return [
        f"{timing['wall_s']:.1f}", f"{timing['start_s']:.1f}", f"{timing['seconds_per_round']:.2f}", *seconds,
        f"{memory['peak_rss_mb']:.0f}", f"{memory['peak_anonymous_mb']:.0f}", f"{summary['test']['hr@10']:.3f}",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
