"""Retraining: the only exact answer, and the gold that every other one is measured against.

With the run's own seed the result is, bit for bit, the run that never had the data: every random draw is addressed by
(seed, purpose, round, user), so that what others draw does not depend on who is missing. From the join point
(``start: join``) the rounds before any affected user took part are kept, and only what came after is repeated; that
needs the state at the join point, which training keeps where users join late.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedrec.errors import ConfigError
from unlearning.state import erase
from unlearning.strategies.base import Forgotten, Guarantee, Strategy, Task


@dataclass(frozen=True)
class Retrain(Strategy):
    """All rounds again without the forgotten data, from scratch or from the join point of the affected users."""

    name = "retrain"
    promise: ClassVar[str] = "exact"

    start: Literal["scratch", "join"] = "scratch"

    def __post_init__(self) -> None:
        if self.start not in ("scratch", "join"):
            raise ConfigError(f"unlearning.strategies.retrain.start={self.start}: write scratch or join")

    def forget(self, task: Task) -> Forgotten:
        here, rounds = task.state.folder, task.state.round
        state, notes = None, []
        if self.start == "join" and task.joined is not None:
            # Nobody affected had taken part yet: what the server and the devices held then owes them nothing.
            state = task.joined.copy_to(here.with_name(f"{here.name}.joined"))
        elif self.start == "join":
            notes.append("the affected users were there from the first round: retrained from scratch")
        state = state or task.federation.begin(here.with_name(f"{here.name}.again"), task.after)
        done = task.federation.train(state, task.after, rounds - state.round)
        state = erase(done.state, task.forget, task.federation.algorithm)
        return Forgotten(state, done.cost, Guarantee("exact"), notes=notes)
