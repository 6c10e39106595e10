"""An algorithm inside of another: what changes one thing of a method for a while starts from here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property

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


class LocalOnly(Wrapped):
    """The same algorithm without a server: every shared tensor becomes the device's own and never leaves it.

    It is the floor that federation must beat, and the leak alarm: under a clean protocol it ranks about as chance does.
    """

    name = "local_only"

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        return {}

    @cached_property
    def private(self) -> Mapping[str, TensorSpec]:
        own = {name: dataclasses.replace(spec, common=True) for name, spec in self.inner.shared.items()}
        return {**own, **self.inner.private}

    def finish_round(self, shared: Tensors, round_index: int) -> Tensors:
        """There is no server to finish one."""
        return shared
