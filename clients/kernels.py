"""The compiled local training of the dot-product family: one device after another, each on its own touched rows.

Per mini-batch: logits of the batch's rows, their slopes, then one sweep that accumulates the user vector's gradient and
updates the rows. A row outside the mini-batch is not visited: the weight decay that it misses is a running product, made
good when it is next read. Arithmetic is float32 as in the batched tensor program, sums over examples are float64; sums
may be reassociated (no other fast-math: NaN and infinity must stay visible).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from clients.cohort import fill_order

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

REORDER = {"reassoc", "nsz", "contract"}

_LOG2E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)  # Cody and Waite's split of ln 2
_LN2_LOW = np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.0)
_ZERO, _HALF, _ONE, _TWO = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(2.0)
_E2, _E3, _E4, _E5, _E6 = (np.float32(1.0 / n) for n in (2, 6, 24, 120, 720))
_L3, _L5, _L7, _L9, _L11, _L13 = (np.float32(1.0 / n) for n in (3, 5, 7, 9, 11, 13))


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


class Visits(NamedTuple):
    """Which examples the devices visit, and how (the fields of CohortExamples and LocalTraining)."""

    members: Int64  # [B] positions in the cohort
    row_ptr: Int64
    rows: Int32
    example_ptr: Int64
    example: Int32
    positives: Int64
    keys: npt.NDArray[np.uint64]
    pairwise: bool
    per: int
    epochs: int
    batch_size: int
    tolerance: float


class Report(NamedTuple):
    """Per device: whether its update is finite, mean loss, steps, Σ squares and nonzero entries of its shared update, decay
    products of (item, personal, user, bias); ``sums`` [n_items, d] and ``counts`` [n_items] add up the good devices."""

    good: npt.NDArray[np.bool_]
    loss: Float64
    steps: Int64
    squares: Float64
    nonzero: Int64
    decay: Float64  # [B, 4]
    sums: Float32
    counts: Int64


@njit(cache=True, fastmath=REORDER, error_model="numpy")
def cross_entropy(
    n: int, logit: Float32, label: Float32, weight: Float32, bits: Int32, power: Float32, slope: Float32
) -> float:
    """Σ weight·BCE(logit, label) of the first ``n`` entries; ``slope`` becomes weight·(σ(logit) − label).

    exp by range reduction (power of two times a polynomial), log(1 + z) = 2·artanh(z / (2 + z)) by its series: both to
    float32's rounding, in loops that vectorise. ``bits`` and ``power`` are one buffer seen as integers and floats.
    """
    for t in range(n):
        low = max(-abs(logit[t]), _LOWEST)
        whole = np.floor(low * _LOG2E + _HALF)
        bits[t] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        slope[t] = low - whole * _LN2_HIGH - whole * _LN2_LOW
    total = 0.0
    for t in range(n):
        r = slope[t]
        z = ((((((_E6 * r + _E5) * r + _E4) * r + _E3) * r + _E2) * r + _ONE) * r + _ONE) * power[t]
        s = z / (_TWO + z)
        q = s * s
        log = _TWO * s * ((((((_L13 * q + _L11) * q + _L9) * q + _L7) * q + _L5) * q + _L3) * q + _ONE)
        x = logit[t]
        total += weight[t] * (max(x, _ZERO) - x * label[t] + log)
        share = _ONE / (_ONE + z)
        slope[t] = ((share if x >= _ZERO else z * share) - label[t]) * weight[t]
    return total


@njit(cache=True, fastmath=REORDER, error_model="numpy")
def _logits(
    active: Int32,
    n: int,
    item: Float32,
    personal: Float32,
    user: Float32,
    bias: np.float32,
    weight: Float32,
    logit: Float32,
) -> tuple[float, float]:
    """⟨user, item (+ personal)⟩ + bias of the active rows; Σ weight·‖personal − item‖² and Σ weight·‖item‖₁."""
    apart, size = 0.0, 0.0
    width = user.size
    both = personal.shape[0] > 0
    for j in range(n):
        c = item[active[j]]
        total, gap, absolute = _ZERO, _ZERO, _ZERO
        if both:
            d = personal[active[j]]
            for k in range(width):
                total += user[k] * (c[k] + d[k])
                gap += (d[k] - c[k]) * (d[k] - c[k])
                absolute += abs(c[k])
        else:
            for k in range(width):
                total += user[k] * c[k]
                absolute += abs(c[k])
        logit[j] = total + bias
        apart += weight[j] * gap
        size += weight[j] * absolute
    return apart, size


@njit(cache=True, fastmath=REORDER, error_model="numpy")
def _update(
    active: Int32, n: int, item: Float32, personal: Float32, user: Float32, slope: Float32, weight: Float32,
    repel: np.float32, l1: np.float32, rate: Float32, keep: Float32, gradient: Float32,
) -> None:  # fmt: skip
    """SGD on the active rows; ``gradient`` becomes the user vector's, taken before the rows change."""
    width = user.size
    for k in range(width):
        gradient[k] = _ZERO
    both = personal.shape[0] > 0
    for j in range(n):
        c = item[active[j]]
        g, share, sign = slope[j], weight[j] * repel, weight[j] * l1
        if both:
            d = personal[active[j]]
            for k in range(width):
                x, y = c[k], d[k]
                gradient[k] += g * (x + y)
                pull, push = g * user[k], share * (y - x)
                # Comparisons add up to sign(x), with sign(0) = 0.
                edge = sign if x > _ZERO else (-sign if x < _ZERO else _ZERO)
                c[k] = keep[0] * x - rate[0] * (pull + push + edge)
                d[k] = keep[1] * y - rate[1] * (pull - push)
        else:
            for k in range(width):
                x = c[k]
                gradient[k] += g * x
                edge = sign if x > _ZERO else (-sign if x < _ZERO else _ZERO)
                c[k] = keep[0] * x - rate[0] * (g * user[k] + edge)


