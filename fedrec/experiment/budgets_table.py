"""A comparison of budgets as numbers: one point for every method and budget, in Markdown, CSV and JSON.

Every ε in here is one that a run's ledger composed; a budget that was asked for and not kept is not shown as if it had
been. ε of different units or adjacencies stand in different columns of a sentence, never in one column without it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedrec.experiment.budgets import Comparison, name_of_epsilon
from fedrec.experiment.budgets_runs import RunState
from fedrec.experiment.budgets_values import CURVES, Spread, curve_value
from fedrec.experiment.console import (
    BASELINES,
    baseline_metrics,
    markdown_cell,
    metric,
    name_of,
    number,
    part,
    primary_ranking,
)
from fedrec.experiment.guarantees import sentence

_DASH = "–"


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
    metrics = {name: Spread.of(_metric(summary, name) for summary in done) for name in _metrics(wanted)}
    curves = {curve: Spread.of(curve_value(summary, curve) for summary in done) for curve in CURVES}
    deltas = [value for one in said if (value := number(one.get("delta"))) is not None]
    return Point(
        method=method,
        algorithm=name_of(done[0].get("algorithm")) if done else _DASH,
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
    )


def _metrics(wanted: str) -> list[str]:
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
            for one in _metrics(wanted)
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


def markdown(found: Sequence[Point], lines: Sequence[Baseline], curve: str | None) -> str:
    """The table as aligned GitHub-flavoured Markdown (also readable as it stands), with what must be said below it."""
    audited = any(point.bounds for point in found)
    head = ["method", "ε", "HR@10", "95 % CI", "NDCG@10", "noise multiplier", "signal/noise"]
    head += ([CURVES[curve]] if curve else []) + (["audit: ε ≥"] if audited else []) + ["seeds"]
    rows = [_cells(point, curve, audited) for point in found]
    for line in lines:
        hr, ndcg = line.metrics.get("hr@10"), line.metrics.get("ndcg@10")
        cells = [line.label, _DASH, hr.text() if hr else _DASH, _interval(hr), ndcg.text() if ndcg else _DASH]
        rows.append(cells + [_DASH] * (len(head) - 6) + [str(hr.n if hr else 0)])
    table = [[markdown_cell(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[place]) for row in table)) for place in range(len(head))]
    rule = ["-" * (width - bool(place)) + ":" * bool(place) for place, width in enumerate(widths)]
    text = "\n".join(
        "| " + " | ".join(cell.ljust(width) if not place else cell.rjust(width)
                          for place, (cell, width) in enumerate(zip(row, widths, strict=True))) + " |"
        for row in (table[0], rule, *table[1:])
    )  # fmt: skip
    return text + "\n" + "".join(f"\n{markdown_cell(note)}\n" for note in notes(found, lines))


def _cells(point: Point, curve: str | None, audited: bool) -> list[str]:
    hr, ndcg = point.metrics.get("hr@10"), point.metrics.get("ndcg@10")
    budget = point.budget + ("" if point.private or math.isinf(point.epsilon) or not point.seeds else " (not private)")
    missing = "failed" if point.failures and not point.seeds else _DASH
    cells = [point.method, budget, hr.text() if hr else missing, _interval(hr), ndcg.text() if ndcg else missing]
    cells.append(" / ".join(f"{value:.3g}" for value in point.noise if value) or _DASH)
    cells.append(f"{point.signal_to_noise.mean:.2g}" if point.signal_to_noise else _DASH)
    if curve:
        area = point.curves.get(curve)
        cells.append(area.text(2) if area else _DASH)
    if audited:
        cells.append(f"{point.bounds.mean:.2f}" if point.bounds else _DASH)
    count = len(point.seeds)
    return [*cells, str(count) if count == point.planned else f"{count} of {point.planned}"]


def _interval(value: Spread | None) -> str:
    return _DASH if value is None or value.low is None or value.high is None else f"{value.low:.3f} to {value.high:.3f}"


def notes(found: Sequence[Point], lines: Sequence[Baseline]) -> list[str]:
    """What a reader has to know to take the numbers for what they are."""
    told = [point for point in found if point.seeds]
    said = ["Means ± standard deviations over seeds; the interval is Student's t. Full ranking, test fold."]
    for adjacency in dict.fromkeys(point.adjacency for point in told if point.adjacency):
        same = [point for point in told if point.adjacency == adjacency]
        facts = [
            f"δ = {_several(rounded_up(point.delta, 2) for point in same if point.delta)}",
            f"sampling: {_several(point.sampler for point in same)}",
            f"accountant: {_several(_ACCOUNTANTS.get(point.accountant, point.accountant) for point in same)}",
            f"trusted: {_several(point.trust for point in same)}",
        ]
        text = f"ε is for {adjacency} ({_several(point.method for point in same)}); {'; '.join(facts)}."
        if any(point.unit == "interaction" for point in same):
            text += " It protects single interactions and is not a guarantee for a user."
        said.append(text)
    if any(math.isinf(point.epsilon) for point in told):
        said.append("ε = ∞: the same method without clipping and noise, and without any guarantee.")
    if any(not point.private and not math.isinf(point.epsilon) for point in told):
        said.append("(not private): anyone can repeat the noise, its seed is fixed.")
    said += [sentence(text) for text in dict.fromkeys(point.held_out for point in told if point.held_out)]
    said += list(dict.fromkeys(point.note for point in told if point.note))
    if any(point.private for point in told):
        said.append(
            "Every ε is that of one run alone. Who sees several runs on the same data gets their composition, and "
            "choosing a method or a setting by these numbers is covered by none of them."
        )
    bad = [point for point in told if point.violated]
    said += [f"{point.method}, ε {point.budget}: the audit refutes the claimed epsilon: a fault." for point in bad]
    said += [f"Failed: {failure}" for point in found for failure in point.failures]
    return said


_ACCOUNTANTS = {"gaussian": "exact Gaussian composition", "prv": "PRV", "rdp": "RDP"}


def _several(values: Any) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


_FACTS = ("unit", "adjacency", "accountant", "trust", "sampler", "statement", "note")


def to_csv(found: Sequence[Point], lines: Sequence[Baseline], wanted: str) -> str:
    """One line a point, then the baselines; every mean with ``_sd``, ``_ci_low`` and ``_ci_high``; empty: unknown."""
    metrics = _metrics(wanted)
    spreads = [*metrics, *CURVES, "signal_to_noise", "audit_epsilon_lower_bound"]
    head = ["method", "algorithm", "epsilon", "epsilon_spent", "delta", "private", "seeds", "failed"]
    head += [f"{name}{end}" for name in spreads for end in ("", "_sd", "_ci_low", "_ci_high")]
    head += ["noise_multipliers", *_FACTS]
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(head)
    for point in found:
        values = {**point.metrics, **point.curves, "signal_to_noise": point.signal_to_noise}
        values["audit_epsilon_lower_bound"] = point.bounds
        table.writerow(
            [
                point.method, point.algorithm, point.epsilon, _blank(point.spent), _blank(point.delta), point.private,
                " ".join(map(str, point.seeds)), len(point.failures),
                *(cell for name in spreads for cell in _spread_cells(values.get(name))),
                " ".join(f"{value:.6g}" for value in point.noise), *(getattr(point, name) for name in _FACTS),
            ]
        )  # fmt: skip
    for line in lines:
        values = dict(line.metrics)
        cells = [cell for name in spreads for cell in _spread_cells(values.get(name))]
        table.writerow([line.label, "", "", "", "", False, "", 0, *cells, "", *("" for _ in _FACTS)])
    return buffer.getvalue()


def _blank(value: float | None) -> float | str:
    return "" if value is None else value


def _spread_cells(value: Spread | None) -> list[float | str]:
    if value is None:
        return [""] * 4
    return [value.mean, *(_blank(one) for one in (value.sd, value.low, value.high))]


def to_dict(
    comparison: Comparison, states: Sequence[RunState], found: Sequence[Point], lines: Sequence[Baseline]
) -> dict[str, Any]:
    """``budgets.json``. An infinite ε is null, as in ``summary.json``."""
    settings = comparison.settings
    return {
        "schema": 1,
        "name": comparison.name,
        "complete": all(state.status == "finished" for state in states),
        "epsilons": [_null(value) for value in settings.epsilons],
        "seeds": list(settings.seeds),
        "metric": settings.metric,
        "points": [_point_dict(point) for point in found],
        "baselines": [
            {"name": line.name, "method": line.method or None} | {k: v.to_dict() for k, v in line.metrics.items()}
            for line in lines
        ],
        "runs": [
            {
                "method": state.run.method, "epsilon": _null(state.run.epsilon), "seed": state.run.seed,
                "status": state.status, "reason": state.reason or None,
                "folder": str(state.run.folder.relative_to(comparison.folder)),
            }
            for state in states
        ],
        "notes": notes(found, lines),
    }  # fmt: skip


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _point_dict(point: Point) -> dict[str, Any]:
    return {
        "method": point.method, "algorithm": point.algorithm, "epsilon": _null(point.epsilon),
        "epsilon_spent": point.spent, "delta": point.delta, "private": point.private, "seeds": list(point.seeds),
        "planned": point.planned, "failures": list(point.failures),
        **{name: value.to_dict() for name, value in point.metrics.items()},
        "attacks": {curve: value.to_dict() for curve, value in point.curves.items()},
        "audit_epsilon_lower_bound": point.bounds.to_dict() if point.bounds else None,
        "audit_violated": point.violated,
        "noise_multipliers": list(point.noise),
        "signal_to_noise": point.signal_to_noise.to_dict() if point.signal_to_noise else None,
        **{name: getattr(point, name) for name in _FACTS},
    }  # fmt: skip
