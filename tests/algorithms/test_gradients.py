"""Closed-form gradients are the derivatives of the papers' losses: vmap(grad(loss)) in float64 is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedrec.algorithms.base import Examples, GradientRecommender, Problem, Tensors
from fedrec.algorithms.fedmf import FedMF
from fedrec.algorithms.fedrap import FedRAP
from fedrec.algorithms.wrapped import LocalOnly

PROBLEM = Problem(n_users=4, n_items=11, seed=0)
DEVICES, ROWS, PAIRS = 4, 7, 9
CASES: dict[str, tuple[type[Any], dict[str, Any], int]] = {
    "fedmf-bce": (FedMF, {"dim": 5}, 0),
    "fedmf-bpr": (FedMF, {"dim": 5, "objective": "bpr"}, 0),
    "fedrap-first-round": (FedRAP, {"dim": 5, "lambda_": 0.7, "mu": 0.4, "sparsity": "subgradient"}, 0),
    "fedrap-later-round": (FedRAP, {"dim": 5, "lambda_": 0.7, "mu": 0.4, "sparsity": "subgradient"}, 12),
    "fedrap-no-curriculum": (FedRAP, {"dim": 5, "curriculum": "none", "sparsity": "subgradient"}, 3),
    "fedrap-proximal": (FedRAP, {"dim": 5, "lambda_": 0.7, "mu": 0.4}, 12),
    "fedrap-no-repel": (FedRAP, {"dim": 5, "lambda_": 0.0, "mu": 0.4, "sparsity": "subgradient"}, 1),
}


def _draw(algorithm: GradientRecommender, round_index: int) -> tuple[Tensors, Examples]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = {}
    for name, spec in {**algorithm.shared, **algorithm.private}.items():
        own = (ROWS, *spec.shape[1:]) if spec.per_item else spec.shape
        params[name] = normal(DEVICES, *own)
    params["item"][0, 0, 0] = 0.0  # sign(0) = 0
    weight, pair_weight = normal(DEVICES, ROWS).abs(), normal(DEVICES, PAIRS).abs()
    weight[:, -1] = 0.0  # padding
    examples = Examples(
        torch.randint(PROBLEM.n_items, (DEVICES, ROWS), generator=generator),
        torch.randint(2, (DEVICES, ROWS), generator=generator).double(),
        weight,
        torch.randint(ROWS, (DEVICES, PAIRS), generator=generator),
        torch.randint(ROWS, (DEVICES, PAIRS), generator=generator),
        pair_weight,
        round_index,
    )
    return params, examples


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("local_only", [False, True])
def test_closed_form_gradients_are_the_derivatives_of_the_loss(case: str, local_only: bool) -> None:
    cls, options, round_index = CASES[case]
    algorithm: GradientRecommender = cls.from_config(options, PROBLEM)
    if local_only:
        algorithm = LocalOnly(algorithm)
    params, examples = _draw(algorithm, round_index)
    expected_loss, expected = GradientRecommender.gradients(algorithm, params, examples)
    loss, found = algorithm.gradients({name: value.clone() for name, value in params.items()}, examples)
    assert torch.allclose(loss, expected_loss, rtol=1e-12)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-10, atol=1e-12), name
        assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("case", CASES)
def test_gradients_leave_the_parameters_alone(case: str) -> None:
    cls, options, round_index = CASES[case]
    algorithm = cls.from_config(options, PROBLEM)
    params, examples = _draw(algorithm, round_index)
    before = {name: value.clone() for name, value in params.items()}
    algorithm.gradients(params, examples)
    assert all(torch.equal(params[name], before[name]) for name in before)


def test_the_curriculum_really_acts_on_lambda_and_mu() -> None:
    """λ_t = λ·tanh(t/10): the loss of one device differs between rounds by exactly the regularisers' change."""
    algorithm = FedRAP(PROBLEM, dim=5, lambda_=0.7, mu=0.4, sparsity="subgradient")
    params, first = _draw(algorithm, 0)
    _, later = _draw(algorithm, 19)
    device = {name: value[0] for name, value in params.items()}

    def one(examples: Examples) -> float:
        own = Examples(examples.items[0], examples.label[0], examples.weight[0], round_index=examples.round_index)
        return float(algorithm.loss(device, own))

    weight = first.weight[0]
    apart = ((device["personal"] - device["item"]).square().mean(1) * weight).sum()
    size = (device["item"].abs().mean(1) * weight).sum()
    growth = torch.tanh(torch.tensor(2.0, dtype=torch.float64)) - torch.tanh(torch.tensor(0.1, dtype=torch.float64))
    assert one(later) - one(first) == pytest.approx(float(growth * (0.4 * size - 0.7 * apart)), rel=1e-9)