@njit(cache=True, error_model="numpy")
def _catch_up(active: Int32, n: int, values: Float32, seen: Float64, product: float) -> None:
    """Multiply the active rows by the decay that they have missed."""
    for j in range(n):
        t = active[j]
        if seen[t] != product:
            missed, row = np.float32(product / seen[t]), values[t]
            for k in range(row.size):
                row[k] *= missed
            seen[t] = product


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
    total = 0.0
    for t in range(rows.size):
        v, base, new = value[t], table.base[rows[t]], table.new[filled + t]
        row = _ZERO
        for k in range(v.size):
            row += v[k] * _ZERO  # NaN for NaN and infinity
            new[k] = v[k] / scale - base[k]
        total += row
    return total == 0.0


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


class Batch(NamedTuple):
    """Buffers of one mini-batch: per distinct row its number, label, weight, logit, slope; per pair its rows' slots."""

    active: Int32
    label: Float32
    weight: Float32
    logit: Float32
    slope: Float32
    first: Int32
    second: Int32
    margin: Float32
    pair_weight: Float32
    pair_slope: Float32
    no_label: Float32
    bits: Int32
    power: Float32
    slot: Int32  # of a touched row in the batch
    mark: Int64  # the step at which a touched row was last in a batch


@njit(cache=True)
def _buffers(rows: int, pairs: int) -> Batch:
    of_row, of_pair = np.empty((4, rows), dtype=np.float32), np.zeros((4, pairs), dtype=np.float32)
    bits, sides = np.empty(max(rows, pairs), dtype=np.int32), np.empty((2, pairs), dtype=np.int32)
    return Batch(
        np.empty(rows, dtype=np.int32), of_row[0], of_row[1], of_row[2], of_row[3], sides[0], sides[1],
        of_pair[0], of_pair[1], of_pair[2], of_pair[3], bits, bits.view(np.float32),
        np.empty(rows, dtype=np.int32), np.empty(rows, dtype=np.int64),
    )  # fmt: skip


@njit(cache=True, error_model="numpy")
def _open_batch(
    visits: Visits, b: int, order: Int64, shuffled: bool, low: int, high: int, step: int, batch: Batch
) -> int:
    """Find the distinct rows of examples (or pairs) ``low…high-1``, with weights; returns how many."""
    start, positives = visits.example_ptr[b], visits.positives[b]
    share = _ONE / np.float32(high - low)
    n = 0
    for k in range(low, high):
        e = order[k] if shuffled else k
        for side in range(2 if visits.pairwise else 1):
            at = e
            if visits.pairwise:
                at = e // visits.per if side == 0 else positives + e
            t = visits.example[start + at]
            if batch.mark[t] != step:
                batch.mark[t], batch.slot[t], batch.active[n] = step, n, t
                batch.label[n], batch.weight[n] = _ONE if at < positives else _ZERO, _ZERO
                n += 1
            if not visits.pairwise:
                batch.weight[batch.slot[t]] += _ONE
            elif side == 0:
                batch.first[k - low] = batch.slot[t]
            else:
                batch.second[k - low] = batch.slot[t]
                batch.pair_weight[k - low] = share
    for j in range(n):
        batch.weight[j] *= share
    return n


@njit(cache=True, error_model="numpy")
def _slopes(pairwise: bool, n: int, pairs: int, batch: Batch) -> float:
    """The batch's loss (BCE, or BPR as the BCE of the margin), and ``slope`` = its derivative by each row's logit."""
    if not pairwise:
        return cross_entropy(n, batch.logit, batch.label, batch.weight, batch.bits, batch.power, batch.slope)
    for k in range(pairs):
        batch.margin[k] = batch.logit[batch.second[k]] - batch.logit[batch.first[k]]
    loss = cross_entropy(
        pairs, batch.margin, batch.no_label, batch.pair_weight, batch.bits, batch.power, batch.pair_slope
    )
    for j in range(n):
        batch.slope[j] = _ZERO
    for k in range(pairs):
        batch.slope[batch.second[k]] += batch.pair_slope[k]
        batch.slope[batch.first[k]] -= batch.pair_slope[k]
    return loss


