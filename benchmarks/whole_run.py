"""A whole run as users start it: ``python -m benchmarks.whole_run [--rounds 100]``.

FedRAP with the published train.py settings on MovieLens-100K, all users, evaluation after every round, through Flower
on Ray with one worker per core, and again in one process. Wall and CPU seconds of everything, and the peak memory of
all processes.
"""

from __future__ import annotations

import argparse
import tempfile

import fedrec
from benchmarks.common import table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for runner in ("ray", "inline"):
            result = fedrec.run(
                "experiment=fedrap_ml100k_paper", "evaluation.private_state=after_round", f"runner={runner}",
                f"federation.rounds={rounds}", "baselines.local_only=false", f"output_dir={folder}",
            )  # fmt: skip
            timing, memory = result.summary["timing"], result.summary["memory"]
            rows.append(
                [
                    runner, f"{timing['wall_s']:.1f}", f"{timing['start_s']:.1f}", f"{timing['seconds_per_round']:.2f}",
                    *(f"{timing[key]:.1f}" for key in ("sample_s", "train_s", "evaluate_s", "transport_s", "cpu_s")),
                    f"{memory['peak_rss_mb']:.0f}", f"{result.test['hr@10']:.3f}",
                ]
            )  # fmt: skip
    table(
        f"FedRAP, train.py settings, ML-100K, {rounds} rounds with evaluation",
        [
            "runner",
            "wall s",
            "start s",
            "s/round",
            "sample",
            "train",
            "evaluate",
            "transport s",
            "CPU-s",
            "peak MB",
            "HR@10",
        ],
        rows,
        ["sample, train, evaluate: CPU-seconds of the nodes; CPU-s and peak MB: all processes together"],
    )


if __name__ == "__main__":
    main()
