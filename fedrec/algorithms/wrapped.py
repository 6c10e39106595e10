"""An algorithm inside of another: what changes one thing of a method for a while starts from here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedrec.algorithms.base import DotProduct, Examples, GradientRecommender, LocalTraining, Tensors, TensorSpec
from fedrec.data.interactions import UserItems


class Wrapped(GradientRecommender):
    """Everything is ``inner``'s. Whoever changes ``loss`` or ``gradients`` must return None from ``dot_product``: the
    compiled kernel knows the inner objective only."""

    def __init__(self, inner: GradientRecommender) -> None:
        self.inner, self.problem = inner, inner.problem

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        return self.inner.shared

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        return self.inner.private

    @property
    def local(self) -> LocalTraining:
        return self.inner.local

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        return self.inner.loss(params, examples)

    def gradients(self, params: Tensors, examples: Examples) -> tuple[Tensor, Tensors]:
        return self.inner.gradients(params, examples)

    def dot_product(self, round_index: int) -> DotProduct | None:
        return self.inner.dot_product(round_index)

    def finish_round(self, shared: Tensors, round_index: int) -> Tensors:
        return self.inner.finish_round(shared, round_index)

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return self.inner.score(params, history)
