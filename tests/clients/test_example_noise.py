"""The gates of example-level DP-SGD: sensitivity, variance, distribution; and planted faults, which they catch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

import clients.example_kernel as example_kernel
import clients.example_steps as example_steps
import clients.per_example as per_example
from clients.example_batches import ExampleBatches
from clients.example_steps import DPSGD, schedule
from clients.store import DeviceStore
from fedrec.algorithms.base import Problem, Tensors
from fedrec.algorithms.fedmf import FedMF
from fedrec.data.interactions import UserItems
from privacy import clipping
from tests.clients.example_worlds import (
    FUSED,
    SEED,
    BiasedMF,
    FedNCF,
    batches_of,
    chi_square,
    device_change,
    draw,
    method,
    noise_only,
    opacus_device,
    run_program,
    start,
    train_items,
    variance_after,
    whole_round,
)


def gate_neighbours(fused: str) -> None:
    """One interaction more moves the clipped sum of a step, all tensors together, by at most C(1 + 1e-6)."""
    bound, widest = 0.5, 0.0
    for seed in range(30):
        # One item: every negative is the positive again, the hardest case for a norm that forgets repeats.
        for n_items in (1, 2, 8):
            algorithm = dataclasses.replace(
                method("bce", 1, n_items, 4, 3, 0.0), user_learning_rate=1.0, item_learning_rate=1.0,
                problem=Problem(1, n_items, seed), item_scale=4.0, user_scale=4.0,
            )  # type: ignore[type-var]  # fmt: skip
            sgd = DPSGD(1.0, 1, 1.0, 0.0, bound)
            items = np.random.default_rng(seed).permutation(n_items).tolist()
            shared, private = start(algorithm, 1)
            moved = []
            for row in (items[:-1], items):
                batches = draw(UserItems.from_pairs([0] * len(row), row, 1), algorithm, sgd)
                own = {name: value.clone() for name, value in private.items()}
                outcome = run_program(fused, algorithm, shared, own, batches, sgd)
                item = device_change(algorithm, outcome, batches, 0, n_items)["item"]
                moved.append(torch.cat([item.flatten(), outcome.private["user"].double().flatten()]))
            widest = max(widest, float((moved[1] - moved[0]).norm()))
    assert widest <= bound * (1 + 1e-6), f"moved by {widest / bound:.6f} C"
    assert widest > 0.99 * bound  # the bound is reached, or the test would pass for anything


def gate_noise_variance(folder: Path, fused: str, nodes: int = 1) -> None:
    """Every coordinate of the sum has the devices' summed variance, and every private coordinate its own."""
    algorithm, numbers = noise_only()
    train = UserItems.from_pairs([0] * 20 + [1] * 20 + [2] * 20, [*range(20), *range(20), *range(10, 30)], 6)
    updates, _, _ = whole_round(folder, algorithm, train, nodes=nodes, fused=fused, **numbers)
    total = sum(u.sums["item"] for u in updates)
    sgd = DPSGD(0.5, 4, 4.0, 0.0, 1.0)
    batches = draw(train, algorithm, sgd)
    readers = np.bincount(batches.rows, minlength=150)
    expected = 6 * variance_after(algorithm.shared["item"], 4)
    for rows in (readers == 0, readers == 1, readers >= 2):
        chi_square(total[torch.from_numpy(rows)], expected)
    many = FedMF(**{**algorithm.__dict__, "problem": Problem(60, 150, SEED)})
    crowd = UserItems.from_pairs(np.repeat(np.arange(60), 3), list(range(3)) * 60, 60)
    _, _, private = whole_round(folder / "crowd", many, crowd, fused=fused, **numbers)
    start = DeviceStore(folder / "start", many.private, range(60), SEED).vectors(np.arange(60))["user"]
    kept = math.prod(1 - many.private["user"].rate(0, s) * 0.2 for s in range(4))
    chi_square(private["user"] - kept * start, variance_after(many.private["user"], 4))


@FUSED
def test_one_interaction_more_changes_a_steps_clipped_sum_by_at_most_the_bound(fused: str) -> None:
    gate_neighbours(fused)


