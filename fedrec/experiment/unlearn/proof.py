"""What the report's verdict rests on: guarantees and stores, golds, the audit log, and what none of it proves."""

from __future__ import annotations

from fedrec.experiment.console import format_count, format_metric, format_seconds, number, part
from fedrec.experiment.report import RunRecord
from fedrec.experiment.report_sections import esc, facts, pretty
from fedrec.experiment.unlearn.record import UnlearningRecord
from fedrec.experiment.unlearn.words import NOT_COVERED, counted, store_text

_MEANS = {
    "exact": "the model is what training without the data gives",
    "approximate": "measured, not proved: see the gates",
    "filter only": "the model still holds the data; recommendations are filtered",
    "certified": "proved up to ε and δ",
    "none": "no promise",
}


def guarantees(record: UnlearningRecord) -> str:
    """What each strategy promises and which updates it has to keep for that."""
    body = ""
    for strategy in record.strategies:
        for text in dict.fromkeys([*(batch.guarantee for batch in strategy.batches), strategy.guarantee]):
            means = next((said for key, said in _MEANS.items() if text.startswith(key)), "")
            body += (
                f'<tr><th class="left">{esc(strategy.name)}</th><td class="left">{esc(text)}</td>'
                f'<td class="left wrap">{means}</td><td class="left">{esc(store_text(strategy))}</td></tr>'
            )
    names = ("strategy", "guarantee", "which means", "updates kept")
    head = "".join(f'<th class="left">{name}</th>' for name in names)
    note = "Kept updates are personal data themselves: they are purged with the person whom they came from."
    kept = any(strategy.store_where != "none" for strategy in record.strategies)
    return (
        f'<h3>Guarantee and stores</h3><div class="scroll"><table class="compact"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>" + (f"<p>{note}</p>" if kept else "")
    )


def finals(record: UnlearningRecord, run: RunRecord) -> str:
    """Test metrics of the models at the end, beside those of the run itself."""
    columns = [("this run", part(run.summary, "test"))] + [
        (one.name, one.test) for one in record.strategies if one.test
    ]
    wanted = ("hr@10", "ndcg@10", "recall@20")
    names = [name for name in wanted if any(number(values.get(name)) is not None for _, values in columns[1:])]
    if not names:
        return ""
    head = '<th class="left">model</th>' + "".join(f"<th>{pretty(name)}</th>" for name in names)
    body = "".join(
        f'<tr><th class="left">{esc(label)}</th>'
        + "".join(f"<td>{format_metric(number(values.get(name)), 4)}</td>" for name in names)
        + "</tr>"
        for label, values in columns
    )
    return (
        '<h3>Models at the end</h3><div class="scroll"><table class="compact"><caption>Test fold.</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def golds(record: UnlearningRecord) -> str:
    """What the gates compare with."""
    if record.golds is None:
        return ""
    listed = record.gold.get("seeds")
    numbers = (number(one) for one in listed) if isinstance(listed, list) else ()
    seeds = [format(int(found), "d") for found in numbers if found is not None]
    cached, seconds = number(record.gold.get("cached")), number(record.gold.get("cpu_s"))
    text = (
        f"{counted(record.golds, 'model')} trained from scratch without everything forgotten, with other seeds. The "
        "gates compare with their mean; ± is the sample standard deviation between them."
    )
    return f"<h3>Gold</h3><p>{text}</p>" + facts(
        (
            ("Seeds", esc(", ".join(seeds))),
            ("CPU time", esc(format_seconds(seconds) if seconds is not None else "")),
            ("From the cache", esc("" if cached is None else format_count(cached))),
            ("Unlearning seeds", esc(", ".join(map(str, record.seeds)))),
        )
    )


def not_covered() -> str:
    items = "".join(f"<li>{esc(text)}</li>" for text in NOT_COVERED)
    return f"<h3>What this does not prove</h3><ul>{items}</ul>"


def audit(record: UnlearningRecord, run: RunRecord) -> str:
    """Where the evidence is and how to check it."""
    head, count = record.audit.get("head"), number(record.audit.get("count"))
    text = (
        "requests.jsonl holds a line for every event: what was asked (subjects only as keyed hashes), by when, what "
        "was done with which seed, hashes of data, checkpoint and stores before and after, the purge and the gates. "
        "Each line holds the hash of the one before, so a change anywhere breaks the chain."
    )
    return f"<h3>Audit log</h3><p>{text}</p>" + facts(
        (
            ("Head", f"<code>sha256 {esc(head)}</code>" if head else "not recorded in summary.json"),
            ("Lines", esc("" if count is None else format_count(count))),
            ("To check it", f"<code>fedrec unlearn --verify {esc(run.summary.get('run_dir') or run.path)}</code>"),
        )
    )
