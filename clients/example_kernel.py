"""The compiled local steps of example-level differential privacy, for the dot-product family (FedMF and its like).

It stands in for :func:`clients.example_steps.run_steps` and gives the same: of a score ⟨user, item⟩ + bias, every row's
gradient is a multiple of the user vector, so an example's gradient is 1 + k numbers and one vector, and its norm
‖u‖²·Σ_{j,k} [item_j = item_k] s_j s_k + ‖Σ_j s_j q_j‖² + (Σ_j s_j)². All arithmetic is float64.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from clients.example_batches import ExampleBatches, Int32, Int64
from clients.example_steps import DPSGD, Float64, Outcome, Schedule
from clients.fused import why_not
from clients.passes import REORDER
from clients.wire import Codec
from fedrec.algorithms.base import DotProduct, GradientRecommender, Tensors
from privacy.clipping import EPSILON


def obstacle(algorithm: GradientRecommender, round_index: int) -> str | None:
    """Why the kernel cannot train this, or None when it can."""
    reason = why_not(algorithm, {}, Codec(), "cpu", round_index)
    form = algorithm.dot_product(round_index)
    if reason or form is None:
        return reason
    if form.personal or form.l1:
        return f"{algorithm.name} has a personal view or a sparsity term"
    return None if form.item in algorithm.shared else f"tensor {form.item} is not shared"


@njit(cache=True, fastmath=REORDER, error_model="numpy")
def _example(
    q: Float64, slot: Int32, user: Float64, bias: float, pairwise: bool, use_bias: bool, bound: float,
    slope: Float64, vector: Float64,
) -> tuple[float, float]:  # fmt: skip
    """(loss, clip factor) of one example. ``slope`` [1 + k] becomes the loss's derivative by each logit, ``vector``
    Σ slope·q, the user's gradient."""
    rows, width = slot.size, user.size
    for t in range(rows):
        total, row = bias, q[slot[t]]
        for k in range(width):
            total += user[k] * row[k]
        slope[t] = total
    loss, positive = 0.0, slope[0]
    if pairwise:
        slope[0] = 0.0
        for t in range(1, rows):
            margin = slope[t] - positive
            loss += (max(margin, 0.0) + np.log1p(np.exp(-abs(margin)))) / (rows - 1)
            slope[t] = 1.0 / (1.0 + np.exp(-margin)) / (rows - 1)
            slope[0] -= slope[t]
    else:
        for t in range(rows):
            x, label = slope[t], 1.0 if t == 0 else 0.0
            loss += (max(x, 0.0) - x * label + np.log1p(np.exp(-abs(x)))) / rows
            slope[t] = (1.0 / (1.0 + np.exp(-x)) - label) / rows
    for k in range(width):
        vector[k] = 0.0
    all_slopes, same = 0.0, 0.0
    for t in range(rows):
        weight, row = slope[t], q[slot[t]]
        all_slopes += weight
        for k in range(width):
            vector[k] += weight * row[k]
        merged, times = 0.0, 0
        for other in range(rows):
            if slot[other] == slot[t]:
                merged += slope[other]
                times += 1
        same += merged * merged / times  # as privacy.clipping: added up before it is squared
    length, square = 0.0, 0.0
    for k in range(width):
        length += user[k] * user[k]
        square += vector[k] * vector[k]
    square += length * same
    if use_bias:
        square += all_slopes * all_slopes
    norm = np.sqrt(square)
    if not np.isfinite(norm):
        return loss, 0.0
    return loss, min(1.0, bound / (norm + EPSILON))


@njit(cache=True, error_model="numpy")
def _read(
    row: Float64, start: npt.NDArray[np.float32], last: int, step: int, item: Schedule, generator: np.random.Generator
) -> None:
    """Bring a row to time ``step``: the decay and the noise that it lacks; loaded first when it was never read."""
    now = item.product[step]
    lacks = now * np.sqrt(max(item.variance[step] - item.variance[max(last, 0)], 0.0))
    factor = now / item.product[last + 1]
    for k in range(row.size):
        row[k] = factor * (start[k] if last < 0 else row[k])
    if lacks > 0.0:
        for k in range(row.size):
            row[k] += lacks * generator.standard_normal()


