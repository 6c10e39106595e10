"""Prints how close the synthetic generator comes to MovieLens-100K, and how fast it streams.

    python benchmarks/synthetic.py                 # calibration, mean and deviation of six seeds, and EASE
    python benchmarks/synthetic.py --speed         # 100,000 × 20,000 and 1,000,000 × 50,000, each in its own process

One thread. MovieLens-100K's column was measured with the same functions (tests/data/test_synthetic.py checks it).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np

from fedrec.data.interactions import Interactions
from fedrec.data.synthetic import MOVIELENS_100K, SyntheticConfig, calibration, generate, stream

# hit_rates() of MovieLens-100K, measured.
_MOVIELENS_HIT_RATES = {"popularity_hr@10": 0.0859, "ease_hr@10": 0.1389}
_SIZES = ((943, 1_682, 106.04), (100_000, 20_000, 106.04), (1_000_000, 50_000, 32.0))


def hit_rates(data: Interactions) -> dict[str, float]:
    """HR@10 of popularity and of EASE (Steck 2019, eq. 8; regularisation 300) on each user's last item."""
    train = np.zeros((data.n_users, data.n_items))
    train[data.user, data.item] = 1
    rows, last = np.arange(data.n_users), data.histories.items[data.histories.indptr[1:] - 1]
    train[rows, last] = 0
    inverse = np.linalg.inv(train.T @ train + 300 * np.eye(data.n_items))
    model = -inverse / np.diag(inverse)
    np.fill_diagonal(model, 0)
    found = {}
    popularity = np.tile(train.sum(axis=0), (data.n_users, 1))
    for name, score in (("popularity_hr@10", popularity), ("ease_hr@10", train @ model)):
        score = np.where(train > 0, -np.inf, score)
        found[name] = float(((score >= score[rows, last][:, None]).sum(axis=1) <= 10).mean())
    return found


def print_calibration(seeds: int) -> None:
    """A Markdown table: property, MovieLens-100K, mean and standard deviation over seeds 0 … ``seeds - 1``."""
    found = []
    for seed in range(seeds):
        data = generate(SyntheticConfig(seed=seed))
        found.append({**calibration(data), **hit_rates(data)})
    print(f"| property | MovieLens-100K | synthetic, mean of {seeds} seeds | deviation |\n|---|---:|---:|---:|")
    for key, target in {**MOVIELENS_100K, **_MOVIELENS_HIT_RATES}.items():
        values = [f[key] for f in found]
        digits = 0 if abs(target) >= 10 or key.startswith("items") else 3
        print(f"| {key} | {target:.{digits}f} | {np.mean(values):.{digits}f} | {np.std(values):.{max(1, digits)}f} |")


def print_speed(users: int, items: int, mean_activity: float) -> None:
    """One row: sizes, interactions, seconds to the first chunk and in all, processor seconds, peak memory."""
    for _ in stream(SyntheticConfig(users=20, items=30)):
        pass  # compiles, or loads what was compiled
    wall, cpu, first, rows = time.perf_counter(), time.process_time(), 0.0, 0
    for chunk in stream(SyntheticConfig(users=users, items=items, mean_activity=mean_activity)):
        first = first or time.perf_counter() - wall
        rows += chunk.item.size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"| {users:,} | {items:,} | {rows:,} | {first:.1f} | {time.perf_counter() - wall:.1f} "
        f"| {time.process_time() - cpu:.1f} | {peak:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="seeds in the calibration table")
    parser.add_argument("--speed", action="store_true", help="measure streaming instead")
    parser.add_argument("--size", nargs=3, metavar=("USERS", "ITEMS", "MEAN"), help="one size, in this process")
    given = parser.parse_args()
    if given.size:
        print_speed(int(given.size[0]), int(given.size[1]), float(given.size[2]))
    elif given.speed:
        print("| users | items | interactions | first chunk, s | all, s | CPU, s | peak MiB |")
        print("|---:|---:|---:|---:|---:|---:|---:|", flush=True)
        for size in _SIZES:
            subprocess.run([sys.executable, __file__, "--size", *map(str, size)], check=True)
    else:
        print_calibration(given.seeds)


if __name__ == "__main__":
    main()
