"""The gates: is the unlearned model what a model is that never saw the data?

Every gate compares with golds, retrained without the data from other seeds. A gate that the golds themselves would fail
says nothing, so no limit is tighter than their own seed noise (``noise``), and a gate whose data cannot tell a model
that remembers from one that does not abstains: ``passed`` is None, and the text says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from unlearning.strategies.base import Cost, Guarantee
from unlearning.verification.distance import between_golds, to_golds
from unlearning.verification.gate import Gate, short
from unlearning.verification.gates_cost import relearn_gate, time_gate, traffic_gate
from unlearning.verification.noise import area_noise, mean_noise, spread
from unlearning.verification.relearn import Relearning
from unlearning.verification.scene import K, Mean, Measurement, Scene
from unlearning.verification.thresholds import Thresholds

# Beyond these tolerances a gate cannot tell a model that remembers: the original is about so far off.
_BLIND_AREA = 0.15
_BLIND_PERCENTILE = 0.25
_UNKNOWN = {
    "retain": "nobody who stays has a test item to recommend",
    "forget": "none of what is to be forgotten was in the training data",
    "mia_auc": "there is no forgotten interaction, or no held-out item of the same users, to compare",
    "fold_in": "no deleted user has two training items and an item held out",
    "percentile": "there is nothing forgotten to rank",
    "bystander": "no user who asked for nothing shares taste with those who did, and has a test item",
}


def judge(
    scene: Scene,
    before: Measurement,
    after: Measurement,
    golds: Sequence[Measurement],
    cost: Cost,
    retraining: Cost,
    thresholds: Thresholds | None = None,
    relearn: Relearning | None = None,
    guarantee: Guarantee | None = None,
) -> list[Gate]:
    """All gates that apply to the scene, in the order in which a report shows them.

    ``cost`` is the strategy's, ``retraining`` one gold's. Of an exact ``guarantee`` time is reported only: it is
    retraining.
    """
    limits = thresholds or Thresholds()
    bench = _Bench(before, after, golds, limits.seed_sds)
    gates = [
        _forget_recall(scene, bench, limits),
        _share(bench, f"retain_recall@{K}", limits.retain_recall, "users who stay"),
        _share(bench, f"retain_ndcg@{K}", limits.retain_ndcg, "users who stay"),
        _area(bench, "mia_auc", limits.mia_auc, "scores"),
    ]
    if scene.forget.users.size:
        gates += _fold_in(bench, limits)
    if scene.only_items:
        gates.append(_percentile(bench, "percentile", limits.percentile_items, "withdrawn items"))
    else:
        gates.append(_percentile(bench, "percentile", limits.percentile_pairs, "forgotten interactions"))
        if scene.forget.items.size:
            gates.append(_percentile(bench, "percentile_items", limits.percentile_items, "withdrawn items"))
    gates.append(_share(bench, f"bystander_ndcg@{K}", limits.bystander_ndcg, "users of similar taste"))
    gates += _distance(bench, limits.distance)
    if len(golds) < 3:
        gates = [replace(gate, text=f"{gate.text}; {_few(len(golds))}") for gate in gates]
    if relearn is not None:
        gates.append(relearn_gate(relearn, limits.relearn_share))
    exact = guarantee is not None and guarantee.kind == "exact"
    return [
        *gates,
        time_gate(cost, retraining, None if exact else limits.time(scene.kinds)),
        traffic_gate(cost, retraining, None if exact else limits.traffic),
    ]


@dataclass(frozen=True)
class _Bench:
    """The measurements, by name."""

    before: Measurement
    after: Measurement
    golds: Sequence[Measurement]
    sds: float

    def numbers(self, name: str) -> tuple[float, float, float]:
        """The unlearned model's value, the golds' mean and their standard deviation."""
        values = [gold.values[name] for gold in self.golds]
        return self.after.values[name], float(np.mean(values)) if values else math.nan, spread(values)

    def noise(self, name: str) -> float:
        means: list[Mean] = [gold.means[name] for gold in self.golds]
        return mean_noise(self.after.means[name], means, self.sds)

    def unknown(self, name: str) -> Gate | None:
        """The gate of a number that could not be measured."""
        value, gold, sd = self.numbers(name)
        if not math.isnan(value) and not math.isnan(gold):
            return None
        reason = next((text for start, text in _UNKNOWN.items() if name.startswith(start)), "it could not be measured")
        return Gate(name, value, gold, sd, "not judged", None, f"not judged: {reason if self.golds else 'no golds'}")


def _forget_recall(scene: Scene, bench: _Bench, limits: Thresholds) -> Gate:
    name = f"forget_recall@{K}"
    if gate := bench.unknown(name):
        return gate
    value, gold, sd = bench.numbers(name)
    if limits.forget_recall_sds is None:
        return Gate(name, value, gold, sd, "reported", None, _compared("forget recall", value, gold))
    room = max(limits.forget_recall_sds * sd, bench.noise(name))
    small = scene.forget.size < limits.min_pairs and not scene.forget.items.size
    if small:
        counts = scene.forget.pairs.counts[scene.forget.affected]
        room = max(room, 1.0 / (counts.size * counts.min()))
    if gold + room >= 1.0:
        text = "not judged: of so few interactions all may be recommended by chance, see their percentile"
        return Gate(name, value, gold, sd, "not judged", None, text)
    passed = value <= gold + room
    text = (
        "what was forgotten is recommended no more often than by models that never saw it"
        if passed
        else f"what was forgotten is still recommended: recall {short(value)} ({short(bench.before.values[name])} "
        f"before), {short(gold)} by models that never saw it"
    )
    if small and passed:
        text += " (of so few one may appear by chance, see their percentile)"
    limit = f"≤ {short(gold + room)} (gold + {limits.forget_recall_sds:g} sd)"
    return Gate(name, value, gold, sd, limit, passed, text)


def _share(bench: _Bench, name: str, share: float | None, whose: str) -> Gate:
    """Usefulness: at least ``share`` of gold."""
    if gate := bench.unknown(name):
        return gate
    value, gold, sd = bench.numbers(name)
    of_gold = f"recommendations for {whose} are worth {short(value)}, gold's {short(gold)}"
    if gold > 0.0:
        of_gold = f"recommendations for {whose} are worth {100.0 * value / gold:.1f} % of gold's"
    if share is None:
        return Gate(name, value, gold, sd, "reported", None, of_gold)
    noise = bench.noise(name)
    least = min(share * gold, gold - noise)
    passed = value >= least
    limit = f"≥ {short(least)} ({share:g} of gold{', less seed noise' if least < share * gold else ''})"
    if value < share * gold and passed:
        of_gold += f"; golds differ by ±{short(noise)} between seeds, so one run cannot tell that from {share:g}"
    return Gate(name, value, gold, sd, limit, passed, of_gold)


def _area(bench: _Bench, name: str, threshold: float | None, what: str) -> Gate:
    """An attacker's AUC: no farther from gold than ``threshold``, up or down."""
    if gate := bench.unknown(name):
        return gate
    value, gold, sd = bench.numbers(name)
    if threshold is None:
        return Gate(name, value, gold, sd, "reported", None, _compared(f"the attack on {what} has an AUC", value, gold))
    found = bench.after.evidence[name]
    noise = area_noise(found, [g.evidence[name] for g in bench.golds], bench.sds)
    tolerance = max(threshold, noise) if not math.isnan(noise) else math.inf
    sample = f"{found.above.size} forgotten and {found.below.size} held-out scores"
    if tolerance > max(_BLIND_AREA, threshold):
        text = f"not judged: {sample} cannot tell a model that remembers from one that does not"
        return Gate(name, value, gold, sd, "not judged", None, text)
    passed = abs(value - gold) <= tolerance
    if passed:
        text = f"the {what} tell forgotten items from ones never trained on no better than gold's do"
    elif value > gold:
        text = f"the {what} still give the forgotten items away: AUC {short(value)}, gold {short(gold)}"
    else:
        text = (
            f"the {what} avoid the forgotten items (AUC {short(value)}, gold {short(gold)}): that gives them away too"
        )
    if tolerance > threshold:
        text += f"; with {sample} a difference below {short(tolerance)} may be chance"
    return Gate(name, value, gold, sd, _plus_minus(gold, tolerance, threshold), passed, text)