@njit(cache=True, error_model="numpy")
def _train(
    view: npt.NDArray[np.float32], users: Float64, biases: Float64, example_ptr: Int64, row_ptr: Int64, rows: Int32,
    slot: Int32, item: Schedule, user_steps: Schedule, bias_steps: Schedule, pairwise: bool, use_bias: bool,
    expected: float, bound: float, generator: np.random.Generator, out: Float64, pending: Float64, losses: Float64,
) -> None:  # fmt: skip
    steps, width = item.rate.size, users.shape[1]
    most = np.max(np.diff(row_ptr))
    last, active, weight = np.empty(most, np.int64), np.empty(most, np.int64), np.empty(most)
    slope, vector, gradient = np.empty(slot.shape[1]), np.empty(width), np.empty(width)
    for b in range(users.shape[0]):
        q, mine = out[row_ptr[b] : row_ptr[b + 1]], rows[row_ptr[b] : row_ptr[b + 1]]
        user = users[b]
        last[: mine.size] = -1
        for s in range(steps):
            low, high = example_ptr[b * steps + s], example_ptr[b * steps + s + 1]
            count, by_bias = 0, 0.0
            for e in range(low, high):
                for t in range(slot.shape[1]):
                    r = slot[e, t]
                    if last[r] != s:
                        _read(q[r], view[mine[r]], last[r], s, item, generator)
                        last[r], active[count], weight[r] = s, r, 0.0
                        count += 1
            gradient[:] = 0.0
            for e in range(low, high):
                loss, factor = _example(q, slot[e], user, biases[b], pairwise, use_bias, bound, slope, vector)
                if np.isfinite(loss):
                    losses[b] += loss
                if factor > 0.0:
                    for t in range(slope.size):
                        weight[slot[e, t]] += factor * slope[t]
                        by_bias += factor * slope[t]
                    for k in range(width):
                        gradient[k] += factor * vector[k]
            share, keep = item.rate[s] / expected, item.keep[s]
            for a in range(count):
                row, pull = q[active[a]], share * weight[active[a]]
                for k in range(width):
                    row[k] = keep * row[k] - pull * user[k]
            share, keep, noise = user_steps.rate[s] / expected, user_steps.keep[s], user_steps.noise[s]
            for k in range(width):
                user[k] = keep * user[k] - share * gradient[k]
                if noise > 0.0:
                    user[k] += noise * generator.standard_normal()
            if use_bias:
                biases[b] = bias_steps.keep[s] * biases[b] - bias_steps.rate[s] / expected * by_bias
                if bias_steps.noise[s] > 0.0:
                    biases[b] += bias_steps.noise[s] * generator.standard_normal()
        end = item.product[steps]
        for r in range(mine.size):
            row, start, factor = q[r], view[mine[r]], end / item.product[last[r] + 1]
            for k in range(width):
                row[k] = factor * row[k] - end * start[k]
            pending[row_ptr[b] + r] = end * end * (item.variance[steps] - item.variance[last[r]])


def run_kernel(
    algorithm: GradientRecommender,
    form: DotProduct,
    shared: Tensors,
    private: Tensors,
    batches: ExampleBatches,
    schedules: dict[str, Schedule],
    sgd: DPSGD,
    generator: np.random.Generator,
) -> Outcome:
    """As :func:`clients.example_steps.run_steps`, of a method without :func:`obstacle`, in float64."""
    view = shared[form.item].contiguous().numpy()
    users = private[form.user].double().numpy().copy()
    biases = private[form.bias].double().numpy().copy() if form.bias else np.zeros(batches.devices)
    out, pending = np.empty((batches.rows.size, view.shape[1])), np.empty(batches.rows.size)
    losses = np.zeros(batches.devices)
    _train(
        view, users, biases, batches.example_ptr, batches.row_ptr, batches.rows, batches.slot, schedules[form.item],
        schedules[form.user], schedules[form.bias or form.user], algorithm.local.pairwise, form.bias is not None,
        float(sgd.expected_batch), float(sgd.max_grad_norm), generator, out, pending, losses,
    )  # fmt: skip
    own = {form.user: torch.from_numpy(users)}
    if form.bias:
        own[form.bias] = torch.from_numpy(biases)
    count = np.bincount(batches.owner, minlength=batches.devices)
    return Outcome({form.item: torch.from_numpy(out)}, {form.item: pending}, {}, own, losses, count)
