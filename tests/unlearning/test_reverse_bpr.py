"""Reverse BPR: its gradient by hand, its closed form against autograd, the rule to stop, who sees what."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.cohort import draw_examples
from clients.forgetting import margins
from clients.workspace import Workspace
from fedrec.algorithms.base import Examples, GradientRecommender, Problem
from fedrec.algorithms.fedease import FedEASE
from fedrec.algorithms.fedmf import FedMF
from fedrec.algorithms.fedrap import FedRAP
from fedrec.data.split import Split
from fedrec.errors import ConfigError
from tests.unlearning.small import federation, task, trained, vectors
from unlearning.forget import ForgetSet
from unlearning.state import State, stores
from unlearning.strategies import Setting
from unlearning.strategies.reverse_bpr import ReverseBPR, ReverseObjective, forgotten_enough


def objective(inner: GradientRecommender, alpha: float = 0.25) -> ReverseObjective:
    return ReverseObjective(
        inner, alpha=alpha, private_rate=0.5, personal_rate=1.0, weight_decay=0.0, negatives=1, retained=0
    )


def pair(label: list[float], positive: list[int], negative: list[int]) -> Examples:
    return Examples(
        items=torch.arange(len(label)), label=torch.tensor(label), weight=torch.zeros(len(label)),
        positive=torch.tensor(positive), negative=torch.tensor(negative), pair_weight=torch.full((len(positive),), 0.5),
    )  # fmt: skip


def test_the_gradient_is_the_one_derived_by_hand() -> None:
    """p = (1, 2); q_0 = (1, 0) to forget, q_1 = (0, 1) drawn, q_2 = (1, 1) retained; α = 1/4.

    Forget: x = p·q_0 − p·q_1 = 1 − 2 = −1, dL/dx = α σ(x) = σ(−1)/4. Retain: x = p·q_2 − p·q_1 = 3 − 2 = 1,
    dL/dx = −(1 − α) σ(−x) = −3 σ(−1)/4. With s = σ(−1)/4 = 0.0672354: ∂L/∂q_0 = s·p, ∂L/∂q_2 = −3s·p,
    ∂L/∂q_1 = (−s + 3s)·p = 2s·p, ∂L/∂p = s·(q_0 − q_1) − 3s·(q_2 − q_1) = s·(1, −1) − 3s·(1, 0) = s·(−2, −1).
    """
    params = {"item": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), "user": torch.tensor([1.0, 2.0])}
    examples = pair([-1.0, 0.0, 1.0], [0, 2], [1, 1])
    batch = Examples(**{k: v.unsqueeze(0) if isinstance(v, torch.Tensor) else v for k, v in vars(examples).items()})
    losses, found = objective(FedMF(Problem(1, 3, 0), dim=2)).gradients(
        {k: v.unsqueeze(0) for k, v in params.items()}, batch
    )
    s = 1.0 / (1.0 + math.e) / 4.0
    p = torch.tensor([1.0, 2.0])
    assert torch.allclose(found["item"][0], torch.stack([s * p, 2 * s * p, -3 * s * p]))
    assert torch.allclose(found["user"][0], s * torch.tensor([-2.0, -1.0]))
    assert losses[0].item() == pytest.approx(math.log1p(math.exp(-1.0)))  # both softplus(−1), weights 1/4 and 3/4


@given(seed=st.integers(0, 10_000), which=st.sampled_from(["fedmf", "fedrap"]), alpha=st.floats(0.05, 1.0))
def test_the_closed_form_is_the_gradient_of_the_loss(seed: int, which: str, alpha: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows, pairs = 7, 9
    inner = FedMF(Problem(3, rows, 0), dim=4) if which == "fedmf" else FedRAP(Problem(3, rows, 0), dim=4)
    wrapped = objective(inner, alpha)
    params = {
        name: torch.randn(2, *((rows, 4) if spec.per_item else spec.shape), generator=draw)
        for name, spec in {**inner.shared, **inner.private}.items()
    }
    label = torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0, 0.0, 0.0]).expand(2, rows)
    examples = Examples(
        items=torch.arange(rows).expand(2, rows), label=label, weight=torch.zeros(2, rows),
        positive=torch.randint(0, 4, (2, pairs), generator=draw),
        negative=torch.randint(4, 7, (2, pairs), generator=draw),
        pair_weight=(torch.rand(2, pairs, generator=draw) > 0.3).float(),
    )  # fmt: skip
    losses, found = wrapped.gradients(params, examples)
    expected_losses, expected = GradientRecommender.gradients(wrapped, params, examples)
    assert torch.allclose(losses, expected_losses, atol=1e-5)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, atol=1e-5), name


def test_the_rule_stops_when_forget_pairs_score_as_pairs_never_trained_on() -> None:
    sums = {"forget_margin": 6.0, "forget_pairs": 3.0, "unseen_margin": 1.9, "unseen_pairs": 1.0}
    assert not forgotten_enough(sums)
    assert forgotten_enough({**sums, "forget_margin": 5.4})
    assert forgotten_enough({"forget_pairs": 0.0})
    assert not forgotten_enough({**sums, "unseen_pairs": 0.0})


def test_devices_report_centred_scores_of_both_kinds_of_pairs(tmp_path: Path, synthetic_split: Split) -> None:
    made = federation(synthetic_split)
    state = trained(made, tmp_path / "run", synthetic_split, 2)
    forget = ForgetSet.of(synthetic_split.train, users=[4, 9])
    made.write(state.devices, synthetic_split, forget.pairs)
    workspace = Workspace.open(state.devices)
    (store,) = stores(state.devices, scratch=True)
    found = margins(workspace, store, state.server.shared, np.arange(60), 1)
    scores = vectors(state) @ state.server.shared["item"].numpy().T
    centred = scores - scores.mean(1, keepdims=True)
    expected = sum(centred[user, synthetic_split.train.row(user)].sum() for user in (4, 9))
    assert found["forget_margin"] == pytest.approx(expected, rel=1e-4)
    unseen = sum(centred[user, synthetic_split.validation.row(user)].sum() for user in (4, 9))
    assert found["unseen_margin"] == pytest.approx(unseen, rel=1e-4)
    assert (found["forget_pairs"], found["unseen_pairs"]) == (forget.size, 2.0)


def test_only_affected_devices_see_what_is_to_be_forgotten(synthetic_split: Split) -> None:
    forget = ForgetSet.of(
        synthetic_split.train, pairs=([4, 9], [synthetic_split.train.row(4)[0], synthetic_split.train.row(9)[1]])
    )
    local = objective(FedMF(Problem(60, 120, 0))).local
    cohort = draw_examples(synthetic_split, np.arange(60), local, 5, 1, forget.pairs)
    assert cohort.forgotten is not None
    assert np.flatnonzero(cohort.forgotten).tolist() == [4, 9]
    assert cohort.positives.tolist() == synthetic_split.train.counts.tolist()


def test_it_forgets_and_stops_by_itself(tmp_path: Path, synthetic_split: Split) -> None:
    made = federation(synthetic_split)
    state = trained(made, tmp_path / "run", synthetic_split, 40)
    forget = ForgetSet.of(synthetic_split.train, users=[4, 9, 21])
    before = _margin(state, forget)
    done = ReverseBPR(user_repair_rounds=0).forget(task(made, state, synthetic_split, forget))
    reverse = [entry for entry in done.trace if entry["phase"] == "reverse"]
    assert 0 < len(reverse) < ReverseBPR().max_rounds
    assert not done.notes
    assert reverse[0]["forget_margin"] == pytest.approx(before, rel=1e-4)
    assert all(entry["forget_margin"] > entry["unseen_margin"] for entry in reverse)


def _margin(state: State, forget: ForgetSet) -> float:
    scores = vectors(state) @ state.server.shared["item"].numpy().T
    centred = scores - scores.mean(1, keepdims=True)
    return float(centred[forget.pairs.users, forget.pairs.items].mean())


def test_methods_without_a_dot_product_and_private_runs_are_refused() -> None:
    rest = {"rounds": 3, "interactions": 10, "users": 5, "secure_aggregation": False, "optimizer": "adam"}
    with pytest.raises(ConfigError, match="fedease does not score pairs by a dot product; write unlearning=retrain"):
        ReverseBPR().check(Setting(algorithm=FedEASE(Problem(5, 5, 0)), privacy=None, **rest))
    with pytest.raises(ConfigError, match="privacy=user_dp: its rounds would be releases"):
        ReverseBPR().check(Setting(algorithm=FedMF(Problem(5, 5, 0)), privacy="user_dp", **rest))
    with pytest.raises(ConfigError, match=r"reverse_bpr\.alpha=0"):
        ReverseBPR(alpha=0.0)
