"""Full-ranking evaluation of MovieLens-1M's users: ``python -m benchmarks.evaluation``.

Every user's validation and test item against all 3,706 items, every metric at three cut-offs, and the sampled ranking
beside it. The naive way sorts each user's scores and evaluates a sample of users.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.common import dataset, leave_one_out, table, workspace
from clients.node import run_task
from fedrec.data.split import Split
from fedrec.evaluation.protocols import Protocol
from fedrec.evaluation.ranking import Evaluator

ALGORITHM = {"_target_": "fedrec.algorithms.fedmf.FedMF", "dim": 32}


def main() -> None:
    torch.set_num_threads(1)
    data = dataset("ml-1m")
    split = leave_one_out(data)
    users = np.arange(split.n_users, dtype=np.int64)
    with workspace(split, ALGORITHM) as space:
        shared = space.algorithm.initial_shared()
        node = [run_task(space, 0, 1, shared, users[:0], users).cpu["evaluate"] for _ in range(4)][1:]
        item = shared["item"]
    vectors = torch.randn(split.n_users, 32, generator=torch.Generator().manual_seed(0))
    product, ranking = [], []
    for _ in range(4):
        evaluator = Evaluator(split, Protocol(), 0)
        start = time.process_time()
        scores = (vectors @ item.T).numpy()
        middle = time.process_time()
        evaluator.add(users, scores)
        product.append(middle - start)
        ranking.append(time.process_time() - middle)
    sample = users[:: max(1, users.size // 200)]
    naive = _sorting(split, vectors[sample].numpy(), item.numpy(), sample) * users.size / sample.size
    score, rank, whole = (float(np.median(x)) for x in (product[1:], ranking[1:], node))
    table(
        f"Evaluation of {split.n_users} users × {split.n_items} items ({data.name}): CPU-seconds, one thread",
        ["path", "scores", "ranking", "total", "ratio"],
        [
            ["product and rank counting", f"{score:.3f}", f"{rank:.3f}", f"{score + rank:.3f}", "1.0"],
            ["a node's evaluation task", "", "", f"{whole:.3f}", f"{whole / (score + rank):.1f}"],
            ["plain loop, argsort a user", "", "", f"{naive:.3f}", f"{naive / (score + rank):.1f}"],
        ],
        [f"plain loop: full ranking only, HR and NDCG at 10, measured on {sample.size} users and scaled"],
    )


def _sorting(split: Split, vectors: np.ndarray, item: np.ndarray, users: np.ndarray) -> float:
    """CPU-seconds of the usual loop: score, mask, sort, look the held-out items up."""
    start = time.process_time()
    hits = gain = 0.0
    for vector, user in zip(vectors, users, strict=True):
        for part, masked in (("validation", ("train",)), ("test", ("train", "validation"))):
            scores = item @ vector
            for name in masked:
                scores[getattr(split, name).row(user)] = -np.inf
            order = np.argsort(-scores)
            for held in getattr(split, part).row(user):
                rank = int(np.flatnonzero(order == held)[0])
                hits += rank < 10
                gain += 1.0 / np.log2(rank + 2) if rank < 10 else 0.0
    assert hits >= gain
    return time.process_time() - start


if __name__ == "__main__":
    main()
