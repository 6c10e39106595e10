"""What the strategies with an update history share: going back, lighter local training, rounds with a longer step.

After going back, the server holds what it held before any affected user took part (the join point, or its initial
values). Retained devices keep the private vectors that they have: nobody else ever saw them, they hold nothing of
others but what came through the shared tensors, which start anew, and starting from them is what makes few rounds
enough. Devices with something to forget start from nothing: their vectors were fitted to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedrec.algorithms import build
from fedrec.algorithms.base import (
    GradientRecommender,
    LocalTraining,
    Problem,
    Tensors,
)
from fedrec.algorithms.wrapped import Wrapped
from fedrec.data.split import Split
from fedrec.errors import ConfigError, RunFailed
from server.aggregation import RoundSum
from server.phase import ServerState
from server.watch import Watch
from unlearning.federation import Federation, Trained
from unlearning.forget import ForgetSet
from unlearning.state import State, erase
from unlearning.strategies.base import Setting, Task

Int64 = npt.NDArray[np.int64]
_CHUNK_ROWS = 32768  # devices with few examples each: larger tensor programs cost less than their padding


def check_replay(name: str, setting: Setting, *, sums_only: bool) -> None:
    """ConfigError for a run that a strategy with an update history cannot repeat, with the reason and the remedy."""
    where = f"unlearning.strategies.{name}"
    algorithm = setting.algorithm
    if not isinstance(algorithm, GradientRecommender):
        raise ConfigError(
            f"{where}: {algorithm.name} has no local training whose updates could be kept; write unlearning=retrain"
        )
    if algorithm.needs_user_updates or not any(spec.per_item for spec in algorithm.shared.values()):
        raise ConfigError(
            f"{where}: {algorithm.name} does not average updates of an item view; write unlearning=retrain"
        )
    if setting.secure_aggregation and not sums_only:
        raise ConfigError(
            f"{where} with secure aggregation: the server never sees single updates, so it can store none; write "
            "unlearning=fru (the devices keep their own), or trust the server (privacy.trust)"
        )
    if setting.privacy:
        raise ConfigError(
            f"{where} with privacy={setting.privacy}: its rounds would be releases that no budget accounts for; write "
            "unlearning=retrain, or privacy=none"
        )


def check_numbers(name: str, settings: object, *, least: Mapping[str, float], above_zero: tuple[str, ...] = ()) -> None:
    """ConfigError unless settings are at least so large, or positive."""
    for key, low in least.items():
        if not getattr(settings, key) >= low:
            raise ConfigError(f"unlearning.strategies.{name}.{key}={getattr(settings, key)}: write {low:g} or more")
    for key in above_zero:
        if not getattr(settings, key) > 0.0:
            raise ConfigError(f"unlearning.strategies.{name}.{key}={getattr(settings, key)}: write a positive number")


def go_back(task: Task) -> State:
    """The state before any affected user took part, as far as the server goes; see the module's docstring."""
    algorithm, forget = task.federation.algorithm, task.forget
    fresh = ForgetSet(np.union1d(forget.users, forget.affected), forget.items, forget.pairs)
    state = erase(task.state, fresh, algorithm)
    return state.at(task.joined.server if task.joined is not None else ServerState.initial(algorithm))


def finish(task: Task, state: State) -> State:
    """The state as the run goes on with it: its round, its devices' data, without what is deleted."""
    server = dataclasses.replace(state.server, round=task.state.round)
    task.federation.write(state.devices, task.after)
    return erase(state.at(server), task.forget, task.federation.algorithm)


def stored_rounds(task: Task, rounds: list[int], name: str) -> list[int]:
    """Those to be replayed: after the join point. RunFailed where there are none."""
    start = task.joined.round if task.joined is not None else 0
    found = [number for number in rounds if start < number <= task.state.round]
    if not found:
        raise RunFailed(
            f"unlearning.strategies.{name}: the update history has no round after round {start}; train with the store "
            "that it asks for, or write unlearning=retrain"
        )
    return found


class Calibration(Wrapped):
    """The wrapped algorithm with shorter local training: fewer epochs, fewer examples in each."""

    name = "calibration"

    def __init__(self, inner: GradientRecommender, local: LocalTraining) -> None:
        super().__init__(inner)
        self._local = local

    @classmethod
    def from_config(cls, options: Mapping[str, Any], problem: Problem) -> Self:
        """``inner`` is the algorithm's own configuration, ``local`` the fields of LocalTraining that differ."""
        inner = build(options["inner"], problem)
        assert isinstance(inner, GradientRecommender)
        return cls(inner, dataclasses.replace(inner.local, **options["local"]))

    @property
    def local(self) -> LocalTraining:
        return self._local


def lighter(federation: Federation, share: float, positives: int, negatives: int) -> Federation:
    """The same federation with local training cut down: ``share`` of the epochs (one at least), at most so many
    positives a device and round, drawn anew each round, and negatives of each. 0: as many as in training."""
    inner = federation.algorithm
    assert isinstance(inner, GradientRecommender)
    local = inner.local
    cut = {
        "epochs": max(1, round(share * local.epochs)),
        "max_positives": min(positives or 2**30, local.max_positives or 2**30) % 2**30,
        "negatives": min(negatives or local.negatives, local.negatives),
    }
    config = {
        "_target_": f"{__name__}.Calibration", "inner": dict(federation.algorithm_config), "local": cut,
    }  # fmt: skip
    settings = dict(federation.settings)
    settings["chunk_rows"] = max(int(settings.get("chunk_rows", 0)), _CHUNK_ROWS)
    return dataclasses.replace(federation, algorithm_config=config, settings=settings)


def rounds_of(
    federation: Federation, state: State, split: Split, rounds: int, step: float, *,
    combine: Callable[[int, RoundSum, Tensors], Tensors] | None = None,
    participants: Callable[[int, Int64], Int64] | None = None, watch: Watch | None = None,
) -> Trained:  # fmt: skip
    """``rounds`` rounds with ``step`` times the server's learning rate; the optimiser's moments are kept."""
    rate = federation.federation.server_learning_rate * step
    longer = dataclasses.replace(federation.federation, server_learning_rate=rate)
    return dataclasses.replace(federation, federation=longer).train(
        state, split, rounds, combine=combine, participants=participants, watch=watch
    )