@njit(cache=True, error_model="numpy")
def train_devices(
    visits: Visits, item: Rows, personal: Rows, users: Float32, biases: Float32,
    rates: Float64, shrinks: Float64, repel: float, l1: float, report: Report,
) -> int:  # fmt: skip
    """Local training of the devices ``visits.members``; returns how many rows of ``new`` the good ones fill.

    ``users`` float32[B, d] and ``biases`` float32[B] are trained in place. ``rates`` and ``shrinks`` (rate · weight decay)
    float64[steps, 4] are those of (item, personal, user, bias) at every local step. ``personal.base`` is empty when the
    method has no personal view. Mini-batches, early stop and update order are those of ``clients.training.local_sgd``.
    """
    width = users.shape[1]
    both = personal.base.shape[0] > 0
    longest, most = np.int64(0), np.int64(0)
    for b in visits.members:
        longest = max(longest, visits.row_ptr[b + 1] - visits.row_ptr[b])
        most = max(most, visits.example_ptr[b + 1] - visits.example_ptr[b])
    c = np.empty((longest, width), dtype=np.float32)
    d = np.empty((longest if both else 0, width), dtype=np.float32)
    batch = _buffers(longest, np.int64(min(most, visits.batch_size) if visits.pairwise else 0))
    seen_c, seen_d = np.empty(longest), np.empty(longest)
    everything = np.arange(longest).astype(np.int32)
    gradient, rate, keep = np.empty(width, np.float32), np.empty(4, np.float32), np.empty(4, np.float32)
    order = np.empty(most, dtype=np.int64)
    strength, edge = np.float32(2.0 * repel / width), np.float32(l1 / width)
    filled = np.int64(0)  # typed: a literal would compile every callee twice
    for i in range(visits.members.size):
        b = visits.members[i]
        rows = visits.rows[visits.row_ptr[b] : visits.row_ptr[b + 1]]
        n = visits.positives[b] * visits.per if visits.pairwise else visits.example_ptr[b + 1] - visits.example_ptr[b]
        shuffled = n > visits.batch_size
        _load(item, i, rows, filled, c)
        if both:
            _load(personal, i, rows, filled, d)
        for t in range(rows.size):
            batch.mark[t], seen_c[t], seen_d[t] = -1, 1.0, 1.0
        user, decay = users[i], report.decay[i]
        total, visited, previous, step, n_active = 0.0, 0, np.nan, np.int64(0), np.int64(0)
        for epoch in range(visits.epochs):
            if shuffled:
                fill_order(visits.keys[b], epoch, order[:n])
            for low in range(0, n, visits.batch_size):
                high = min(low + visits.batch_size, n)
                if shuffled or step == 0:
                    n_active = _open_batch(visits, b, order, shuffled, low, high, step, batch)
                if shuffled:
                    _catch_up(batch.active, n_active, c, seen_c, decay[0])
                    if both:
                        _catch_up(batch.active, n_active, d, seen_d, decay[1])
                apart, size = _logits(batch.active, n_active, c, d, user, biases[i], batch.weight, batch.logit)
                if visits.pairwise:  # the weights of pairs; λ and μ act on pointwise batches only
                    apart, size = 0.0, 0.0
                loss = _slopes(visits.pairwise, n_active, high - low, batch)
                loss += (l1 * size - repel * apart) / width
                for s in range(4):
                    rate[s] = rates[step, s]
                    keep[s] = 1.0 - shrinks[step, s]
                    decay[s] *= 1.0 - shrinks[step, s]
                push, sign = (_ZERO, _ZERO) if visits.pairwise else (strength, edge)
                _update(batch.active, n_active, c, d, user, batch.slope, batch.weight, push, sign, rate, keep, gradient)
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
            _catch_up(everything, rows.size, c, seen_c, decay[0])
            if both:
                _catch_up(everything, rows.size, d, seen_d, decay[1])
        report.loss[i], report.steps[i] = total / visited, step
        if _close(item, personal, i, rows, filled, c, d, user, biases[i], total, report):
            filled += rows.size
    return filled


@njit(cache=True, error_model="numpy")
def _close(
    item: Rows, personal: Rows, i: int, rows: Int32, filled: int, c: Float32, d: Float32,
    user: Float32, bias: np.float32, total: float, report: Report,
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
        good = good and np.isfinite(report.squares[i])
    report.good[i] = good
    if not good:
        return False
    if item.own:
        item.log_scale[i] += np.log(decay[0])
    else:
        for t in range(rows.size):
            report.counts[rows[t]] += 1
            target, delta = report.sums[rows[t]], c[t]
            for k in range(user.size):
                target[k] += delta[k]
    if both:
        personal.log_scale[i] += np.log(decay[1])
    return True


def scratch(rows: int, width: int) -> tuple[Int64, Float32, Float32]:
    """Empty ``place``, ``old`` and ``new`` of a :class:`Rows` for ``rows`` rows."""
    values: Any = np.empty((2, rows, width), dtype=np.float32)
    return np.empty(rows, dtype=np.int64), values[0], values[1]
