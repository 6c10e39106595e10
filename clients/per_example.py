"""Per-example gradients of any :class:`GradientRecommender`: each example is a device of its own.

An example is one positive with its k negatives. The seam's ``gradients`` takes a batch of devices, so a batch of E
examples is E devices of 1 + k rows, weight 1/(1 + k) each: no algorithm needs to know of differential privacy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedrec.algorithms.base import Examples, GradientRecommender, Tensors
from privacy.clipping import clip_factors, example_norms, scale_examples


@dataclass(frozen=True)
class ClippedExamples:
    """E examples' clipped gradients: ``gradients[name]`` [E, 1 + k, …] by looked-up row for per-item tensors, [E, …]
    for all others; ``loss`` [E]; ``norm`` [E] before clipping. An example whose norm is not finite is all zeros."""

    loss: Tensor
    gradients: Tensors
    norm: Tensor


def pseudo_devices(items: Tensor, *, pairwise: bool, round_index: int, dtype: torch.dtype) -> Examples:
    """E examples as the mini-batches of E devices. ``items`` int64[E, 1 + k]: column 0 the positive, then negatives."""
    size, rows = items.shape
    label = torch.zeros(size, rows, dtype=dtype)
    label[:, 0] = 1.0
    if not pairwise:
        return Examples(items, label, torch.full((size, rows), 1.0 / rows, dtype=dtype), round_index=round_index)
    k = rows - 1
    return Examples(
        items,
        label,
        torch.zeros(size, rows, dtype=dtype),
        positive=torch.zeros(size, k, dtype=torch.int64),
        negative=torch.arange(1, rows).repeat(size, 1),
        pair_weight=torch.full((size, k), 1.0 / max(k, 1), dtype=dtype),
        round_index=round_index,
    )


def per_example_gradients(
    algorithm: GradientRecommender, params: Tensors, items: Tensor, round_index: int
) -> tuple[Tensor, Tensors]:
    """Losses [E] and gradients of E examples, none of which knows of the others.

    Args:
        params: the tensors as each example sees them: per-item ones as the looked-up rows [E, 1 + k, …], all others
            [E, …] (an expanded view will do). A repeated item is looked up twice; the true gradient of its row is the
            sum of both.
        items: int64[E, 1 + k], the positive first. E may be 0.
        round_index: from 0.

    Returns:
        Losses and gradients in the shapes and dtype of ``params``.
    """
    some = next(iter(params.values()))
    if not len(items):  # vmap knows no empty batch, Poisson sampling does
        return some.new_zeros(0), {name: torch.zeros_like(value) for name, value in params.items()}
    examples = pseudo_devices(items, pairwise=algorithm.local.pairwise, round_index=round_index, dtype=some.dtype)
    return algorithm.gradients(params, examples)


def clipped_gradients(
    algorithm: GradientRecommender, params: Tensors, items: Tensor, round_index: int, max_grad_norm: float
) -> ClippedExamples:
    """Per-example gradients, each clipped to ``max_grad_norm`` over all tensors of ``params`` together.

    Arguments as of :func:`per_example_gradients`. The sum over any set of examples moves by at most ``max_grad_norm``
    when one example joins or leaves.
    """
    loss, gradients = per_example_gradients(algorithm, params, items, round_index)
    specs = {**algorithm.shared, **algorithm.private}
    norm = example_norms(gradients, items, {name for name in gradients if specs[name].per_item})
    factors = clip_factors(norm, max_grad_norm)
    return ClippedExamples(loss, {name: scale_examples(g, factors) for name, g in gradients.items()}, norm)
