"""The report and the tables say what the run directories say: all of it, escaped, and nothing else."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedrec.errors import ConfigError
from fedrec.experiment.console import format_bytes, format_seconds, markdown_table, result_rows, result_table
from fedrec.experiment.report import RunRecord, label_runs, read_run, write_report
from fedrec.experiment.report_charts import hit_interval
from tests.experiment.run_directories import lines_of, metrics_at, summary_of, write_run

VOID = {"meta", "br", "hr", "img", "input", "link", "source", "col", "wbr"}


class Page(HTMLParser):
    """A page taken apart: tags in order, attributes, text; fails on tags that do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def paper_summary(**changes: Any) -> dict[str, Any]:
    return summary_of(
        "fedrap",
        40,
        25,
        protocol={"name": "paper", "split": "leave-last-one-out", "ties": "first", "ranking": "sampled", "leaky": True},
        ranking="sampled",
        select_on="test hr@10",
        test=metrics_at(1.0, 0.98) | {"full_hr@10": 0.94, "full_ndcg@10": 0.7},
        validation=metrics_at(1.0, 0.97),
        baselines={
            "popularity": {"test": {"hr@10": 0.404, "ndcg@10": 0.226, "full_hr@10": 0.085}},
            "ease": {"skipped": "27,278 items need 5.9 GB"},
            "local_only": {"test": {"hr@10": 1.0}, "rounds": 20},
        },
        **changes,
    )


def report_of(tmp_path: Path, *runs: Path) -> Page:
    return Page(write_report(runs, tmp_path / "report.html"))


def table_text(summaries: list[dict[str, Any]], width: int = 200) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(result_table(summaries))
    return out.getvalue()


def test_a_report_tells_the_whole_run_and_needs_nothing_but_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "fedmf_ml100k" / "2025-01-31", summary_of(), config="algorithm:\n  name: fedmf\n")
    page = report_of(tmp_path, run)
    for fact in (
        "fedmf on ml-100k",
        "943 users, 1,682 items, 100,000 interactions, density 6.3 %",
        "cite Harper and Konstan 2015",
        "Test HR@10 0.133 and NDCG@10 0.070 (full ranking), at round 45 of 60, chosen on validation ndcg@10.",
        "popularity 0.085, EASE 0.147, local only 0.004",
        "415 of 943 users have a tied last timestamp",
        "torch 2.13.0",
        "sampler: all; fraction: 1.0; nodes: 2",
        "name: inline; workers: 1; device: cpu",
        "55.0 kB (26 % of dense)",
        "3.30 MB",  # 60 rounds of 55 kB
        "3.11 GB",  # the same for 943 users
        "best round 45",
        "1 min 01 s",
        "1,184 MB",
        "86.7 %",
        "algorithm: name: fedmf",
        "fedmf_ml100k/2025-01-31",
    ):
        assert fact in page.text, fact
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    references = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href", "action")]
    assert references
    assert all(value.startswith("#") for value in references)
    assert "@import" not in page.html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page.html))
    assert "<h3>Privacy</h3>" not in page.html
    assert "<h3>Unlearning</h3>" not in page.html


def test_privacy_and_unlearning_have_sections_when_a_run_had_them(tmp_path: Path) -> None:
    privacy = {"unit": "user", "epsilon": 4.0, "delta": 1e-5, "adjacency": "add/remove one user", "private": True}
    privacy |= {"statement": "(4, 1e-05)-differential privacy for one user", "sampler": "poisson", "sample_rate": 0.1}
    unlearning = {"strategy": "reverse BPR", "requests": [{"user": 3, "gate": "passed"}, {"user": 9, "gate": "failed"}]}
    run = write_run(tmp_path / "run", summary_of(privacy=privacy, unlearning=unlearning), lines=[])
    page = report_of(tmp_path, run)
    assert "Privacy (4, 1e-05)-differential privacy for one user." in page.text
    assert "Neighbouring data add/remove one user" in page.text
    assert "Sampling Poisson, rate 0.1" in page.text
    assert "user gate 3 passed 9 failed" in page.text


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script><b onload=\"x\">$\\frac{&amp;</style>-->"
    summary = summary_of(
        evil,
        protocol={"name": evil, "split": evil, "leaky": True},
        dataset={"name": evil, "users": 9, "items": 9, "interactions": 30, "licence": evil, "sha256": evil},
        status=evil,
        reason=evil,
        select_on=evil,
        warnings=[evil],
        seed=evil,
        versions={evil: evil, "fedrec": evil},
        privacy={evil: evil, "unit": evil, "epsilon": 1.0, "delta": 0.1, "adjacency": evil},
        unlearning={evil: [{evil: evil}, {"deep": {evil: [evil]}}]},
    )
    summary["baselines"][evil] = {"test": {"hr@10": 0.1, evil: 0.2}}
    summary["baselines"]["ease"] = {"skipped": evil}
    summary["traffic"][evil] = evil
    summary["histogram"][f"{evil}_ndcg"] = [3, 2]
    lines = lines_of(4)
    for line in lines:
        line["sparsity"] = {evil: 0.5}
    first = write_run(tmp_path / "a" / "one", summary, lines, config=evil)
    second = write_run(tmp_path / "b" / "one", summary | {"seed": 2}, lines, config=evil)
    page = report_of(tmp_path, first, second)
    assert not {"script", "b"} & set(page.tags)
    assert page.tags.count("style") == 1
    assert not [name for _, name, _ in page.attributes if name == "onload"]
    assert page.html.count("<!--") == 0
    assert page.text.count(evil) >= 30


