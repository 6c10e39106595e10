"""The gates that DP-SGD on tables must pass, as functions of whatever makes one: an honest one passes, a faulty one
fails an assertion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from privacy.dpsgd import DPSGD

Make = Callable[..., DPSGD]
LEVEL = 1e-3  # noise seeds are fixed, so a gate passes or fails once and for all

SCHEDULES: dict[str, list[dict[str, float]]] = {
    "constant": [{"learning_rate": 0.3}] * 12,
    "decaying": [{"learning_rate": 0.5 * 0.6**s} for s in range(12)],
    "weight decay": [{"learning_rate": 0.5, "weight_decay": 0.3}] * 12,
    "everything changes": [
        {
            "learning_rate": 0.5 / (1 + s % 4), "weight_decay": 0.1 * (s % 3), "noise_multiplier": 0.5 + s % 2,
            "max_grad_norm": 1.0 + s % 5, "expected_batch": 2.0 + s % 3,
        }
        for s in range(12)
    ],
}  # fmt: skip
USUAL = {"noise_multiplier": 1.5, "max_grad_norm": 0.7, "expected_batch": 4.0}


def settings(step: Mapping[str, float]) -> dict[str, Any]:
    return {**USUAL, **step}


def variance(schedule: list[dict[str, float]]) -> float:
    """Of a coordinate that no example touches: each step's noise, shrunk by the decay of all later steps."""
    found = 0.0
    for step in map(settings, schedule):
        shrink = 1.0 - step["learning_rate"] * step.get("weight_decay", 0.0)
        scale = step["learning_rate"] * step["noise_multiplier"] * step["max_grad_norm"] / step["expected_batch"]
        found = found * shrink**2 + scale**2
    return found


def nobody(*names: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {}, {}


def untouched_rows_have_the_variance(make: Make, schedule: list[dict[str, float]], flush_at: tuple[int, ...]) -> None:
    """χ² of never-touched rows, which start at zero, against the closed form; and none is left as it was."""
    sgd = make({"item": torch.zeros(500, 8, dtype=torch.float64)}, noise_seed=1)
    for number, step in enumerate(schedule):
        sgd.step(*nobody(), **settings(step))
        if number in flush_at:
            sgd.flush()
    values = sgd.release()["item"].numpy()
    total = float((values**2).sum() / variance(schedule))
    low, high = stats.chi2.ppf([LEVEL, 1.0 - LEVEL], values.size)
    assert low < total < high, f"variance is {total / values.size:.3f} of what it should be"
    assert not (values == 0.0).any(), "a row is what it was before training"
    assert stats.kstest(values.ravel() / variance(schedule) ** 0.5, "norm").pvalue > LEVEL


def one_example_moves_the_sum_by_at_most_c(
    make: Make, rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor], clip: float
) -> None:
    """σ = 0: leaving out any one of the examples changes the clipped sum, over all tables, by ≤ C(1 + 1e-6)."""
    width = next(iter(gradients.values())).shape[2]
    size = next(iter(rows.values())).shape[0]

    def clipped_sum(keep: list[int]) -> Tensor:
        sgd = make({name: torch.zeros(9, width, dtype=torch.float64) for name in rows})
        sgd.step(
            {name: value[keep] for name, value in rows.items()},
            {name: value[keep] for name, value in gradients.items()},
            learning_rate=1.0, noise_multiplier=0.0, max_grad_norm=clip, expected_batch=1.0,
        )  # fmt: skip
        return torch.cat([value.flatten() for value in sgd.release().values()])

    everybody = clipped_sum(list(range(size)))
    for left_out in range(size):
        moved = everybody - clipped_sum([b for b in range(size) if b != left_out])
        assert float(moved.norm()) <= clip * (1.0 + 1e-6), f"example {left_out} moves the sum by {float(moved.norm())}"


def same_index_thrice() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three examples, one of which looks one row up three times and gets the same gradient each time."""
    rows = {"user": torch.tensor([[0], [1], [2]]), "item": torch.tensor([[4, 4, 4], [1, 2, 3], [4, 5, 6]])}
    generator = torch.Generator().manual_seed(3)
    gradients = {
        name: torch.randn(*at.shape, 2, generator=generator, dtype=torch.float64) * 3.0 for name, at in rows.items()
    }
    gradients["item"][0] = gradients["item"][0, :1]
    return rows, gradients


def replicas(make: Make, schedule: list[dict[str, float]], flush_at: tuple[int, ...], noise_seed: int) -> np.ndarray:
    """Final values float64[replicas, numbers] of independent copies of one small training run.

    A copy has 3 items and 1 user of width 2; its one example touches other items in every step, some of them twice,
    some never again, and its gradient depends on the values that were read.
    """
    copies = 400
    items, users = 3 * torch.arange(copies).unsqueeze(1), torch.arange(copies).unsqueeze(1)
    tables = {"item": torch.full((3 * copies, 2), 0.5), "user": torch.full((copies, 2), -0.5)}
    sgd = make(tables, noise_seed=noise_seed)
    touched = [[0, 1], [0, 0], [1, 1], [0, 1], [2, 0], [0, 0], [1, 0], [0, 0], [0, 0], [1, 1], [0, 1], [0, 0]]
    for number, step in enumerate(schedule):
        rows = {"item": items + torch.tensor(touched[number]), "user": users}
        item, user = sgd.read("item", rows["item"]), sgd.read("user", rows["user"])
        slope = torch.sigmoid((item * user).sum(2, keepdim=True)) - 0.5
        gradients = {"item": slope * user + item, "user": (slope * item).sum(1, keepdim=True) + user}
        sgd.step(rows, gradients, **settings(step))
        if number in flush_at:
            sgd.flush()
    found = sgd.release()
    return np.hstack([found["item"].reshape(copies, 6).double().numpy(), found["user"].double().numpy()])


def same_distribution(first: np.ndarray, second: np.ndarray) -> None:
    """Kolmogorov and Smirnov on every number and on products of pairs (their joint law), corrected by Bonferroni."""
    assert first.shape == second.shape
    n = first.shape[1]
    pairs = [(i, j) for i in range(n) for j in range(i)]

    def numbers(values: np.ndarray) -> list[np.ndarray]:
        centred = values - np.vstack([first, second]).mean(0)
        return [*values.T, *(centred[:, i] * centred[:, j] for i, j in pairs)]

    tests = [stats.ks_2samp(a, b).pvalue for a, b in zip(numbers(first), numbers(second), strict=True)]
    assert min(tests) * len(tests) > LEVEL, f"smallest p of {len(tests)} is {min(tests):.2g}"
