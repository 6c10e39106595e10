"""What ``fedrec budgets`` leaves in a comparison's folder: budgets.json, .csv, .md, .png, .svg and .html."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template

from fedrec.errors import ConfigError
from fedrec.experiment import budgets_table as tables
from fedrec.experiment.budgets import Comparison
from fedrec.experiment.budgets_points import baselines, points, shown_curve
from fedrec.experiment.budgets_runs import RunState
from fedrec.experiment.console import name_of, part, protocol_label


def title_of(states: Sequence[RunState]) -> str:
    """``Privacy budgets on ml-100k (943 users), protocol clean``, from the runs; empty while none is finished."""
    summary = next((state.summary for state in states if state.status == "finished" and state.summary), None)
    if summary is None:
        return ""
    data = part(summary, "dataset")
    return f"Privacy budgets on {name_of(data)} ({data.get('users', 0):,} users), protocol {protocol_label(summary)}"


def write_numbers(comparison: Comparison, states: Sequence[RunState]) -> str:
    """Write budgets.json, .csv and .md, and return the Markdown. Unfinished runs are dashes, and said to be."""
    settings = comparison.settings
    found, lines = points(states, settings.metric), baselines(states, settings.metric)
    table = tables.markdown(found, lines, shown_curve(found, settings.attack_curve))
    comparison.folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(_jsonable(tables.to_dict(comparison, states, found, lines)), indent=1, ensure_ascii=False)
    _write(comparison.folder / "budgets.json", document + "\n")
    _write(comparison.folder / "budgets.csv", tables.to_csv(found, lines, settings.metric))
    _write(comparison.folder / "budgets.md", f"### {title_of(states)}\n\n{table}" if title_of(states) else table)
    return table


def write_pictures(comparison: Comparison, states: Sequence[RunState]) -> list[Path]:
    """Draw budgets.png, .svg and .html; nothing while no run is finished."""
    from fedrec.experiment import budgets_plot as plot  # brings matplotlib

    settings, title = comparison.settings, title_of(states)
    if not title:
        return []
    found, lines = points(states, settings.metric), baselines(states, settings.metric)
    curve = shown_curve(found, settings.attack_curve)
    figure = plot.draw(found, lines, settings.metric, curve, title)
    pictures = plot.write_pictures(figure, comparison.folder)
    alt = f"{title}: {settings.metric.upper()} against epsilon; the table below gives the numbers"
    svg = plot.inline_svg(found, lines, settings.metric, curve, alt)
    table, *notes = tables.markdown(found, lines, curve).split("\n\n")
    _write(comparison.folder / "budgets.html", _page(title, svg, table, notes, states, comparison))
    return [*pictures, comparison.folder / "budgets.html"]


def _page(
    title: str, svg: str, table: str, notes: Sequence[str], states: Sequence[RunState], comparison: Comparison
) -> str:
    template = resources.files("fedrec.experiment")
    body = f"<h1>{html.escape(title)}</h1><p class='subtitle'>{html.escape(comparison.name)}</p>"
    missing = sum(state.status == "missing" for state in states)
    if missing:
        text = f"{missing} of {len(states)} runs are missing; the same command runs them."
        body += f'<p class="alert"><strong>Unfinished.</strong> {text}</p>'
    body += f"<figure>{svg}</figure>{_table(table)}" + "".join(f'<p class="note">{_plain(note)}</p>' for note in notes)
    statements = dict.fromkeys(
        (point.method, point.budget, point.statement)
        for point in points(states, comparison.settings.metric)
        if point.statement
    )
    listed = "".join(
        f"<dt>{html.escape(method)}, ε {html.escape(budget)}</dt><dd>{html.escape(text)}</dd>"
        for method, budget, text in statements
    )
    body += f'<h3>What is guaranteed</h3><dl class="facts">{listed}</dl>' if listed else ""
    footer = "Made by fedrec; every number is as the runs recorded it, every ε as their ledger.json composes it."
    return Template(template.joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title), style=template.joinpath("report.css").read_text(encoding="utf-8"), body=body,
        footer=footer,
    )  # fmt: skip


def _table(markdown: str) -> str:
    """The Markdown table as HTML."""
    rows = [[_plain(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in markdown.splitlines()]
    head = "".join(f'<th class="{"" if place else "left"}">{cell}</th>' for place, cell in enumerate(rows[0]))
    body = "".join(
        f'<tr><th class="left">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows[2:]
    )
    return f'<div class="scroll"><table class="dense"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _plain(text: str) -> str:
    return html.escape(re.sub(r"\\(.)", r"\1", text))


def _jsonable(value: object) -> object:
    """JSON has no NaN and no infinity; both are written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _jsonable(inner) for key, inner in value.items()}
    return [_jsonable(inner) for inner in value] if isinstance(value, list) else value


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"output_dir: {path} cannot be written ({error.strerror}); choose another folder") from None
