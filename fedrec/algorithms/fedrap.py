"""FedRAP: federated recommendation with additive personalisation.

Li, Long, Zhou, "Federated Recommendation with Additive Personalization", ICLR 2024 (arXiv 2301.09109). Item i of user
u is C_i + D_ui: a global view C that is federated and a personal view D_u that stays on the device. The score
function w_u, b_u is private too: logit = w_u·(C_i + D_ui) + b_u.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

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

Curriculum = Literal["tanh", "none"]


@lru_cache(maxsize=1)
def _published_values(seed: int, n_items: int, dim: int) -> Mapping[str, Tensor]:
    """The draws of the published model in its own order: personal view, a view that is never used, score function,
    global view."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.empty(n_items, dim).normal_(generator=generator)

    bound = 1.0 / math.sqrt(dim)
    personal, _ = normal(), normal()
    score = torch.empty(dim).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(()).uniform_(-bound, bound, generator=generator)
    return {"personal": personal, "score": score, "bias": bias, "item": normal()}


@dataclass(frozen=True)
class FedRAP(GradientRecommender):
    """Equation 5 of the paper: BCE − λ_t·MSE(D_u, C) + μ_t·mean|C|, with λ_t, μ_t = λ, μ times tanh(t/10).

    ``curriculum="none"`` keeps λ and μ constant, which is what the published code does (its tanh is computed and never
    read). ``sparsity="proximal"`` takes the μ term out of the devices' loss and lets the server soft-threshold the
    averaged view, so that entries become exactly zero; ``"subgradient"`` is the published code's μ·sign(C), which never
    does. ``published_seed`` draws the initial values as the published code does after ``torch.manual_seed`` of it, to
    follow its curve. Rates: ``item_*`` for the global view C, ``personal_*`` for D, ``score_*`` for (w, b).
    """

    name = "fedrap"

    problem: Problem
    dim: int = 32
    lambda_: float = 0.1
    mu: float = 0.1
    curriculum: Curriculum = "tanh"
    curriculum_rounds: float = 10.0
    sparsity: Literal["proximal", "subgradient"] = "proximal"
    item_learning_rate: float = 200.0
    personal_learning_rate: float = 200.0
    score_learning_rate: float = 0.5
    item_weight_decay: float = 1e-4
    personal_weight_decay: float = 1e-4
    score_weight_decay: float = 1e-4
    round_decay: float = 0.97
    step_decay: float = 0.95
    item_scale: float = 1.0
    personal_scale: float = 1.0
    score_scale: float = 0.0
    common_score: bool = True
    local_epochs: int = 10
    batch_size: int = 2048
    negatives: int = 4
    tolerance: float = 1e-4
    max_positives: int = 0
    published_seed: int | None = None

    def __post_init__(self) -> None:
        require_at_least(self, 1, "dim", "local_epochs", "batch_size", "negatives")
        require_at_least(self, 0, "tolerance", "max_positives")
        if self.curriculum not in ("tanh", "none"):
            raise ConfigError(
                f"algorithm.curriculum={self.curriculum}: write tanh (as the paper) or none (as its code)"
            )
        if self.sparsity not in ("proximal", "subgradient"):
            raise ConfigError(f"algorithm.sparsity={self.sparsity}: write proximal (exact zeros) or subgradient")

    def _schedule(self) -> dict[str, Any]:
        return {"round_decay": self.round_decay, "step_decay": self.step_decay}

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        shape = (self.problem.n_items, self.dim)
        return {
            "item": TensorSpec(
                shape, per_item=True, init="normal", scale=self.item_scale,
                learning_rate=self.item_learning_rate, weight_decay=self.item_weight_decay,
                value=self._published("item"), **self._schedule(),
            )
        }  # fmt: skip

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        # As torch.nn.Linear: uniform in ±1/sqrt(dim), when no scale is given.
        bound = self.score_scale or 1.0 / math.sqrt(self.dim)
        score: dict[str, Any] = {
            "init": "uniform", "scale": bound, "common": self.common_score,
            "learning_rate": self.score_learning_rate, "weight_decay": self.score_weight_decay, **self._schedule(),
        }  # fmt: skip
        return {
            "personal": TensorSpec(
                (self.problem.n_items, self.dim), per_item=True, common=True,
                init="normal" if self.personal_scale else "zeros", scale=self.personal_scale,
                learning_rate=self.personal_learning_rate, weight_decay=self.personal_weight_decay,
                value=self._published("personal"), **self._schedule(),
            ),
            "score": TensorSpec((self.dim,), value=self._published("score"), **score),
            "bias": TensorSpec((), value=self._published("bias"), **score),
        }  # fmt: skip

    def _published(self, name: str) -> Tensor | None:
        """An initial tensor as the published code draws it, or None to draw it as all of fedrec's are."""
        if self.published_seed is None:
            return None
        return _published_values(self.published_seed, self.problem.n_items, self.dim)[name]

    @property
    def local(self) -> LocalTraining:
        return LocalTraining(self.local_epochs, self.batch_size, self.negatives, self.tolerance, self.max_positives)

    def strength(self, round_index: int) -> float:
        """The curriculum's factor on λ and μ in a round (from 0)."""
        return math.tanh((round_index + 1) / self.curriculum_rounds) if self.curriculum == "tanh" else 1.0

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        """BCE − λ_t·MSE(D, C) + μ_t·mean|C|, each a mean over the batch's examples."""
        item, personal = params["item"], params["personal"]
        logits = (item + personal) @ params["score"] + params["bias"]
        bce = (F.binary_cross_entropy_with_logits(logits, examples.label, reduction="none") * examples.weight).sum()
        form = self.dot_product(examples.round_index)
        apart = ((personal - item).square().mean(1) * examples.weight).sum()
        size = (item.abs().mean(1) * examples.weight).sum()
        return bce - form.repel * apart + form.l1 * size

    def gradients(self, params: Tensors, examples: Examples) -> tuple[Tensor, Tensors]:
        """The gradients of ``loss`` in closed form, for B devices."""
        item, personal, w = params["item"], params["personal"], params["score"]
        form = self.dot_product(examples.round_index)
        both = item + personal
        logits = dot(both, w) + params["bias"].unsqueeze(1)
        weight = examples.weight
        loss = (F.binary_cross_entropy_with_logits(logits, examples.label, reduction="none") * weight).sum(1)
        slope = (torch.sigmoid(logits) - examples.label) * weight
        grads = {"score": torch.bmm(slope.unsqueeze(1), both).squeeze(1), "bias": slope.sum(1)}
        pull = torch.bmm(slope.unsqueeze(2), w.unsqueeze(1))
        if form.repel:
            apart = torch.sub(personal, item, out=both)
            loss -= form.repel / self.dim * (torch.einsum("btd,btd->bt", apart, apart) * weight).sum(1)
            apart *= (2.0 * form.repel / self.dim * weight).unsqueeze(2)
            grads["item"], grads["personal"] = pull + apart, pull.sub_(apart)
        else:
            grads["item"], grads["personal"] = pull, pull
        if form.l1:
            share = form.l1 / self.dim * weight
            edge = item.sign().mul_(share.unsqueeze(2))
            loss += torch.linalg.vecdot(item.flatten(1), edge.flatten(1))  # |x| = x·sign(x)
            grads["item"] = edge.add_(grads["item"])
        return loss, grads

    def dot_product(self, round_index: int) -> DotProduct:
        strength = self.strength(round_index)
        l1 = self.mu * strength if self.sparsity == "subgradient" else 0.0
        return DotProduct("score", "item", "personal", "bias", repel=self.lambda_ * strength, l1=l1)

    def finish_round(self, shared: Tensors, round_index: int) -> Tensors:
        """The proximal step of μ_t·mean|C| over the catalogue: soft threshold at μ_t·η_t/(n_items·dim).

        η_t is the sum of the devices' learning rates over the local steps of a one-batch device.
        """
        if self.sparsity != "proximal" or self.mu == 0.0:
            return shared
        spec = self.shared["item"]
        rate = sum(spec.rate(round_index, step) for step in range(self.local_epochs))
        threshold = self.mu * self.strength(round_index) * rate / math.prod(spec.shape)
        return {**shared, "item": F.softshrink(shared["item"], threshold)}

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return (
            dot(params["item"], params["score"])
            + dot(params["personal"], params["score"])
            + params["bias"].unsqueeze(1)
        )
