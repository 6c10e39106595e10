"""FRU (Yuan, Yin, Guo, He, Cui, Nguyen, "Federated Unlearning for On-Device Recommendation", WSDM 2023).

Devices keep their own updates: of each stored round the α share of items with the largest ‖ΔV_i‖ (``top``, in float16
by default). To forget, the server goes back to the join point, and the stored rounds are repeated with λ times the
local epochs (``calibration``); the aggregate gets the length that the retained devices' stored updates add up to:

    ΔV̄ = ‖agg(ΔV)‖ · agg(ΔV̂) / ‖agg(ΔV̂)‖

Devices upload their stored rows once for it, which is counted as traffic; the server needs sums only, so that secure
aggregation stays possible. What affected users stored is left out: it was made from what is to be forgotten.

Semi-hard negatives: a device draws from the union of the β share of items that its user's vector scores highest, and
the β share nearest to the centroid of its items (``semi_hard``). A device finds them with what it has; here they enter
its table of items that are never drawn, and are found anew every ``refresh`` rounds, as the item view changes.

Ours: where training has one local epoch, λ cannot shorten it, and ``positives`` and ``negatives`` bound the examples of
a round; ``replays``, ``step`` and ``finish_rounds`` stand for the rounds that were not stored, as in
:mod:`.federaser`; the server optimiser is the run's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from fedrec.algorithms.base import GradientRecommender, Recommender, Tensors
from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from fedrec.errors import ConfigError
from server.aggregation import RoundSum, mean_update
from unlearning.federation import Federation, ModelScorer
from unlearning.state import State
from unlearning.stores.recording import device_histories, recorded_tensor
from unlearning.stores.size import check_settings
from unlearning.strategies.base import Cost, Forgotten, Guarantee, Setting, StoreNeeds, Strategy, Task, timed
from unlearning.strategies.replay import (
    check_numbers,
    check_replay,
    finish,
    go_back,
    lighter,
    rounds_of,
    stored_rounds,
)

Int64 = npt.NDArray[np.int64]
_SCORED = 2**24  # (user, item) pairs at a time


@dataclass(frozen=True)
class FRU(Strategy):
    """Stored rounds again without the forgotten, at the length of the devices' own stored updates.

    Attributes:
        interval: every so many rounds are stored. top: α. precision: of stored rows.
        calibration: λ. semi_hard: β; 0 draws negatives as training does; the paper's 0.5 costs FedMF a good
            twentieth of its recall (docs/unlearning.md). refresh: rounds between two looks for them.
        positives, negatives: examples of a device in a round at most: positives, and negatives of each (0: as in
            training).
        replays: so often each stored round is repeated.
        step: times the server's learning rate while replaying; ``finish_step`` in the ``finish_rounds`` afterwards.
    """

    name = "fru"
    promise: ClassVar[str] = "approximate"

    interval: int = 10
    top: float = 0.5
    precision: Literal["float32", "float16"] = "float16"
    calibration: float = 0.1
    semi_hard: float = 0.7
    refresh: int = 10
    positives: int = 32
    negatives: int = 8
    replays: int = 2
    step: float = 4.0
    finish_rounds: int = 10
    finish_step: float = 1.5
    max_bytes: int = StoreNeeds.max_bytes

    def __post_init__(self) -> None:
        check_settings(self.store)
        check_numbers(
            self.name, self,
            least={"positives": 0, "negatives": 0, "replays": 1, "finish_rounds": 0, "semi_hard": 0, "refresh": 1},
            above_zero=("calibration", "step", "finish_step"),
        )  # fmt: skip
        for key in ("semi_hard", "calibration"):
            if getattr(self, key) > 1.0:
                raise ConfigError(f"unlearning.strategies.fru.{key}={getattr(self, key)}: write a share up to 1")

    @property
    def store(self) -> StoreNeeds:
        return StoreNeeds("client", self.interval, self.top, self.precision, self.max_bytes)

    def check(self, setting: Setting) -> None:
        """ConfigError for methods without local training, and under privacy mechanisms."""
        check_replay(self.name, setting, sums_only=True)

    def forget(self, task: Task) -> Forgotten:
        with timed() as spent:
            lengths = Lengths.of(task, self.store)
        upload = Cost(cpu_s=spent.cpu_s, wall_s=spent.wall_s, upload_bytes=lengths.bytes)
        light = lighter(task.federation, self.calibration, self.positives, self.negatives)
        state, cost, trace = go_back(task), upload, []
        replay = Replay(light.algorithm, lengths, light.federation.mean, state.round, self.replays)
        phases = [("replay", n, self.step) for n in self._parts(len(lengths.norms) * self.replays)]
        phases += [("train", n, self.finish_step) for n in self._parts(self.finish_rounds)]
        for phase, rounds, step in phases:
            with timed() as spent:
                split = self._split(task, light, state)
            done = rounds_of(
                light, state, split, rounds, step, combine=replay.combine if phase == "replay" else None,
                participants=replay.participants if phase == "replay" else None,
            )  # fmt: skip
            state, cost = done.state, cost + done.cost + Cost(cpu_s=spent.cpu_s, wall_s=spent.wall_s)
            trace += [{"phase": phase, "round": line["round"], "loss": line["loss"]} for line in done.lines]
        notes = [f"replayed {len(lengths.norms)} stored rounds {self.replays} times"]
        return Forgotten(finish(task, state), cost, Guarantee("approximate"), trace, notes)

    def _parts(self, rounds: int) -> list[int]:
        if not self.semi_hard:
            return [rounds] if rounds else []
        return [min(self.refresh, rounds - start) for start in range(0, rounds, self.refresh)]

    def _split(self, task: Task, federation: Federation, state: State) -> Split:
        """The retained data; of negatives, only semi-hard ones where a device has enough of them."""
        if not self.semi_hard:
            return task.after
        algorithm = federation.algorithm
        assert isinstance(algorithm, GradientRecommender)
        scorer = federation.scorer(state, task.after)
        table = semi_hard_exclusions(task.after, scorer, self.semi_hard, max(1, algorithm.local.negatives))
        return replace(task.after, negatives_exclude=table)


@dataclass(frozen=True)
class Lengths:
    """Of each stored round: ``norms`` the L2 norm of the retained devices' mean stored update, and ``users`` int64, who
    took part. ``others`` int64: retained users of whom no device has anything stored; they take part always. ``bytes``:
    what devices upload of their stores."""

    norms: list[float]
    users: list[Int64]
    others: Int64
    bytes: float

    @classmethod
    def of(cls, task: Task, needs: StoreNeeds) -> Lengths:
        histories = device_histories(task.state.devices, needs)
        rounds = stored_rounds(task, sorted({number for one in histories for number in one.rounds}), FRU.name)
        spec = task.federation.algorithm.shared[recorded_tensor(task.federation.algorithm)]
        width = math.prod(spec.shape[1:])
        gone = np.union1d(task.forget.users, task.forget.affected)
        norms, took_part, sent = [], [], 0.0
        for number in rounds:
            total, users = torch.zeros(spec.shape[0], width), []
            for history in (one for one in histories if number in one.rounds):
                found = history.read(number)
                keep = ~np.isin(found.users, gone)
                rows = np.repeat(keep, np.diff(found.indptr))
                total.index_add_(0, torch.from_numpy(found.rows[rows].astype(np.int64)),
                                 torch.from_numpy(found.values[rows]))  # fmt: skip
                users.append(found.users[keep])
                sent += int(rows.sum()) * (4 + width * (2 if needs.precision == "float16" else 4))
            together = np.unique(np.concatenate(users))
            norms.append(float(total.double().norm()) / max(together.size, 1))
            took_part.append(together)
        everybody = np.flatnonzero(task.after.train.counts).astype(np.int64)
        return cls(norms, took_part, np.setdiff1d(everybody, np.concatenate(took_part)), sent)


@dataclass(frozen=True)
class Replay:
    """One replayed round: who takes part, and the length of the mean update."""

    algorithm: Recommender
    lengths: Lengths
    mean: str
    start: int
    replays: int

    def _place(self, number: int) -> int:
        return (number - self.start - 1) // self.replays

    def participants(self, number: int, sampled: Int64) -> Int64:
        """Who took part in the stored round, and those of whom nothing is stored."""
        return np.union1d(self.lengths.users[self._place(number)], self.lengths.others)

    def combine(self, number: int, total: RoundSum, shared: Tensors) -> Tensors:
        """The mean update, the item view's at its stored length."""
        found = mean_update(total, self.algorithm, shared, self.mean)
        name, length = recorded_tensor(self.algorithm), self.lengths.norms[self._place(number)]
        now = float(found[name].double().norm())
        if now > 0.0 and length > 0.0:  # nothing is stored of anybody retained: as it is
            found[name] = found[name] * (length / now)
        return found


