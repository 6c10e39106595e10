"""DP-SGD on two embedding tables, lazily noised: ``python -m benchmarks.lazy_noise``.

Users and items of the same number, dimension 32, score ⟨user, item⟩ with binary cross-entropy, Poisson batches of 1024
expected examples; against Opacus' ghost clipping, and against SGD without privacy on the same batches, written in the
same way (gather, the same gradient kernel, scatter) and as torch's sparse embeddings.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import table
from privacy.lazy import LazyNoiseSGD
from privacy.lazy_kernels import descend

Batch = tuple[Tensor, Tensor, Tensor]  # users int64[B, 1], items int64[B, 1], labels float32[B]
Tables = dict[str, Tensor]
DIM, EXPECTED, RATE, SIGMA, CLIP = 32, 1024, 0.05, 1.0, 1.0


def batches(rows: int, count: int, seed: int) -> Iterator[Batch]:
    """Poisson batches of interactions of uniformly random users and items."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        size = int(draw.poisson(EXPECTED))
        user, item = (torch.from_numpy(draw.integers(rows, size=(size, 1))) for _ in range(2))
        yield user, item, torch.from_numpy(draw.integers(2, size=size).astype(np.float32))


def fresh(rows: int) -> Tables:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.empty(rows, DIM).normal_(generator=generator) * 0.1 for name in ("user", "item")}


@njit(cache=True, fastmath={"contract", "reassoc"})
def _gradients(
    user: npt.NDArray[Any], item: npt.NDArray[Any], label: npt.NDArray[Any], by_user: npt.NDArray[Any],
    by_item: npt.NDArray[Any],
) -> None:  # fmt: skip
    for b in range(label.size):
        score = np.float32(0.0)
        for k in range(user.shape[2]):
            score += user[b, 0, k] * item[b, 0, k]
        slope = np.float32(1.0) / (np.float32(1.0) + np.exp(-score)) - label[b]
        for k in range(user.shape[2]):
            by_user[b, 0, k] = slope * item[b, 0, k]
            by_item[b, 0, k] = slope * user[b, 0, k]


def gradients(user: Tensor, item: Tensor, label: Tensor) -> Tables:
    """Per-example gradients of binary cross-entropy by both rows, [B, 1, DIM] each."""
    found = {"user": torch.empty_like(user), "item": torch.empty_like(item)}
    _gradients(user.numpy(), item.numpy(), label.numpy(), found["user"].numpy(), found["item"].numpy())
    return found


def lazy(rows: int) -> tuple[Callable[[Batch], None], LazyNoiseSGD]:
    sgd = LazyNoiseSGD(fresh(rows))

    def step(batch: Batch) -> None:
        user, item, label = batch
        found = gradients(sgd.read("user", user), sgd.read("item", item), label)
        sgd.step(
            {"user": user, "item": item}, found, learning_rate=RATE, noise_multiplier=SIGMA, max_grad_norm=CLIP,
            expected_batch=EXPECTED,
        )  # fmt: skip

    return step, sgd


def same_style(rows: int) -> Callable[[Batch], None]:
    """SGD without privacy, in the lazy one's manner: gather, gradients, scatter."""
    tables = fresh(rows)

    def step(batch: Batch) -> None:
        user, item, label = batch
        looked = {"user": user, "item": item}
        values = {name: tables[name].index_select(0, at.flatten()).view(*at.shape, DIM) for name, at in looked.items()}
        found = gradients(values["user"], values["item"], label)
        ones = np.ones(len(label))
        for name, at in looked.items():
            descend(tables[name].numpy(), at.numpy(), found[name].numpy(), ones, RATE / EXPECTED)

    return step


