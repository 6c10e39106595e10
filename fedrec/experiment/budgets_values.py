"""What a comparison of budgets reads out of the runs' summaries: attack curves, and means with their spread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats

from fedrec.experiment.console import number, part

#: Attack curves: all are areas under the ROC curve, so that 0.5 is guessing.
CURVES = {
    "membership.fold_in": "membership AUC (fold-in)",
    "membership.score": "membership AUC (score)",
    "interaction.sign": "interaction AUC (sign attack)",
    "interaction.row_set": "interaction AUC (row set)",
    "attribute.gender": "attribute AUC (gender)",
    "attribute.age_35": "attribute AUC (age 35 or over)",
}


def curve_value(summary: Mapping[str, Any], curve: str) -> float | None:
    """The AUC of ``curve`` in a ``summary.json``, of the last recorded round; None where it was not measured."""
    kind, _, way = curve.partition(".")
    found = part(summary, "attacks").get(kind)
    if isinstance(found, Sequence) and not isinstance(found, str):
        found = found[-1] if found else None
    return number(part(found, way).get("auc"))


@dataclass(frozen=True)
class Spread:
    """A mean over ``n`` runs; ``sd`` (sample standard deviation), ``low`` and ``high`` need two or more of them.

    ``low`` to ``high`` is the 95 % confidence interval of the mean by Student's t distribution.
    """

    mean: float
    n: int
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None where no value is a finite number."""
        found = [float(value) for value in values if value is not None and math.isfinite(value)]
        if not found:
            return None
        mean, n = float(np.mean(found)), len(found)
        if n < 2:
            return cls(mean, n)
        sd = float(np.std(found, ddof=1))
        half = float(scipy.stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
        return cls(mean, n, sd, mean - half, mean + half)

    def to_dict(self) -> dict[str, float | int | None]:
        return {"mean": self.mean, "sd": self.sd, "ci_low": self.low, "ci_high": self.high, "n": self.n}

    def text(self, digits: int = 3) -> str:
        """``0.122 ± 0.004``, the second number the standard deviation; one run has none."""
        return f"{self.mean:.{digits}f}" + ("" if self.sd is None else f" ± {self.sd:.{digits}f}")
