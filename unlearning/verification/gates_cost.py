"""Gates on effort: time and traffic against retraining, and how long it takes to relearn."""

from __future__ import annotations

import math

import numpy as np

from unlearning.strategies.base import Cost
from unlearning.verification.gate import Gate
from unlearning.verification.relearn import Relearning, relearned_slowly

_MOMENT = 0.1  # seconds: so little passes, for the clock says more about the machine than about the method


def time_gate(cost: Cost, retraining: Cost, share: float | None) -> Gate:
    """CPU seconds of all processes as a share of retraining's."""
    return _share_of_retraining("time", cost.cpu_s, retraining.cpu_s, share, "CPU time", "s", _MOMENT)


def traffic_gate(cost: Cost, retraining: Cost, share: float | None) -> Gate:
    """Bytes up and down, all devices together, as a share of retraining's."""
    spent = cost.upload_bytes + cost.download_bytes
    return _share_of_retraining(
        "traffic", spent / 1e6, (retraining.upload_bytes + retraining.download_bytes) / 1e6, share, "traffic", "MB"
    )


def _share_of_retraining(
    name: str, spent: float, retraining: float, share: float | None, what: str, unit: str, always: float = 0.0
) -> Gate:
    if not retraining > 0.0:
        return Gate(name, math.nan, math.nan, 0.0, "not judged", None, f"not judged: retraining's {what} is not known")
    ratio = spent / retraining
    text = f"{100.0 * ratio:.3g} % of the {what} of retraining ({spent:.3g} of {retraining:.3g} {unit})"
    if share is None:
        return Gate(name, ratio, 1.0, 0.0, "reported", None, text)
    return Gate(name, ratio, 1.0, 0.0, f"≤ {share:g} of retraining", ratio <= share or spent < always, text)


def relearn_gate(found: Relearning, share: float | None) -> Gate:
    """Rounds to relearn, at least ``share`` of the golds'; a model or gold that did not get there shows the horizon."""
    reached = min(found.after, found.horizon)
    golds = [min(rounds, found.horizon) for rounds in found.golds]
    gold = float(np.mean(golds)) if golds else math.nan
    sd = float(np.std(golds, ddof=1)) if len(golds) > 1 else 0.0
    mine = f"in {reached:.1f} rounds" if math.isfinite(found.after) else f"not within {found.horizon} rounds"
    open_end = " or more" if any(math.isinf(rounds) for rounds in found.golds) else ""
    text = f"given back, what was forgotten is relearned {mine}; models that never saw it take {gold:.1f}{open_end}"
    if share is None or not golds:
        return Gate("relearn_rounds", reached, gold, sd, "reported", None, text)
    passed = relearned_slowly(found, share)
    if passed is False:
        text += ": it was hidden, not forgotten"
    return Gate("relearn_rounds", reached, gold, sd, f"≥ {share:g} of gold", passed, text)
