"""Fine-tuning on what is retained, a baseline: some more ordinary rounds without the forgotten data.

It does not forget: nothing pushes against what was memorised, and a model near its optimum hardly moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedrec.errors import ConfigError
from unlearning.state import erase
from unlearning.strategies.base import Forgotten, Guarantee, Strategy, Task


@dataclass(frozen=True)
class Finetune(Strategy):
    """``rounds`` more rounds on the retained data, then the rows of the deleted."""

    name = "finetune"
    promise: ClassVar[str] = "approximate"

    rounds: int = 10

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"unlearning.strategies.finetune.rounds={self.rounds}: write a whole number, 1 or more")

    def forget(self, task: Task) -> Forgotten:
        state = erase(task.state, task.forget, task.federation.algorithm)
        done = task.federation.train(state, task.after, self.rounds)
        trace = [{"phase": "train", "round": line["round"], "loss": line["loss"]} for line in done.lines]
        return Forgotten(done.state, done.cost, Guarantee("approximate"), trace)