@FUSED
def test_noise_has_its_variance_on_touched_and_untouched_rows_and_user_vectors(tmp_path: Path, fused: str) -> None:
    gate_noise_variance(tmp_path, fused)


@pytest.mark.parametrize("nodes", [2, 6])
def test_noise_of_the_sum_does_not_depend_on_how_users_are_spread(tmp_path: Path, nodes: int) -> None:
    gate_noise_variance(tmp_path, "on", nodes)


def test_noise_has_its_variance_on_dense_shared_tensors(tmp_path: Path) -> None:
    algorithm, numbers = FedNCF(Problem(6, 40, SEED), dim=10, hidden=15, learning_rate=0.4, decay=0.1), noise_only()[1]
    (update,), shared, _ = whole_round(tmp_path, algorithm, train_items(6, 40, 2, 9), **numbers)
    spec = algorithm.shared["mlp.0"]
    kept = math.prod(1 - spec.rate(0, s) * spec.weight_decay for s in range(4))
    chi_square(update.sums["mlp.0"] - 6 * (kept - 1) * shared["mlp.0"], 6 * variance_after(spec, 4))


@FUSED
def test_noise_has_its_variance_on_a_private_number(tmp_path: Path, fused: str) -> None:
    algorithm = BiasedMF(Problem(500, 20, SEED), dim=2, negatives=1)
    _, _, private = whole_round(tmp_path, algorithm, train_items(500, 20, 2), fused=fused, **noise_only()[1])
    chi_square(private["bias"], variance_after(algorithm.private["bias"], 4))


