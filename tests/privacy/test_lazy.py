"""Lazy noise is DP-SGD: equal to Opacus without noise, equal in distribution with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import privacy.lazy
from privacy.eager import OpacusSGD
from privacy.lazy import LazyNoiseSGD
from tests.privacy import lazy_gates as gates


def random_batches(
    seed: int, dtype: torch.dtype, sizes: list[int]
) -> tuple[dict[str, Tensor], list[tuple[dict[str, Tensor], dict[str, Tensor]]]]:
    """Three tables of random shape (one a dense tensor, as a table of one row), and batches that repeat indices."""
    draw = np.random.default_rng(seed)
    shapes = {"user": (int(draw.integers(1, 8)), 3), "item": (int(draw.integers(1, 8)), 3), "dense": (1, 5)}
    width = {"user": 1, "item": int(draw.integers(1, 6)), "dense": 1}

    def real(*shape: int) -> Tensor:
        return torch.from_numpy(draw.normal(size=shape)).to(dtype)

    batches = []
    for size in sizes:
        rows = {n: torch.from_numpy(draw.integers(shapes[n][0], size=(size, width[n]))) for n in shapes}
        scale = 10.0 ** draw.uniform(-2, 1)
        batches.append((rows, {n: real(*rows[n].shape, shapes[n][1]) * scale for n in shapes}))
    return {n: real(*shape) for n, shape in shapes.items()}, batches


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    clip=st.floats(0.01, 100.0),
    decay=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_without_noise_it_equals_opacus_hooks(
    seed: int, sizes: list[int], clip: float, decay: float, dtype: torch.dtype
) -> None:
    tables, batches = random_batches(seed, dtype, sizes)
    ours, opacus = LazyNoiseSGD(tables), OpacusSGD(tables)
    for number, (rows, gradients) in enumerate(batches):
        for sgd in (ours, opacus):
            for name, at in rows.items():
                sgd.read(name, at)
            sgd.step(
                rows, gradients, learning_rate={"user": 0.5, "item": 0.9**number, "dense": 0.1}, noise_multiplier=0.0,
                max_grad_norm=clip, expected_batch=2.5, weight_decay=decay,
            )  # fmt: skip
    found, wanted = ours.release(), opacus.release()
    for name in tables:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-12 if dtype is torch.float64 else 2e-5)


def test_a_table_that_nobody_touches_decays_and_empty_batches_are_steps() -> None:
    tables, batches = random_batches(5, torch.float64, [3])
    ours, opacus = LazyNoiseSGD(tables), OpacusSGD(tables)
    some = {"item": batches[0][0]["item"]}, {"item": batches[0][1]["item"]}
    for rows, gradients in (({}, {}), some, ({}, {})):
        for sgd in (ours, opacus):
            for name, at in rows.items():
                sgd.read(name, at)
            sgd.step(rows, gradients, learning_rate=0.5, weight_decay=0.1, **{**gates.USUAL, "noise_multiplier": 0.0})
    for name, wanted in opacus.release().items():
        assert float((ours.read(name, torch.arange(len(wanted))) - wanted).abs().max()) < 1e-12


@given(seed=st.integers(0, 2**32 - 1), clip=st.floats(0.01, 10.0))
def test_one_example_more_changes_the_sum_by_at_most_the_clipping_norm(seed: int, clip: float) -> None:
    draw = np.random.default_rng(seed)
    size = int(draw.integers(1, 5))
    rows = {name: torch.from_numpy(draw.integers(3, size=(size, t))) for name, t in (("user", 1), ("item", 5))}
    scale = 10.0 ** draw.uniform(-3, 3)
    # A common part: gradients of a row that is looked up more than once add up instead of cancelling.
    gradients = {
        name: torch.from_numpy(draw.normal(size=(*at.shape, 2)) + draw.normal()) * scale for name, at in rows.items()
    }
    gates.one_example_moves_the_sum_by_at_most_c(LazyNoiseSGD, rows, gradients, clip)


@pytest.mark.parametrize("name", list(gates.SCHEDULES))
@pytest.mark.parametrize("flush_at", [(), (0, 3, 4)], ids=["one flush", "odd flushes"])
@pytest.mark.parametrize("make", [LazyNoiseSGD, OpacusSGD])
def test_never_touched_rows_have_the_variance_of_eager_noise(
    make: gates.Make, name: str, flush_at: tuple[int, ...]
) -> None:
    gates.untouched_rows_have_the_variance(make, gates.SCHEDULES[name], flush_at)


@pytest.mark.parametrize("name", list(gates.SCHEDULES))
@pytest.mark.parametrize("flush_at", [(), (0, 3, 4)], ids=["one flush", "odd flushes"])
def test_trained_values_have_the_distribution_that_opacus_gives_them(name: str, flush_at: tuple[int, ...]) -> None:
    schedule = gates.SCHEDULES[name]
    lazy = gates.replicas(LazyNoiseSGD, schedule, flush_at, noise_seed=2)
    gates.same_distribution(lazy, gates.replicas(OpacusSGD, schedule, (), noise_seed=3))


def test_a_small_history_a_fading_rate_and_a_strong_decay_lose_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    fading = [{"learning_rate": 0.5**s} for s in range(60)]
    halving = [{"learning_rate": 1.0, "weight_decay": 0.5}] * 700  # P_t would be 2^-700
    gates.untouched_rows_have_the_variance(LazyNoiseSGD, fading, ())
    gates.untouched_rows_have_the_variance(LazyNoiseSGD, halving, ())
    monkeypatch.setattr(privacy.lazy, "_HISTORY", 7)
    gates.untouched_rows_have_the_variance(LazyNoiseSGD, gates.SCHEDULES["everything changes"], ())


def test_a_late_small_step_still_gets_its_own_noise() -> None:
    # After one step of rate 1, the variance of a step of rate 1e-9 is lost in the sum's last digit.
    sgd = LazyNoiseSGD({"item": torch.zeros(1000, 8, dtype=torch.float64)}, noise_seed=1)
    rows = torch.arange(1000)
    sgd.step({}, {}, learning_rate=1.0, **gates.USUAL)
    before = sgd.read("item", rows)
    sgd.step({}, {}, learning_rate=1e-9, **gates.USUAL)
    moved = (sgd.read("item", rows) - before).numpy()
    assert np.std(moved) == pytest.approx(gates.variance([{"learning_rate": 1e-9}]) ** 0.5, rel=0.03)


def test_the_value_that_is_read_is_the_value_that_is_released() -> None:
    sgd = LazyNoiseSGD({"item": torch.zeros(50, 4)}, noise_seed=1)
    for _ in range(3):
        sgd.step({}, {}, learning_rate=0.1, **gates.USUAL)
    read = sgd.read("item", torch.tensor([[3, 7], [3, 9]]))
    assert torch.equal(read[0, 0], read[1, 0])
    sgd.flush()
    assert torch.equal(sgd["item"][[3, 7]], read[0])
    assert torch.equal(sgd.release()["item"][9], read[1, 1])


def test_tables_given_are_not_changed_and_tables_read_are_copies() -> None:
    start = torch.ones(5, 2)
    sgd = LazyNoiseSGD({"item": start})
    sgd.tables["item"].zero_()
    sgd.read("item", torch.arange(5)).zero_()
    sgd.step({}, {}, learning_rate=0.1, **{**gates.USUAL, "noise_multiplier": 0.0})
    assert torch.equal(sgd.release()["item"], torch.ones(5, 2))
    assert torch.equal(start, torch.ones(5, 2))


def test_memory_is_the_tables_and_a_stamp_a_row() -> None:
    size, steps = (20_000, 32), 100
    sgd = LazyNoiseSGD({"user": torch.zeros(size), "item": torch.zeros(size)})
    rows = {name: torch.randint(size[0], (1024, 1)) for name in ("user", "item")}
    for _ in range(steps):
        gradients = {name: sgd.read(name, at) for name, at in rows.items()}
        sgd.step(rows, gradients, learning_rate=0.1, **gates.USUAL)
    sgd.flush()
    tables = 2 * 4 * size[0] * size[1]
    assert sgd.nbytes <= 1.3 * tables + 8 * 2 * size[0]
