"""The report of an unlearning experiment: the verdict first, then requests and gates, at the end the model itself.

One self-contained page in the style of ``report``; its account of the requests is ``sections.unlearning``.
"""

from __future__ import annotations

import contextlib
import os
from importlib import resources
from pathlib import Path
from string import Template

from fedrec.errors import ConfigError
from fedrec.experiment import report_charts, report_privacy, report_sections
from fedrec.experiment.console import name_of
from fedrec.experiment.report import RunRecord, label_runs, read_run
from fedrec.experiment.report_sections import esc
from fedrec.experiment.unlearn.reading import read_unlearning
from fedrec.experiment.unlearn.sections import unlearning


def page(record: RunRecord) -> tuple[str, str]:
    """Title (escaped) and body of the page about one run that unlearned."""
    found = read_unlearning(record.summary)
    names = [strategy.name for strategy in found.strategies] if found else []
    how = f": {', '.join(names)}" if 0 < len(names) <= 2 else f": {len(names)} strategies" if names else ""
    title = esc(f"Unlearning on {name_of(record.summary.get('dataset'), 'unnamed data')}{how}")
    account = unlearning(record, "run0").replace("<h3>Unlearning</h3>", "", 1)
    model = "".join(
        (
            report_sections.alerts(record),
            report_sections.lede(record),
            report_sections.what_ran(record),
            report_charts.result_bars([record], "run0"),
            report_charts.result_table(record),
            report_charts.curves(record, "run0"),
            report_charts.traffic(record, "run0"),
            report_charts.timing(record, "run0"),
            report_privacy.privacy(record, "run0"),
            report_privacy.attacks(record, "run0"),
            report_sections.configuration(record),
        )
    )
    heading = "<h2>The training run</h2>" if found else ""
    body = f'<section class="run">{heading}{model}</section>'
    return title, f"<h1>{title}</h1>{report_sections.subtitle(record)}{account}{body}"


def render_unlearn_report(record: RunRecord) -> str:
    """The whole page for a record as ``report.read_run`` gives it."""
    from fedrec.experiment.report_pages import footer

    template = Template(resources.files("fedrec.experiment").joinpath("report.html").read_text(encoding="utf-8"))
    style = resources.files("fedrec.experiment").joinpath("report.css").read_text(encoding="utf-8")
    labelled = label_runs([record])
    title, body = page(labelled[0])
    return template.substitute(title=title, style=style, body=body, footer=footer(labelled))


def write_unlearn_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page about ``run_dir`` to ``output`` (default: its ``report.html``), replacing only by a complete one.

    Raises ConfigError for a run directory that cannot be read or an output that cannot be written.
    """
    target = output if output is not None else run_dir / "report.html"
    html = render_unlearn_report(read_run(run_dir))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(html, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ConfigError(
            f"{target} cannot be written ({error.strerror or error}): choose another place for the report"
        ) from error
    return target
