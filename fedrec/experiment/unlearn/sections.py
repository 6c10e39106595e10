"""What the report says of unlearning: each function turns a part of the record into HTML, or into nothing.

``unlearning`` is all of it. Missing facts leave their sentence out; all texts from files pass ``esc``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from fedrec.experiment.report import RunRecord
from fedrec.experiment.report_sections import charts, esc, figure, tree
from fedrec.experiment.unlearn import lines, panels, plots
from fedrec.experiment.unlearn.batches import batch_section, costs
from fedrec.experiment.unlearn.compare import COLUMNS, compare
from fedrec.experiment.unlearn.panels import Group
from fedrec.experiment.unlearn.proof import audit, finals, golds, guarantees, not_covered
from fedrec.experiment.unlearn.reading import read_unlearning
from fedrec.experiment.unlearn.record import StrategyRecord, UnlearningRecord, kinds_label, label_of
from fedrec.experiment.unlearn.table import share_text
from fedrec.experiment.unlearn.words import answer_text, counted, failure_lines, listed, verdict_sentence


def unlearning(record: RunRecord, salt: str) -> str:
    """The whole account of a run's requests; nothing for a run without. ``salt`` keeps chart ids apart."""
    found = read_unlearning(record.summary)
    if found is None:
        said = record.summary.get("unlearning")
        return f"<h3>Unlearning</h3>{tree(said)}" if said else ""
    details = "".join(
        batch_section(strategy, batch, f"{salt}-u{row}-{batch.number}", several=len(found.strategies) > 1)
        for row, strategy in enumerate(found.strategies)
        for batch in strategy.batches
    )
    heading = "Every request, by strategy" if len(found.strategies) > 1 else "Every request and its gates"
    return "".join(
        (
            f"<h3>Unlearning</h3>{verdict(found)}",
            side_by_side(found, salt),
            pictures(found, salt),
            requests(found, salt),
            f"<h3>{heading}</h3>{details}",
            costs(found),
            guarantees(found),
            finals(found, record),
            golds(found),
            not_covered(),
            audit(found, record),
        )
    )


def verdict(record: UnlearningRecord) -> str:
    """The result in a sentence, and everything that a reader must know before relying on it."""
    failed = any(strategy.failed for strategy in record.strategies)
    mended = failed and all(batch.fallback for one in record.strategies for batch in one.batches if batch.failed)
    late = any(request.in_time is False for request in record.requests)
    judged = any(strategy.gates for strategy in record.strategies)
    kind, word = (
        ("warn", "fell back")
        if mended
        else ("bad", "failed")
        if failed
        else ("", "passed")
        if judged
        else ("warn", "not judged")
    )
    badges = f'<span class="badge {kind}">{word}</span> ' + ('<span class="badge warn">late</span> ' if late else "")
    said = f'<p class="lede">{badges}{esc(verdict_sentence(record))}</p>'
    if len(record.strategies) > 1 and (lines := failure_lines(record)):
        said += "<ul>" + "".join(f"<li>{esc(line)}</li>" for line in lines) + "</ul>"
    for strategy in record.strategies:
        said += _consequences(strategy, alone=len(record.strategies) == 1)
    if record.golds is not None and record.golds < 3:
        text = f"Only {counted(record.golds, 'retraining')} to compare with: the spread between seeds is hardly known."
        said += _alert("", "Few golds.", text)
    return said


def _consequences(strategy: StrategyRecord, alone: bool) -> str:
    """What follows from failed gates: another model was kept, or the request is not honoured, or only its price was."""
    fallen = [batch for batch in strategy.batches if batch.fallback]
    failed = [batch for batch in strategy.batches if batch.failed and not batch.fallback]
    said = ""
    if fallen:
        text = (
            f"{strategy.name} failed its gates for {listed([batch.title for batch in fallen])}, so "
            f"{fallen[0].fallback} was run instead, and its model is the one kept. The gates shown are those of the "
            "first attempt."
        )
        said += _alert("", "Fell back.", text)
    if alone and (kept := [batch.title for batch in failed if batch.remembers]):
        text = f"{listed(kept)}: the model that was kept failed a gate on forgetting. Do not treat this as honoured."
        said += _alert("bad", "Not forgotten.", text)
    if alone and (dear := [batch.title for batch in failed if not batch.remembers]):
        text = f"{listed(dear)}: every gate on forgetting passed; one on usefulness or cost did not."
        said += _alert("", "At a price.", text)
    return said


def _alert(kind: str, head: str, text: str) -> str:
    return f'<p class="alert {kind}"><strong>{esc(head)}</strong> {esc(text)}</p>'


