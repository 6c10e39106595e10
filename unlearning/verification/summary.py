"""What a run's summary keeps of a judgement: the measured numbers and the histograms of percentiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unlearning.verification.distance import between_golds, to_golds
from unlearning.verification.scene import K, Measurement

_BINS = 20


def measured(before: Measurement, after: Measurement, golds: Sequence[Measurement]) -> dict[str, Any]:
    """``{"before": {…}, "after": {…}, "golds": [{…}, …]}``, every model with its ``distance`` to the (other) golds, and
    the ``noise_floor`` between them; numbers that do not exist are None."""
    floor = between_golds([gold.predictions for gold in golds]).divergence

    def numbers(model: Measurement, others: Sequence[Measurement]) -> dict[str, float | None]:
        away = to_golds(model.predictions, [other.predictions for other in others])
        return _json({**model.values, "distance": away.divergence, f"overlap@{K}": away.overlap, "noise_floor": floor})

    return {
        "before": numbers(before, golds),
        "after": numbers(after, golds),
        "golds": [numbers(gold, [*golds[:i], *golds[i + 1 :]]) for i, gold in enumerate(golds)],
    }


def percentile_histograms(
    before: Measurement, after: Measurement, golds: Sequence[Measurement], bins: int = _BINS
) -> dict[str, list[float]]:
    """``edges`` (bins + 1, from 0 to 1) and counts per bin of ``before`` and ``after``; ``gold`` is the golds' mean."""
    edges = np.linspace(0.0, 1.0, bins + 1)

    def counts(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.histogram(values[~np.isnan(values)], edges)[0].astype(np.float64)

    gold = np.mean([counts(g.percentiles) for g in golds], axis=0) if golds else np.zeros(bins)
    return {
        "edges": edges.tolist(),
        "before": counts(before.percentiles).tolist(),
        "after": counts(after.percentiles).tolist(),
        "gold": gold.tolist(),
    }


def _json(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
