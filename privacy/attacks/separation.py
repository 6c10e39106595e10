"""Telling rows with a label from rows with noise alone, in one dimension: a three-part Gaussian mixture.

A dense upload under noise is mostly rows that the user never touched. Projected on the upload's main direction they are
N(0, τ²), τ the mechanism's noise, which is public; interactions stand on one side of them and negatives on the other.
Fitted by expectation-maximisation (Dempster, Laird & Rubin 1977).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
_STEPS = 60


def posterior(projection: Float64, noise: float, typical: int) -> Float64:
    """float64[t]: the probability that a row is one of the positive side.

    Args:
        projection: float64[t], of the rows on the upload's main direction.
        noise: τ > 0, standard deviation of a row without a label.
        typical: a publicly known typical number of interactions; where the fit starts.
    """
    a, n = projection, projection.size
    count = max(1, min(typical, n // 3))
    peak = float(np.sort(np.abs(a))[-count:].mean())
    weight = np.array([n - 2.0 * count, count, count]) / n
    mean = np.array([0.0, peak, -peak])
    variance = np.full(3, noise**2)
    share = np.zeros((n, 3))
    for _ in range(_STEPS):
        log = np.log(weight) - 0.5 * np.log(variance) - 0.5 * (a[:, None] - mean) ** 2 / variance
        share = np.exp(log - log.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        size = share.sum(axis=0) + 1e-9
        weight = (size + 1.0) / (n + 3.0)  # no part dies out
        for part, sign in ((1, 1.0), (2, -1.0)):
            mean[part] = sign * max(0.0, sign * float(share[:, part] @ a / size[part]))
            # Labels of unequal size spread more than the noise does, never less.
            variance[part] = max(noise**2, float(share[:, part] @ (a - mean[part]) ** 2 / size[part]))
    return np.asarray(share[:, 1])


def best_f1(probability: Float64) -> npt.NDArray[np.int64]:
    """Positions, ascending, of the k most probable rows, with the k of the largest expected F1.

    To first order it is 2·Σ_{top k} p / (k + Σ p) (Ye, Chai, Lee & Chieu, ICML 2012).
    """
    if not probability.size:
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(-probability, kind="stable")
    top = np.cumsum(probability[order])
    expected = 2.0 * top / (np.arange(1, order.size + 1) + top[-1])
    return np.sort(order[: int(expected.argmax()) + 1])
