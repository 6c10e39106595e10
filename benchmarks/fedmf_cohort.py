"""FedMF with 100 examples a user and one local step, per user and round: ``python -m benchmarks.fedmf_cohort``.

20 positives with 4 negatives each, dimension 32; at MovieLens-100K's size and with 10,000 synthetic users.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.common import dataset, leave_one_out, plain_loop, run_rounds, table, workspace
from fedrec.algorithms.base import GradientRecommender
from fedrec.data import load_dataset

ALGORITHM = {"_target_": "fedrec.algorithms.fedmf.FedMF", "dim": 32, "max_positives": 20, "negatives": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds per path")
    parser.add_argument("--sample", type=int, default=100, help="users of the plain loop")
    arguments = parser.parse_args()
    for data in (dataset("ml-100k"), load_dataset("synthetic", users=10_000, items=1682, seed=0)):
        split = leave_one_out(data)
        found: dict[str, tuple[float, float]] = {}
        for name, mode in (("fused kernel", "on"), ("batched torch", "off")):
            with workspace(split, ALGORITHM, fused=mode) as space:
                lap, _ = run_rounds(space, arguments.rounds, evaluate=False)
                algorithm = space.algorithm
            found[name] = lap["sample"] / split.n_users, lap["train"] / split.n_users
        assert isinstance(algorithm, GradientRecommender)
        sample = np.argsort(split.train.counts)[:: max(1, split.n_users // arguments.sample)]
        sampling, training = plain_loop(algorithm, split, sample.tolist())
        found["plain loop"] = sampling / sample.size, training / sample.size
        base = sum(found["fused kernel"])
        rows = [
            [name, *(f"{1e6 * x:.1f}" for x in (*lap_pair, sum(lap_pair))), f"{sum(lap_pair) / base:.1f}"]
            for name, lap_pair in found.items()
        ]
        table(
            f"FedMF, one local step, {split.n_users} users × {split.n_items} items ({data.name}): CPU-µs a user",
            ["path", "sampling", "training", "total", "ratio"],
            rows,
            [f"plain loop: mean of {sample.size} users; no state kept"],
        )


if __name__ == "__main__":
    main()
