"""The compiled passes of one mini-batch of the dot-product family: rows and weights, logits, slopes, the SGD sweep.

Arithmetic is float32 as in the batched tensor program, sums over examples are float64; sums may be reassociated (no
other fast-math: NaN and infinity must stay visible).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

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
def buffers(rows: int, pairs: int) -> Batch:
    of_row, of_pair = np.empty((4, rows), dtype=np.float32), np.zeros((4, pairs), dtype=np.float32)
    bits, sides = np.empty(max(rows, pairs), dtype=np.int32), np.empty((2, pairs), dtype=np.int32)
    return Batch(
        np.empty(rows, dtype=np.int32), of_row[0], of_row[1], of_row[2], of_row[3], sides[0], sides[1],
        of_pair[0], of_pair[1], of_pair[2], of_pair[3], bits, bits.view(np.float32),
        np.empty(rows, dtype=np.int32), np.empty(rows, dtype=np.int64),
    )  # fmt: skip


@njit(cache=True, error_model="numpy")
def open_batch(
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


@njit(cache=True, error_model="numpy")
def slopes(pairwise: bool, n: int, pairs: int, batch: Batch) -> float:
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


@njit(cache=True, fastmath=REORDER, error_model="numpy")
def logits(
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
def update(
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
def catch_up(active: Int32, n: int, values: Float32, seen: Float64, product: float) -> None:
    """Multiply the active rows by the decay that they have missed."""
    for j in range(n):
        t = active[j]
        if seen[t] != product:
            missed, row = np.float32(product / seen[t]), values[t]
            for k in range(row.size):
                row[k] *= missed
            seen[t] = product
