"""Gradient ascent on the forget set, a baseline (Golatkar, Achille, Soatto, CVPR 2020, among others).

Devices climb the very loss that they descended in training. Its gradient vanishes where a pair is memorised and the
loss has no bound above, so that there is no good number of rounds: few do nothing, many ruin the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedrec.algorithms.base import Examples, GradientRecommender, Tensors
from fedrec.algorithms.wrapped import Wrapped
from fedrec.errors import ConfigError
from unlearning.federation import ADAM
from unlearning.state import erase
from unlearning.strategies.base import Forgotten, Guarantee, Setting, Strategy, Task


@dataclass(frozen=True)
class GradientAscent(Strategy):
    """``rounds`` rounds of ascent by the affected devices, then the rows of the deleted.

    ``item_rate`` is the server Adam's learning rate; private tensors climb at their own rate in training.
    """

    name = "gradient_ascent"
    promise: ClassVar[str] = "approximate"

    rounds: int = 3
    item_rate: float = 0.005

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(
                f"unlearning.strategies.gradient_ascent.rounds={self.rounds}: write a whole number, 1 or more"
            )
        if not self.item_rate > 0.0:
            raise ConfigError(
                f"unlearning.strategies.gradient_ascent.item_rate={self.item_rate}: write a positive number"
            )

    def check(self, setting: Setting) -> None:
        """ConfigError for methods without a loss, and under a privacy mechanism."""
        if not isinstance(setting.algorithm, GradientRecommender):
            raise ConfigError(
                f"unlearning.strategies.gradient_ascent: {setting.algorithm.name} has no loss; write unlearning=retrain"
            )
        if setting.privacy:
            raise ConfigError(
                f"unlearning.strategies.gradient_ascent with privacy={setting.privacy}: its rounds would be releases "
                "that no budget accounts for; write unlearning=retrain, or privacy=none"
            )

    def forget(self, task: Task) -> Forgotten:
        only = replace(task.before, train=task.forget.pairs)
        done = task.federation.train(
            task.state, only, self.rounds, objective={"_target_": f"{__name__}.Ascent"},
            federation={**ADAM, "server_learning_rate": self.item_rate, "divergence_factor": float("inf")},
        )  # fmt: skip
        trace = [{"phase": "ascent", "round": line["round"], "loss": line["loss"]} for line in done.lines]
        task.federation.write(done.state.devices, task.after)
        state = erase(done.state, task.forget, task.federation.algorithm)
        return Forgotten(state, done.cost, Guarantee("approximate"), trace)


class Ascent(Wrapped):
    """The wrapped algorithm with its loss turned round."""

    name = "gradient_ascent"

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        """−L of the algorithm, on one device's forget set and negatives drawn for it."""
        return -self.inner.loss(params, examples)

    def gradients(self, params: Tensors, examples: Examples) -> tuple[Tensor, Tensors]:
        losses, found = self.inner.gradients(params, examples)
        return -losses, {name: torch.neg(value) for name, value in found.items()}

    def dot_product(self, round_index: int) -> None:
        """No compiled kernel climbs."""

    def finish_round(self, shared: Tensors, round_index: int) -> Tensors:
        """Nothing: the server's own step belongs to the descent."""
        return shared
