"""The one-run audit: silent on honest noise, and louder than the claim on every planted fault."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from fedrec.algorithms.base import Tensors, TensorSpec
from fedrec.errors import ConfigError
from privacy.accountants import Release, epsilon
from privacy.attacks.audit import CanaryAudit, epsilon_ceiling, epsilon_lower_bound, p_value

SPECS = {"item": TensorSpec((100, 8), per_item=True), "bias": TensorSpec((5,)), "scale": TensorSpec(())}
DELTA = 943**-1.1
C = 0.5


@given(st.integers(1, 120), st.data(), st.floats(0.5, 0.99))
def test_without_delta_the_bound_is_clopper_and_pearsons_in_log_odds(
    guesses: int, data: st.DataObject, confidence: float
) -> None:
    correct = data.draw(st.integers(0, guesses))
    low = binomtest(correct, guesses, alternative="greater").proportion_ci(confidence, method="exact").low
    expected = math.log(low / (1.0 - low)) if low > 0.5 else 0.0
    assert epsilon_lower_bound(200, guesses, correct, 0.0, confidence) == pytest.approx(expected, abs=1e-4)


@given(st.integers(1, 60), st.data(), st.floats(0.0, 6.0), st.floats(0.0, 0.01))
def test_the_p_value_is_the_theorems_formula_term_by_term(
    m: int, data: st.DataObject, eps: float, delta: float
) -> None:
    guesses = data.draw(st.integers(0, m))
    correct = data.draw(st.integers(0, guesses))
    w = binom(guesses, math.exp(eps) / (1.0 + math.exp(eps)))
    chance = [float(w.pmf(k)) for k in range(guesses + 1)]
    tail = sum(chance[correct:])
    worst = max(sum(chance[max(correct - i, 0) : correct]) / i for i in range(1, m + 1))
    assert p_value(m, guesses, correct, eps, delta) == pytest.approx(min(1.0, tail + 2 * m * delta * worst), abs=1e-9)


@pytest.mark.parametrize(("eps", "delta"), [(0.5, 0.0), (1.5, 1e-4), (1.0, 5e-3)])
def test_randomised_response_is_refuted_no_more_often_than_allowed(eps: float, delta: float) -> None:
    """The mechanism that the theorem is tight for: truth with probability e^ε/(1 + e^ε), all revealed with a δ."""
    draw = np.random.default_rng(0)
    m, wrong, runs = 100, 0, 3000
    bounds = [epsilon_lower_bound(m, m, v, delta) for v in range(m + 1)]
    for _ in range(runs):
        revealed = draw.random(m) < delta
        right = revealed | (draw.random(m) < 1.0 / (1.0 + math.exp(-eps)))
        wrong += bounds[int(right.sum())] > eps
    assert wrong / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_the_bound_falls_with_wrong_guesses_delta_and_confidence() -> None:
    assert epsilon_lower_bound(100, 80, 80, 1e-4) > epsilon_lower_bound(100, 80, 75, 1e-4) > 0.0
    assert epsilon_lower_bound(100, 80, 80, 1e-4) > epsilon_lower_bound(100, 80, 80, 1e-3)
    assert epsilon_lower_bound(100, 80, 80, 1e-4, 0.9) > epsilon_lower_bound(100, 80, 80, 1e-4, 0.99)
    assert epsilon_lower_bound(100, 80, 40, 0.0) == epsilon_lower_bound(100, 0, 0, 0.0) == 0.0
    assert epsilon_ceiling(200, DELTA) > epsilon_ceiling(50, DELTA)
    for bad in ((10, 11, 5, 0.0), (10, 5, 6, 0.0)):
        with pytest.raises(ValueError, match="0 ≤ correct ≤ guesses ≤ m"):
            epsilon_lower_bound(*bad)


def _clip(upload: Tensors) -> Tensors:
    norm = torch.cat([value.reshape(len(value), -1) for value in upload.values()], dim=1).norm(dim=1)
    factor = (C / norm).clamp(max=1.0)
    return {name: value * factor.view(-1, *[1] * (value.ndim - 1)) for name, value in upload.items()}


def _federation(
    seed: int, *, sigma: float, rounds: int = 12, rate: float = 1.0, noise: float = 1.0, clipping: bool = True
) -> CanaryAudit:
    """A Gaussian mechanism of 60 users' clipped sums in plain NumPy, with canaries among them."""
    draw = np.random.default_rng(seed)
    clip = _clip if clipping else lambda upload: upload
    audit = CanaryAudit(100, rate, seed)
    users = clip({n: torch.from_numpy(draw.normal(size=(60, *s.shape)).astype(np.float32)) for n, s in SPECS.items()})
    for number in range(1, rounds + 1):
        present = torch.from_numpy(draw.random(60) < rate)
        honest = {name: value[present].sum(0) for name, value in users.items()}
        planted, _ = audit.contribution(SPECS, number, clip, C)
        noisy = {
            name: honest[name] + planted[name]
            + torch.from_numpy(np.asarray(draw.normal(size=spec.shape), dtype=np.float32)) * (noise * sigma * C)
            for name, spec in SPECS.items()
        }  # fmt: skip
        audit.observe(noisy, SPECS, C, sigma, honest)
    return audit


def _claimed(sigma: float, rounds: int, rate: float) -> float:
    return epsilon([Release(sigma, rate, rounds)], DELTA, "rdp" if rate < 1.0 else "auto").value


