"""DP-SGD on B devices at once: the local steps of example-level differential privacy, for any gradient method.

Abadi et al. (CCS 2016, algorithm 1) per device. With g_e the clipped gradient of example e, learning rate η_s, weight
decay λ, noise multiplier σ, clipping norm C and B the expected batch, a step is, for every coordinate of every table,

    w ← (1 − η_s λ) w − η_s/B · (Σ_e g_e + σ C z),   z ~ N(0, 1).

Nobody sees an item row between two batches that look it up, so its noise is drawn when it is next read, as one normal
draw of the accumulated variance (LazyDP, Lim et al., ASPLOS 2024): the same joint distribution of everything that is
read. With P_t = Π_{s<t} (1 − η_s λ) and S_t = Σ_{s<t} (η_s σ C/B)²/P_{s+1}², a row that was exact at time a reads at
time t as (P_t/P_a) w + P_t √(S_t − S_a) z. What is pending after the last step is returned as a variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clients.example_batches import ExampleBatches
from clients.per_example import clipped_gradients
from fedrec.algorithms.base import GradientRecommender, Tensors, TensorSpec

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DPSGD:
    """The public numbers of a device's round. ``noise_multiplier`` is relative to ``max_grad_norm``."""

    sample_rate: float
    steps: int
    expected_batch: float
    noise_multiplier: float
    max_grad_norm: float

    @property
    def deviation(self) -> float:
        """Standard deviation of the noise on the averaged gradient, σC/B."""
        # No noise is no noise, whatever C (0 · ∞ is not a number).
        return self.noise_multiplier * self.max_grad_norm / self.expected_batch if self.noise_multiplier else 0.0


class Schedule(NamedTuple):
    """One tensor's steps: ``rate``, ``keep`` = 1 − rate·decay and ``noise`` (deviation of what a step adds)
    float64[steps]; the decay products P and scaled variances S float64[steps + 1] of this module's docstring."""

    rate: Float64
    keep: Float64
    noise: Float64
    product: Float64
    variance: Float64

    @property
    def total(self) -> float:
        """Variance of the noise on a coordinate that was never read, after all steps."""
        return float(self.product[-1] ** 2 * self.variance[-1])


def schedule(spec: TensorSpec, round_index: int, sgd: DPSGD) -> Schedule:
    """The steps of one tensor in round ``round_index`` (from 0)."""
    rate = np.array([spec.rate(round_index, step) for step in range(sgd.steps)])
    keep = 1.0 - rate * spec.weight_decay
    product = np.concatenate([[1.0], np.cumprod(keep)])
    noise = rate * sgd.deviation
    variance = np.concatenate([[0.0], np.cumsum((noise / product[1:]) ** 2)])
    return Schedule(rate, keep, noise, product, variance)


@dataclass(frozen=True)
class Outcome:
    """B devices after their steps; R their touched rows, device after device (``ExampleBatches.rows``).

    ``rows[name]`` [R, width] is the change of a touched row of a per-item tensor beyond its weight decay, w − P·w_0,
    and ``pending[name]`` float64[R] the variance of the noise that each of its coordinates still lacks. ``dense[name]``
    [B, …] is the change of any other shared tensor, ``private[name]`` [B, …] the new private one. ``loss`` float64[B]
    sums the losses of the ``examples`` int64[B] visited.
    """

    rows: Tensors
    pending: Mapping[str, Float64]
    dense: Tensors
    private: Tensors
    loss: Float64
    examples: npt.NDArray[np.int64]