def _patch(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Plant ``fault`` in both programs (the kernel then runs as the Python that it is compiled from)."""
    if fault == "noise halved":
        honest = DPSGD.deviation.fget  # type: ignore[attr-defined]
        monkeypatch.setattr(DPSGD, "deviation", property(lambda self: 0.5 * honest(self)))
    elif fault == "untouched rows forgotten":
        monkeypatch.setattr(example_steps.Schedule, "total", property(lambda self: 0.0))
    else:
        example = example_kernel._example.py_func
        monkeypatch.setattr(example_kernel, "_train", example_kernel._train.py_func)
        if fault == "no clipping":
            monkeypatch.setattr(per_example, "clip_factors", lambda norms, bound: torch.ones_like(norms))
            planted = lambda *given: example(*given[:6], math.inf, *given[7:])  # noqa: E731
        else:
            monkeypatch.setattr(clipping, "row_squared_norms", lambda g, items: g.flatten(1).square().sum(1))
            planted = lambda q, slot, *given: example(q[slot], np.arange(slot.size), *given)  # noqa: E731
        monkeypatch.setattr(example_kernel, "_example", planted)


@pytest.mark.parametrize("fault", ["noise halved", "untouched rows forgotten"])
@FUSED
def test_the_variance_gate_catches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fused: str, fault: str) -> None:
    _patch(monkeypatch, fault)
    with pytest.raises(AssertionError, match="of what it must be"):
        gate_noise_variance(tmp_path, fused)


@pytest.mark.parametrize("fault", ["no clipping", "norm that forgets repeats"])
@FUSED
def test_the_neighbour_gate_catches(monkeypatch: pytest.MonkeyPatch, fused: str, fault: str) -> None:
    _patch(monkeypatch, fault)
    with pytest.raises(AssertionError, match="moved by"):
        gate_neighbours(fused)


# -- the trajectory under noise: later gradients see the noise of earlier steps ----------------------------------------


def _many(batches: ExampleBatches, copies: int) -> ExampleBatches:
    """The same device ``copies`` times."""
    one = batches.example_ptr[-1]
    shift = np.repeat(np.arange(copies), batches.steps) * one
    ptr = np.concatenate([np.tile(batches.example_ptr[:-1], copies) + shift, [copies * one]])
    return ExampleBatches(
        batches.steps, ptr, np.tile(batches.items, (copies, 1)), np.arange(copies + 1) * batches.rows.size,
        np.tile(batches.rows, copies), np.tile(batches.slot, (copies, 1)),
    )  # fmt: skip


def gate_distribution(fused: str, opacus: list[Tensors]) -> None:
    """Statistics of a noisy run have Opacus' distribution (Kolmogorov and Smirnov, Bonferroni over them)."""
    algorithm, sgd, batches, shared, private = _noisy_world()
    copies = 3000
    crowd = _many(batches, copies)
    own = {name: value.expand(copies, *value.shape[1:]).clone() for name, value in private.items()}
    outcome = run_program(fused, algorithm, shared, own, crowd, sgd, np.random.default_rng(77))
    deviation = np.sqrt(outcome.pending["item"])[:, None]
    rows = outcome.rows["item"].numpy()
    rows = (rows + deviation * np.random.default_rng(78).standard_normal(rows.shape)).reshape(copies, -1, 2)
    product = schedule(algorithm.shared["item"], 0, sgd).product[-1]
    places = torch.from_numpy(batches.rows.astype(np.int64))
    theirs = torch.stack([r["item"] - product * shared["item"].double() for r in opacus])[:, places].numpy()
    users = outcome.private["user"].numpy()
    their_users = torch.stack([r["user"].reshape(-1) for r in opacus]).numpy()
    pairs = [(users[:, k], their_users[:, k]) for k in range(2)]
    pairs += [(rows[:, r, k], theirs[:, r, k]) for r in range(rows.shape[1]) for k in range(2)]
    # How rows and user vector vary together is what a late draw could get wrong.
    pairs += [((rows[:, r] * users).sum(1), (theirs[:, r] * their_users).sum(1)) for r in range(rows.shape[1])]
    pairs += [(np.square(users).sum(1), np.square(their_users).sum(1))]
    p = min(ks_2samp(a, b).pvalue for a, b in pairs)
    assert p * len(pairs) > 1e-3, f"smallest p {p:.2g} of {len(pairs)}"


def _noisy_world() -> tuple[FedMF, DPSGD, ExampleBatches, Tensors, Tensors]:
    algorithm = FedMF(
        Problem(1, 3, SEED), dim=2, negatives=1, user_learning_rate=2.0, item_learning_rate=3.0, step_decay=0.9,
        item_weight_decay=0.05, user_weight_decay=0.1, user_scale=1.0, item_scale=1.0,
    )  # fmt: skip
    # Few, large gradients: the noise of one step turns those of the next.
    sgd = DPSGD(0.5, 4, 1.0, 0.5, 1.0)
    batches = draw(UserItems.from_pairs([0, 0, 0], [0, 1, 2], 1), algorithm, sgd)
    return algorithm, sgd, batches, *start(algorithm, 1)


@pytest.fixture(scope="module")
def opacus_runs() -> list[Tensors]:
    algorithm, sgd, batches, shared, private = _noisy_world()
    assert 3 <= len(batches.items) <= 9
    assert batches.rows.size == 3
    tables = {**shared, **{name: value[0] for name, value in private.items()}}
    generator = torch.Generator().manual_seed(1)
    return [opacus_device(algorithm, tables, batches_of(batches, 0), sgd, generator) for _ in range(500)]


@FUSED
def test_a_noisy_run_has_opacus_distribution(fused: str, opacus_runs: list[Tensors]) -> None:
    gate_distribution(fused, opacus_runs)


def test_the_distribution_gate_catches_noise_that_comes_too_late(
    monkeypatch: pytest.MonkeyPatch, opacus_runs: list[Tensors]
) -> None:
    """All of a row's noise at the end: every variance is right, but no gradient has seen any."""
    honest: Callable[..., Any] = example_steps.catch_up

    def late(steps: Any, last: Any, now: int) -> Any:
        factor, deviation = honest(steps, last, now)
        if now < steps.rate.size:
            return factor, np.zeros_like(deviation)
        return factor, np.full_like(deviation, math.sqrt(steps.total))

    monkeypatch.setattr(example_steps, "catch_up", late)
    with pytest.raises(AssertionError, match="smallest p"):
        gate_distribution("off", opacus_runs)