def test_a_leaky_protocol_and_a_choice_on_test_are_said_before_any_number(tmp_path: Path) -> None:
    page = report_of(tmp_path, write_run(tmp_path / "run", paper_summary(), []))
    warned, chosen, result = (page.text.index(text) for text in ("Leaky protocol.", "Chosen on test.", "Test HR@10"))
    assert warned < chosen < result
    assert "EASE was skipped: 27,278 items need 5.9 GB." in page.text
    assert "paper (leaky)" in table_text([paper_summary()])
    assert "paper (leaky)" in markdown_table([paper_summary()])
    assert "leaky" not in table_text([summary_of()]) + markdown_table([summary_of()])


@pytest.mark.parametrize("status", ["diverged", "interrupted", "failed"])
def test_a_run_that_did_not_end_well_says_so_and_why(tmp_path: Path, status: str) -> None:
    lines = [{"round": n, "loss": 0.5 if n < 9 else math.nan} for n in range(1, 13)]
    summary = summary_of(status=status, reason="the loss was not finite in round 9", histogram=None, baselines=None)
    page = report_of(tmp_path, write_run(tmp_path / "run", summary, lines))
    assert f"{status}. the loss was not finite in round 9" in page.text
    assert "not finite from round 9" in page.text
    assert f"fedmf [{status}]" in table_text([summary])


def test_a_loss_over_many_orders_of_magnitude_is_drawn_on_a_log_scale(tmp_path: Path) -> None:
    lines = [{"round": n, "loss": -0.2 * 10 ** (n / 2)} for n in range(1, 31)]
    assert "−1e14" in report_of(tmp_path, write_run(tmp_path / "run", {}, lines)).text


def test_several_runs_are_compared_first_and_then_told_one_by_one(tmp_path: Path) -> None:
    ease_line = {"round": 1, "validation": {"ndcg@10": 0.08}, "upload_bytes_per_user": 5.7e6}
    runs = [
        write_run(tmp_path / "fedmf" / "one", summary_of()),
        write_run(tmp_path / "fedease" / "one", summary_of("fedease", 1, 1, 0.141), [ease_line]),
        write_run(tmp_path / "paper" / "one", paper_summary(), lines_of(40, 0.9)),
    ]
    page = report_of(tmp_path, *runs)
    assert page.tags.count("section") == 3
    assert "3 runs on ml-100k" in page.text
    assert "The runs differ in data set or protocol: compare numbers only within one." in page.text
    assert "Result on ml-100k, protocol clean" in page.text
    assert "Result on ml-100k, protocol paper (leaky)" in page.text
    assert "Validation NDCG@10, full ranking, over upload" in page.text
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value for tag, name, value in page.attributes if tag == "a" and name == "href"}
    assert links == {"#run0", "#run1", "#run2"}
    used = {value[1:] for _, name, value in page.attributes if name in ("href", "xlink:href")}
    assert used <= set(ids)


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", summary_of(), lines_of(5))
    first = write_report([run], tmp_path / "a.html").read_bytes()
    assert write_report([run], tmp_path / "b.html").read_bytes() == first


