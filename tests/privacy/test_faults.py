"""Faults that published code has had, planted one by one into the user-level mechanism, and the gate that catches each.

The gates are those that the other tests apply to the honest mechanism: the norm of a user's contribution, the χ² of the
noise, the ledger's and the plan's refusals. Faults of DP-SGD on single interactions (duplicate-naive norm, forgotten
flush, noise halved, no clipping) are planted where it lives: test_lazy_faults.py and ../clients/test_example_dp.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import clients.protection
import clients.training
from clients.protection import Protection, noise_generator
from fedrec.errors import ConfigError
from privacy.ledger import Ledger, Subject
from privacy.plan import Federation, make_plan
from privacy.settings import PrivacySettings
from tests.clients import small
from tests.clients.test_protection import assert_variance, contribution, noise_of, norm

CLIP = 0.02  # well below what the users of this small world upload


def _space(folder: Path) -> Any:
    # The tensor program, whose functions can be replaced; the fused kernel is held to it in test_protection.py.
    return small.workspace(
        folder, {**small.FEDMF, "item_weight_decay": 0.2, "negatives": 1}, fused="off", upload={"kind": "dense"}
    )


def _gate_sensitivity(space: Any, users: int = 6) -> None:
    """Every user's contribution has norm C at most, and adding a user changes the sum by that much at most."""
    everybody, _ = contribution(space, range(users), Protection(clip=CLIP))
    for user in range(users):
        rest, _ = contribution(space, [u for u in range(users) if u != user], Protection(clip=CLIP))
        change = {name: everybody[name] - rest[name] for name in rest}
        assert norm(change) <= CLIP * (1 + 1e-5)  # float32 sums round the rest by a few 1e-8


def _gate_noise(space: Any, users: int = 8) -> None:
    """The noise of every coordinate has the variance that the devices' shares add up to."""
    noise, _ = noise_of(space, range(users), Protection(clip=CLIP, noise=0.5, generator=noise_generator(2)))
    assert_variance(noise["item"], users * 0.25)


def test_the_honest_mechanism_passes_both_gates(tmp_path: Path) -> None:
    _gate_sensitivity(_space(tmp_path))
    _gate_noise(_space(tmp_path))


def test_no_clipping_is_caught_by_the_norm_of_a_contribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients.training, "clip_factors", lambda norms, clip: torch.ones_like(norms))
    with pytest.raises(AssertionError):
        _gate_sensitivity(_space(tmp_path))


def test_clipping_per_node_is_caught_by_the_norm_of_a_contribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own wrappers clip the mean of a node: a user then moves the sum by up to the other users' norms."""

    def per_node(norms: torch.Tensor, clip: float) -> torch.Tensor:
        return torch.full_like(norms, min(1.0, clip / float(norms.mean())))

    monkeypatch.setattr(clients.training, "clip_factors", per_node)
    with pytest.raises(AssertionError):
        _gate_sensitivity(_space(tmp_path))


def test_clipping_tensor_by_tensor_is_caught_where_there_are_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of four tensors within C lets a user move the whole by 2C."""
    honest = clients.training.whole_norms

    def largest_tensor(algorithm: Any, before: Any, deltas: Any, decay: Any, chunk: Any, squares: Any) -> torch.Tensor:
        return honest(algorithm, before, deltas, decay, chunk, squares) / 2.0

    monkeypatch.setattr(clients.training, "whole_norms", largest_tensor)
    with pytest.raises(AssertionError):
        _gate_sensitivity(_space(tmp_path))


def test_the_decay_of_untouched_rows_left_out_of_the_norm_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = clients.training.whole_norms

    def touched_only(algorithm: Any, before: Any, deltas: Any, decay: Any, chunk: Any, squares: Any) -> torch.Tensor:
        return honest(algorithm, before, deltas, decay, chunk, dict.fromkeys(squares, 0.0))

    monkeypatch.setattr(clients.training, "whole_norms", touched_only)
    with pytest.raises(AssertionError):
        _gate_sensitivity(_space(tmp_path))


@pytest.mark.parametrize("factor", [0.5, 1.0 / math.sqrt(8.0), 0.0], ids=["halved", "over-root-n", "none"])
def test_too_little_noise_is_caught_by_its_variance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    honest = clients.training.add_noise

    def less(update: Any, algorithm: Any, shared: Any, protection: Protection) -> None:
        honest(update, algorithm, shared, replace(protection, noise=factor * protection.noise))

    monkeypatch.setattr(clients.training, "add_noise", less)
    with pytest.raises(AssertionError):
        _gate_noise(_space(tmp_path))


def test_noise_on_touched_rows_alone_is_caught_by_the_variance_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = clients.training.add_noise

    def touched_only(update: Any, algorithm: Any, shared: Any, protection: Protection) -> None:
        touched = update.counts > 0
        before = {name: total.clone() for name, total in update.sums.items()}
        honest(update, algorithm, shared, protection)
        for name, total in update.sums.items():
            total[~touched] = before[name][~touched]

    monkeypatch.setattr(clients.training, "add_noise", touched_only)
    with pytest.raises(AssertionError):
        _gate_noise(_space(tmp_path), users=1)


def test_a_cohort_of_fixed_size_is_never_accounted_for_as_a_poisson_sample(tmp_path: Path) -> None:
    settings = PrivacySettings("user_dp", noise_multiplier=2.93)
    with pytest.raises(ConfigError, match=r"federation\.sampler=fixed: .* must not get its epsilon; write"):
        make_plan(settings, Federation(943, 100_000, "fixed", 0.1, 100))
    ledger = Ledger.start(tmp_path / "ledger.json", Subject("data", "0" * 64, 943, 100_000), 5e-4)
    with pytest.raises(ConfigError, match=r"federation\.sampler=fixed"):
        ledger.record(
            run="run", round=1, unit="user", what=["item"], sampler="fixed", sample_rate=0.1, noise_multiplier=2.93,
            max_grad_norm=1.0,
        )  # fmt: skip
    assert not ledger.entries
