"""Per-example norms with repeated items, and clip factors: against the dense gradient, and against Opacus."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from torch import Tensor

from privacy.clipping import clip_factors, example_norms, row_squared_norms, scale_examples

SHAPES = st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))


def _case(shape: tuple[int, int, int, int, int]) -> tuple[Tensor, Tensor, int]:
    """Gradients float64[E, T, d] and items int64[E, T] of a catalogue so small that items repeat."""
    examples, looked_up, width, n_items, seed = shape
    draw = np.random.default_rng(seed)
    gradients = draw.normal(size=(examples, looked_up, width)) * 10.0 ** draw.integers(-4, 5)
    items = draw.integers(0, n_items, (examples, looked_up))
    return torch.from_numpy(gradients), torch.from_numpy(items), n_items


def _dense(gradients: Tensor, items: Tensor, n_items: int) -> Tensor:
    """The gradient of the whole table, as Opacus holds it: [E, n_items, d]."""
    whole = torch.zeros(len(items), n_items, gradients.shape[2], dtype=gradients.dtype)
    return whole.scatter_add_(1, items.unsqueeze(2).expand_as(gradients), gradients)


@given(SHAPES)
def test_the_norm_is_that_of_the_dense_table_whatever_repeats(shape: tuple[int, int, int, int, int]) -> None:
    gradients, items, n_items = _case(shape)
    expected = _dense(gradients, items, n_items).flatten(1).square().sum(1)
    torch.testing.assert_close(row_squared_norms(gradients, items), expected, rtol=1e-10, atol=1e-12)


@given(SHAPES)
def test_all_tensors_count_in_one_norm(shape: tuple[int, int, int, int, int]) -> None:
    gradients, items, n_items = _case(shape)
    user, scalar = gradients[:, 0] * 3.0, gradients[:, 0, 0]
    found = example_norms({"item": gradients, "user": user, "bias": scalar, "level": gradients[:, :, 0]}, items, {
        "item", "level",
    })  # fmt: skip
    table = _dense(gradients, items, n_items)
    parts = [table.flatten(1), user, scalar.unsqueeze(1), table[:, :, 0]]
    torch.testing.assert_close(found, torch.cat(parts, 1).norm(dim=1), rtol=1e-10, atol=1e-12)


def test_a_sum_of_squares_over_looked_up_rows_is_not_the_norm() -> None:
    """Why the cross terms are there: two equal rows of norm 1 on one item are a gradient of norm 2, not √2."""
    gradients, items = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[7, 7]])
    assert float(row_squared_norms(gradients, items)) == 4.0
    assert float(row_squared_norms(gradients, torch.tensor([[7, 8]]))) == 2.0


@given(st.lists(st.floats(0.0, 1e6), min_size=1, max_size=9), st.floats(1e-3, 1e3))
def test_factors_are_those_of_opacus(norms: list[float], bound: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = DPOptimizer(
        torch.optim.SGD([parameter], lr=1.0), noise_multiplier=0.0, max_grad_norm=bound, expected_batch_size=1
    )
    parameter.grad_sample = torch.tensor(norms, dtype=torch.float64).unsqueeze(1)
    optimizer.clip_and_accumulate()
    factors = clip_factors(torch.tensor(norms, dtype=torch.float64), bound)
    assert float(factors @ torch.tensor(norms, dtype=torch.float64)) == pytest.approx(float(parameter.summed_grad))


@given(SHAPES, st.floats(1e-3, 1e3))
def test_a_clipped_example_is_never_longer_than_the_bound_and_a_short_one_is_untouched(
    shape: tuple[int, int, int, int, int], bound: float
) -> None:
    gradients, items, n_items = _case(shape)
    norms = example_norms({"item": gradients}, items, {"item"})
    clipped = scale_examples(gradients, clip_factors(norms, bound))
    lengths = _dense(clipped, items, n_items).flatten(1).norm(dim=1)
    assert (lengths <= bound * (1 + 1e-9)).all()
    short = norms <= bound - 1e-6
    assert torch.equal(clipped[short], gradients[short])
    assert (lengths[norms > bound] > 0.99 * bound - 1e-6).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_an_example_without_a_finite_norm_adds_exactly_nothing(bad: float) -> None:
    gradients = torch.tensor([[[1.0]], [[bad]], [[2.0]]], dtype=torch.float64)
    factors = clip_factors(example_norms({"item": gradients}, torch.zeros(3, 1, dtype=torch.int64), {"item"}), 1.0)
    assert factors[1] == 0.0
    assert scale_examples(gradients, factors)[1].item() == 0.0
    assert (factors[[0, 2]] > 0.4).all()


def test_an_infinite_bound_clips_nothing() -> None:
    assert clip_factors(torch.tensor([0.0, 1.0, 1e30]), math.inf).tolist() == [1.0, 1.0, 1.0]


def test_a_gradient_of_no_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensors"):
        example_norms({}, torch.zeros(1, 1, dtype=torch.int64), set())


def test_rows_that_nearly_cancel_are_measured_as_their_sum_in_float32_too() -> None:
    row = torch.randn(8, generator=torch.Generator().manual_seed(1))
    gradients, items = torch.stack([row, 1e-4 * row - row]).unsqueeze(0), torch.tensor([[3, 3]])
    merged = gradients.sum(1).double().norm()
    assert float(row_squared_norms(gradients, items).sqrt()) == pytest.approx(float(merged), rel=1e-6)