def side_by_side(record: UnlearningRecord, salt: str) -> str:
    """The strategies in one table for each kind of request."""
    if len(record.strategies) < 2:
        return ""
    text = ""
    groups = plots.groups_of(record)
    for place, (kinds, rows, count) in enumerate(compare(record)):
        body = ""
        for row in rows:
            texts = row.cells()
            marks = f'<td class="left">{_badge(texts[-1], row.verdict == "passed") if texts[-1] else ""}</td>'
            inner = "".join(f"<td>{esc(cell)}</td>" for cell in texts[1:9])
            last = " last" if row is rows[1] else ""
            name = f'<th class="left">{esc(texts[0])}</th>'
            body += (
                f'<tr class="{"baseline" if row.reference else ""}{last}">{name}{inner}'
                f'<td class="left">{esc(texts[9])}</td>{marks}</tr>'
            )
        head = "".join(
            f'<th class="{"left" if index in (0, 9, 10) else ""}">{esc(name)}</th>'
            for index, name in enumerate(COLUMNS)
        )
        caption = "Retained: share of gold. Time: CPU time as a share of retraining's. Gold: models retrained without."
        if count > 1:
            caption += f" Means over up to {count} batches."
        drawn = [*_utility(groups.get(kinds, []), f"{salt}-side{place}", kinds_label(kinds)),
                 *_prices(groups.get(kinds, []), f"{salt}-price{place}")]  # fmt: skip
        text += (
            f"<h4>{esc(kinds_label(kinds).capitalize())}</h4>"
            f'<div class="scroll"><table class="dense"><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>{charts(drawn)}"
        )
    return f"<h3>Strategies side by side</h3>{text}"


def _badge(text: str, good: bool) -> str:
    return f'<span class="badge {"" if good else "bad"}">{esc(text)}</span>'


def _utility(groups: Sequence[Group], name: str, what: str) -> Iterable[str]:
    batches = [batch for group in groups for batch in group.batches]
    if not panels.can_place(batches):
        return
    told = []
    for group in groups:
        for batch in group.batches:
            ratio = batch.of_gold(panels.UTILITY)
            values = [
                f"{label_of(key)} {value:.3f} (gold {gold:.3f})"
                for key in panels.attacks_of([batch])
                if (value := batch.value(key)) is not None and (gold := batch.gold(key)[0]) is not None
            ]
            if ratio is not None:
                title = group.label if len(group.batches) == 1 else f"{group.label}, {batch.title}"
                told.append(f"{title}: NDCG@20 {share_text(ratio)} of gold, {', '.join(values)}")
    alt = f"Forgetting against utility, {what}. {'; '.join(told)}."
    caption = "Height 0: attacks do as on a model that never saw the data. Both above and below are a difference."
    yield figure("Forgetting against utility", plots.utility_svg(name, alt, groups), caption)


def _prices(groups: Sequence[Group], name: str) -> Iterable[str]:
    priced = [group for group in groups if lines.has_price(group)]
    if priced:
        shown = [f"{group.label} {share_text(group.batches[0].ratio() or 0.0)}" for group in priced]
        svg = plots.prices_svg(name, f"CPU time against retraining: {', '.join(shown)}.", priced)
        yield figure("Its price", svg, "Hollow: a gate failed.")


def pictures(record: UnlearningRecord, salt: str) -> str:
    """Of one strategy: forgetting against utility, and for many requests in a row how the model wears."""
    if len(record.strategies) > 1:
        return ""
    groups = plots.groups_of(record)[()]
    drawn = list(_utility(groups, f"{salt}-utility", record.strategies[0].name))
    for place, group in enumerate(groups):
        if len(group.batches) >= 4 and panels.can_place(group.batches):
            alt = f"{group.label}: NDCG@20 and attacks against gold, for {len(group.batches)} requests in a row."
            svg = plots.drift_svg(f"{salt}-drift{place}", alt, group)
            drawn.append(figure("Request after request", svg))
    return charts(drawn)


def requests(record: UnlearningRecord, salt: str) -> str:
    """When requests came, when they had to be and were honoured."""
    found = record.requests
    if not found:
        return ""
    body = ""
    for one in found:
        state = {True: _badge("in time", True), False: _badge("late", False)}.get(bool(one.in_time), "–")
        cells_ = (one.selector, one.reason or "–", _when(one.received), _when(one.deadline), _when(one.finished))
        texts = "".join(f'<td class="left wrap">{esc(cell)}</td>' for cell in cells_)
        mark = state if one.in_time is not None else "–"
        body += f'<tr><th class="left">{esc(one.id)}</th>{texts}<td class="left">{mark}</td></tr>'
    names = ("request", "scope", "reason", "received", "deadline", "finished", "")
    head = "".join(f'<th class="left">{name}</th>' for name in names)
    table = (
        f'<div class="scroll"><table class="dense"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    drawn = []
    if any(one.received and (one.deadline or one.finished) for one in found):
        told = "; ".join(f"{one.id} {answer_text(one)}" for one in found)
        svg = plots.timeline_svg(f"{salt}-time", f"Time line of requests: {told}.", found)
        note = "Dot: received. Diamond: finished. Bar: deadline."
        if len(record.strategies) > 1:
            note += " Finished: by the slowest of the strategies."
        drawn = [figure("Requests and their deadlines", svg, note)]
    return f"<h3>Requests</h3>{charts(drawn)}{table}"


def _when(time: datetime | None) -> str:
    if time is None:
        return "–"
    zone = time.tzname() or ""
    return f"{time:%Y-%m-%d %H:%M}{f' {zone}' if zone else ''}"
