"""FedEraser (Liu, Ma, Yang, Wang, Liu, "FedEraser: Enabling Efficient Client-Level Data Removal from Federated Learning
Models", IWQoS 2021): replay with calibrated updates.

The server stores what devices upload, every Δt-th round (``interval``). To forget, it goes back to before any affected
user took part and repeats the stored rounds with the retained users: each trains shortly from the current model, which
gives the direction, and the stored update gives the length (the paper's §III-B):

    Ũ_k = |U_k| · Û_k / ‖Û_k‖

Only ‖U_k‖ enters, so only norms are kept, with the one row that the store keeps at least. Of forgotten users, and of
those with single interactions to forget, whose stored norms owe something to them, nothing is used.

From the paper: interval, length and direction, retained users only, calibration ratio r (``calibration``, of the local
epochs). Ours: where training has one local epoch, r cannot shorten it, and ``positives`` and ``negatives`` bound the
examples of a round instead; each stored round is repeated ``replays`` times with ``step`` times the server's learning
rate, for the rounds that were not stored; the server optimiser (Adam, say) is the run's own, where the paper averages;
``finish_rounds`` short rounds with a smaller step and no calibration; private vectors (:mod:`.replay`), of which the
paper has none. Users without a stored norm get the others' mean ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from fedrec.algorithms.base import GradientRecommender, Recommender, Tensors
from fedrec.errors import ConfigError
from server.aggregation import RoundSum, mean_update
from server.watch import Watch
from unlearning.stores.history import UpdateHistory
from unlearning.stores.recording import ServerNeeds, recorded_tensor, uploads
from unlearning.stores.size import check_settings
from unlearning.strategies.base import Forgotten, Guarantee, Setting, StoreNeeds, Strategy, Task
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
Float32 = npt.NDArray[np.float32]
_NORMS_ONLY = 1e-6  # the share of rows that the store keeps: the largest one of each update


@dataclass(frozen=True)
class FedEraser(Strategy):
    """Stored rounds again without the forgotten, in the directions of now and the lengths of then.

    Attributes:
        interval: Δt: every so many rounds are stored.
        calibration: r: the share of the local epochs (one at least) that calibration trains.
        positives, negatives: examples of a device in a calibration round at most: positives, and negatives of each
            (0: as in training).
        replays: so often each stored round is repeated.
        step: times the server's learning rate while replaying; ``finish_step`` in the ``finish_rounds`` afterwards.
    """

    name = "federaser"
    promise: ClassVar[str] = "approximate"

    interval: int = 10
    calibration: float = 0.5
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
            self.name, self, least={"positives": 0, "negatives": 0, "replays": 1, "finish_rounds": 0},
            above_zero=("calibration", "step", "finish_step"),
        )  # fmt: skip
        if self.calibration > 1.0:
            raise ConfigError(f"unlearning.strategies.federaser.calibration={self.calibration}: write a share up to 1")

    @property
    def store(self) -> StoreNeeds:
        return ServerNeeds("server", self.interval, _NORMS_ONLY, "float32", self.max_bytes)

    def check(self, setting: Setting) -> None:
        """ConfigError for methods without local training, under secure aggregation and under privacy mechanisms."""
        check_replay(self.name, setting, sums_only=False)

    def forget(self, task: Task) -> Forgotten:
        assert task.history is not None
        history = UpdateHistory(task.history, self.store)
        stored = stored_rounds(task, history.rounds, self.name)
        lengths = Lengths.of(history, stored, task)
        light = lighter(task.federation, self.calibration, self.positives, self.negatives)
        algorithm = light.algorithm
        assert isinstance(algorithm, GradientRecommender)
        state = go_back(task)
        start, mean = state.round, light.federation.mean
        calibrate = Calibrate(algorithm, lengths, mean, start, self.replays)
        done = rounds_of(
            light, state, task.after, len(stored) * self.replays, self.step, combine=calibrate.combine,
            participants=calibrate.participants, watch=calibrate,
        )  # fmt: skip
        ended = rounds_of(light, done.state, task.after, self.finish_rounds, self.finish_step)
        trace = [{"phase": "replay", "round": line["round"], "loss": line["loss"]} for line in done.lines]
        trace += [{"phase": "train", "round": line["round"], "loss": line["loss"]} for line in ended.lines]
        notes = [
            f"replayed {len(stored)} stored rounds {self.replays} times, with stored lengths of "
            f"{lengths.known.size} users"
        ]
        return Forgotten(finish(task, ended.state), done.cost + ended.cost, Guarantee("approximate"), trace, notes)


@dataclass(frozen=True)
class Lengths:
    """``known`` int64[k], ascending: users with stored updates and nothing to forget. ``norms`` float32[r, k]: theirs,
    round by round, 0 where they took no part. ``others``: users of whom nothing is stored; they take part always."""

    known: Int64
    norms: Float32
    others: Int64

    @classmethod
    def of(cls, history: UpdateHistory, rounds: list[int], task: Task) -> Lengths:
        found = [history.norms(number) for number in rounds]
        gone = np.union1d(task.forget.users, task.forget.affected)
        known = np.setdiff1d(np.unique(np.concatenate([users for users, _ in found])), gone)
        norms = np.zeros((len(rounds), known.size), dtype=np.float32)
        for place, (users, values) in enumerate(found):
            keep = np.isin(users, known)
            norms[place, np.searchsorted(known, users[keep])] = values[keep]
        everybody = np.flatnonzero(task.after.train.counts).astype(np.int64)
        return cls(known, norms, np.setdiff1d(everybody, known))


class Calibrate(Watch):
    """One replayed round: who takes part, whose uploads are looked at, and how they are added up."""

    def __init__(self, algorithm: Recommender, lengths: Lengths, mean: str, start: int, replays: int) -> None:
        super().__init__(lengths.known, ())
        self._algorithm, self._lengths, self._mean = algorithm, lengths, mean
        self._start, self._replays = start, replays
        self._tensor = recorded_tensor(algorithm)

    def _norms(self, number: int) -> Float32:
        # Stored rounds in turn, each ``replays`` times.
        norms: Float32 = self._lengths.norms[(number - self._start - 1) // self._replays]
        return norms

    def participants(self, number: int, sampled: Int64) -> Int64:
        """Who took part in the stored round, and those of whom nothing is known."""
        return np.union1d(self.users(number), self._lengths.others)

    def users(self, number: int) -> Int64:
        return self._lengths.known[self._norms(number) > 0.0]

    def record(self, number: int, total: RoundSum, shared: Tensors) -> None:
        """Nothing is kept of a replayed round."""

    def combine(self, number: int, total: RoundSum, shared: Tensors) -> Tensors:
        """The mean update with every known upload at its stored length."""
        users, indptr, rows, values = uploads(total)
        if users.size:
            scale, elsewhere = scales(self._lengths.known, self._norms(number), users, indptr, values)
            summed = total.sums[self._tensor]
            flat = summed.view(summed.shape[0], -1) * elsewhere
            more = values * np.repeat(scale - elsewhere, np.diff(indptr))[:, None]
            flat.index_add_(0, torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(more.astype(np.float32)))
            total.sums[self._tensor] = flat.view_as(summed)
        return mean_update(total, self._algorithm, shared, self._mean)


def scales(known: Int64, stored: Float32, users: Int64, indptr: Int64, values: Float32) -> tuple[Float32, float]:
    """By what uploads are multiplied: |U_k| / ‖Û_k‖ of ``users``, float32[k]; and the mean of it, for everybody else.

    ``stored`` are the norms of the users ``known``, 0 without one: such an upload gets the mean as well.
    """
    squares = np.einsum("nw,nw->n", values, values, dtype=np.float64)
    now = np.sqrt(np.bincount(np.repeat(np.arange(users.size), np.diff(indptr)), squares, minlength=users.size))
    then = stored[np.searchsorted(known, users)].astype(np.float64)
    good = (now > 0.0) & (then > 0.0)
    ratio = np.divide(then, now, out=np.zeros_like(then), where=good)
    mean = float(ratio[good].mean()) if good.any() else 1.0
    return np.where(good, ratio, mean).astype(np.float32), mean
