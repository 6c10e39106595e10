"""Per-example clipping for DP-SGD (Abadi et al., CCS 2016, algorithm 1): norms over all tensors at once, and factors.

The norm is that of the gradient as the tables would hold it: an item that occurs twice within an example gets the sum
of both rows' gradients, ‖g‖² = Σ_{j,k} [item_j = item_k]⟨g_j, g_k⟩. Taking Σ_j ‖g_j‖² instead may underestimate it, and
the example then moves the sum by more than C.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

EPSILON = 1e-6  # as Opacus adds it to the norm (opacus.optimizers.DPOptimizer.clip_and_accumulate)


def row_squared_norms(gradients: Tensor, items: Tensor) -> Tensor:
    """Squared norm of each example's gradient of one item table, repeated items merged.

    Args:
        gradients: [E, T, …], by the T rows that an example looked up.
        items: int64[E, T], the row numbers.

    Returns:
        [E], in the dtype of ``gradients``.
    """
    width = math.prod(gradients.shape[2:])
    same = (items.unsqueeze(2) == items.unsqueeze(1)).to(gradients.dtype)
    # Rows are added up before they are squared: Σ_{j,k} ⟨g_j, g_k⟩ itself would cancel to rounding errors of the size
    # of the rows, where they nearly cancel. Each of the m rows of an item then holds the whole sum.
    merged = torch.bmm(same, gradients.reshape(*items.shape, width))
    return (merged.square().sum(2) / same.sum(2)).sum(1)


def example_norms(gradients: Mapping[str, Tensor], items: Tensor, per_item: Collection[str]) -> Tensor:
    """ℓ2 norm of each example's whole gradient, [E]: all tensors together ("flat" clipping).

    ``gradients[name]`` is [E, T, …] by looked-up row for the names in ``per_item``, [E, …] for all others; ``items``
    int64[E, T].
    """
    total: Tensor | None = None
    for name, gradient in gradients.items():
        if name in per_item:
            square = row_squared_norms(gradient, items)
        else:
            # A number an example gets an axis to sum over: torch sums over no axes as over all.
            square = gradient.unsqueeze(-1).flatten(1).square().sum(1)
        total = square if total is None else total + square
    if total is None:
        raise ValueError("a gradient of no tensors has no norm")
    return total.sqrt()


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C / (‖g‖ + 1e-6)), as Opacus clips. 0 for a norm that is infinite or NaN: such an example adds nothing.

    ``max_grad_norm`` may be infinite (no clipping).
    """
    factors = (max_grad_norm / (norms + EPSILON)).clamp_max(1.0)
    return torch.where(torch.isfinite(norms), factors, 0.0)


def scale_examples(gradient: Tensor, factors: Tensor) -> Tensor:
    """``gradient`` [E, …] with example e multiplied by ``factors[e]``; exactly zero where the factor is zero."""
    factor = factors.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1))
    # 0 · NaN is NaN: an example that is left out is selected away.
    return torch.where(factor > 0.0, gradient * factor, 0.0)
