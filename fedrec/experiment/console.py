"""Results in words: the comparison table for the terminal and for Markdown, and how numbers are written.

A table never mixes two rankings in one column: ``HR@10``, ``NDCG@10``, ``Recall@20`` and coverage are always over the
full ranking, ``sampled HR@10`` is always over sampled negatives, whichever of the two a run calls its primary one.
Whatever a summary does not say is shown as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

Ranking = Literal["full", "sampled"]
BASELINES = {"popularity": "popularity", "ease": "EASE", "local_only": "local only"}
COLUMNS = (
    "algorithm",
    "protocol",
    "HR@10",
    "NDCG@10",
    "Recall@20",
    "sampled HR@10",
    "coverage",
    "rounds (best)",
    "upload/user",
    "wall s",
)
_BROKEN = {
    "NDCG@10": "NDCG\n@10",
    "Recall@20": "Recall\n@20",
    "coverage": "cover-\nage",
    "sampled HR@10": "sampled\nHR@10",
    "rounds (best)": "rounds\n(best)",
    "upload/user": "upload\n/user",
}
_DASH = "–"


def number(value: object) -> float | None:
    """``value`` as a float (NaN and infinities included), or None for anything that is not a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def part(tree: object, *keys: str) -> Mapping[str, Any]:
    """The mapping found by following ``keys``; empty where the path is missing, null or not a mapping."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def name_of(value: object, default: str = _DASH) -> str:
    """A component's name, whether the summary holds the name itself or a mapping with ``name``."""
    found = value.get("name") if isinstance(value, Mapping) else value
    return default if found is None or found == "" else str(found)


def format_metric(value: float | None, digits: int = 3) -> str:
    return _DASH if value is None else f"{value:.{digits}f}"


def format_count(value: float | None) -> str:
    return _DASH if value is None or not math.isfinite(value) else f"{value:,.0f}"


def format_bytes(value: float | None) -> str:
    """Decimal units (1 kB = 1000 bytes), three significant digits."""
    if value is None or not math.isfinite(value):
        return _DASH
    for unit in ("B", "kB", "MB", "GB"):
        size = abs(value)
        if size < 999.5:
            decimals = 0 if unit == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
            return f"{value:.{decimals}f} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def format_seconds(value: float | None) -> str:
    """``0.42 s``, ``12.3 s``, ``4 min 05 s``, ``2 h 03 min``."""
    if value is None or not math.isfinite(value):
        return _DASH
    if value < 59.95:
        return f"{value:.2f} s" if value < 9.995 else f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_loss(value: float) -> str:
    """A loss as it is: a diverged one says so and a huge one is not hidden behind rounding."""
    if math.isnan(value):
        return "NaN (not a number)"
    if math.isinf(value):
        return "+∞ (infinite)" if value > 0 else "−∞ (infinite)"
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"


def primary_ranking(summary: Mapping[str, Any]) -> Ranking:
    """Which ranking the unprefixed metric names of this summary mean."""
    for said in (summary.get("ranking"), part(summary, "protocol").get("ranking")):
        if isinstance(said, str) and said in ("full", "sampled"):
            return "full" if said == "full" else "sampled"
    prefixed = part(summary, "test") or part(summary, "validation")
    return "sampled" if any(key.startswith("full_") for key in prefixed) else "full"


def metric(metrics: Mapping[str, Any], name: str, ranking: Ranking, primary: Ranking) -> float | None:
    """``name`` (``"hr@10"``) under ``ranking``, from metrics whose unprefixed names mean ``primary``."""
    return number(metrics.get(name if ranking == primary else f"{ranking}_{name}"))


def is_leaky(summary: Mapping[str, Any]) -> bool:
    return part(summary, "protocol").get("leaky") is True


def protocol_label(summary: Mapping[str, Any]) -> str:
    """The protocol's name, with ``(leaky)`` where training could see what is held out."""
    name = name_of(summary.get("protocol"))
    return f"{name} (leaky)" if is_leaky(summary) else name


