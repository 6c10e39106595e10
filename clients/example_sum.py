"""The sum of the dense, noisy uploads of example-level differential privacy, with as few draws as it takes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.example_batches import ExampleBatches
from clients.example_steps import Outcome, Schedule
from clients.update import CohortUpdate, start_update
from clients.wire import Codec
from fedrec.algorithms.base import GradientRecommender, Tensors

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


def finite_devices(outcome: Outcome, batches: ExampleBatches) -> npt.NDArray[np.bool_]:
    """bool[B]: devices all of whose values are finite.

    It costs no privacy: every gradient is clipped, so that only the noise of earlier steps can decide it.
    """
    good = np.ones(batches.devices, dtype=np.bool_)
    row_owner = np.repeat(np.arange(batches.devices), np.diff(batches.row_ptr))
    for rows in outcome.rows.values():
        good[row_owner[~torch.isfinite(rows).all(1).numpy()]] = False
    for value in (*outcome.dense.values(), *outcome.private.values()):
        good &= torch.isfinite(value.float().reshape(batches.devices, -1)).all(1).numpy()
    return good


class UploadSum:
    """The sum of a node's dense uploads, and the variance of the noise that it still lacks."""

    def __init__(
        self,
        algorithm: GradientRecommender,
        schedules: Mapping[str, Schedule],
        shared: Tensors,
        generator: np.random.Generator,
    ) -> None:
        self.algorithm, self.schedules, self.shared, self.generator = algorithm, schedules, shared, generator
        self.n_items = n_items = algorithm.problem.n_items
        self.update = start_update(algorithm, n_items)
        self.sums = {name: value.double() for name, value in self.update.sums.items()}
        self.variance = {name: np.zeros(n_items) for name, spec in algorithm.shared.items() if spec.per_item}
        self.touched = np.zeros(n_items, dtype=np.int64)
        self.devices = 0  # those whose pending noise is drawn with the sum's

    def add(
        self,
        users: Int64,
        batches: ExampleBatches,
        outcome: Outcome,
        good: npt.NDArray[np.bool_],
        keep_users: Collection[int],
    ) -> None:
        update = self.update
        kept = np.isin(users, np.asarray(list(keep_users), dtype=np.int64)) & good
        together = good & ~kept
        row_owner = np.repeat(np.arange(batches.devices), np.diff(batches.row_ptr))
        chosen = np.flatnonzero(together[row_owner])
        items, counts = batches.rows[chosen], np.diff(batches.row_ptr)
        for name, spec in self.algorithm.shared.items():
            if spec.per_item:
                flat, index = self.sums[name].view(self.n_items, -1), torch.from_numpy(items.astype(np.int64))
                flat.index_add_(0, index, outcome.rows[name][torch.from_numpy(chosen)].double())
                lacking = outcome.pending[name]
                self.variance[name] += np.bincount(items, lacking[chosen], minlength=self.n_items)
                square = float(outcome.rows[name][torch.from_numpy(good[row_owner])].double().square().sum())
                untouched = self.schedules[name].total * float((self.n_items - counts[good]).sum())
                square += flat.shape[1] * (float(lacking[good[row_owner]].sum()) + untouched)
                update.decay[name] += float(good.sum()) * (float(self.schedules[name].product[-1]) - 1.0)
            else:
                changes = outcome.dense[name][torch.from_numpy(good)].double()
                self.sums[name] += changes.sum(0)
                square = float(changes.square().sum())
            update.squared_norm[name] = update.squared_norm.get(name, 0.0) + square
        self.touched += np.bincount(items, minlength=self.n_items)
        self.devices += int(together.sum())
        for b in np.flatnonzero(kept):
            self._keep(int(users[b]), int(b), batches, outcome)
        update.users += users[good].tolist()
        update.failed += users[~good].tolist()
        update.loss += float((outcome.loss / np.maximum(outcome.examples, 1))[good].sum())

    def _keep(self, user: int, b: int, batches: ExampleBatches, outcome: Outcome) -> None:
        """Draw the whole upload of the device at position ``b``, keep it, and add it to the sum."""
        seen = False
        mine = slice(int(batches.row_ptr[b]), int(batches.row_ptr[b + 1]))
        for name, spec in self.algorithm.shared.items():
            if spec.per_item:
                variance = np.full(self.n_items, self.schedules[name].total)
                variance[batches.rows[mine]] = outcome.pending[name][mine]
                whole = self._noise(variance, spec.shape)
                rows = torch.from_numpy(batches.rows[mine].astype(np.int64))
                whole.view(self.n_items, -1).index_add_(0, rows, outcome.rows[name][mine].double())
                self.sums[name] += whole
                if not seen:
                    moved = whole + (self.schedules[name].product[-1] - 1.0) * self.shared[name].double()
                    values = moved.reshape(self.n_items, -1).float().numpy()
                    self.update.views.append((user, np.arange(self.n_items, dtype=np.int32), values))
                    seen = True
            else:
                whole = outcome.dense[name][b]
            self.update.user_updates.setdefault(name, []).append(whole.float())

    def _noise(self, variance: Float64, shape: tuple[int, ...]) -> Tensor:
        """float64[*shape] of noise, with ``variance`` per item."""
        deviation = np.sqrt(variance).reshape(-1, *[1] * (len(shape) - 1))
        if not deviation.any():
            return torch.zeros(shape, dtype=torch.float64)
        return torch.from_numpy(self.generator.standard_normal(shape) * deviation)

    def finish(self, steps: int) -> CohortUpdate:
        """The node's update, its pending noise drawn.

        The devices' pending noises are independent normal numbers that nobody has read, of which the node uploads only
        the sum. A sum of independent N(0, v_u) is N(0, Σ v_u): so one draw per coordinate, of the summed variance, has
        exactly the distribution of every device drawing its own.
        """
        update = self.update
        for name, spec in self.algorithm.shared.items():
            if spec.per_item:
                # A device that never read a row lacks all of its noise there.
                missing = self.schedules[name].total * (self.devices - self.touched)
                self.sums[name] += self._noise(self.variance[name] + missing, spec.shape)
        update.sums = {name: value.float() for name, value in self.sums.items()}
        update.devices, update.steps = len(update.users), steps * len(update.users)
        update.counts += update.devices
        codec, one = Codec("dense"), torch.ones(1, dtype=torch.int64)
        for spec in self.algorithm.shared.values():
            size = 4 * math.prod(spec.shape)
            if spec.per_item:
                width = math.prod(spec.shape[1:])
                size = int(codec.device_bytes(spec.shape[0], width, one, one, spec.weight_decay > 0)[0])
            update.upload_bytes += update.devices * size
        return update
