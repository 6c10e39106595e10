"""What a run's report shows of its privacy and of the attacks on it: the guarantee in words first, numbers after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedrec.experiment import plots
from fedrec.experiment.console import format_count, number, part
from fedrec.experiment.guarantees import areas, audit_bounds, guarantee, is_private, what_the_server_saw
from fedrec.experiment.report import RunRecord
from fedrec.experiment.report_charts import points
from fedrec.experiment.report_sections import charts, esc, facts, figure, tree

_ACCOUNTANTS = {"gaussian": "exact Gaussian composition", "prv": "PRV", "rdp": "RDP"}
# Said in words, in the accounting's table, or in a chart.
_SHOWN = frozenset(
    ("mode", "unit", "epsilon", "delta", "adjacency", "sampler", "sample_rate", "accountant", "note",
     "noise_multiplier", "noise_multipliers", "max_grad_norm", "releases", "trust", "private", "statement", "covers",
     "not_covered", "signal_to_noise", "row_set", "optimizer")
)  # fmt: skip


def privacy(record: RunRecord, salt: str) -> str:
    """The guarantee, its accounting, and clipping and noise over the rounds; nothing for a run without a mechanism."""
    said = part(record.summary, "privacy")
    if not said:
        return ""
    text = guarantee(record.summary).partition(" Not covered: ")[0]
    if not is_private(record.summary):
        told = f'<p class="alert bad"><strong>Not private.</strong> {esc(text)}</p>'
    else:
        told = f"<p>{esc(text)}</p>"
        if said.get("unit") == "interaction":
            warning = "The unit is one interaction: this is not a guarantee for a user, whose history is many of them."
            told += f'<p class="alert"><strong>Not a guarantee for a user.</strong> {warning}</p>'
    return f"<h3>Privacy</h3>{told}{_accounting(said)}{_over_rounds(record, salt)}"


def _accounting(said: Mapping[str, Any]) -> str:
    noise = _numbers(said.get("noise_multipliers")) or _numbers([said.get("noise_multiplier")])
    sampling = "everyone in every release" if said.get("sampler") == "all" else ""
    if said.get("sampler") == "poisson":
        sampling = f"Poisson, rate {number(said.get('sample_rate')) or 0.0:g}"
    accountant = _ACCOUNTANTS.get(str(said.get("accountant")), str(said.get("accountant") or ""))
    if said.get("note"):
        accountant += f" ({said['note']})"
    left_out = said.get("not_covered")
    missing = "; ".join(map(str, left_out)) if isinstance(left_out, Sequence) and not isinstance(left_out, str) else ""
    ratio = number(said.get("signal_to_noise"))
    pairs = [
        ("Unit", esc(said.get("unit", ""))),
        ("Neighbouring data", esc(said.get("adjacency") or "")),
        ("Epsilon", _value(said.get("epsilon"), none="infinite (no guarantee)")),
        ("Delta", _value(said.get("delta"))),
        ("Trusted", esc(said.get("trust") or "")),
        ("Covered", esc(said.get("covers") or "")),
        ("Not covered", esc(missing)),
        ("Sampling", esc(sampling)),
        ("Releases", esc(format_count(number(said.get("releases"))))),
        ("Noise multiplier", esc(", ".join(f"{value:.4g}" for value in noise)) if any(noise) else "none"),
        ("Clipping norm", _value(said.get("max_grad_norm"))),
        ("Signal to noise", "" if ratio is None else f"{ratio:.3g}, mean over the releases (norms of the mean update)"),
        ("Accountant", esc(accountant)),
        ("Row set", esc(said.get("row_set") or "")),
        ("Optimizer", esc(said.get("optimizer") or "")),
    ]
    rest = [(str(key).replace("_", " "), tree(value)) for key, value in said.items() if key not in _SHOWN]
    ledger = '<p class="note">Every release, with its noise and what it adds up to, is in ledger.json.</p>'
    return facts([*pairs, *rest]) + ledger


def _numbers(values: object) -> list[float]:
    listed = values if isinstance(values, Sequence) and not isinstance(values, str) else []
    return [value for one in listed if (value := number(one)) is not None]


def _value(value: object, none: str = "") -> str:
    found = number(value)
    return none if found is None else f"{found:.6g}"


def _over_rounds(record: RunRecord, salt: str) -> str:
    """Signal against noise, the clipping norm and the share of clipped devices; nothing for one or two releases."""
    if len(record.rounds) < 3:
        return ""
    drawn = []
    norms = [("signal", *points(record, "signal_norm")), ("noise", *points(record, "noise_norm"))]
    series = [plots.Series(name, xs, ys, style) for style, (name, xs, ys) in enumerate(norms) if xs]
    if series:
        last = ", ".join(f"{one.label} {one.y[-1]:.3g}" for one in series)
        svg = plots.curves(f"{salt}-noise", f"Norms over rounds, at last: {last}", series, from_zero=True)
        drawn.append(figure("L2 norm of the mean update", svg, "Signal: without the noise. Only a simulator knows it."))
    clip = points(record, "clip")
    if len(set(clip[1])) > 1:
        svg = plots.curves(
            f"{salt}-clip", f"Clipping norm over rounds, at last {clip[1][-1]:.3g}", [plots.Series("", *clip)],
            from_zero=True,
        )  # fmt: skip
        drawn.append(figure("Clipping norm", svg, "It follows a noisy quantile of the devices' norms."))
    share = points(record, "clipped_share")
    if share[0]:
        svg = plots.curves(
            f"{salt}-clipped", f"Share of clipped devices, at last {share[1][-1]:.3g}",
            [plots.Series("", *share)], y_format=lambda value: f"{100 * value:.3g} %", from_zero=True,
        )  # fmt: skip
        drawn.append(figure("Devices whose update was clipped", svg))
    abandoned = [str(line["abandoned"]) for line in record.rounds if line.get("abandoned")]
    count = "one round was" if len(abandoned) == 1 else f"{len(abandoned)} rounds were"
    said = f"<p>{count.capitalize()} abandoned: {esc(abandoned[0])}.</p>" if abandoned else ""
    return charts(drawn) + said


def attacks(record: RunRecord, salt: str) -> str:
    """How well attacks did on the run, and what the attacker had before it; nothing where none was mounted."""
    found = part(record.summary, "attacks")
    if not found:
        return ""
    body = [f"<p>{esc(what_the_server_saw(record.summary))}</p>", _chart(record, salt), _audit(record.summary)]
    body.append(_interaction(found.get("interaction")))
    body.append(_membership(part(found, "membership")))
    body.append(_attribute(found.get("attribute")))
    known = ("interaction", "membership", "attribute", "audit")
    body += [f"<h4>{esc(key)}</h4>{tree(value)}" for key, value in found.items() if key not in known]
    return "<h3>Attacks</h3>" + "".join(body)


def _chart(record: RunRecord, salt: str) -> str:
    rows = [plots.Bar(label, area, f"{area:.2f}", 0, interval) for label, area, interval in areas(record.summary)]
    if not rows:
        return ""
    rows.append(plots.Bar("guessing", 0.5, "0.50", None, guide=True))
    alt = "Area under the ROC curve of each attack: " + ", ".join(f"{row.label} {row.text}" for row in rows)
    svg = plots.bars(f"{salt}-attacks", alt, rows, limit=1.08)
    return charts([figure("Area under the ROC curve", svg, "Thin line: 95 % interval over the attacked users.")])


def _audit(summary: Mapping[str, Any]) -> str:
    audit = part(summary, "attacks", "audit")
    if not audit:
        return ""
    bound, claimed = audit_bounds(summary)
    if bound is None:
        return f"<h4>Audit</h4>{tree(audit)}"
    confidence, ceiling = number(audit.get("confidence")), number(audit.get("ceiling"))
    text = f"With {100 * (confidence or 0.95):.0f} % confidence epsilon is at least {bound:.2f}"
    text += "; no epsilon is claimed." if claimed is None else f"; {claimed:.3g} is claimed."
    if ceiling is not None:
        text += (
            f" {format_count(number(audit.get('canaries')))} canaries could have shown {ceiling:.2f} at most, so a low "
            "bound is no proof of privacy; one above the claim proves a fault."
        )
    alert = ""
    if audit.get("violated"):
        alert = '<p class="alert bad"><strong>The claimed epsilon is refuted.</strong> The mechanism has a fault.</p>'
    return f"<h4>Audit with planted canary devices</h4>{alert}<p>{esc(text)}</p>"


_GUESSES = {"sign": "sign attack", "row_set": "row set"}


def _interaction(entries: object) -> str:
    lines = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    if not lines:
        return ""
    columns = {
        "precision": "precision", "recall": "recall", "f1": "F1", "auc": "AUC", "random_f1": "F1 of guessing as many",
    }  # fmt: skip
    rows, said = [], []
    for entry in lines:
        rows += [
            [_round(entry), label, *(_cell(part(entry, name).get(key)) for key in columns)]
            for name, label in _GUESSES.items()
            if part(entry, name)
        ]
        if entry.get("hidden"):
            said.append(f"Round {_round(entry)}: {entry['hidden']}.")
        alone = part(entry, "singletons")
        if alone:
            said.append(
                f"Of the rows that {_cell(alone.get('participants'))} devices touched, "
                f"{_percent(alone.get('row_share'))} are one device's alone and arrive in the sum unchanged; "
                f"{_percent(alone.get('user_share'))} of the devices have such rows."
            )
        linked = part(entry, "linked")
        if linked and number(linked.get("pairs")):
            said.append(
                f"Rows linked to one device by their direction: {_cell(linked.get('pairs'))} pairs, precision "
                f"{_cell(linked.get('precision'))}, recall {_cell(linked.get('recall'))}."
            )
    head = ["round", "guess from", *columns.values()]
    sentences = "".join(f"<p>{esc(text)}</p>" for text in said)
    return f"<h4>A user's items from one upload</h4>{_table(head, rows)}{sentences}"


def _membership(found: Mapping[str, Any]) -> str:
    ways = {"fold_in": "fold-in", "score": "score"}
    columns = {
        "members": "members", "nonmembers": "non-members", "auc": "AUC", "auc_low": "from", "auc_high": "to",
        "advantage": "advantage", "tpr_at_fpr_1pct": "TPR at 1 % FPR",
    }  # fmt: skip
    rows = [
        [label, *(_cell(part(found, way).get(key)) for key in columns)]
        for way, label in ways.items()
        if part(found, way)
    ]
    note = "<p>Did a person take part in the training? Asked of the released item view.</p>"
    return f"<h4>Membership</h4>{note}{_table(['test by', *columns.values()], rows)}" if rows else ""


def _attribute(entries: object) -> str:
    rows, said = [], []
    for entry in entries if isinstance(entries, list) else []:
        for key, label in (("gender", "gender"), ("age_35", "age 35 or over")):
            found = part(entry, key)
            if number(found.get("auc")) is not None:
                cells = [_cell(found.get(name)) for name in ("users", "positives", "auc", "auc_low", "auc_high")]
                rows.append([_round(entry), label, *cells])
            elif found.get("skipped"):
                said.append(f"{label}: {found['skipped']}.")
        said += [f"Round {_round(entry)}: {entry[key]}." for key in ("hidden", "skipped") if part(entry).get(key)]
    if not rows and not said:
        return ""
    table = _table(["round", "attribute", "users", "positives", "AUC", "from", "to"], rows)
    return f"<h4>Attributes from an upload</h4>{table}" + "".join(f"<p>{esc(text)}</p>" for text in dict.fromkeys(said))


def _round(entry: Mapping[str, Any]) -> str:
    return format_count(number(entry.get("round")))


def _cell(value: object) -> str:
    found = number(value)
    if found is None or not math.isfinite(found):
        return "–"
    return format_count(found) if found == int(found) and found > 1 else f"{found:.3f}"


def _percent(value: object) -> str:
    found = number(value)
    return "–" if found is None else f"{100 * found:.1f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    names = "".join(f'<th class="{"" if place else "left"}">{esc(name)}</th>' for place, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f'<td class="{"" if place else "left"}">{esc(cell)}</td>' for place, cell in enumerate(row))
        + "</tr>" for row in rows
    )  # fmt: skip
    return (
        f'<div class="scroll"><table class="compact"><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'
    )
