"""What unlearning did, as tables: one per request and strategy, one with the strategies side by side.

For the terminal (rich, 100 columns), as Markdown and as CSV. ``document`` is always a whole ``summary.json``.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedrec.experiment.console import format_bytes, format_count, format_seconds, markdown_cell
from fedrec.experiment.unlearn.compare import COLUMNS, Compared, compare
from fedrec.experiment.unlearn.reading import read_unlearning
from fedrec.experiment.unlearn.record import (
    BatchRecord,
    Row,
    StrategyRecord,
    UnlearningRecord,
    kinds_label,
    label_of,
)
from fedrec.experiment.unlearn.words import failure_lines, scope, verdict_sentence

_DASH = "–"
_MARKS = {True: "✓", False: "✗", None: _DASH}
_GOLD_NOTE = "gold is the mean of models retrained without the forgotten data."
_STYLES = {True: "green", False: "bold red", None: "dim"}
_BROKEN = {
    "percentile": "perc.", "time": "time", "member AUC": "MIA", "fold-in AUC": "fold\nin", "guarantee": "prom-\nise",
}  # fmt: skip
_WORDS = {
    "approximate": "approx.",
    "filter only": "filter",
    " failed": " ✗",
    " of ": "/",
    "passed": "✓",
    "gold (retrained)": "gold",
}
_SHORT = re.compile("|".join(map(re.escape, _WORDS)))
HEAD = ("measure", "before", "after", "gold", "limit", "")


def cells(row: Row) -> tuple[str, ...]:
    """The texts under ``HEAD``."""
    gold = _DASH if row.gold is None else f"{value_text(row.name, row.gold)}{_deviation(row.name, row.gold_sd)}"
    after = value_text(row.name, row.after) + _deviation(row.name, row.after_sd)
    limit = _DASH if row.limit in ("", "reported", "not judged") else row.limit
    return (label_of(row.name), value_text(row.name, row.before), after, gold, limit, _MARKS[row.passed])


def value_text(name: str, value: float | None) -> str:
    """Rounds as whole numbers where they are, shares of retraining with two significant digits, others to 3 places."""
    if value is None:
        return _DASH
    if name == "relearn_rounds":
        return f"{value:.3g}"
    if name.startswith(("time", "traffic")) and value < 0.0995:
        return f"{value:.2g}" if value else "0"
    return f"{value:.3f}"


def _deviation(name: str, sd: float | None) -> str:
    return "" if sd is None or name.startswith(("time", "traffic", "distance", "overlap")) else f" ± {sd:.3f}"


def cost_line(batch: BatchRecord) -> str:
    """Time, rounds and traffic, each against retraining."""
    said = []
    if (seconds := batch.cost.get("cpu_s")) is not None:
        said.append(f"{format_seconds(seconds)} of CPU time{_against(batch.ratio('cpu_s'))}")
    if (rounds := batch.cost.get("rounds")) is not None:
        of = batch.retraining.get("rounds")
        said.append(f"{format_count(rounds)} rounds" + (f" of {format_count(of)}" if of is not None else ""))
    up, down = batch.cost.get("upload_bytes"), batch.cost.get("download_bytes")
    if up is not None or down is not None:
        said.append(f"{format_bytes(up)} up{_against(batch.ratio('upload_bytes'))}, {format_bytes(down)} down")
    return "; ".join(said)


def _against(ratio: float | None) -> str:
    return "" if ratio is None else f" ({share_text(ratio)} of retraining)"


def share_text(ratio: float) -> str:
    percent = 100 * ratio
    return "0 %" if percent == 0 else "under 0.1 %" if percent < 0.1 else f"{percent:.3g} %"


def foot(batch: BatchRecord) -> list[str]:
    """What stands below a batch's table."""
    said = [cost_line(batch), f"Guarantee: {batch.guarantee}."]
    times = [request.in_time for request in batch.requests]
    if batch.late:
        said.append(f"Late: {', '.join(request.id for request in batch.late)}.")
    elif times and all(times):
        said.append("In time.")
    if batch.fallback:
        said.append(f"Its own gates failed; fell back to {batch.fallback}, whose model is the one kept.")
    return [text for text in said if text]


def heading(strategy: StrategyRecord, batch: BatchRecord) -> str:
    when = "" if batch.round is None else f" after round {batch.round}"
    return f"{batch.title} ({scope(batch)}){when}, {strategy.name}:"


def request_table(strategy: StrategyRecord, batch: BatchRecord) -> Table:
    """The measures of one batch: before, after, gold ± deviation over golds, limit, verdict."""
    verdict = Text(batch.verdict or "not judged", style="bold red" if batch.failed else "green")
    title = Text.assemble((heading(strategy, batch), "bold"), " ", verdict)
    table = Table(
        title=title, title_justify="left", title_style="", caption="\n".join(foot(batch)), caption_justify="left",
        header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False,
    )  # fmt: skip
    for place, name in enumerate(HEAD):
        left = place in (0, 4)
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=place in (1, 2, 3, 5))
    for row in batch.rows():
        texts = [Text(cell) for cell in cells(row)]
        texts[-1].stylize(_STYLES[row.passed])
        if row.passed is False:
            texts[2].stylize("bold red")
        table.add_row(*texts)
    return table


