"""What the benchmarks share: data, workspaces, CPU clocks, the plain per-user loop, and the printed table."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients.node import run_task
from clients.workspace import Workspace
from fedrec.algorithms.base import Examples, GradientRecommender, Tensors
from fedrec.data import load_dataset
from fedrec.data.interactions import Interactions
from fedrec.data.split import Split
from fedrec.errors import DataError
from fedrec.evaluation.protocols import Protocol, make_split

CLEAN: dict[str, Any] = {"name": "clean"}
SYNTHETIC = {"ml-100k": {"users": 943, "items": 1682}, "ml-1m": {"users": 6040, "items": 3706}}


def dataset(name: str) -> Interactions:
    """The data set, or a synthetic one of its size where it cannot be had (the table says which)."""
    try:
        return load_dataset(name)
    except DataError:
        return load_dataset("synthetic", **SYNTHETIC[name], seed=0)


def leave_one_out(data: Interactions) -> Split:
    return make_split(data, Protocol.from_config(CLEAN), 0)


@contextmanager
def workspace(split: Split, algorithm: Mapping[str, Any], **settings: Any) -> Iterator[Workspace]:
    """One node that hosts everybody, in a folder that lives as long as the benchmark."""
    with tempfile.TemporaryDirectory(prefix="fedrec-bench-") as folder:
        options = {"seed": 0, "n_nodes": 1, "upload": {"kind": "touched"}, "download": {"kind": "dense"}, **settings}
        Workspace.create(Path(folder), split, algorithm, CLEAN, options)
        yield Workspace.open(folder)


def run_rounds(space: Workspace, rounds: int, *, evaluate: bool) -> tuple[dict[str, float], Tensors]:
    """Median CPU-seconds of every lap over ``rounds`` rounds of all users; round 1 (compilation, first pages) is left
    out."""
    users = np.arange(space.split.n_users, dtype=np.int64)
    shared, laps = space.algorithm.initial_shared(), []
    for number in range(1, rounds + 2):
        result = run_task(space, 0, number, shared, users, users if evaluate else users[:0])
        update = result.update
        shared = {
            name: value * (1.0 + update.decay[name] / update.devices) + update.sums[name] / update.devices
            for name, value in shared.items()
        }
        laps.append(result.cpu)
    return {name: float(np.median([lap[name] for lap in laps[1:]])) for name in laps[0]}, shared


def plain_loop(
    algorithm: GradientRecommender, split: Split, users: Sequence[int], seed: int = 0
) -> tuple[float, float]:
    """Local training as published code does it: (CPU-seconds of sampling, CPU-seconds of training) of ``users``.

    One device after another: dense local copies of every tensor, Python-side negatives, autograd and
    ``torch.optim.SGD`` over the mini-batches of a ``DataLoader``-like loop, and the dense difference added to the
    server's sum.
    """
    torch.set_num_threads(1)
    users = [users[0], *users]  # the first pays for torch's lazy imports and is not counted
    draw = np.random.default_rng(seed)
    local, shared = algorithm.local, algorithm.initial_shared()
    specs = {**algorithm.shared, **algorithm.private}
    start = {name: (shared[name] if name in shared else spec.initial(np.uint64(1))) for name, spec in specs.items()}
    sums = {name: torch.zeros_like(value) for name, value in shared.items()}
    sampling = training = 0.0
    for turn, user in enumerate(users):
        if turn == 1:
            sampling = training = 0.0
        clock = time.process_time()
        items, labels = _examples(split, user, local.negatives, local.max_positives, draw)
        sampling, clock = sampling + time.process_time() - clock, time.process_time()
        params = {name: value.clone().requires_grad_(True) for name, value in start.items()}
        groups = [
            {"params": [params[name]], "lr": spec.learning_rate, "weight_decay": spec.weight_decay}
            for name, spec in specs.items()
        ]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, next(iter(specs.values())).step_decay)
        for _ in range(local.epochs):
            order = torch.randperm(items.numel())
            for batch in order.split(local.batch_size):
                optimizer.zero_grad()
                _batch_loss(algorithm, params, items[batch], labels[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        for name in sums:
            sums[name] += params[name].detach() - shared[name]
        training += time.process_time() - clock
    return sampling, training


def _examples(split: Split, user: int, negatives: int, limit: int, draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    positives = split.train.row(user)
    if limit and positives.size > limit:
        positives = draw.choice(positives, limit, replace=False)
    free = np.setdiff1d(np.arange(split.n_items), split.negatives_exclude.row(user))
    drawn = [draw.choice(free, negatives, replace=False) for _ in positives]
    items = np.concatenate([positives, *drawn]).astype(np.int64)
    labels = np.concatenate([np.ones(positives.size), np.zeros(items.size - positives.size)])
    return torch.from_numpy(items), torch.from_numpy(labels.astype(np.float32))


def _batch_loss(algorithm: GradientRecommender, params: Tensors, items: Tensor, labels: Tensor) -> Tensor:
    specs = {**algorithm.shared, **algorithm.private}
    rows = {name: (value[items] if specs[name].per_item else value) for name, value in params.items()}
    weight = torch.full((items.numel(),), 1.0 / items.numel())
    return algorithm.loss(rows, Examples(items, labels, weight))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a small table: first column left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return "  ".join([cells[0].ljust(widths[0]), *padded[1:]])

    print(f"\n{title}\n{line(header)}\n{line(['-' * w for w in widths])}")
    print("\n".join(line(row) for row in rows))
    for note in notes:
        print(f"  {note}")