@pytest.mark.parametrize(("sigma", "rounds", "rate"), [(11.0, 12, 1.0), (1.3, 12, 0.3)])
def test_honest_noise_is_never_accused(sigma: float, rounds: int, rate: float) -> None:
    claimed = _claimed(sigma, rounds, rate)
    for seed in range(20):
        found = _federation(seed, sigma=sigma, rounds=rounds, rate=rate).result(DELTA, claimed)
        assert found["epsilon_lower_bound"] <= claimed
        assert not found["violated"]


@pytest.mark.parametrize(
    "fault",
    [{"noise": 0.0}, {"noise": 1.0 / math.sqrt(60)}, {"clipping": False}],
    ids=["no noise", "noise divided by √B", "no clipping"],
)
def test_a_planted_fault_is_refuted_in_every_run(fault: dict[str, Any]) -> None:
    claimed = _claimed(11.0, 12, 1.0)
    assert 0.5 < claimed < 1.5
    for seed in range(20):
        found = _federation(seed, sigma=11.0, **fault).result(DELTA, claimed)
        assert found["violated"]
        assert claimed < found["epsilon_lower_bound"] <= found["ceiling"]


def test_a_mechanism_without_noise_is_guessed_perfectly() -> None:
    audit = _federation(3, sigma=11.0, noise=0.0)
    found = audit.result(DELTA, 1.0)
    assert found["correct"] == found["guesses"] == 80
    assert found["epsilon_lower_bound"] == found["ceiling"] == epsilon_ceiling(100, DELTA)
    assert audit.scores[audit.included].min() > audit.scores[~audit.included].max()
    assert found["included"] == audit.included.sum()


def test_canaries_are_unit_patterns_over_all_tensors_and_symmetric_where_they_must_be() -> None:
    specs = {**SPECS, "gram": TensorSpec((30, 30), symmetric=True)}
    audit = CanaryAudit(20, seed=1)
    found = audit.directions(specs, np.arange(20))
    assert {name: tuple(v.shape[1:]) for name, v in found.items()} == {n: s.shape for n, s in specs.items()}
    assert torch.equal(found["gram"], found["gram"].mT)
    flat = torch.cat([value.reshape(20, -1) for value in found.values()], dim=1).double()
    np.testing.assert_allclose(flat.norm(dim=1), 1.0, rtol=1e-6)
    assert len(flat.abs().unique()) == 1
    # Far from one another: |cos| of random sign patterns is about 1/√D.
    cosine = (flat @ flat.T).fill_diagonal_(0.0)
    assert cosine.abs().max() < 6.0 / math.sqrt(800)
    assert flat.mean().abs() < 5.0 / math.sqrt(flat.numel()) / math.sqrt(flat.shape[1])


def test_patterns_too_large_to_keep_are_the_same_and_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _federation(4, sigma=2.0, rounds=3)
    directions = kept.directions(SPECS, np.array([3, 50]))
    monkeypatch.setattr("privacy.attacks.audit._BLOCK", 3000)
    recomputed = _federation(4, sigma=2.0, rounds=3)
    for name, value in recomputed.directions(SPECS, np.array([3, 50])).items():
        assert torch.equal(value, directions[name])
    np.testing.assert_allclose(recomputed.scores, kept.scores, atol=1e-4)


def test_canaries_arrive_unclipped_and_leave_clipped() -> None:
    audit = CanaryAudit(16, seed=2, excess=10.0)
    seen: list[float] = []

    def clip(upload: Tensors) -> Tensors:
        seen.extend(torch.cat([value.reshape(len(value), -1) for value in upload.values()], dim=1).norm(dim=1).tolist())
        return _clip(upload)

    total, count = audit.contribution(SPECS, 1, clip, C)
    assert count == audit.included.sum() == len(seen) > 0
    np.testing.assert_allclose(seen, 10.0 * C, rtol=1e-5)
    expected = {name: torch.zeros(spec.shape) for name, spec in SPECS.items()}
    for name, value in audit.directions(SPECS, np.flatnonzero(audit.included)).items():
        expected[name] += C * value.sum(0)
    for name, value in total.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4)


def test_coins_are_fair_and_canaries_are_sampled_at_the_users_rate() -> None:
    audit = CanaryAudit(4000, 0.3, seed=5)
    included = audit.included
    assert included.mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(4000))
    drawn = [audit.sampled(number) for number in range(1, 21)]
    assert all(included[members].all() for members in drawn)
    share = np.mean([members.size for members in drawn]) / included.sum()
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / (20 * included.sum())))
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], CanaryAudit(4000, 0.3, seed=5).sampled(1))


def test_without_a_seed_the_coins_are_the_operating_systems() -> None:
    assert not np.array_equal(CanaryAudit(100).included, CanaryAudit(100).included)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"canaries": 7}, "canaries=7"),
        ({"rate": 0.0}, "rate in"),
        ({"rate": 1.5}, "rate in"),
        ({"excess": 1.0}, "excess=1"),
    ],
)
def test_an_audit_that_could_find_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CanaryAudit(**settings)


def test_an_audit_without_a_release_has_no_verdict() -> None:
    with pytest.raises(ValueError, match="observed no round"):
        CanaryAudit(10, seed=0).result(DELTA, 1.0)
