"""One verdict of one gate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gate:
    """``value`` of the unlearned model beside ``gold``, the golds' mean, and ``spread``, their standard deviation; what
    was asked for (``limit``), whether it was met (None: reported only, or there was nothing to judge by), and what that
    means in a sentence. NaN stands for a number that does not exist."""

    name: str
    value: float
    gold: float
    spread: float
    limit: str
    passed: bool | None
    text: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON: NaN and infinities as None."""
        numbers = {"value": self.value, "gold": self.gold, "spread": self.spread}
        return {
            "name": self.name,
            **{name: float(number) if math.isfinite(number) else None for name, number in numbers.items()},
            "limit": self.limit,
            "passed": self.passed,
            "text": self.text,
        }


def failed(gates: Iterable[Gate]) -> tuple[Gate, ...]:
    """Those that failed. A gate that had nothing to judge by did not fail."""
    return tuple(gate for gate in gates if gate.passed is False)


def forgetting_was_judged(gates: Iterable[Gate]) -> bool:
    """Whether any gate could tell a model that remembers from one that does not. A request of one interaction, say, may
    be too small for that: then nothing failed, and nothing was shown."""
    telling = ("forget_recall", "mia_auc", "fold_in", "percentile")
    return any(gate.passed is not None and gate.name.startswith(telling) for gate in gates)


def short(number: float) -> str:
    """Three decimals, as metrics are read; more where they would all be zero."""
    return "nothing" if math.isnan(number) else f"{number:.2g}" if 0.0 < abs(number) < 0.005 else f"{number:.3f}"
