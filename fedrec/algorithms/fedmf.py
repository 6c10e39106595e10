"""FedMF: federated matrix factorisation. The item view is shared, the user vector stays on the device.

After Chai, Wang, Chen, Yang, "Secure Federated Matrix Factorization" (IEEE Intelligent Systems 2021), for implicit
feedback: pointwise binary cross-entropy (as in He et al., NCF, WWW 2017) or BPR (Rendle et al., UAI 2009).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedrec.algorithms.base import (
    DotProduct,
    Examples,
    GradientRecommender,
    LocalTraining,
    Problem,
    Tensors,
    TensorSpec,
    dot,
    require_at_least,
)
from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError


@dataclass(frozen=True)
class FedMF(GradientRecommender):
    """score(u, i) = ⟨p_u, q_i⟩; ``item`` q is shared, ``user`` p private.

    With server Adam (``federation=adam``) the item learning rate only sets the scale of the upload;
    Adam removes it.
    """

    name = "fedmf"

    problem: Problem
    dim: int = 32
    objective: Literal["bce", "bpr"] = "bce"
    user_learning_rate: float = 1.0
    item_learning_rate: float = 1.0
    user_weight_decay: float = 0.0
    item_weight_decay: float = 0.0
    round_decay: float = 1.0
    step_decay: float = 1.0
    user_scale: float = 0.1
    item_scale: float = 0.1
    local_epochs: int = 1
    batch_size: int = 2048
    negatives: int = 4
    tolerance: float = 0.0
    max_positives: int = 0

    def __post_init__(self) -> None:
        require_at_least(self, 1, "dim", "local_epochs", "batch_size", "negatives")
        require_at_least(self, 0, "tolerance", "max_positives")
        if self.objective not in ("bce", "bpr"):
            raise ConfigError(f"algorithm.objective={self.objective}: write bce (pointwise) or bpr (pairwise)")

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        return {
            "item": TensorSpec(
                (self.problem.n_items, self.dim), per_item=True, init="normal", scale=self.item_scale,
                learning_rate=self.item_learning_rate, weight_decay=self.item_weight_decay,
                round_decay=self.round_decay, step_decay=self.step_decay,
            )
        }  # fmt: skip

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        return {
            "user": TensorSpec(
                (self.dim,), init="normal", scale=self.user_scale,
                learning_rate=self.user_learning_rate, weight_decay=self.user_weight_decay,
                round_decay=self.round_decay, step_decay=self.step_decay,
            )
        }  # fmt: skip

    @property
    def local(self) -> LocalTraining:
        return LocalTraining(
            self.local_epochs,
            self.batch_size,
            self.negatives,
            self.tolerance,
            self.max_positives,
            self.objective == "bpr",
        )

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        """Mean BCE over the batch, or mean −log σ(s_pos − s_neg) over its pairs."""
        scores = params["item"] @ params["user"]
        if self.objective == "bce":
            losses = F.binary_cross_entropy_with_logits(scores, examples.label, reduction="none")
            return (losses * examples.weight).sum()
        assert examples.positive is not None
        assert examples.negative is not None
        assert examples.pair_weight is not None
        return (F.softplus(scores[examples.negative] - scores[examples.positive]) * examples.pair_weight).sum()

    def gradients(self, params: Tensors, examples: Examples) -> tuple[Tensor, Tensors]:
        """The gradients of ``loss`` in closed form, for B devices."""
        item, user = params["item"], params["user"]
        scores = dot(item, user)
        if self.objective == "bce":
            losses = F.binary_cross_entropy_with_logits(scores, examples.label, reduction="none")
            loss = (losses * examples.weight).sum(1)
            slope = (torch.sigmoid(scores) - examples.label) * examples.weight
        else:
            assert examples.positive is not None
            assert examples.negative is not None
            assert examples.pair_weight is not None
            margin = scores.gather(1, examples.negative) - scores.gather(1, examples.positive)
            loss = (F.softplus(margin) * examples.pair_weight).sum(1)
            pair = torch.sigmoid(margin) * examples.pair_weight
            slope = torch.zeros_like(scores)
            slope.scatter_add_(1, examples.negative, pair)
            slope.scatter_add_(1, examples.positive, -pair)
        grads = {
            "item": slope.unsqueeze(2) * user.unsqueeze(1),
            "user": torch.bmm(slope.unsqueeze(1), item).squeeze(1),
        }
        return loss, grads

    def dot_product(self, round_index: int) -> DotProduct:
        return DotProduct(user="user", item="item")

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return dot(params["item"], params["user"])
