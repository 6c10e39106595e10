"""How well one number tells two groups apart: ROC curve, its area, and DeLong's interval for the area.

All functions take float[p] scores of the positives (members, the user's items, …) and float[n] scores of the negatives;
a higher score says "positive". Ties count one half.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri
from scipy.stats import rankdata

Scores = npt.NDArray[np.floating[Any]]


class Area(NamedTuple):
    """An area under the ROC curve and its two-sided confidence interval, clipped to [0, 1]."""

    auc: float
    low: float
    high: float


def auc(positive: Scores, negative: Scores) -> float:
    """P(positive > negative) + ½·P(equal), the Mann-Whitney statistic; NaN when either group is empty."""
    if not positive.size or not negative.size:
        return math.nan
    ranks = rankdata(np.concatenate([positive, negative]))
    p = positive.size
    return float((ranks[:p].sum() - p * (p + 1) / 2) / (p * negative.size))


def delong(positive: Scores, negative: Scores, confidence: float = 0.95) -> Area:
    """The area with the normal interval of DeLong, DeLong & Clarke-Pearson (Biometrics 1988), by mid-ranks.

    Its width is 0 when the groups do not overlap at all: the method cannot say how far from 1 the true area may be.
    NaN bounds with fewer than two scores in a group.
    """
    area = auc(positive, negative)
    p, n = positive.size, negative.size
    if p < 2 or n < 2:
        return Area(area, math.nan, math.nan)
    ranks = rankdata(np.concatenate([positive, negative]))
    # A score's placement: the share of the other group that it beats.
    above = (ranks[:p] - rankdata(positive)) / n
    below = 1.0 - (ranks[p:] - rankdata(negative)) / p
    half = float(ndtri(0.5 + confidence / 2)) * math.sqrt(above.var(ddof=1) / p + below.var(ddof=1) / n)
    return Area(area, max(0.0, area - half), min(1.0, area + half))


def advantage(positive: Scores, negative: Scores) -> float:
    """max over thresholds of TPR − FPR (Yeom et al., CSF 2018): 0 for a useless score, 1 for a perfect one."""
    if not positive.size or not negative.size:
        return math.nan
    at = np.unique(np.concatenate([positive, negative]))
    tpr = 1.0 - np.searchsorted(np.sort(positive), at, side="left") / positive.size
    fpr = 1.0 - np.searchsorted(np.sort(negative), at, side="left") / negative.size
    return float(max(0.0, (tpr - fpr).max()))


def tpr_at_fpr(positive: Scores, negative: Scores, fpr: float = 0.01) -> float:
    """The largest TPR of a threshold whose FPR is at most ``fpr`` (Carlini et al., S&P 2022).

    With fewer than 1/``fpr`` negatives no false alarm is allowed at all.
    """
    if not positive.size or not negative.size:
        return math.nan
    allowed = math.floor(fpr * negative.size + 1e-9)
    if allowed >= negative.size:
        return 1.0
    threshold = np.sort(negative)[::-1][allowed]
    return float((positive > threshold).mean())
