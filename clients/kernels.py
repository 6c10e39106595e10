"""The compiled local training of the dot-product family: one device after another, each on its own touched rows.

Per mini-batch: logits of the batch's rows, their slopes, then one sweep that accumulates the user vector's gradient and
updates the rows (``clients.passes``). A row outside the mini-batch is not visited: the weight decay that it misses is a
running product, made good when it is next read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from clients.cohort import fill_order
from clients.passes import (
    REORDER,
    Float32,
    Float64,
    Int32,
    Int64,
    Visits,
    buffers,
    catch_up,
    logits,
    open_batch,
    slopes,
    update,
)

_ZERO = np.float32(0.0)


class Rows(NamedTuple):
    """One per-item tensor as the kernel reads and returns it.

    Device b starts from ``scale[b]·(base[row] + offset[first[b] + row])``; without ``own`` simply from ``base[row]``.
    Returned for the good devices, row after row: ``old`` the stored offsets, ``new`` the ones to store, ``place`` their
    positions in ``offset``; ``log_scale`` float64[B] is updated in place.
    """

    own: bool
    base: Float32  # [n_items, d]
    offset: Float32  # [devices of the node * n_items, d]
    first: Int64  # [B]
    log_scale: Float64  # [B]
    place: Int64  # [R]
    old: Float32  # [R, d]
    new: Float32  # [R, d]


class Report(NamedTuple):
    """Per device: whether its update is finite, mean loss, steps, Σ squares and nonzero entries of its shared update,
    decay products of (item, personal, user, bias), the L2 norm of the whole shared update and the factor that clips it;
    ``sums`` [n_items, d] and ``counts`` [n_items] add up the good devices, clipped."""

    good: npt.NDArray[np.bool_]
    loss: Float64
    steps: Int64
    squares: Float64
    nonzero: Int64
    decay: Float64  # [B, 4]
    norm: Float64
    factor: Float64
    sums: Float32
    counts: Int64


@njit(cache=True, error_model="numpy")
def _load(table: Rows, b: int, rows: Int32, filled: int, out: Float32) -> None:
    scale = np.float32(np.exp(table.log_scale[b]))
    for t in range(rows.size):
        row = np.int64(rows[t])
        value, base = out[t], table.base[row]
        if table.own:
            table.place[filled + t] = table.first[b] + row
            offset, old = table.offset[table.first[b] + row], table.old[filled + t]
            for k in range(value.size):
                old[k] = offset[k]
                value[k] = scale * (base[k] + offset[k])
        else:
            for k in range(value.size):
                value[k] = base[k]


@njit(cache=True, fastmath=REORDER, error_model="numpy")
def _finite(table: Rows, b: int, rows: Int32, filled: int, value: Float32, decay: float) -> bool:
    """Fill ``new`` with the offsets that stand for ``value``; False when a value is not finite."""
    scale = np.float32(np.exp(table.log_scale[b] + np.log(decay)))
    total = _ZERO
    for t in range(rows.size):
        v, base, new = value[t], table.base[rows[t]], table.new[filled + t]
        row = _ZERO
        for k in range(v.size):
            row += v[k] * _ZERO  # NaN for NaN and infinity
            new[k] = v[k] / scale - base[k]
        total += row
    return bool(total == _ZERO)


@njit(cache=True, fastmath=REORDER, error_model="numpy")
def _difference(base: Float32, rows: Int32, value: Float32, decay: float) -> tuple[float, int]:
    """``value`` becomes value − decay·base; returns its Σ squares and its number of nonzero entries."""
    keep = np.float32(decay)
    squares, nonzero = 0.0, 0
    for t in range(rows.size):
        v, start = value[t], base[rows[t]]
        for k in range(v.size):
            delta = v[k] - keep * start[k]
            v[k] = delta
            squares += np.float64(delta) * np.float64(delta)
            nonzero += delta != _ZERO
    return squares, nonzero


@njit(cache=True, fastmath=REORDER, error_model="numpy")
def _whole_norm(base: Float32, rows: Int32, delta: Float32, decay: float, view_squares: float) -> float:
    """The L2 norm of a whole update: delta + (P − 1)·base on the device's rows, (P − 1)·base on all others.

    ``view_squares`` is Σ base² over all rows.
    """
    shrunk = decay - 1.0
    squares, own = 0.0, 0.0
    for t in range(rows.size):
        moved, start = delta[t], base[rows[t]]
        for k in range(moved.size):
            whole = np.float64(moved[k]) + shrunk * np.float64(start[k])
            squares += whole * whole
            own += np.float64(start[k]) * np.float64(start[k])
    return float(np.sqrt(squares + shrunk * shrunk * max(view_squares - own, 0.0)))


@njit(cache=True, error_model="numpy")
def train_devices(
    visits: Visits, item: Rows, personal: Rows, users: Float32, biases: Float32,
    rates: Float64, shrinks: Float64, repel: float, l1: float, clip: float, view_squares: float, report: Report,
) -> int:  # fmt: skip
    """Local training of the devices ``visits.members``; returns how many rows of ``new`` the good ones fill.

    ``users`` float32[B, d] and ``biases`` float32[B] are trained in place. ``rates`` and ``shrinks`` (rate · weight
    decay) float64[steps, 4] are those of (item, personal, user, bias) at every local step. ``personal.base`` is empty
    when the method has no personal view. Updates enter the sums clipped to L2 norm ``clip``. Mini-batches, early stop
    and update order are those of ``clients.training.local_sgd``.
    """
    width = users.shape[1]
    both = personal.base.shape[0] > 0
    zero = 0 * visits.members.size  # not a literal, for which numba would compile every callee anew
    longest, most = zero, zero
    for b in visits.members:
        longest = max(longest, int(visits.row_ptr[b + 1] - visits.row_ptr[b]))
        most = max(most, int(visits.example_ptr[b + 1] - visits.example_ptr[b]))
    c = np.empty((longest, width), dtype=np.float32)
    d = np.empty((longest if both else 0, width), dtype=np.float32)
    batch = buffers(longest, min(most, visits.batch_size) if visits.pairwise else zero)
    seen_c, seen_d = np.empty(longest), np.empty(longest)
    everything = np.arange(longest).astype(np.int32)
    gradient, rate, keep = np.empty(width, np.float32), np.empty(4, np.float32), np.empty(4, np.float32)
    order = np.empty(most, dtype=np.int64)
    strength, edge = np.float32(2.0 * repel / width), np.float32(l1 / width)
    filled = zero
    for i in range(visits.members.size):
        b = visits.members[i]
        rows = visits.rows[visits.row_ptr[b] : visits.row_ptr[b + 1]]
        n = int(visits.example_ptr[b + 1] - visits.example_ptr[b])
        if visits.pairwise:
            n = int(visits.positives[b]) * visits.per
        shuffled = n > visits.batch_size
        _load(item, i, rows, filled, c)
        if both:
            _load(personal, i, rows, filled, d)
        for t in range(rows.size):
            batch.mark[t], seen_c[t], seen_d[t] = -1, 1.0, 1.0
        user, decay = users[i], report.decay[i]
        total, visited, previous, step, n_active = 0.0, zero, np.nan, zero, zero
        for epoch in range(visits.epochs):
            if shuffled:
                fill_order(visits.keys[b], epoch, order[:n])
            for low in range(0, n, visits.batch_size):
                high = min(low + visits.batch_size, n)
                if shuffled or step == 0:
                    n_active = open_batch(visits, b, order, shuffled, low, high, step, batch)
                if shuffled:
                    catch_up(batch.active, n_active, c, seen_c, decay[0])
                    if both:
                        catch_up(batch.active, n_active, d, seen_d, decay[1])
                apart, size = logits(batch.active, n_active, c, d, user, biases[i], batch.weight, batch.logit)
                if visits.pairwise:  # the weights of pairs; λ and μ act on pointwise batches only
                    apart, size = 0.0, 0.0
                loss = slopes(visits.pairwise, n_active, high - low, batch)
                loss += (l1 * size - repel * apart) / width
                for s in range(4):
                    rate[s] = rates[step, s]
                    keep[s] = 1.0 - shrinks[step, s]
                    decay[s] *= 1.0 - shrinks[step, s]
                push, sign = (_ZERO, _ZERO) if visits.pairwise else (strength, edge)
                update(batch.active, n_active, c, d, user, batch.slope, batch.weight, push, sign, rate, keep, gradient)
                bias_gradient = 0.0
                for j in range(n_active):
                    bias_gradient += batch.slope[j]
                    if shuffled:
                        seen_c[batch.active[j]] = decay[0]
                        seen_d[batch.active[j]] = decay[1]
                for k in range(width):
                    user[k] = keep[2] * user[k] - rate[2] * gradient[k]
                biases[i] = keep[3] * biases[i] - rate[3] * np.float32(bias_gradient)
                total += loss * (high - low)
                visited += high - low
                step += 1
            if visits.tolerance > 0.0:
                mean = total / visited
                if abs(mean - previous) < visits.tolerance * abs(previous):
                    break
                previous = mean
        if shuffled:
            catch_up(everything, rows.size, c, seen_c, decay[0])
            if both:
                catch_up(everything, rows.size, d, seen_d, decay[1])
        report.loss[i], report.steps[i] = total / visited, step
        if _close(item, personal, i, rows, filled, c, d, user, biases[i], total, clip, view_squares, report):
            filled += rows.size
    return filled


@njit(cache=True, error_model="numpy")
def _close(
    item: Rows, personal: Rows, i: int, rows: Int32, filled: int, c: Float32, d: Float32,
    user: Float32, bias: np.float32, total: float, clip: float, view_squares: float, report: Report,
) -> bool:  # fmt: skip
    """Report device ``i``; add it to the sums, and prepare what is stored of it, unless a value is not finite."""
    decay = report.decay[i]
    good = np.isfinite(total) and np.isfinite(bias)
    for k in range(user.size):
        good = good and np.isfinite(user[k])
    both = personal.base.shape[0] > 0
    if both:
        good = _finite(personal, i, rows, filled, d, decay[1]) and good
    if item.own:
        good = _finite(item, i, rows, filled, c, decay[0]) and good
    else:
        report.squares[i], report.nonzero[i] = _difference(item.base, rows, c, decay[0])
        if np.isfinite(clip):
            report.norm[i] = _whole_norm(item.base, rows, c, decay[0], view_squares)
            report.factor[i] = min(1.0, clip / (report.norm[i] + 1e-6))
        good = good and np.isfinite(report.squares[i]) and np.isfinite(report.norm[i])
    report.good[i] = good
    if not good:
        return False
    if item.own:
        item.log_scale[i] += np.log(decay[0])
    else:
        factor = np.float32(report.factor[i])
        for t in range(rows.size):
            report.counts[rows[t]] += 1
            target, delta = report.sums[rows[t]], c[t]
            for k in range(user.size):
                target[k] += factor * delta[k]
    if both:
        personal.log_scale[i] += np.log(decay[1])
    return True


def scratch(rows: int, width: int) -> tuple[Int64, Float32, Float32]:
    """Empty ``place``, ``old`` and ``new`` of a :class:`Rows` for ``rows`` rows."""
    values: Any = np.empty((2, rows, width), dtype=np.float32)
    return np.empty(rows, dtype=np.int64), values[0], values[1]