def semi_hard_exclusions(split: Split, scorer: ModelScorer, share: float, needed: int) -> UserItems:
    """Items that a device does not draw: those of ``split`` already, and all that are not semi-hard for it.

    Semi-hard is the union of the ``share`` of items that the user scores highest and of the ``share`` nearest to the
    centroid of the user's items in the item view. A device that would keep fewer than ``needed`` keeps all.
    """
    shared: Mapping[str, Any] = scorer.shared
    view = shared[recorded_tensor(scorer.algorithm)].flatten(1).numpy()
    wanted = max(1, math.ceil(share * split.n_items))
    lengths = np.einsum("nw,nw->n", view, view)
    owner, item = [], []
    step = max(1, _SCORED // split.n_items)
    for start in range(0, split.n_users, step):
        users = np.arange(start, min(start + step, split.n_users))
        history = split.train.take(users)
        counts = np.maximum(history.counts, 1).astype(np.float32)
        centroid = np.zeros((users.size, view.shape[1]), dtype=np.float32)
        np.add.at(centroid, history.users, view[history.items])
        near = 2.0 * (centroid / counts[:, None]) @ view.T - lengths  # minus the squared distance, up to a constant
        kept = np.zeros((users.size, split.n_items), dtype=np.bool_)
        for values in (scorer.raw_scores(users), near):
            best = np.argpartition(-values, wanted - 1, axis=1)[:, :wanted]
            np.put_along_axis(kept, best, True, axis=1)
        given = split.negatives_exclude.take(users)
        excluded = np.zeros_like(kept)
        excluded[given.users, given.items] = True
        enough = (kept & ~excluded).sum(1) >= needed
        excluded |= ~kept & enough[:, None]
        row, column = np.nonzero(excluded)
        owner.append(row + start)
        item.append(column.astype(np.int32))
    return UserItems.from_pairs(np.concatenate(owner), np.concatenate(item), split.n_users)