def total_bytes(summary: Mapping[str, Any], direction: Literal["upload", "download"]) -> float | None:
    """Bytes that one user sent or received in the whole run.

    ``traffic.<direction>_bytes_per_user_total`` where the run recorded it (the mean over all users); otherwise the
    bytes of a user's round times the rounds, which is a user that took part in every round.
    """
    traffic = part(summary, "traffic")
    recorded = number(traffic.get(f"{direction}_bytes_per_user_total"))
    a_round, rounds = number(traffic.get(f"{direction}_bytes_per_user_round")), number(summary.get("rounds"))
    if recorded is not None or a_round is None or rounds is None:
        return recorded
    return a_round * rounds


def baseline_metrics(entry: object, fold: str = "test") -> Mapping[str, Any]:
    """A baseline's metrics on ``fold``; a flat mapping of metrics counts as the test fold."""
    if isinstance(entry, Mapping) and fold not in entry and fold == "test" and any("@" in key for key in entry):
        return entry
    return part(entry, fold)


@dataclass(frozen=True)
class ResultRow:
    """One line of a comparison. Metrics are of the test fold; ``upload`` in bytes a user, ``wall_s`` in seconds."""

    label: str
    protocol: str
    data_set: str
    leaky: bool
    baseline: bool
    hr: float | None
    ndcg: float | None
    recall: float | None
    sampled_hr: float | None
    coverage: float | None
    rounds: str = _DASH
    upload: float | None = None
    wall_s: float | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """The texts under ``COLUMNS``."""
        metrics = (self.hr, self.ndcg, self.recall, self.sampled_hr, self.coverage)
        wall = _DASH if self.wall_s is None else f"{self.wall_s:,.1f}"
        return (self.label, self.protocol, *map(format_metric, metrics), self.rounds, format_bytes(self.upload), wall)


def _row(summary: Mapping[str, Any], label: str, metrics: Mapping[str, Any], baseline: bool, **rest: Any) -> ResultRow:
    primary = primary_ranking(summary)
    return ResultRow(
        label=label,
        protocol=protocol_label(summary),
        data_set=name_of(summary.get("dataset")),
        leaky=is_leaky(summary),
        baseline=baseline,
        hr=metric(metrics, "hr@10", "full", primary),
        ndcg=metric(metrics, "ndcg@10", "full", primary),
        recall=metric(metrics, "recall@20", "full", primary),
        sampled_hr=metric(metrics, "hr@10", "sampled", primary),
        coverage=metric(metrics, "coverage@10", "full", primary),
        **rest,
    )


def run_row(summary: Mapping[str, Any], label: str | None = None) -> ResultRow:
    """The row of the run itself; a run that did not end well is labelled with its status."""
    status = summary.get("status")
    name = label or name_of(summary.get("algorithm"), "run")
    if status in ("diverged", "interrupted", "failed"):
        name = f"{name} [{status}]"
    rounds, best = number(summary.get("rounds")), number(summary.get("best_round"))
    said = format_count(rounds) + ("" if best is None else f" ({format_count(best)})")
    wall = number(part(summary, "timing").get("wall_s"))
    upload = total_bytes(summary, "upload")
    note = _spread_note(summary, name)
    return _row(summary, name, part(summary, "test"), False, rounds=said, upload=upload, wall_s=wall, note=note)


def _spread_note(summary: Mapping[str, Any], label: str) -> str:
    """The standard deviations over the orders of tied timestamps, where the run was repeated over several."""
    primary, spread, parts = primary_ranking(summary), part(summary, "spread"), summary.get("parts")
    if not spread or not isinstance(parts, Sequence):
        return ""
    names = {"HR@10": "hr@10", "NDCG@10": "ndcg@10", "Recall@20": "recall@20"}
    found = {shown: metric(spread, name, "full", primary) for shown, name in names.items()}
    found["sampled HR@10"] = metric(spread, "hr@10", "sampled", primary)
    said = ", ".join(f"{shown} ± {value:.4f}" for shown, value in found.items() if value is not None)
    return f"{label}: mean of {len(parts)} orders of tied timestamps; standard deviations {said}."