def _fold_in(bench: _Bench, limits: Thresholds) -> list[Gate]:
    """The attack on the item view; where held-out items are too few for it, percentiles among untouched items judge."""
    area = _area(bench, "fold_in_auc", limits.fold_in_auc, "released item tensors")
    blind = area.passed is None and limits.fold_in_auc is not None
    backup = _percentile(
        bench, "fold_in_percentile", limits.fold_in_percentile if blind else None, "deleted histories, folded in,"
    )
    return [area, backup]


def _percentile(bench: _Bench, name: str, threshold: float | None, what: str) -> Gate:
    """The place in the rankings: no farther from gold than ``threshold``, up or down."""
    if gate := bench.unknown(name):
        return gate
    value, gold, sd = bench.numbers(name)
    compared = _compared(f"{what} rank at percentile", value, gold)
    if threshold is None:
        return Gate(name, value, gold, sd, "reported", None, compared)
    tolerance = max(threshold, bench.noise(name))
    if tolerance > max(_BLIND_PERCENTILE, threshold):
        text = f"not judged: golds rank them differently from seed to seed (±{short(tolerance)}); {compared}"
        return Gate(name, value, gold, sd, "not judged", None, text)
    passed = abs(value - gold) <= tolerance
    if passed:
        text = f"{what} rank about as high as in models that never saw them"
    elif value > gold:
        text = f"{compared}: they are remembered"
    elif bench.before.values[name] > value:
        text = f"{compared}: pushed below, they stand out (over-forgetting)"
    else:
        text = f"{compared}: still too low, they stand out"
    return Gate(name, value, gold, sd, _plus_minus(gold, tolerance, threshold), passed, text)


