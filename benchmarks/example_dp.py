"""DP-SGD on a device's own interactions, against Opacus hooks: ``python -m benchmarks.example_dp``.

10 local steps on a 1682 × 32 item view, 100 interactions a user, Poisson rate 0.1, 4 negatives an interaction, noise on
every coordinate of every step. Opacus trains the same batches, one client after another.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import table
from clients.example_batches import draw_batches
from clients.example_dp import train_example_dp
from clients.store import DeviceStore
from fedrec.algorithms.base import Problem
from fedrec.algorithms.fedmf import FedMF
from fedrec.data.interactions import UserItems

ITEMS, WIDTH, INTERACTIONS, STEPS, RATE, NOISE, BOUND = 1682, 32, 100, 10, 0.1, 1.1, 0.5
OURS = {"compiled kernel": "on", "tensor program": "off"}


def _method(users: int) -> FedMF:
    return FedMF(Problem(users, ITEMS, 0), dim=WIDTH, negatives=4, item_weight_decay=1e-4, user_weight_decay=1e-4)


def _train_items(users: int) -> UserItems:
    draw = np.random.default_rng(0)
    rows = [draw.permutation(ITEMS)[:INTERACTIONS] for _ in range(users)]
    return UserItems.from_pairs(np.repeat(np.arange(users), INTERACTIONS), np.concatenate(rows), users)


def ours(users: int, fused: str, repeats: int) -> float:
    """Median CPU-seconds a client of a whole round of ``users`` devices: batches, steps, upload, private state."""
    algorithm, train, times = _method(users), _train_items(users), []
    shared = algorithm.initial_shared()
    with tempfile.TemporaryDirectory(prefix="fedrec-bench-") as folder:
        store = DeviceStore(Path(folder), algorithm.private, range(users), 0)
        for number in range(1, repeats + 2):
            store.begin(number)
            clock = time.process_time()
            train_example_dp(
                algorithm, shared, store, train, np.arange(users), n_items=ITEMS, seed=0, round_number=number,
                sample_rate=RATE, steps=STEPS, expected_batch=RATE * INTERACTIONS, noise_multiplier=NOISE,
                max_grad_norm=BOUND, noise_seed=None, fused=fused,
            )  # fmt: skip
            times.append(time.process_time() - clock)
    return float(np.median(times[1:])) / users  # the first round compiles


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item, self.user = nn.Embedding(ITEMS, WIDTH), nn.Embedding(1, WIDTH)

    def forward(self, items: Tensor) -> Tensor:
        logits: Tensor = (self.item(items) * self.user(torch.zeros_like(items))).sum(2)
        return logits


def opacus_hooks(batches: list[Tensor]) -> tuple[float, float]:
    """CPU-seconds of (setting up, training) one client with Opacus' per-sample hooks and its DPOptimizer."""
    clock = time.process_time()
    model = _Model()
    hooked = GradSampleModule(model, batch_first=True, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=1e-4), noise_multiplier=NOISE, max_grad_norm=BOUND,
        expected_batch_size=int(RATE * INTERACTIONS), loss_reduction="mean",
    )  # fmt: skip
    setting_up, clock = time.process_time() - clock, time.process_time()
    for items in batches:
        _step(hooked, optimizer, items)
    return setting_up, time.process_time() - clock


def opacus_engine(examples: Tensor) -> tuple[float, float]:
    """The same by ``PrivacyEngine.make_private``, with the data loader that it makes: one epoch of int64[100, 5]."""
    clock = time.process_time()
    model = _Model()
    loader = DataLoader(TensorDataset(examples), batch_size=int(RATE * INTERACTIONS))
    hooked, optimizer, poisson = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=1e-4), data_loader=loader,
        noise_multiplier=NOISE, max_grad_norm=BOUND,
    )  # fmt: skip
    setting_up, clock = time.process_time() - clock, time.process_time()
    for (items,) in poisson:
        _step(hooked, optimizer, items)
    return setting_up, time.process_time() - clock


def _step(hooked: nn.Module, optimizer: torch.optim.Optimizer, items: Tensor) -> None:
    optimizer.zero_grad()
    logits = hooked(items)
    label = torch.zeros_like(logits)
    label[:, 0] = 1.0
    F.binary_cross_entropy_with_logits(logits, label).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=400, help="devices of one node")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds per path")
    parser.add_argument("--sample", type=int, default=30, help="clients of Opacus")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message="(Full backward hook|Secure RNG)")
    torch.set_num_threads(1)
    found = {name: ours(arguments.users, mode, arguments.rounds) for name, mode in OURS.items()}
    drawn = draw_batches(
        _train_items(arguments.sample), np.arange(arguments.sample), n_items=ITEMS, negatives=4, seed=0, round_number=1,
        sample_rate=RATE, steps=STEPS,
    )  # fmt: skip
    ptr, items = drawn.example_ptr, torch.from_numpy(drawn.items.astype(np.int64))
    hooks, engine = [], []
    for b in range(drawn.devices):
        steps = range(b * STEPS, (b + 1) * STEPS)
        hooks.append(opacus_hooks([items[ptr[s] : ptr[s + 1]] for s in steps]))
        engine.append(opacus_engine(torch.randint(ITEMS, (INTERACTIONS, 5))))
    # The first client pays for torch's lazy imports.
    (setting_up, training), made = np.median(hooks[1:], axis=0), np.median(engine[1:], axis=0).sum()
    found |= {"Opacus hooks": setting_up + training, "Opacus make_private": made}
    rows = [[n, f"{1e3 * x:.2f}", *(f"{found[o] / x:.0f}" for o in list(found)[2:])] for n, x in found.items()]
    table(
        f"Example-level DP-SGD, {STEPS} steps of {ITEMS} × {WIDTH}, {INTERACTIONS} interactions: CPU-ms a client",
        ["path", "total", "hooks / path", "make_private / path"],
        rows,
        [
            f"ours: whole rounds of {arguments.users} devices, batches and private state included",
            f"Opacus: median of {drawn.devices - 1} clients; hooks get their batches, {1e3 * setting_up:.2f} ms set-up",
        ],
    )


if __name__ == "__main__":
    main()
