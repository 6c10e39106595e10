"""How far apart two models' predictions are: Jensen-Shannon divergence of softmax scores, overlap of the top lists.

Two retrainings that differ in their seed only are apart as well. That is the noise floor; a distance is worth nothing
until it is divided by it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Predictions:
    """Of the compared users: ``scores`` float16[users, items], standardised per user (−inf: never recommended), and
    ``top`` int32[users, k], the recommended lists (−1 fills a list that is short)."""

    scores: npt.NDArray[np.float16]
    top: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Distance:
    """A mean over pairs of models: ``divergence`` in bits, 0 equal, 1 nothing in common; ``overlap``, the share of the
    top lists that agrees. NaN without a pair, or without users."""

    divergence: float
    overlap: float


def standardise(scores: Float32) -> npt.NDArray[np.float16]:
    """``scores`` float32[users, items], each user's finite ones shifted and scaled to mean 0 and deviation 1."""
    known = np.isfinite(scores)
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    values = np.where(known, scores, 0.0).astype(np.float64)
    centred = values - values.sum(axis=1, keepdims=True) / count
    deviation = np.sqrt((np.where(known, centred, 0.0) ** 2).sum(axis=1, keepdims=True) / count)
    scaled = centred / np.where(deviation > 1e-12, deviation, 1.0)
    return np.where(known, scaled, -np.inf).astype(np.float16)


def divergence(one: npt.NDArray[np.float16], other: npt.NDArray[np.float16]) -> float:
    """The mean over users of the Jensen-Shannon divergence, in bits, of the softmax of standardised scores [U, I]."""
    total = 0.0
    block = max(1, 2_000_000 // max(one.shape[1], 1))
    for start in range(0, len(one), block):
        p, q = (_softmax(scores[start : start + block]) for scores in (one, other))
        middle = (p + q) / 2.0
        total += (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2.0
    return total / max(len(one), 1)


def overlap(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> float:
    """The mean share of the shorter list that is in the other one; NaN without any list."""
    shares = []
    for mine, yours in zip(one, other, strict=True):
        length = min((mine >= 0).sum(), (yours >= 0).sum())
        if length:
            shares.append(np.intersect1d(mine[mine >= 0], yours[yours >= 0]).size / length)
    return float(np.mean(shares)) if shares else math.nan


def to_golds(model: Predictions, golds: Sequence[Predictions]) -> Distance:
    """How far ``model`` is from each of ``golds``, on average."""
    return _mean([(model, gold) for gold in golds])


def between_golds(golds: Sequence[Predictions]) -> Distance:
    """How far two of ``golds`` are from each other, on average: the noise floor."""
    return _mean(list(itertools.combinations(golds, 2)))


def _softmax(standardised: npt.NDArray[np.float16]) -> npt.NDArray[np.float64]:
    scores = standardised.astype(np.float64)
    peak = np.max(scores, axis=1, initial=-np.inf, keepdims=True)
    weight = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
    return np.asarray(weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-300))


def _relative_entropy(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """Σ over users of KL(p‖q) in bits; 0·log 0 = 0."""
    ratio = np.divide(p, q, out=np.ones_like(p), where=p > 0.0)
    return float((p * np.log2(ratio)).sum())


def _mean(pairs: Sequence[tuple[Predictions, Predictions]]) -> Distance:
    if not pairs or not len(pairs[0][0].scores):
        return Distance(math.nan, math.nan)
    return Distance(
        float(np.mean([divergence(one.scores, other.scores) for one, other in pairs])),
        float(np.mean([overlap(one.top, other.top) for one, other in pairs])),
    )