def _distance(bench: _Bench, threshold: float | None) -> list[Gate]:
    """How far predictions are from the golds', in units of how far those are from each other."""
    golds = [gold.predictions for gold in bench.golds]
    away, floor = to_golds(bench.after.predictions, golds), between_golds(golds)
    if math.isnan(away.divergence) or math.isnan(floor.divergence):
        text = "not judged: the distance between golds takes two of them, and users who stay"
        return [Gate("distance", away.divergence, floor.divergence, 0.0, "not judged", None, text)]
    shared = f"{100.0 * away.overlap:.0f} % of the top {K} are a gold's too, of another gold's"
    same = Gate(
        f"overlap@{K}", away.overlap, floor.overlap, 0.0, "reported", None, f"{shared} {100.0 * floor.overlap:.0f} %"
    )
    ratio = away.divergence / max(floor.divergence, 1e-9)
    text = f"predictions are {ratio:.2f} times as far from a gold's as two golds are from each other"
    limit = "reported" if threshold is None else f"≤ {threshold:g} × noise floor"
    passed = None if threshold is None else away.divergence <= threshold * floor.divergence + 1e-9
    return [Gate("distance", away.divergence, floor.divergence, 0.0, limit, passed, text), same]


def _plus_minus(gold: float, tolerance: float, threshold: float) -> str:
    note = f"; asked ± {short(threshold)}, seed noise is more" if tolerance > threshold else ""
    return f"{short(gold)} ± {short(tolerance)}{note}"


def _compared(what: str, value: float, gold: float) -> str:
    return f"{what} {short(value)}, {short(gold)} in models that never saw them"


def _few(count: int) -> str:
    if count == 0:
        return "no model was retrained to compare with"
    return f"only {count} model{'s' if count > 1 else ''} retrained to compare with, so seed noise is hardly known"