def comparison_tables(record: UnlearningRecord) -> list[Table]:
    """Strategies side by side, a table for each kind of request that they were put to."""
    tables = []
    for kinds, rows, count in compare(record):
        many = f", means over {count} batches" if count > 1 else ""
        table = Table(
            title=f"Strategies side by side: {kinds_label(kinds)}{many}", title_justify="left", title_style="bold",
            header_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False,
        )  # fmt: skip
        for place, name in enumerate(COLUMNS):
            table.add_column(
                _BROKEN.get(name, name.replace(" ", "\n", 1)), justify="right" if 0 < place < 9 else "left",
                overflow="fold", no_wrap=place > 0, min_width=12 if not place else None,
            )  # fmt: skip
        for place, row in enumerate(rows):
            texts = [Text(_SHORT.sub(lambda found: _WORDS[found[0]], cell)) for cell in row.cells()]
            if row.reference is False:
                texts[-1].stylize("green" if row.verdict == "passed" else "bold red")
            last = row.reference and not rows[min(place + 1, len(rows) - 1)].reference
            table.add_row(*texts, style="dim" if row.reference else "", end_section=last)
        tables.append(table)
    return tables


def unlearn_tables(document: Mapping[str, Any], every: bool | None = None) -> RenderableType:
    """All of it for the terminal: of one strategy a table per request, of several the comparison; then the verdict.

    ``every`` True shows the tables per request for several strategies too, False for none.
    """
    record = read_unlearning(document)
    if record is None:
        return Text("Nothing was unlearned: this run's summary has no strategies.")
    shown: list[RenderableType] = []
    whole = len(record.strategies) == 1 if every is None else every
    for strategy in record.strategies:
        for batch in strategy.batches:
            if whole:
                shown += [request_table(strategy, batch), Text()]
    if len(record.strategies) > 1:
        for table in comparison_tables(record):
            shown += [table, Text()]
        shown += [*(Text(line) for line in failure_lines(record)), Text()]
    return Group(*shown, Text(verdict_sentence(record), style="bold"))


def unlearn_markdown(document: Mapping[str, Any], every: bool | None = None) -> str:
    """The same as GitHub-flavoured Markdown; empty where nothing was unlearned."""
    record = read_unlearning(document)
    if record is None:
        return ""
    parts = [markdown_cell(verdict_sentence(record))]
    several = len(record.strategies) > 1
    if several:
        for kinds, rows, count in compare(record):
            many = f", means over {count} batches" if count > 1 else ""
            parts.append(f"**{kinds_label(kinds).capitalize()}**{many}")
            parts.append(_markdown(COLUMNS, [_bold(row) for row in rows], left=(0, 9, 10)))
        parts.append(f"Shares of gold for what is retained, share of retraining's CPU time; {_GOLD_NOTE}")
    if every if every is not None else not several:
        for strategy in record.strategies:
            for batch in strategy.batches:
                head = f"{heading(strategy, batch)} {batch.verdict or 'not judged'}"
                parts.append(f"**{markdown_cell(head)}**")
                rows_ = [[markdown_cell(cell) for cell in cells(row)] for row in batch.rows()]
                parts.append(_markdown((*HEAD[:-1], "gate"), rows_, left=(0, 4, 5)))
                parts.append(markdown_cell(" ".join(_sentences(foot(batch)))))
    return "\n\n".join(parts) + "\n"


def _bold(row: Compared) -> list[str]:
    texts = [markdown_cell(cell) for cell in row.cells()]
    return texts if row.reference else [f"**{texts[0]}**", *texts[1:]]


def _sentences(texts: Iterable[str]) -> list[str]:
    return [text if text.endswith(".") else f"{text}." for text in texts]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    rule = ["---" if place in left else "---:" for place in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (list(head), rule, *rows))


CSV_HEAD = ("strategy", "guarantee", "store", "store_bytes", "batch", "round", "kinds", "requests", "verdict",
            "fallback", "measure", "before", "after", "after_sd", "gold", "gold_sd", "limit", "passed")  # fmt: skip


def unlearn_csv(document: Mapping[str, Any]) -> str:
    """One line per strategy, batch and measure; costs are measures whose gold is the retraining's. Empty: unknown."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(CSV_HEAD)
    record = read_unlearning(document)
    for strategy in record.strategies if record else ():
        for batch in strategy.batches:
            head = [strategy.name, batch.guarantee, strategy.store_where, _blank(strategy.store_bytes), batch.number,
                    _blank(batch.round), " ".join(batch.kinds), " ".join(one.id for one in batch.requests),
                    batch.verdict, batch.fallback or ""]  # fmt: skip
            for row in batch.rows():
                values = (row.before, row.after, row.after_sd, row.gold, row.gold_sd)
                passed = "" if row.passed is None else str(row.passed).lower()
                table.writerow([*head, row.name, *map(_blank, values), row.limit, passed])
            for name in dict.fromkeys([*batch.cost, *batch.retraining]):
                values = (None, batch.cost.get(name), None, batch.retraining.get(name), None)
                table.writerow([*head, name, *map(_blank, values), "", ""])
    return buffer.getvalue()


def _blank(value: float | None) -> float | str:
    return "" if value is None else float(f"{value:.9g}")


__all__ = ["comparison_tables", "request_table", "unlearn_csv", "unlearn_markdown", "unlearn_tables"]