def test_matplotlib_is_loaded_only_for_a_report_and_left_as_it_was(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", summary_of(), lines_of(3))
    code = f"""
import sys
from pathlib import Path
import fedrec.experiment.console, fedrec.experiment.progress, fedrec.experiment.report as report
assert not [name for name in sys.modules if name.startswith("matplotlib")]
import matplotlib
before = matplotlib.rcParams.copy()
report.write_report([Path({str(run)!r})], Path({str(tmp_path / "out.html")!r}))
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_run_with_an_empty_summary_still_has_a_report_and_a_row(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text("{}")
    page = report_of(tmp_path, run)
    assert "No test metrics were recorded." in page.text
    assert "metrics.jsonl is missing" in page.text
    assert table_text([{}]).count("–") >= 7


def test_null_and_unexpected_types_leave_facts_out_and_break_nothing(tmp_path: Path) -> None:
    nulls = dict.fromkeys(summary_of())
    odd = summary_of(dataset="ml-100k", protocol="clean", algorithm={"name": "fedmf"}, warnings="one sentence")
    odd["baselines"] = {"popularity": {"hr@10": 0.08}, "ease": None, "local_only": 3}
    odd["traffic"] = {"upload_bytes_per_user_round": None, "dense_bytes": 0}
    odd |= {"histogram": {"test_ndcg@10": [None]}, "timing": [], "memory": "?", "rounds": None}
    lines = [{}, {"round": 2, "loss": None, "validation": None, "sparsity": None}, {"validation": {"ndcg@10": "high"}}]
    runs = [write_run(tmp_path / name, summary, lines) for name, summary in (("nulls", nulls), ("odd", odd))]
    page = report_of(tmp_path, *runs)
    assert "one sentence" in page.text
    assert "popularity" in page.text
    for key in summary_of():
        without = {name: value for name, value in summary_of().items() if name != key}
        assert "popularity" in markdown_table([without]) or key == "baselines"


def test_a_corrupt_or_missing_run_directory_is_named_with_its_remedy_and_nothing_is_written(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", summary_of(), lines_of(3))
    broken = write_run(tmp_path / "broken", summary_of(), lines_of(3))
    (broken / "metrics.jsonl").write_text('{"round": 1}\n{"round": \n{"round": 3}\n')
    cut = write_run(tmp_path / "cut", summary_of(), [])
    (cut / "summary.json").write_text('{"schema": 1,\n "algo')
    listed = write_run(tmp_path / "listed", summary_of(), [])
    (listed / "summary.json").write_text("[]")
    binary = write_run(tmp_path / "binary", summary_of(), [])
    (binary / "config.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    empty = tmp_path / "empty"
    empty.mkdir()
    output = tmp_path / "report.html"
    output.write_text("an older report")
    for path, message in (
        (broken, r"broken/metrics\.jsonl, line 2, is not valid JSON .* repeat the run"),
        (cut, r"cut/summary\.json is not valid JSON \(.*line 2, column 2.*\): restore the file"),
        (listed, r"listed/summary\.json holds list instead of a JSON object"),
        (binary, r"binary/config\.yaml cannot be read"),
        (empty, r"empty has no summary\.json: .*run that has ended"),
        (tmp_path / "nowhere", r"nowhere does not exist: give a directory written by `fedrec run`"),
        (good / "summary.json", r"summary\.json is a file, not a run directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_report([good, path], output)
    with pytest.raises(ConfigError, match="no run directory given"):
        write_report([], output)
    with pytest.raises(ConfigError, match="is a directory: name the HTML file"):
        write_report([good], tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be written .*choose another place"):
        write_report([good], output / "below.html")
    assert output.read_text() == "an older report"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["report.html"]


def test_a_metrics_file_cut_off_in_its_last_line_is_used_up_to_there_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {}, lines_of(6))
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole[:-40])
    record = read_run(run)
    assert [line["round"] for line in record.rounds] == [1, 2, 3, 4, 5]
    assert "The last line of metrics.jsonl is incomplete" in report_of(tmp_path, run).text
    (run / "metrics.jsonl").write_text(whole[:-1])  # only the line end is missing
    assert len(read_run(run).rounds) == 6


def test_the_table_never_mixes_full_and_sampled_rankings() -> None:
    clean, paper = result_rows([summary_of(), paper_summary()])[0::4][:2]
    assert (clean.hr, clean.sampled_hr) == (0.133, pytest.approx(0.133 * 4.6))
    assert (paper.hr, paper.sampled_hr) == (0.94, 0.98)
    assert paper.ndcg == 0.7


def test_baselines_shared_by_runs_are_listed_once_and_local_only_per_algorithm() -> None:
    rows = result_rows([summary_of(), summary_of("fedease", 1, 1, 0.141), paper_summary()])
    labels = [(row.label, row.protocol) for row in rows]
    assert labels == [
        ("fedmf", "clean"),
        ("fedease", "clean"),
        ("popularity", "clean"),
        ("EASE", "clean"),
        ("fedmf, local only", "clean"),
        ("fedease, local only", "clean"),
        ("fedrap", "paper (leaky)"),
        ("popularity", "paper (leaky)"),
        ("EASE", "paper (leaky)"),
        ("fedrap, local only", "paper (leaky)"),
    ]


def test_console_and_markdown_say_the_same_numbers() -> None:
    summaries = [summary_of(), paper_summary(dataset={"name": "ml|1m"})]
    shown, markdown = table_text(summaries), markdown_table(summaries)
    lines = markdown.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {12}
    assert len(table) == 2 + len(result_rows(summaries))
    assert "ml\\|1m" in markdown
    numbers = re.findall(r"\d\.\d{3}|\d+ \(\d+\)|[\d.]+ MB", shown)
    assert len(numbers) > 20
    assert numbers == re.findall(r"\d\.\d{3}|\d+ \(\d+\)|[\d.]+ MB", markdown)
    assert "EASE was skipped: 27,278 items need 5.9 GB" in shown
    assert "EASE was skipped: 27,278 items need 5.9 GB" in markdown


def test_the_console_table_keeps_every_number_whole_in_a_terminal_of_80_columns() -> None:
    summaries = [summary_of(rounds=150, best=115), summary_of("fedease", 1, 1, 0.141), paper_summary(status="diverged")]
    wide, narrow = table_text(summaries, 200), table_text(summaries, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow
    figures = r"\d\.\d{3}|\d+ \(\d+\)|[\d.]+ MB|61\.4"
    assert re.findall(figures, narrow) == re.findall(figures, wide)


def test_the_interval_of_a_hit_rate_is_the_binomial_one_over_the_users_that_were_evaluated() -> None:
    low, high = hit_interval(summary_of(), 0.133) or (0.0, 0.0)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.133 * 0.867 / 943))
    fewer = hit_interval(summary_of(histogram={"test_ndcg@10": [90, 10]}), 0.2)
    assert fewer == (pytest.approx(0.2 - 0.0784), pytest.approx(0.2 + 0.0784))
    drawn_thrice = summary_of(histogram={"test_ndcg@10": [2700, 129]})
    assert hit_interval(drawn_thrice, 0.133) == (pytest.approx(low), pytest.approx(high))
    assert hit_interval({}, 0.2) is None


def test_upload_of_a_user_is_the_recorded_total_or_the_rounds_times_a_round() -> None:
    traffic = {"upload_bytes_per_user_round": 1000.0}
    assert result_rows([summary_of(rounds=60, traffic=traffic)])[0].upload == 60_000
    recorded = traffic | {"upload_bytes_per_user_total": 6100.0}
    assert result_rows([summary_of(rounds=60, traffic=recorded)])[0].upload == 6100


TRAITS = st.tuples(st.sampled_from("ab"), st.sampled_from("cd"), st.sampled_from("ef"), st.integers(1, 2))


@given(st.lists(TRAITS, min_size=1, max_size=7))
def test_labels_tell_runs_apart_and_start_with_the_algorithm(runs: list[tuple[str, str, str, int]]) -> None:
    records = [
        RunRecord(Path(f"/runs/{experiment}/{seed}"), {"algorithm": algorithm, "protocol": protocol, "seed": seed})
        for algorithm, protocol, experiment, seed in runs
    ]
    labels = [record.label for record in label_runs(records)]
    assert len(set(labels)) == len(labels)
    assert all(label.startswith(run[0]) for label, run in zip(labels, runs, strict=True))
    if len({run[0] for run in runs}) == len(runs):
        assert labels == [run[0] for run in runs]


@given(st.floats(0, 1e14))
@settings(max_examples=200)
def test_bytes_are_written_with_three_digits_and_a_unit(value: float) -> None:
    number, unit = format_bytes(value).split()
    scale = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number) * scale == pytest.approx(value, rel=0.0051, abs=0.51)
    assert unit == "TB" or float(number) < 1000


@given(st.floats(0, 1e6))
@settings(max_examples=200)
def test_durations_read_back_to_what_they_were(value: float) -> None:
    seconds = {"s": 1, "min": 60, "h": 3600}
    words = format_seconds(value).split()
    total = sum(float(amount) * seconds[unit] for amount, unit in zip(words[::2], words[1::2], strict=True))
    assert total == pytest.approx(value, abs=0.5 if value < 3600 else 60)
    assert "60 s" not in " ".join(words[2:])


def test_summary_json_with_nan_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", summary_of(test={"hr@10": math.nan, "ndcg@10": 0.07}), lines_of(3))
    assert "NaN" in (run / "summary.json").read_text()
    assert json.loads((run / "summary.json").read_text())["seed"] == 7
    assert "Test HR@10 nan and NDCG@10 0.070" in report_of(tmp_path, run).text
