"""A comparison of budgets as points: a method at a budget, over its seeds; and the baselines beside them.

Every ε in here is one that a run's ledger composed; a budget that was asked for and not kept is not shown as if it had
been.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedrec.experiment.budgets import name_of_epsilon
from fedrec.experiment.budgets_runs import RunState
from fedrec.experiment.budgets_values import CURVES, Spread, curve_value
from fedrec.experiment.console import BASELINES, baseline_metrics, metric, name_of, number, part, primary_ranking


@dataclass(frozen=True)
class Point:
    """A method at a budget, over its seeds.

    ``epsilon`` is what was asked for (infinite: no clipping, no noise), ``spent`` the largest ε that the ledgers of the
    runs composed (None without privacy). ``metrics`` are of the test fold over the full ranking, ``curves`` AUCs of
    attacks, ``bounds`` the audit's lower bound on ε, ``noise`` a round's noise multipliers (one: the same in all).
    """

    method: str
    algorithm: str
    epsilon: float
    spent: float | None
    private: bool
    planned: int
    seeds: tuple[int, ...]
    failures: tuple[str, ...]
    metrics: Mapping[str, Spread]
    curves: Mapping[str, Spread]
    bounds: Spread | None
    violated: int
    noise: tuple[float, ...]
    signal_to_noise: Spread | None
    delta: float | None
    unit: str
    adjacency: str
    accountant: str
    trust: str
    sampler: str
    statement: str
    note: str
    held_out: str
    special: bool = False  # with settings of its own at this epsilon

    @property
    def budget(self) -> str:
        """The ε to print: as spent, rounded upwards, where that is not what was asked for."""
        if math.isinf(self.epsilon):
            return "∞"
        asked = name_of_epsilon(self.epsilon)
        if self.spent is None or math.isclose(self.spent, self.epsilon, rel_tol=5e-3):
            return asked
        return f"{asked} (spent {rounded_up(self.spent)})"


def rounded_up(value: float, digits: int = 3) -> str:
    """Three significant digits, upwards: what is printed must not be less than what was spent."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1) if value > 0.0 else 1.0
    return f"{math.ceil(value / unit * (1.0 - 1e-9)) * unit:.{digits}g}"


def points(states: Sequence[RunState], settings_metric: str) -> list[Point]:
    """One point for every method and budget, methods in their order, budgets ascending."""
    grouped: dict[tuple[str, float], list[RunState]] = {}
    for state in states:
        grouped.setdefault((state.run.method, state.run.epsilon), []).append(state)
    order = {method: place for place, method in enumerate(dict.fromkeys(method for method, _ in grouped))}
    keys = sorted(grouped, key=lambda key: (order[key[0]], key[1]))
    return [_point(*key, grouped[key], settings_metric) for key in keys]


def _point(method: str, epsilon: float, states: Sequence[RunState], wanted: str) -> Point:
    done = [state.summary for state in states if state.status == "finished" and state.summary is not None]
    said = [part(summary, "privacy") for summary in done]
    first = said[0] if said else {}
    spent = [value for one in said if (value := number(one.get("epsilon"))) is not None]
    audits = [part(summary, "attacks", "audit") for summary in done]
    metrics = {name: Spread.of(_metric(summary, name) for summary in done) for name in metric_names(wanted)}
    curves = {curve: Spread.of(curve_value(summary, curve) for summary in done) for curve in CURVES}
    deltas = [value for one in said if (value := number(one.get("delta"))) is not None]
    return Point(
        method=method,
        algorithm=name_of(done[0].get("algorithm")) if done else "–",
        epsilon=epsilon,
        spent=max(spent) if spent and len(spent) == len(said) else None,
        private=bool(said) and all(one.get("private") is True for one in said),
        planned=len(states),
        seeds=tuple(state.run.seed for state in states if state.status == "finished"),
        failures=tuple(f"{state.run.title}: {state.reason}" for state in states if state.status == "failed"),
        metrics={name: found for name, found in metrics.items() if found},
        curves={curve: found for curve, found in curves.items() if found},
        bounds=Spread.of(number(audit.get("epsilon_lower_bound")) for audit in audits),
        violated=sum(audit.get("violated") is True for audit in audits),
        noise=tuple(number(value) or 0.0 for value in first.get("noise_multipliers", ())),
        signal_to_noise=Spread.of(number(one.get("signal_to_noise")) for one in said),
        delta=max(deltas) if deltas else None,
        unit=str(first.get("unit", "")),
        adjacency=str(first.get("adjacency", "")),
        accountant=" and ".join(dict.fromkeys(str(one.get("accountant")) for one in said)),
        trust=str(first.get("trust", "")),
        sampler=_sampler(first),
        statement=str(first.get("statement", "")),
        note=" ".join(dict.fromkeys(str(one["note"]) for one in said if one.get("note"))),
        held_out=next((str(text) for one in done for text in one.get("warnings", ()) if "non-members" in text), ""),
        special=any(state.run.special for state in states),
    )


def metric_names(wanted: str) -> list[str]:
    """The metrics of a comparison that draws ``wanted``."""
    return list(dict.fromkeys(("hr@10", "ndcg@10", wanted)))


def _metric(summary: Mapping[str, Any], name: str) -> float | None:
    return metric(part(summary, "test"), name, "full", primary_ranking(summary))


def _sampler(said: Mapping[str, Any]) -> str:
    if said.get("sampler") == "poisson":
        return f"Poisson at rate {number(said.get('sample_rate')) or 0.0:g}"
    return "everyone in every release" if said else ""


@dataclass(frozen=True)
class Baseline:
    """A horizontal line: popularity, EASE, or a method without its server. None of them depends on ε."""

    name: str
    label: str
    method: str
    metrics: Mapping[str, Spread]


def baselines(states: Sequence[RunState], wanted: str) -> list[Baseline]:
    """The baselines that runs brought along, means over the seeds that did."""
    found: dict[tuple[str, str], list[tuple[Mapping[str, Any], object]]] = {}
    for state in states:
        for name, entry in part(state.summary, "baselines").items():
            if state.status == "finished" and state.summary is not None and baseline_metrics(entry):
                key = (name, state.run.method if name == "local_only" else "")
                found.setdefault(key, []).append((state.summary, entry))
    lines = []
    for (name, method), entries in found.items():
        values = {
            one: Spread.of(
                metric(baseline_metrics(entry), one, "full", primary_ranking(summary)) for summary, entry in entries
            )
            for one in metric_names(wanted)
        }
        label = f"{method}, local only" if method else f"central {BASELINES[name]}" if name == "ease" else name
        lines.append(Baseline(name, label, method, {one: value for one, value in values.items() if value}))
    order = list(BASELINES)
    return sorted(lines, key=lambda line: order.index(line.name) if line.name in order else len(order))


def shown_curve(found: Sequence[Point], chosen: str | None) -> str | None:
    """The attack curve to show: the chosen one, else the first that any run measured."""
    if chosen is not None:
        return chosen
    return next((curve for curve in CURVES if any(curve in point.curves for point in found)), None)
