"""The compiled parts of lazy-noise SGD: catching rows up, per-example norms and clip factors, descending.

All single-threaded; tables and gradients are float32 or float64, norms are summed in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Real = npt.NDArray[Any]  # float32 or float64

OUT_OF_RANGE, NOT_READ, NOT_FINITE = -1, -2, -3


@njit(cache=True)
def in_range(rows: Int64, n_rows: int) -> bool:
    """Whether every row number is one of ``range(n_rows)``."""
    low, high = 0, -1
    for row in rows:
        low, high = min(low, row), max(high, row)
    return low >= 0 and high < n_rows


@njit(cache=True)
def collect(
    rows: Int64, last: Int32, now: int, product: Float64, variance: Float64, stale: Int64, keep: Float64,
    spread: Float64,
) -> int:  # fmt: skip
    """List the rows that are behind step ``now``, each once, and mark them as caught up; returns how many there are.

    Row ``stale[i]`` becomes keep[i]·w + spread[i]·z: the decay P_now/P_last and the deviation P_now·sqrt(S_now −
    S_last) that it missed.
    """
    found = 0
    for row in rows:
        seen = last[row]
        if seen != now:
            last[row] = now
            stale[found] = row
            keep[found] = product[now] / product[seen]
            spread[found] = product[now] * np.sqrt(max(variance[now] - variance[seen], 0.0))
            found += 1
    return found


@njit(cache=True, fastmath={"contract"})
def catch_up(values: Real, stale: Int64, found: int, keep: Float64, spread: Float64, noise: Float32) -> None:
    """w ← keep·w + spread·z of the first ``found`` stale rows; ``noise`` is float32[found · width]."""
    width = values.shape[1]
    unit = values.dtype.type
    for i in range(found):
        row, share, deviation = values[stale[i]], unit(keep[i]), unit(spread[i])
        z = noise[i * width : (i + 1) * width]
        for k in range(width):
            row[k] = share * row[k] + deviation * z[k]


@njit(cache=True, fastmath={"contract", "reassoc"})
def squared_norms(rows: Int64, gradients: Real, last: Int32, now: int, out: Float64) -> int:
    """Add each example's squared gradient norm in one table to ``out`` float64[B]; 0, or why the step is refused.

    ‖g‖² = Σ_{j,k} [row_j = row_k] ⟨g_j, g_k⟩: a row that an example repeats gets the sum of its gradients, and counts
    as that sum.
    """
    width, flat = gradients.shape[2], rows.ravel()
    if not in_range(flat, last.size):
        return OUT_OF_RANGE
    behind = 0
    for row in flat:  # a loop of its own, so that the processor waits for many rows' stamps at once
        behind += last[row] != now
    if behind:
        return NOT_READ
    for b in range(rows.shape[0]):
        total = 0.0
        for j in range(rows.shape[1]):
            row = rows[b, j]
            own = gradients[b, j]
            square = 0.0
            for k in range(width):
                square += np.float64(own[k]) * np.float64(own[k])
            total += square
            for i in range(j):
                if rows[b, i] == row:
                    other = gradients[b, i]
                    product = 0.0
                    for k in range(width):
                        product += np.float64(own[k]) * np.float64(other[k])
                    total += 2.0 * product
        out[b] += total
    return 0


@njit(cache=True)
def clip_factors(squares: Float64, max_grad_norm: float) -> int:
    """Squared norms become clip factors min(1, C/(‖g‖ + 1e-6)), in place; 0, or why the step is refused."""
    for b in range(squares.size):
        # Two opposite gradients of one row may sum to a rounding error below zero.
        norm = np.sqrt(max(squares[b], 0.0))
        if not np.isfinite(squares[b]):
            return NOT_FINITE
        squares[b] = min(1.0, max_grad_norm / (norm + 1e-6))
    return 0


@njit(cache=True, fastmath={"contract"})
def descend(values: Real, rows: Int64, gradients: Real, factors: Float64, rate: float) -> None:
    """w[row] ← w[row] − rate·factor·gradient over all examples and their rows."""
    width = gradients.shape[2]
    unit = values.dtype.type
    for b in range(rows.shape[0]):
        share = unit(rate * factors[b])
        for j in range(rows.shape[1]):
            target, gradient = values[rows[b, j]], gradients[b, j]
            for k in range(width):
                target[k] -= share * gradient[k]
