"""Relearn time: how fast a model picks up again what it was made to forget.

A model that only hides its memory gets it back within a round or two of training on it; a model that never saw the data
has to learn it (Golatkar, Achille & Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Relearning:
    """Rounds until forget Recall@20 reaches ``target``, of the unlearned model and of every gold; ``horizon`` is how
    many rounds were tried, and infinite rounds mean: not within it."""

    after: float
    golds: tuple[float, ...]
    target: float
    horizon: int


def relearn_target(before: float, gold: float, share: float = 0.9) -> float:
    """The forget Recall@20 that counts as relearned: ``share`` of the way from ``gold`` back to ``before``."""
    return gold + share * (before - gold)


def rounds_to(curve: Sequence[float], target: float) -> float:
    """Rounds, interpolated, until ``curve`` (entry r: after r rounds, entry 0: before any) reaches ``target``; infinite
    where it never does."""
    for at, value in enumerate(curve):
        if value >= target:
            if at == 0:
                return 0.0
            earlier = curve[at - 1]
            return at - 1 + (target - earlier) / (value - earlier)
    return math.inf


def relearn_rounds(
    curve_after: Sequence[float], curve_golds: Sequence[Sequence[float]], target: float
) -> Relearning:  # fmt: skip
    """From measured curves of forget Recall@20 per round of training with the data given back.

    Raises:
        ValueError: the curves are empty or of different lengths.
    """
    lengths = {len(curve) for curve in (curve_after, *curve_golds)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"relearning curves must have the same number of rounds, got {sorted(lengths)}")
    golds = tuple(rounds_to(curve, target) for curve in curve_golds)
    return Relearning(rounds_to(curve_after, target), golds, target, len(curve_after) - 1)


def relearned_slowly(found: Relearning, share: float) -> bool | None:
    """Whether the unlearned model needed at least ``share`` of the golds' mean rounds.

    Golds that did not get there count as the horizon, a lower bound: None where that leaves it open.
    """
    if not found.golds:
        return None
    if math.isinf(found.after):
        return True
    at_least = sum(min(rounds, found.horizon) for rounds in found.golds) / len(found.golds)
    if found.after < share * at_least:
        return False
    return None if any(math.isinf(rounds) for rounds in found.golds) else True
