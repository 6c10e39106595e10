"""What privacy costs a FedMF round on all users of MovieLens-100K: ``python -m benchmarks.user_dp``.

Whole rounds through both Flower apps in one process, with the default settings of ``algorithm=fedmf``: examples, local
training, messages, aggregation, the server's step; with privacy also clipping, noise and the ledger. Blocks of rounds
of all modes take turns. Then the calibration of the noise, asked twice.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.common import dataset, leave_one_out, table, workspace
from fedrec.algorithms import build
from fedrec.algorithms.base import Problem
from fedrec.data.interactions import Interactions
from fedrec.data.split import Split
from fedrec.experiment.config import load_config
from fedrec.experiment.privacy import check_algorithm, device_settings, plan_privacy, read_settings
from privacy.accountants import default_delta
from privacy.calibration import noise_multiplier
from privacy.ledger import Ledger, Subject
from server.guard import Guard
from server.runners import run_federation
from server.settings import EvaluationSettings, FederationSettings, RunnerSettings, from_config

EPSILON = "privacy.epsilon=8"
MODES: dict[str, tuple[str, ...]] = {
    "no privacy": (),
    "user_dp": ("privacy=user_dp", EPSILON),
    "user_dp, adaptive clipping": ("privacy=user_dp", EPSILON, "privacy.adaptive_clipping=true"),
    "user_dp, secure aggregation": ("privacy=user_dp", EPSILON, "privacy.trust=secure_aggregation"),
    "local_dp": ("privacy=local_dp", EPSILON),
}
PARTS = ("sample_s", "train_s", "aggregate_s")


def block(
    split: Split, subject: Subject, overrides: Sequence[str], rounds: int, folder: Path, block_number: int
) -> npt.NDArray[np.float64]:
    """CPU-seconds of ``rounds`` rounds, [rounds, 4]: of examples, training and aggregation, and of everything.

    A block continues the ledger of the one before in ``folder``, so that the ledger grows as in one long run.
    """
    # The first round compiles and opens files; the last one's line also waits for the final evaluation.
    config = load_config(["algorithm=fedmf", "federation=adam", *overrides, f"federation.rounds={rounds + 2}"])
    federation: FederationSettings = from_config(FederationSettings, "federation", config["federation"])
    settings = read_settings(config["privacy"], federation)
    lines: list[tuple[float, dict[str, Any]]] = []

    def listen(line: dict[str, Any]) -> None:
        lines.append((time.process_time(), line))

    options: dict[str, Any] = {"fused": "on", "upload": {"kind": federation.upload_codec}}
    guard = None
    if settings is not None:
        algorithm = build(config["algorithm"], Problem(split.n_users, split.n_items, 0))
        check_algorithm(settings, algorithm, federation)
        plan = plan_privacy(
            settings, algorithm, federation, n_nodes=1, subject=subject, n_interactions=split.train.items.size
        )
        options |= device_settings(plan, federation, seed=0)
        ledgers = [folder / f"ledger-{number}.json" for number in (block_number - 1, block_number)]
        ledger = Ledger.start(
            ledgers[1], subject, plan.delta, settings.accountant, ledgers[0] if ledgers[0].exists() else None
        )
        guard = Guard(plan, algorithm, ledger, f"block {block_number}", seed=0)
    with workspace(split, config["algorithm"], **options) as space:
        run_federation(
            space, federation, EvaluationSettings(every=rounds + 2), RunnerSettings(name="inline"), listen, guard=guard
        )
    whole = np.diff([at for at, _ in lines[:-1]])
    parts = [[line[part] for part in PARTS] for _, line in lines[1:-1]]
    return np.column_stack([parts, whole])


def rounds_of_all_modes(data: Interactions, blocks: int, rounds: int) -> dict[str, npt.NDArray[np.float64]]:
    """CPU-seconds by mode, [blocks * rounds, 4]; the modes take turns block by block."""
    split = leave_one_out(data)
    subject = Subject(data.name, data.sha256, data.n_users, len(data))
    found: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in MODES}
    with tempfile.TemporaryDirectory(prefix="fedrec-bench-") as folder:
        for number in range(blocks):
            for name, overrides in MODES.items():
                own = Path(folder) / name.replace(" ", "-")
                own.mkdir(exist_ok=True)
                found[name].append(block(split, subject, overrides, rounds, own, number))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def calibrations(users: int) -> tuple[float, float]:
    """Wall-seconds of finding the noise for epsilon 8, 100 Poisson rounds, in an empty cache; and of asking again."""
    before = os.environ.get("FEDREC_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="fedrec-bench-") as folder:
        os.environ["FEDREC_CACHE_DIR"] = folder
        try:
            clocks = [time.perf_counter()]
            for _ in range(2):
                noise_multiplier(8.0, default_delta(users), 0.1, 100)
                clocks.append(time.perf_counter())
        finally:
            if before is None:
                del os.environ["FEDREC_CACHE_DIR"]
            else:
                os.environ["FEDREC_CACHE_DIR"] = before
    return clocks[1] - clocks[0], clocks[2] - clocks[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=5, help="blocks of every mode")
    parser.add_argument("--rounds", type=int, default=8, help="measured rounds in a block")
    arguments = parser.parse_args()
    data = dataset("ml-100k")
    found = rounds_of_all_modes(data, arguments.blocks, arguments.rounds)
    medians = {name: np.median(seconds, axis=0) for name, seconds in found.items()}
    base = medians["no privacy"][-1]
    table(
        f"FedMF, one round, all {data.n_users} users of {data.name}: CPU-milliseconds, one process",
        ["privacy", "examples", "training", "aggregation", "whole round", "ratio"],
        [[name, *(f"{1e3 * x:.1f}" for x in row), f"{row[-1] / base:.3f}"] for name, row in medians.items()],
        [
            f"medians of {arguments.blocks} blocks of {arguments.rounds} rounds, modes taking turns; no evaluation",
            "whole round: messages, private state on disk and, in aggregation, the ledger's file too",
        ],
    )
    first, second = calibrations(data.n_users)
    print(f"\nNoise for epsilon 8, 100 Poisson rounds at rate 0.1: {first:.2f} s, asked again {1e3 * second:.1f} ms")


if __name__ == "__main__":
    main()