def torch_sparse(rows: int) -> Callable[[Batch], None]:
    """SGD without privacy, as torch offers it: sparse embeddings, autograd, ``torch.optim.SGD``."""
    model = nn.ModuleDict(
        {name: nn.Embedding.from_pretrained(value, freeze=False, sparse=True) for name, value in fresh(rows).items()}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step(batch: Batch) -> None:
        user, item, label = batch
        optimizer.zero_grad()
        scores = (model["user"](user) * model["item"](item)).sum((1, 2))
        loss = F.binary_cross_entropy_with_logits(scores, label, reduction="sum") / EXPECTED
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


class _TwoTables(nn.Module):
    def __init__(self, tables: Tables) -> None:
        super().__init__()
        self.user = nn.Embedding.from_pretrained(tables["user"], freeze=False)
        self.item = nn.Embedding.from_pretrained(tables["item"], freeze=False)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product: Tensor = (self.user(user) * self.item(item)).sum((1, 2))
        return product


def ghost(rows: int) -> Callable[[Batch], None]:
    """Opacus' fast gradient clipping with ghost norms."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    model = GradSampleModuleFastGradientClipping(
        _TwoTables(fresh(rows)), loss_reduction="mean", max_grad_norm=CLIP, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=RATE), noise_multiplier=SIGMA, max_grad_norm=CLIP,
        expected_batch_size=EXPECTED,
    )  # fmt: skip
    criterion = DPLossFastGradientClipping(model, optimizer, nn.BCEWithLogitsLoss(), loss_reduction="mean")

    def step(batch: Batch) -> None:
        user, item, label = batch
        optimizer.zero_grad()
        criterion(model(user, item), label).backward()
        optimizer.step()

    return step


def milliseconds(step: Callable[[Batch], None], rows: int, count: int) -> float:
    """Median CPU time of a step, after two that warm up."""
    taken = []
    for batch in batches(rows, count + 2, 1):
        clock = time.process_time()
        step(batch)
        taken.append(time.process_time() - clock)
    return 1e3 * float(np.median(taken[2:]))


def memory(rows: int) -> tuple[float, float]:
    """What the lazy tables hold after 20 steps and a flush, and their peak until then, both by the tables' own size."""
    tables = fresh(rows)
    size = sum(value.numel() * value.element_size() for value in tables.values())
    tracemalloc.start()
    step, sgd = lazy(rows)
    for batch in batches(rows, 20, 2):
        step(batch)
    sgd.flush()
    held = sgd.nbytes
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / size, peak / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=200, help="measured steps of the fast ones")
    parser.add_argument("--ghost-limit", type=int, default=1_000_000, help="largest table that ghost clipping gets")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    lines = []
    for rows in arguments.rows:
        step, sgd = lazy(rows)
        ours = milliseconds(step, rows, arguments.steps)
        clock = time.process_time()
        sgd.flush()
        flush = 1e3 * (time.process_time() - clock)
        plain = milliseconds(same_style(rows), rows, arguments.steps)
        sparse = milliseconds(torch_sparse(rows), rows, arguments.steps)
        slow = float("nan")
        if rows <= arguments.ghost_limit:
            slow = milliseconds(ghost(rows), rows, max(3, min(30, 1_000_000 // rows)))
        held, peak = memory(rows)
        numbers = [plain, sparse, ours, flush, slow]
        ratios = [ours / plain, ours / sparse, slow / ours, slow / (ours + flush / 100)]
        lines.append(
            [
                f"{rows} x {DIM}",
                *(f"{x:.3g}" for x in numbers),
                *(f"{x:.3g}" for x in ratios),
                f"{held:.2f}",
                f"{peak:.2f}",
            ]
        )
    table(
        f"DP-SGD on two tables, batch {EXPECTED} (Poisson): CPU-ms a step, median",
        ["rows", "SGD", "torch SGD", "lazy", "flush", "ghost", "lazy/SGD", "lazy/torch", "ghost/lazy", "flush 100",
         "held", "peak"],
        lines,
        [
            "SGD, torch SGD: without privacy, in the same kernels and as torch's sparse embeddings",
            "flush 100: ghost / (lazy + flush / 100), a release every 100 steps",
            "held, peak: memory of the lazy tables after 20 steps and a flush, and at its peak, by the tables' size",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