def baseline_rows(summary: Mapping[str, Any]) -> list[ResultRow]:
    """The rows of a summary's baselines; a skipped one keeps its row and says why in ``note``."""
    rows = []
    for key, entry in part(summary, "baselines").items():
        if entry is None:
            continue
        label = BASELINES.get(key, key)
        if key == "local_only":
            label = f"{name_of(summary.get('algorithm'), 'run')}, local only"
        rounds = number(part(entry).get("rounds"))
        skipped = part(entry).get("skipped")
        rows.append(
            _row(
                summary,
                label,
                baseline_metrics(entry),
                True,
                rounds=format_count(rounds),
                note=f"{label} was skipped: {str(skipped).rstrip(chr(46))}." if skipped else "",
            )
        )
    return rows


def result_rows(summaries: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> list[ResultRow]:
    """Rows of all runs, those of one data set and protocol together, each group followed by its distinct baselines."""
    groups: dict[tuple[str, str], tuple[list[ResultRow], list[ResultRow]]] = {}
    for index, summary in enumerate(summaries):
        row = run_row(summary, labels[index] if labels else None)
        runs, baselines = groups.setdefault((row.data_set, row.protocol), ([], []))
        runs.append(row)
        baselines.extend(other for other in baseline_rows(summary) if other not in baselines)
    return [row for runs, baselines in groups.values() for row in (*runs, *baselines)]


def _columns(rows: Sequence[ResultRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and texts; the data set gets a column only where there is more than one."""
    if len({row.data_set for row in rows}) < 2:
        return COLUMNS, [row.cells() for row in rows]
    head = (COLUMNS[0], "data set", *COLUMNS[1:])
    return head, [(cells[0], row.data_set, *cells[1:]) for row in rows for cells in (row.cells(),)]


def _notes(rows: Sequence[ResultRow]) -> list[str]:
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    if any(row.leaky for row in rows):
        notes.append("(leaky): training could tell which items are held out; these numbers say nothing about accuracy.")
    return notes


def result_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """The comparison of ``summaries`` (mappings as in ``summary.json``) for a terminal."""
    rows = result_rows(summaries)
    head, lines = _columns(rows)
    table = Table(
        caption="\n".join(_notes(rows)) or None,
        caption_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        padding=0,  # the box's dividers already part the columns, and the whole has to fit 80 characters
        show_edge=False,
    )
    left = 2 if head is COLUMNS else 3
    for index, column in enumerate(head):
        if index < left:
            table.add_column(column, overflow="fold", min_width=10 if index == 0 else 7)
        else:
            table.add_column(_BROKEN.get(column, column), justify="right", no_wrap=True)
    for index, (row, line) in enumerate(zip(rows, lines, strict=True)):
        last = index + 1 == len(rows) or (row.baseline and not rows[index + 1].baseline)
        style = "dim" if row.baseline else ("yellow" if row.leaky else "")
        table.add_row(*(Text(cell) for cell in line), style=style, end_section=last)
    return table


def markdown_table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The same comparison as GitHub-flavoured Markdown, notes below; runs are bold, baselines are not."""
    rows = result_rows(summaries)
    head, lines = _columns(rows)
    left = 2 if head is COLUMNS else 3
    rule = ["---" if index < left else "---:" for index in range(len(head))]
    body = [
        [
            markdown_cell(cell) if row.baseline or index else f"**{markdown_cell(cell)}**"
            for index, cell in enumerate(line)
        ]
        for row, line in zip(rows, lines, strict=True)
    ]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in (list(head), rule, *body))
    return text + "".join(f"\n\n{markdown_cell(note)}" for note in _notes(rows)) + "\n"


def markdown_cell(cell: str) -> str:
    """``cell`` with Markdown's own characters escaped, on one line."""
    for character in "\\|*_`<[":
        cell = cell.replace(character, f"\\{character}")
    return cell.replace("\n", " ")
