"""How much models differ that differ in their seed only: what a gate must not hold against anybody."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, t

from unlearning.verification.areas import Evidence, difference_error
from unlearning.verification.scene import Mean

EXACT = 1e-6  # float32 scores computed in another order differ by less


def spread(values: Sequence[float]) -> float:
    """The standard deviation over golds; 0 of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def mean_noise(after: Mean, golds: Sequence[Mean], sds: float) -> float:
    """How far a retrained model may stray from the mean of ``golds``, at ``sds`` standard deviations.

    The larger of two estimates: from the golds' means themselves, which few golds estimate badly, and from their
    differences unit by unit (users, say), as if units were independent: Σ w²·var, with Student's t where there are few.
    Of a single gold the differences between it and ``after`` have to do.
    """
    count = len(golds)
    if not count or not after.values.size or sds <= 0.0:
        return EXACT
    units = np.array([gold.values for gold in golds])
    weights = after.weights
    if count == 1:
        gap = after.values - units[0]
        own = math.sqrt(float(weights**2 @ (gap - gap @ weights) ** 2))
        return max(sds * own, EXACT)
    own = math.sqrt(float(weights**2 @ units.var(axis=0, ddof=1)) * (1.0 + 1.0 / count))
    factor = float(t.ppf(norm.cdf(sds), units.shape[1] * (count - 1)))
    return max(factor * own, sds * spread([gold.value for gold in golds]), EXACT)


def area_noise(after: Evidence, golds: Sequence[Evidence], sds: float) -> float:
    """The same of an AUC; its own error is that of a paired difference (``areas``). NaN where nobody can tell."""
    if sds <= 0.0:
        return EXACT
    error = difference_error(after, golds)
    return max(sds * error, sds * spread([gold.auc for gold in golds]), EXACT) if not math.isnan(error) else math.nan
