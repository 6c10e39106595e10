"""What a node's devices contribute to a round, whichever way they were trained."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedrec.algorithms.base import Recommender, Tensors


@dataclass
class CohortUpdate:
    """What the devices of one node contribute to a round: sums, never single devices (unless a method asks).

    ``sums[name]`` is Σ over devices of their update, without the decay of untouched rows, which is
    ``decay[name]``·(shared tensor): Σ_u (P_u − 1) for the product P_u of device u's decay factors. ``counts``
    int64[n_items] is the number of devices that touched an item.
    """

    sums: Tensors
    decay: dict[str, float]
    counts: Tensor
    devices: int = 0
    loss: float = 0.0
    steps: int = 0
    upload_bytes: int = 0
    squared_norm: dict[str, float] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)
    users: list[int] = field(default_factory=list)
    user_updates: dict[str, list[Tensor]] = field(default_factory=dict)


def start_update(algorithm: Recommender, n_items: int) -> CohortUpdate:
    """An empty sum to add devices to."""
    sums = {name: torch.zeros(spec.shape) for name, spec in algorithm.shared.items()}
    return CohortUpdate(sums, dict.fromkeys(sums, 0.0), torch.zeros(n_items, dtype=torch.int64))
