"""Proof that forgetting worked: look at a model (``measure``), compare it with retrained ones (``judge``).

Doors: ``Scene``, ``MeasureSettings``, ``measure`` → ``Measurement``; ``Thresholds``, ``judge`` → ``Gate``; ``failed``,
``forgetting_was_judged``; ``relearn_rounds``, ``relearn_target``; ``measured``, ``percentile_histograms`` for the
summary.
"""

from unlearning.verification.gate import Gate, failed, forgetting_was_judged
from unlearning.verification.gates import judge
from unlearning.verification.measure import MaskingScorer, measure
from unlearning.verification.relearn import Relearning, relearn_rounds, relearn_target
from unlearning.verification.scene import Measurement, MeasureSettings, Scene
from unlearning.verification.summary import measured, percentile_histograms
from unlearning.verification.thresholds import Thresholds

__all__ = [
    "Gate",
    "MaskingScorer",
    "MeasureSettings",
    "Measurement",
    "Relearning",
    "Scene",
    "Thresholds",
    "failed",
    "forgetting_was_judged",
    "judge",
    "measure",
    "measured",
    "percentile_histograms",
    "relearn_rounds",
    "relearn_target",
]
