"""A comparison of budgets in Markdown, CSV and JSON.

ε of different units or adjacencies are different quantities: a table of several says what each is of.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from fedrec.experiment.budgets import Comparison
from fedrec.experiment.budgets_points import Baseline, Point, metric_names, rounded_up
from fedrec.experiment.budgets_runs import RunState
from fedrec.experiment.budgets_values import CURVES, Spread
from fedrec.experiment.console import markdown_cell
from fedrec.experiment.guarantees import sentence

_DASH = "–"


def markdown(found: Sequence[Point], lines: Sequence[Baseline], curve: str | None) -> str:
    """The table as aligned GitHub-flavoured Markdown (also readable as it stands), with what must be said below it."""
    audited = any(point.bounds for point in found)
    several = len({point.adjacency for point in found if point.adjacency}) > 1
    head = [
        "method",
        *(["ε protects"] if several else []),
        "ε",
        "HR@10",
        "95 % CI",
        "NDCG@10",
        "noise multiplier",
        "signal/noise",
    ]
    head += ([CURVES[curve]] if curve else []) + (["audit: ε ≥"] if audited else []) + ["seeds"]
    rows = [_cells(point, curve, audited) for point in found]
    if several:  # ε of different things are different quantities
        rows = [[cells[0], _protects(point), *cells[1:]] for point, cells in zip(found, rows, strict=True)]
    for line in lines:
        hr, ndcg = line.metrics.get("hr@10"), line.metrics.get("ndcg@10")
        cells = [
            line.label,
            *([_DASH] * (1 + several)),
            hr.text() if hr else _DASH,
            _interval(hr),
            ndcg.text() if ndcg else _DASH,
        ]
        rows.append(cells + [_DASH] * (len(head) - 6 - several) + [str(hr.n if hr else 0)])
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


def _protects(point: Point) -> str:
    if not point.adjacency:
        return _DASH
    return f"one {point.unit}" + (" (replaced)" if point.adjacency.startswith("replace") else "")


def _interval(value: Spread | None) -> str:
    """Of a rate: what lies outside of [0, 1] is cut off."""
    if value is None or value.low is None or value.high is None:
        return _DASH
    return f"{max(value.low, 0.0):.3f} to {min(value.high, 1.0):.3f}"


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
    if special := [f"{point.method} at ε {point.budget}" for point in told if point.special]:
        said.append(f"With settings of their own: {', '.join(special)}.")
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
    for method in dict.fromkeys(point.method for point in found):
        failures = [failure for point in found if point.method == method for failure in point.failures]
        if failures:
            said.append(f"Failed runs of {method}: {len(failures)}, the first: {failures[0].rstrip(chr(46))}.")
    return said


_ACCOUNTANTS = {"gaussian": "exact Gaussian composition", "prv": "PRV", "rdp": "RDP"}


def _several(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


_FACTS = ("unit", "adjacency", "accountant", "trust", "sampler", "statement", "note")


def to_csv(found: Sequence[Point], lines: Sequence[Baseline], wanted: str) -> str:
    """One line a point, then the baselines; every mean with ``_sd``, ``_ci_low`` and ``_ci_high``; empty: unknown."""
    metrics = metric_names(wanted)
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
