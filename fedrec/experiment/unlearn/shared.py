"""What all strategies of an experiment share: the model before the first request, and the golds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedrec.experiment.unlearn.golds import Gold, make_golds
from fedrec.experiment.unlearn.setup import Setup
from unlearning.requests import Batch
from unlearning.state import State
from unlearning.strategies import Cost
from unlearning.verification import Scene


@dataclass
class Shared:
    """What strategies share: the state that training ended in before the first request, and the golds by batch."""

    scratch: Path
    cache: Path | None
    say: Callable[[str], None]
    tell: Callable[[str], None]
    trained: State | None = None
    joined: State | None = None
    golds: dict[int, list[Gold]] = field(default_factory=dict)
    training: Cost = field(default_factory=Cost)

    def golds_of(self, setup: Setup, number: int, batch: Batch, scene: Scene) -> list[Gold]:
        """The golds of batch ``number``, made when they are first asked for."""
        if number not in self.golds:
            self.golds[number] = make_golds(
                setup.federation, scene, batch.forgotten, batch.round, setup.settings.golds,
                relearn=setup.settings.relearn_rounds, scratch=self.scratch, cache=self.cache,
                workers=setup.settings.gold_workers, say=self.say,
            )  # fmt: skip
            found = self.golds[number]
            cost, kept = mean_cost([gold.cost for gold in found]).cpu_s, sum(gold.cached for gold in found)
            self.tell(f"golds for batch {number}: {len(found)} retrained, {cost:.1f} s of CPU each ({kept} kept ones)")
        return self.golds[number]


def mean_cost(costs: list[Cost]) -> Cost:
    """The mean of several."""
    total = sum(costs, Cost())
    return Cost(*(value / max(len(costs), 1) for value in dataclasses.astuple(total)))
