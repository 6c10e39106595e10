"""Per-example gradients through the seam equal autograd on the whole tables, one example at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.per_example import clipped_gradients, per_example_gradients, pseudo_devices
from fedrec.algorithms.base import Examples, GradientRecommender, Problem, Tensors
from fedrec.algorithms.fedmf import FedMF
from fedrec.algorithms.fedrap import FedRAP
from tests.algorithms.test_seam import FedNCF

KINDS = ["bce", "bpr", "fedncf", "fedrap"]
SHAPES = st.tuples(st.sampled_from(KINDS), st.integers(1, 7), st.integers(2, 7), st.integers(1, 4), st.integers(0, 999))


def _algorithm(kind: str, n_items: int, negatives: int) -> GradientRecommender:
    problem = Problem(3, n_items, 0)
    if kind == "fedncf":
        return FedNCF(problem, dim=3, hidden=4)
    if kind == "fedrap":
        return FedRAP(problem, dim=3, sparsity="subgradient", negatives=negatives)
    return FedMF(problem, dim=3, objective=kind, negatives=negatives)  # type: ignore[arg-type]


def _case(kind: str, size: int, n_items: int, k: int, seed: int) -> tuple[GradientRecommender, Tensors, Tensor]:
    """Whole tables in float64, and items int64[E, 1 + k]; few items, so that they repeat within examples."""
    algorithm, generator = _algorithm(kind, n_items, k), torch.Generator().manual_seed(seed)
    specs = {**algorithm.shared, **algorithm.private}
    whole = {n: torch.randn(s.shape, generator=generator, dtype=torch.float64) for n, s in specs.items()}
    return algorithm, whole, torch.randint(n_items, (size, 1 + k), generator=generator)


def _looked_up(algorithm: GradientRecommender, whole: Tensors, items: Tensor) -> Tensors:
    specs = {**algorithm.shared, **algorithm.private}
    return {n: v[items] if specs[n].per_item else v.expand(len(items), *v.shape) for n, v in whole.items()}


def _by_autograd(algorithm: GradientRecommender, whole: Tensors, row: Tensor) -> tuple[Tensor, Tensors]:
    """Loss and gradient by the whole tables of one example, by ``loss`` and torch's autograd alone."""
    specs = {**algorithm.shared, **algorithm.private}
    leaves = {name: value.clone().requires_grad_(True) for name, value in whole.items()}
    params = {name: value[row] if specs[name].per_item else value for name, value in leaves.items()}
    k = row.numel() - 1
    label = torch.tensor([1.0] + [0.0] * k, dtype=torch.float64)
    pairs: dict[str, Any] = {
        "positive": torch.zeros(k, dtype=torch.int64), "negative": torch.arange(1, k + 1),
        "pair_weight": torch.full((k,), 1.0 / k, dtype=torch.float64),
    }  # fmt: skip
    loss = algorithm.loss(
        params, Examples(row, label, torch.full((k + 1,), 1.0 / (k + 1), dtype=torch.float64), **pairs)
    )
    found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), dict(zip(leaves, found, strict=True))


def _merged(algorithm: GradientRecommender, gradients: Tensors, items: Tensor, e: int) -> Tensors:
    """Example e's gradient by the whole tables."""
    specs = {**algorithm.shared, **algorithm.private}
    out = {}
    for name, value in gradients.items():
        if specs[name].per_item:
            out[name] = torch.zeros(specs[name].shape, dtype=value.dtype).index_add_(0, items[e], value[e])
        else:
            out[name] = value[e]
    return out


@given(SHAPES)
@settings(max_examples=40)
def test_each_examples_gradient_is_autograds_with_repeated_items_merged(shape: tuple[str, int, int, int, int]) -> None:
    algorithm, whole, items = _case(*shape)
    losses, gradients = per_example_gradients(algorithm, _looked_up(algorithm, whole, items), items, 0)
    for e, row in enumerate(items):
        loss, expected = _by_autograd(algorithm, whole, row)
        torch.testing.assert_close(losses[e], loss, rtol=1e-9, atol=1e-12)
        found = _merged(algorithm, gradients, items, e)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-12)


@given(SHAPES, st.sampled_from([1e-3, 0.1, 1.0]))
@settings(max_examples=40)
def test_a_clipped_examples_whole_gradient_is_at_most_the_bound(
    shape: tuple[str, int, int, int, int], bound: float
) -> None:
    algorithm, whole, items = _case(*shape)
    clipped = clipped_gradients(algorithm, _looked_up(algorithm, whole, items), items, 0, bound)
    for e, row in enumerate(items):
        gradient = _by_autograd(algorithm, whole, row)[1]
        mine = _merged(algorithm, clipped.gradients, items, e)
        expected = torch.cat([gradient[name].flatten() for name in gradient])
        found = torch.cat([mine[name].flatten() for name in gradient])
        assert float(clipped.norm[e]) == pytest.approx(float(expected.norm()), rel=1e-8)
        torch.testing.assert_close(
            found, expected * min(1.0, bound / (float(expected.norm()) + 1e-6)), rtol=1e-7, atol=1e-12
        )
        assert float(found.norm()) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_is_a_batch(kind: str) -> None:
    algorithm, whole, items = _case(kind, 2, 5, 2, 0)
    clipped = clipped_gradients(algorithm, _looked_up(algorithm, whole, items[:0]), items[:0], 0, 1.0)
    assert clipped.loss.shape == clipped.norm.shape == (0,)
    for name, value in _looked_up(algorithm, whole, items[:0]).items():
        assert clipped.gradients[name].shape == value.shape


@pytest.mark.parametrize("kind", ["bce", "bpr", "fedncf"])
def test_one_diverged_example_is_left_out_and_the_others_are_as_without_it(kind: str) -> None:
    algorithm, whole, items = _case(kind, 4, 5, 2, 1)
    params = {name: value.clone() for name, value in _looked_up(algorithm, whole, items).items()}
    params["item"][2, 1] = float("nan")
    clipped = clipped_gradients(algorithm, params, items, 0, 0.5)
    others = torch.tensor([0, 1, 3])
    expected = clipped_gradients(algorithm, _looked_up(algorithm, whole, items[others]), items[others], 0, 0.5)
    for name, value in clipped.gradients.items():
        assert int(torch.count_nonzero(value[2])) == 0
        torch.testing.assert_close(value[others], expected.gradients[name])


def test_a_pairwise_example_is_k_equal_pairs_and_a_pointwise_one_1_plus_k_equal_rows() -> None:
    items = torch.tensor([[4, 2, 2], [0, 1, 4]])
    point = pseudo_devices(items, pairwise=False, round_index=3, dtype=torch.float64)
    assert point.weight.tolist() == [[1 / 3] * 3] * 2
    assert point.label.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert point.round_index == 3
    assert point.positive is None
    pair = pseudo_devices(items, pairwise=True, round_index=0, dtype=torch.float32)
    assert pair.pair_weight is not None
    assert pair.negative is not None
    assert pair.pair_weight.tolist() == [[0.5, 0.5]] * 2
    assert pair.negative.tolist() == [[1, 2]] * 2
    assert int(torch.count_nonzero(pair.weight)) == 0
