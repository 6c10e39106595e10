"""One request in the report: what was asked, its gates with their sentences, its pictures, what it cost."""

from __future__ import annotations

from collections.abc import Iterable

from fedrec.experiment.console import format_bytes, format_count, format_seconds, number
from fedrec.experiment.report_sections import charts, esc, facts, figure
from fedrec.experiment.unlearn import lines, plots
from fedrec.experiment.unlearn.panels import Group
from fedrec.experiment.unlearn.record import BatchRecord, StrategyRecord, UnlearningRecord
from fedrec.experiment.unlearn.table import cells, share_text, value_text
from fedrec.experiment.unlearn.words import counted, forgotten_text, scope

_GATES = {True: ("", "passed"), False: ("bad", "failed"), None: ("warn", "reported")}


def batch_section(strategy: StrategyRecord, batch: BatchRecord, salt: str, several: bool = False) -> str:
    """One batch: what it was, its gates with their sentences, pictures, notes; folded away where there are several."""
    kind = "bad" if batch.failed else "" if batch.verdict == "passed" else "warn"
    badge = f'<span class="badge {kind}">{esc(batch.verdict or "not judged")}</span>'
    title = f"{batch.title}: {scope(batch)}" + (f", by {strategy.name}" if several else "")
    body = facts(
        (
            ("Forgotten", esc(forgotten_text(batch))),
            ("Came back", esc(counted(batch.returning, "user") if batch.returning else "")),
            ("After round", esc("" if batch.round is None else batch.round)),
            ("Guarantee", esc(batch.guarantee)),
            ("Fell back to", esc(batch.fallback or "")),
        )
    )
    body += gate_table(batch) + charts(_batch_figures(batch, salt))
    body += "".join(f'<p class="note">{esc(note)}</p>' for note in batch.notes)
    if several:
        return f"<details><summary>{badge} {esc(title)}</summary>{body}</details>"
    return f"<h4>{badge} {esc(title)}</h4>{body}"


def gate_table(batch: BatchRecord) -> str:
    """Before, after, gold, limit, verdict and what the gate means; then what was measured and decides nothing."""
    body = ""
    for row in batch.rows():
        texts = cells(row)
        gate = row.text or row.limit
        kind, word = _GATES[row.passed]
        word = row.limit if row.passed is None and row.limit == "not judged" else word
        mark = f'<span class="badge {kind}">{word}</span>' if gate else ""
        inner = "".join(f"<td>{esc(cell)}</td>" for cell in texts[1:4])
        body += (
            f'<tr class="{"" if gate else "baseline"}"><th class="left">{esc(texts[0])}</th>{inner}'
            f'<td class="left limit">{esc(texts[4])}</td><td class="left">{mark}</td>'
            f'<td class="left wrap">{esc(row.text)}</td></tr>'
        )
    if not body:
        return '<p class="note">Nothing was measured.</p>'
    names = ("measure", "before", "after", "gold ± sd", "limit", "gate", "what it says")
    head = "".join(f'<th class="{"" if place in (1, 2, 3) else "left"}">{name}</th>'
                   for place, name in enumerate(names))  # fmt: skip
    return f'<div class="scroll"><table class="dense"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _batch_figures(batch: BatchRecord, salt: str) -> Iterable[str]:
    if lines.has_percentiles(batch):
        means = [
            f"{word} {value_text('percentile', value)}"
            for word, value in (("before", batch.before.get("percentile")), ("after", batch.value("percentile")),
                                ("gold", batch.gold("percentile")[0]))
            if value is not None
        ]  # fmt: skip
        alt = "Where the forgotten stand in their users' rankings" + (f", means: {', '.join(means)}" if means else "")
        svg = plots.percentiles_svg(f"{salt}-percentiles", f"{alt}.", [Group("after", 0, (batch,))])
        yield figure("Percentiles of the forgotten", svg, "0: recommended last; 1: recommended first.")
    if lines.has_trace(batch):
        last = batch.trace[-1]
        ends = [f"{word} {found:.3f}" for word, key in (("forgotten", "forget_margin"), ("unseen", "unseen_margin"))
                if (found := number(last.get(key))) is not None]  # fmt: skip
        phases = dict.fromkeys(str(entry.get("phase") or "") for entry in batch.trace)
        alt = f"Mean margins over {len(batch.trace)} rounds of unlearning ({', then '.join(phases)})"
        svg = plots.trace_svg(f"{salt}-trace", alt + (f", at last: {', '.join(ends)}." if ends else "."), batch)
        note = "Scores of forgotten pairs and of pairs never trained on, each above its user's mean score."
        yield figure("Rounds of unlearning", svg, note)


def costs(record: UnlearningRecord) -> str:
    """Time, rounds and traffic of every batch, and of retraining for the same."""
    body = ""
    for strategy in record.strategies:
        for batch in strategy.batches:
            if batch.cost:
                body += _cost_row(strategy.name, batch)
    if not body:
        return ""
    names = ("strategy", "request", "CPU time", "retraining", "share", "wall time", "rounds", "up", "down",
             "up, retraining")  # fmt: skip
    head = "".join(f'<th class="{"left" if place < 2 else ""}">{name}</th>' for place, name in enumerate(names))
    return (
        '<h3>Cost against retraining</h3><div class="scroll"><table class="dense">'
        "<caption>Traffic: of all devices together.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cost_row(name: str, batch: BatchRecord) -> str:
    cost, whole, ratio = batch.cost, batch.retraining, batch.ratio()
    texts = (
        format_seconds(cost.get("cpu_s")), format_seconds(whole.get("cpu_s")),
        "–" if ratio is None else share_text(ratio), format_seconds(cost.get("wall_s")),
        f"{format_count(cost.get('rounds'))} of {format_count(whole.get('rounds'))}",
        format_bytes(cost.get("upload_bytes")), format_bytes(cost.get("download_bytes")),
        format_bytes(whole.get("upload_bytes")),
    )  # fmt: skip
    inner = "".join(f"<td>{esc(text)}</td>" for text in texts)
    return f'<tr><th class="left">{esc(name)}</th><td class="left">{esc(batch.title)}</td>{inner}</tr>'