def run_steps(
    algorithm: GradientRecommender,
    shared: Tensors,
    private: Tensors,
    batches: ExampleBatches,
    schedules: Mapping[str, Schedule],
    sgd: DPSGD,
    round_index: int,
    generator: np.random.Generator,
) -> Outcome:
    """The local steps of the devices of ``batches`` as one tensor program, in the dtype of ``shared``.

    ``shared[name]`` [*shape] is what the devices downloaded, ``private[name]`` [B, *shape], whose memory may be reused.
    """
    owner = torch.from_numpy(batches.owner)
    place = torch.from_numpy(batches.row_ptr[batches.owner][:, None] + batches.slot)  # int64[E, 1 + k], among R
    items = torch.from_numpy(batches.items.astype(np.int64))
    steps = [torch.from_numpy(found) for found in _by_step(batches)]
    table = {name for name, spec in algorithm.shared.items() if spec.per_item}
    catalogue = torch.from_numpy(batches.rows.astype(np.int64))
    values = {name: shared[name].index_select(0, catalogue) for name in table}
    others = [name for name in shared if name not in table]
    own = {name: shared[name].expand(batches.devices, *shared[name].shape).clone() for name in others}
    own |= private
    last = np.full(catalogue.numel(), -1)  # the step whose noise is the first that a row lacks; -1: it lacks all
    losses = torch.zeros(batches.devices, dtype=torch.float64)

    def noise(like: Tensor) -> Tensor:
        return torch.from_numpy(generator.standard_normal(tuple(like.shape))).to(like.dtype)

    for step, chosen in enumerate(steps):
        active, position = torch.unique(place[chosen], return_inverse=True)
        for name in table:
            factor, deviation = catch_up(schedules[name], last[active.numpy()], step)
            row = values[name].index_select(0, active)
            row = row * _column(factor, row)
            if sgd.deviation:
                row += noise(row) * _column(deviation, row)
            values[name].index_copy_(0, active, row)
        params = {name: value[place[chosen]] for name, value in values.items()}
        params |= {name: value.index_select(0, owner[chosen]) for name, value in own.items()}
        clipped = clipped_gradients(algorithm, params, items[chosen], round_index, sgd.max_grad_norm)
        losses.index_add_(0, owner[chosen], torch.where(torch.isfinite(clipped.loss), clipped.loss, 0.0).double())
        for name in table:
            rates, row = schedules[name], values[name].index_select(0, active)
            total = torch.zeros_like(row).index_add_(0, position.flatten(), clipped.gradients[name].flatten(0, 1))
            row = row * rates.keep[step] - total * (rates.rate[step] / sgd.expected_batch)
            values[name].index_copy_(0, active, row)
        last[active.numpy()] = step
        for name, value in own.items():
            rates = schedules[name]
            total = torch.zeros_like(value).index_add_(0, owner[chosen], clipped.gradients[name])
            value.mul_(rates.keep[step]).sub_(total, alpha=rates.rate[step] / sgd.expected_batch)
            if sgd.deviation:
                value.sub_(noise(value), alpha=rates.noise[step])
    rows, pending = {}, {}
    for name in table:
        moved = values[name] * _column(catch_up(schedules[name], last, sgd.steps)[0], values[name])
        start = shared[name].index_select(0, catalogue)
        # Nobody may have touched anything: the width is the tensor's, not the rows'.
        width = math.prod(shared[name].shape[1:])
        rows[name] = (moved - start * schedules[name].product[-1]).reshape(len(start), width)
        pending[name] = catch_up(schedules[name], last, sgd.steps)[1] ** 2
    dense = {name: own[name] - shared[name] for name in others}
    count = np.bincount(batches.owner, minlength=batches.devices)
    return Outcome(rows, pending, dense, {name: own[name] for name in private}, losses.numpy(), count)


def catch_up(steps: Schedule, last: npt.NDArray[np.int64], now: int) -> tuple[Float64, Float64]:
    """Factor and noise deviation that bring rows to time ``now``, when they hold all decay up to and including step
    ``last`` and all noise before it (-1: neither any)."""
    factor = steps.product[now] / steps.product[last + 1]
    variance = np.maximum(steps.variance[now] - steps.variance[np.maximum(last, 0)], 0.0)
    return factor, steps.product[now] * np.sqrt(variance)


def _column(values: Float64, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _by_step(batches: ExampleBatches) -> list[npt.NDArray[np.int64]]:
    """The examples of every step, over all devices."""
    step = batches.step
    order = np.argsort(step, kind="stable")
    return np.split(order, np.searchsorted(step[order], np.arange(1, batches.steps)))
