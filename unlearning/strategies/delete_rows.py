"""Deleting rows, the baseline that many call unlearning: the account and the item's vector go, nothing else changes.

For a forgotten user the item view still answers: a fresh vector fitted to half of the deleted history ranks the other
half well above what the user never touched (the fold-in gate). For items, in a model that learns nothing of them but
their own row, it is all that there is to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from unlearning.state import erase
from unlearning.strategies.base import Cost, Forgotten, Guarantee, Strategy, Task, timed


@dataclass(frozen=True)
class DeleteRows(Strategy):
    """Fresh devices for deleted users, initial rows for withdrawn items; single interactions leave the history only."""

    name = "delete_rows"
    promise: ClassVar[str] = "approximate"

    def forget(self, task: Task) -> Forgotten:
        with timed() as spent:
            state = erase(task.state, task.forget, task.federation.algorithm)
        return Forgotten(state, Cost(cpu_s=spent.cpu_s, wall_s=spent.wall_s), Guarantee("approximate"))
