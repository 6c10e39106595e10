"""Each fault that the literature's code has had is planted, and a named gate catches it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import privacy.lazy
from privacy.lazy import LazyNoiseSGD
from privacy.normals import NoiseSource
from tests.privacy import lazy_gates as gates

CONSTANT, DECAYING = gates.SCHEDULES["constant"], gates.SCHEDULES["decaying"]


def test_halved_noise_fails_the_variance_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = NoiseSource.normal
    monkeypatch.setattr(NoiseSource, "normal", lambda self, count: np.float32(0.5) * honest(self, count))
    with pytest.raises(AssertionError, match=r"variance is 0\.2"):
        gates.untouched_rows_have_the_variance(LazyNoiseSGD, CONSTANT, ())


def test_no_clipping_fails_the_neighbour_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(squares: Any, max_grad_norm: float) -> int:
        squares[:] = 1.0
        return 0

    gates.one_example_moves_the_sum_by_at_most_c(LazyNoiseSGD, *gates.same_index_thrice(), 1.0)
    monkeypatch.setattr(privacy.lazy, "clip_factors", ones)
    with pytest.raises(AssertionError, match="moves the sum"):
        gates.one_example_moves_the_sum_by_at_most_c(LazyNoiseSGD, *gates.same_index_thrice(), 1.0)


def test_clipping_at_twice_the_norm_fails_the_neighbour_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = privacy.lazy.clip_factors
    monkeypatch.setattr(privacy.lazy, "clip_factors", lambda squares, norm: honest(squares, 2.0 * norm))
    with pytest.raises(AssertionError, match="moves the sum"):
        gates.one_example_moves_the_sum_by_at_most_c(LazyNoiseSGD, *gates.same_index_thrice(), 1.0)


def test_a_norm_that_takes_repeated_rows_for_different_ones_fails_the_neighbour_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def naive(rows: Any, gradients: Any, last: Any, now: int, out: Any) -> int:
        out += (gradients**2).sum((1, 2))
        return 0

    monkeypatch.setattr(privacy.lazy, "squared_norms", naive)
    with pytest.raises(AssertionError, match="example 0 moves the sum by 1"):
        gates.one_example_moves_the_sum_by_at_most_c(LazyNoiseSGD, *gates.same_index_thrice(), 1.0)


def test_clipping_each_table_by_itself_fails_the_neighbour_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = privacy.lazy.squared_norms

    def last_table_only(rows: Any, gradients: Any, last: Any, now: int, out: Any) -> int:
        out[:] = 0.0
        return int(honest(rows, gradients, last, now, out))

    monkeypatch.setattr(privacy.lazy, "squared_norms", last_table_only)
    with pytest.raises(AssertionError, match="moves the sum"):
        gates.one_example_moves_the_sum_by_at_most_c(LazyNoiseSGD, *gates.same_index_thrice(), 1.0)


def test_a_forgotten_flush_fails_the_variance_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LazyNoiseSGD, "_catch_up_all", lambda self, table: None)
    with pytest.raises(AssertionError, match=r"variance is 0\.000"):
        gates.untouched_rows_have_the_variance(LazyNoiseSGD, CONSTANT, ())


def test_a_rate_left_out_of_the_history_fails_the_variance_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """LazyDP's own code adds k noises at today's learning rate: right for a constant rate only."""

    def todays_rate(self: Any, keep: float, deviation: float) -> None:
        self.now += 1
        self.variance[: self.now + 1] = np.arange(self.now + 1) * deviation**2

    monkeypatch.setattr(privacy.lazy._Table, "advance", todays_rate)
    gates.untouched_rows_have_the_variance(LazyNoiseSGD, CONSTANT, ())
    with pytest.raises(AssertionError, match=r"variance is 0\.00"):
        gates.untouched_rows_have_the_variance(LazyNoiseSGD, DECAYING, ())


def test_one_noise_too_few_at_each_read_fails_the_comparison_with_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    from privacy.eager import OpacusSGD

    honest = privacy.lazy.collect

    def short(rows: Any, last: Any, now: int, product: Any, variance: Any, stale: Any, keep: Any, spread: Any) -> int:
        found = int(honest(rows, last, now, product, variance, stale, keep, spread))
        latest = variance[now] - variance[max(now - 1, 0)]
        spread[:found] = np.sqrt(np.maximum(spread[:found] ** 2 - latest * product[now] ** 2, 0.0))
        return found

    eager = gates.replicas(OpacusSGD, CONSTANT, (), noise_seed=3)
    monkeypatch.setattr(privacy.lazy, "collect", short)
    with pytest.raises(AssertionError, match="smallest p"):
        gates.same_distribution(gates.replicas(LazyNoiseSGD, CONSTANT, (), noise_seed=2), eager)
