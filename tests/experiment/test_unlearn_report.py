"""What is shown of unlearning is what the document says: in the terminal, in files, in pictures, on the page."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console

from fedrec.algorithms.base import Problem, Recommender, Tensors
from fedrec.algorithms.fedmf import FedMF
from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from fedrec.errors import ConfigError
from fedrec.experiment import report_pages
from fedrec.experiment.console import markdown_cell
from fedrec.experiment.report import RunRecord, label_runs, read_run
from fedrec.experiment.unlearn import lines as unlearn_lines
from fedrec.experiment.unlearn import panels as unlearn_panels
from fedrec.experiment.unlearn.plots import PAGE, draw, groups_of, write_pictures
from fedrec.experiment.unlearn.reading import bounds_of, guarantee_text, read_unlearning
from fedrec.experiment.unlearn.record import UnlearningRecord
from fedrec.experiment.unlearn.report import render_unlearn_report, write_unlearn_report
from fedrec.experiment.unlearn.sections import unlearning
from fedrec.experiment.unlearn.table import unlearn_csv, unlearn_markdown, unlearn_tables
from fedrec.experiment.unlearn.words import verdict_sentence
from tests.experiment.test_report import Page
from tests.experiment.unlearning_documents import (
    AFTER,
    BEFORE,
    Document,
    batch,
    comparison,
    document,
    mixed,
    sequential,
    write_unlearning_run,
)
from unlearning.forget import ForgetSet
from unlearning.strategies.base import Cost
from unlearning.verification import Gate, Scene, judge, measure

DOCUMENTS = {
    "mixed": document(),
    "late": document({"reverse_bpr": mixed("reverse_bpr", late=True)}),
    "fell back": document({"delete_rows": [batch(1, "user", "delete_rows", fallback="retrain")]}),
    "compared": comparison(("user", "item"), ("retrain", "reverse_bpr", "fru", "delete_rows")),
    "sequential": sequential(count=5),
}
ONE = document({"reverse_bpr": [batch(1, "user", "reverse_bpr")]})
EVERY = pytest.mark.parametrize("found", DOCUMENTS.values(), ids=DOCUMENTS.keys())


def read(found: Document) -> UnlearningRecord:
    record = read_unlearning(found)
    assert record is not None
    return record


def terminal(found: Document, width: int = 100, every: bool | None = None) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(unlearn_tables(found, every))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def points_of(line: Line2D) -> list[tuple[float, float]]:
    xs, ys = np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)
    return list(zip(xs.tolist(), ys.tolist(), strict=True))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The pages of all DOCUMENTS: drawing takes most of the time of these tests."""
    return {name: page(tmp_path_factory.mktemp("pages"), found) for name, found in DOCUMENTS.items()
            if name != "late"}  # fmt: skip


EVERY_PAGE = pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "late"])


def page(tmp_path: Path, found: Document) -> Page:
    return Page(write_unlearn_report(write_unlearning_run(tmp_path / "run", found)))


def with_changes(found: Document, **changes: Any) -> Document:
    """A copy whose first batch of the first strategy has ``changes``."""
    changed = copy.deepcopy(found)
    next(iter(changed["unlearning"]["strategies"].values()))["batches"][0] |= changes
    return changed


# The verdict


def test_the_verdict_counts_requests_gates_and_late_ones() -> None:
    assert verdict_sentence(read(document())) == "3 requests honoured by reverse_bpr: all 19 gates passed."
    late = verdict_sentence(read(DOCUMENTS["late"]))
    assert late == "3 requests honoured by reverse_bpr: all 19 gates passed. 1 late (r2)."


def test_a_failed_gate_is_named_with_its_request() -> None:
    failed = document({"delete_rows": [batch(1, "user", "delete_rows")]})
    assert verdict_sentence(read(failed)) == "1 request put to delete_rows: 1 of 7 gates failed (fold-in AUC)."
    assert verdict_sentence(read(DOCUMENTS["fell back"])).endswith("(fold-in AUC); retrain took over in r1.")
    said = verdict_sentence(read(sequential()))
    assert said.startswith("8 requests put to reverse_bpr: 6 of 48 gates failed (retain NDCG@20 in r3, r4, r5, r6, r7,")
    assert said.endswith("1 late (r5).")


def test_of_several_strategies_the_verdict_says_who_passed() -> None:
    said = verdict_sentence(read(comparison(("user",))))
    assert said.startswith("1 request put to 9 strategies: retrain, reverse_bpr and fru passed all their gates; ")
    assert "delete_rows" in said.split("gates; ")[1]


def test_gates_that_abstain_are_not_counted_as_passed() -> None:
    found = document({"retrain": [batch(1, "user", "retrain")]})  # its time is reported only
    assert "all 6 gates passed" in verdict_sentence(read(found))
    silent = copy.deepcopy(found)
    for gate in silent["unlearning"]["strategies"]["retrain"]["batches"][0]["gates"]:
        gate["passed"] = None
    assert verdict_sentence(read(silent)) == "1 request honoured by retrain: no gate could decide."


# Tables


@EVERY
def test_tables_fit_a_hundred_columns_with_nothing_cut_off(found: Document) -> None:
    for every in (True, False, None):
        text = terminal(found, every=every)
        assert max(map(len, text.splitlines())) <= 100
        assert "…" not in re.sub(r"r\d … r\d", "", text)


def test_a_request_s_table_shows_before_after_gold_limit_and_verdict() -> None:
    lines = terminal(document()).splitlines()
    row = next(line for line in lines if "fold-in AUC" in line).split()
    assert row == ["fold-in", "AUC", "0.675", "0.478", "0.503", "±", "0.008", "0.503", "±", "0.030", "✓"]
    failed = terminal(document({"delete_rows": [batch(1, "user", "delete_rows")]})).splitlines()
    assert next(line for line in failed if "fold-in AUC" in line).rstrip().endswith("✗")
    assert any("22 % of retraining" in line for line in lines)
    assert "Guarantee: approximate." in "\n".join(lines)


def test_a_gate_that_reports_only_has_a_dash_for_a_verdict() -> None:
    lines = terminal(document({"retrain": [batch(1, "user", "retrain")]})).splitlines()
    assert next(line for line in lines if "time / retraining" in line).split()[-2:] == ["–", "–"]


def test_side_by_side_every_strategy_has_one_line_a_kind_below_gold_and_before() -> None:
    text = terminal(comparison(("user", "item")))
    users, items = text.split("Strategies side by side: items")
    for name in AFTER["user"]:
        assert sum(line.startswith(f"{name} ") for line in users.splitlines()) == 1
    assert {line.split()[0] for line in items.splitlines() if " approx. " in line} == {"reverse_bpr", "delete_rows"}
    line = next(line for line in users.splitlines() if line.startswith("fru ")).split()
    assert line[1:8] == ["0.973", "0.969", "0.121", "0.507", "0.519", "0.868", "0.17"]
    assert "31.0 MB" in next(line for line in users.splitlines() if line.startswith("fru "))
    before = next(line for line in users.splitlines() if line.startswith("before")).split()
    assert [float(cell) for cell in before[3:7]] == list(BEFORE["user"][2:6])


def test_a_line_of_many_requests_is_their_mean() -> None:
    two = document({"a": [batch(1, "user", "reverse_bpr"), batch(2, "user", "fru")], "b": [batch(1, "user", "fru")]})
    line = next(line for line in terminal(two).splitlines() if line.startswith("a "))
    assert line.split()[3] == f"{(0.122 + 0.121) / 2:.3f}"[:5]
    assert "means over 2 batches" in terminal(two)


def test_markdown_tables_are_rectangular_and_carry_the_verdict() -> None:
    for found in DOCUMENTS.values():
        text = unlearn_markdown(found, every=True)
        blocks = [block for block in text.split("\n\n") if block.startswith("| ")]
        assert blocks
        for block in blocks:
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
        assert text.startswith(verdict_sentence(read(found)).split("_")[0])


def test_the_csv_repeats_every_measured_number() -> None:
    found = comparison(("user", "interaction"))
    rows = list(csv.DictReader(io.StringIO(unlearn_csv(found))))
    for name, entry in found["unlearning"]["strategies"].items():
        for place, one in enumerate(entry["batches"], 1):
            own = {row["measure"]: row for row in rows if row["strategy"] == name and row["batch"] == str(place)}
            for gate in one["gates"]:
                assert float(own[gate["name"]]["after"]) == pytest.approx(gate["value"], abs=1e-8)
                assert own[gate["name"]]["passed"] == {True: "true", False: "false", None: ""}[gate["passed"]]
            assert float(own["cpu_s"]["after"]) == pytest.approx(one["cost"]["cpu_s"])
            assert float(own["cpu_s"]["gold"]) == one["retraining"]["cpu_s"]


def test_deviations_over_seeds_stand_beside_the_means() -> None:
    found = document({"reverse_bpr": [batch(1, "user", "reverse_bpr")]})
    found["unlearning"]["strategies"]["reverse_bpr"]["batches"][0]["measured"]["spread"] = {"fold_in_auc": 0.0123}
    found["unlearning"]["seeds"] = [0, 1, 2]
    line = next(line for line in terminal(found).splitlines() if "fold-in AUC" in line)
    assert "0.478 ± 0.012" in line
    assert "Unlearning seeds" in render_unlearn_report(RunRecord(Path("run"), found))


# Reading


def test_certified_is_said_only_with_an_epsilon_and_a_delta() -> None:
    assert guarantee_text({"kind": "certified", "epsilon": 1.5, "delta": 1e-5}) == "certified (ε = 1.5, δ = 1e-05)"
    assert guarantee_text("certified (ε = 1.5, δ = 1e-05)") == "certified (ε = 1.5, δ = 1e-05)"
    for value in ("certified", {"kind": "certified", "epsilon": 1.5}, {"kind": "certified", "delta": 1e-5}):
        assert "certified" not in guarantee_text(value)
    found = with_changes(document({"sifu": [batch(1, "user", "fru")]}), guarantee="certified")
    found["unlearning"]["strategies"]["sifu"]["guarantee"] = "certified"
    for text in (terminal(found), unlearn_markdown(found), unlearn_csv(found)):
        assert "certified" not in text
    assert "certified" not in render_unlearn_report(RunRecord(Path("run"), found))


def test_limits_as_gates_write_them_are_understood() -> None:
    assert bounds_of("≤ 0.136 (gold + 2 sd)", 0.12) == (None, 0.136)
    assert bounds_of("≥ 0.329 (0.95 of gold)", 0.3465) == (0.329, None)
    assert bounds_of("≥ 0.5 of gold", 8.0) == (4.0, None)
    assert bounds_of("≤ 0.3 of retraining", 1.0) == (None, 0.3)
    assert bounds_of("0.506 ± 0.034; asked ± 0.02, seed noise is more", 0.506) == pytest.approx((0.472, 0.54))
    for text in ("", "reported", "not judged", "≤ 2 × noise floor", "≥ nothing (0.95 of gold)"):
        assert bounds_of(text, 0.5) == (None, None)


def judgements() -> Iterator[list[Gate]]:
    """The real gates on models that score at random; one of them remembers what was forgotten, one avoids it."""
    rng = np.random.default_rng(5)
    n_users, n_items = 60, 80
    picked = np.stack([rng.permutation(n_items)[:14] for _ in range(n_users)])

    def table(columns: slice) -> UserItems:
        items = picked[:, columns]
        owner = np.repeat(np.arange(n_users), items.shape[1])
        return UserItems.from_pairs(owner, items.ravel().astype(np.int32), n_users).sorted

    train, validation, test = table(slice(0, 10)), table(slice(10, 12)), table(slice(12, 14))
    split = Split("planted", n_items, train, validation, test, negatives_exclude=train)
    chosen = rng.permutation(n_users)[:20]
    forget = ForgetSet.of(train, pairs=(np.repeat(chosen, 5), picked[chosen, :5].ravel()))
    scene = Scene(frozenset({"interaction"}), split, forget.remove_from(split), forget, 3)

    @dataclass(frozen=True)
    class Planted:
        """Random scores, higher for test items, higher or lower by ``memory`` for what was forgotten."""

        seed: int
        memory: float
        algorithm: Recommender
        shared: Tensors = field(default_factory=dict)

        def scores(self, users: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
            scores = np.random.default_rng(self.seed).normal(size=(n_users, n_items)).astype(np.float32)
            scores[forget.pairs.users, forget.pairs.items] += self.memory
            scores[test.users, test.items] += 1.0
            return np.asarray(scores[users])

    fedmf = FedMF(Problem(n_users, n_items, seed=0))
    golds = [measure(Planted(seed, 0.0, fedmf), scene) for seed in (1, 2, 3)]
    before = measure(Planted(4, 2.0, fedmf), scene)
    for seed, memory in ((5, 0.0), (6, 2.0), (7, -2.0)):
        after = measure(Planted(seed, memory, fedmf), scene)
        yield judge(scene, before, after, golds, Cost(cpu_s=1.0), Cost(cpu_s=10.0))


def test_what_is_shaded_is_what_the_real_gates_let_pass() -> None:
    decided = 0
    for gates in judgements():
        for gate in gates:
            low, high = bounds_of(gate.limit, gate.gold)
            if gate.passed is None or (low is None and high is None):
                continue
            room = 6e-4  # limits are written with three decimals
            inside = (low is None or gate.value >= low - room) and (high is None or gate.value <= high + room)
            near = any(bound is not None and abs(gate.value - bound) <= room for bound in (low, high))
            assert near or inside == gate.passed, gate
            decided += 1
    assert decided >= 12


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


# Drawing a page takes its time: what is found is not shrunk.
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.data())
def test_a_damaged_document_is_shown_as_far_as_it_goes(data: st.DataObject) -> None:
    found = document({"reverse_bpr": [batch(1, "user", "reverse_bpr")]})
    one = found["unlearning"]["strategies"]["reverse_bpr"]["batches"][0]
    one["percentiles"], one["trace"] = {"edges": [0.0, 0.5, 1.0], "after": [1, 2], "gold": [2, 1]}, one["trace"][:2]
    targets = [one, one["measured"], one["measured"]["after"], one["gates"][0], one["requests"][0], one["percentiles"],
               one["trace"][0], one["cost"], found["unlearning"], found["unlearning"]["gold"]]  # fmt: skip
    for _ in range(data.draw(st.integers(1, 6))):
        target = data.draw(st.sampled_from(targets))
        key = data.draw(st.sampled_from(sorted(target)))
        target[key] = data.draw(JSON)
    record = RunRecord(Path("run"), found)
    said = terminal(found)
    assert len(list(csv.reader(io.StringIO(unlearn_csv(found))))) >= 1
    if read_unlearning(found) is None:
        assert "Nothing was unlearned" in said
    else:
        assert unlearn_markdown(found).startswith(markdown_cell(verdict_sentence(read(found))))
        assert unlearning(record, "x").startswith("<h3>Unlearning</h3>")


def test_a_run_without_unlearning_has_neither_tables_nor_pictures(tmp_path: Path) -> None:
    for found in (document() | {"unlearning": None}, document({})):
        assert "Nothing was unlearned" in terminal(found)
        assert unlearn_markdown(found) == ""
        assert len(unlearn_csv(found).splitlines()) == 1
        assert write_pictures(found, tmp_path) == []
    assert unlearning(RunRecord(Path("run"), document() | {"unlearning": None}), "x") == ""


# Pictures


@EVERY
def test_the_picture_names_everybody_it_draws(found: Document) -> None:
    figure = draw(found)
    assert figure is not None
    (legend,) = figure.legends
    shown = {text.get_text() for text in legend.get_texts()}
    expected = {group.label for groups in groups_of(read(found)).values() for group in groups}
    assert expected <= shown
    assert "gold ± sd" in shown


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (write_pictures(document(), tmp_path / name) for name in "ab")
    assert [path.name for path in first] == ["unlearning.png", "unlearning.svg"]
    assert [one.read_bytes() for one in first] == [one.read_bytes() for one in second]
    changed = document({"reverse_bpr": [batch(1, "user", "fru")]})
    assert write_pictures(changed, tmp_path / "b")[1].read_bytes() != first[1].read_bytes()


def test_marks_stand_where_the_numbers_say() -> None:
    found = document({"delete_rows": [batch(1, "user", "delete_rows")]})
    groups = groups_of(read(found))[()]
    axes = Figure().add_subplot()
    unlearn_panels.forgetting(axes, groups, PAGE)
    points = {
        (round(x, 4), round(y, 4))
        for line in axes.lines
        if line.get_marker() == groups[0].marker
        for x, y in points_of(line)
    }
    ratio = round(0.2811 / 0.2891, 4)
    assert {(ratio, 0.001), (ratio, 0.172)} <= points  # scores forget, the item view does not
    heights = sorted(round(patch.get_height(), 4) for patch in axes.patches if hasattr(patch, "get_height"))
    assert heights == [0.04, 0.06]  # both gates, up and down


def test_late_requests_are_drawn_in_another_colour() -> None:
    requests = read(DOCUMENTS["late"]).requests
    axes = Figure().add_subplot()
    unlearn_lines.timeline(axes, requests, PAGE)
    colours = {int(points_of(line)[0][1]): line.get_color() for line in axes.lines if line.get_marker() == "D"}
    assert colours[1] == PAGE.series[1] != colours[0] == colours[2]
    texts = [text.get_text() for text in axes.texts]
    assert texts[0] == "after 6 days, 24 days to spare"
    assert texts[1] == "after 33 days, 3 days late"


def test_the_trace_marks_where_the_stop_rule_halted() -> None:
    axes = Figure().add_subplot()
    unlearn_lines.trace(axes, read(document()).strategies[0].batches[0], PAGE)
    stops = [points_of(line)[0][0] for line in axes.lines if len({x for x, _ in points_of(line)}) == 1]
    assert stops == [8.5]
    assert "stop, then repair" in {text.get_text() for text in axes.texts}


# The page


@EVERY_PAGE
def test_the_page_is_whole_and_needs_no_network(pages: dict[str, Page], name: str) -> None:
    shown = pages[name]
    assert {"script", "link", "iframe", "img"}.isdisjoint(shown.tags)
    assert not [value for _, key, value in shown.attributes if key in ("src", "href") and not value.startswith("#")]
    ids = [value for _, key, value in shown.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert verdict_sentence(read(DOCUMENTS[name])) in shown.text


@EVERY_PAGE
def test_every_chart_says_in_words_what_it_shows(pages: dict[str, Page], name: str) -> None:
    shown = pages[name]
    labels = [value for tag, key, value in shown.attributes if (tag, key) == ("svg", "aria-label")]
    assert len(labels) == shown.html.count('<svg role="img"') > 0
    assert all(len(label) > 10 for label in labels)
    assert any(label.startswith("Time line of requests: r1 after 6 days") for label in labels)


def test_the_page_says_every_gate_s_sentence_and_number(pages: dict[str, Page]) -> None:
    found, text = DOCUMENTS["mixed"], pages["mixed"].text
    for one in found["unlearning"]["strategies"]["reverse_bpr"]["batches"]:
        for gate in one["gates"]:
            assert gate["text"] in text
            assert gate["limit"] in text
    assert f"sha256 {found['unlearning']['audit']['head']}" in text
    assert "fedrec unlearn --verify" in text
    assert "101, 102, 103" in text
    assert "GDPR Art. 17" in text


def test_a_request_that_failed_at_forgetting_is_not_called_honoured(tmp_path: Path, pages: dict[str, Page]) -> None:
    text = page(tmp_path / "a", document({"delete_rows": [batch(1, "user", "delete_rows")]})).text
    assert "Not forgotten. r1: the model that was kept failed a gate on forgetting." in text
    assert "honoured by" not in text
    dear = page(tmp_path / "b", document({"federaser": [batch(1, "user", "federaser")]})).text
    assert "At a price. r1: every gate on forgetting passed; one on usefulness or cost did not." in dear
    assert "Not forgotten" not in dear
    fallen = pages["fell back"].text
    assert "Fell back. delete_rows failed its gates for r1, so retrain was run instead" in fallen
    assert "Not forgotten" not in fallen


def test_few_golds_and_users_who_came_back_are_said(tmp_path: Path) -> None:
    found = with_changes(ONE, returning=2)
    found["unlearning"]["golds"] = 1
    text = page(tmp_path, found).text
    assert "Few golds. Only 1 retraining to compare with" in text
    assert "Came back 2 users" in text


def test_texts_from_the_document_are_escaped(tmp_path: Path) -> None:
    bad = "<b onload=x>&"
    found = with_changes(ONE, notes=[bad], fallback=bad, guarantee=bad, verdict=bad)
    first = found["unlearning"]["strategies"]["reverse_bpr"]["batches"][0]
    first["requests"][0] |= {"id": bad, "selector": bad, "reason": bad}
    first["gates"][0] |= {"name": bad, "text": bad, "limit": bad}
    found["unlearning"]["audit"]["head"] = bad
    found["unlearning"]["strategies"][bad] = copy.deepcopy(found["unlearning"]["strategies"]["reverse_bpr"])
    shown = page(tmp_path, found)
    assert "b" not in shown.tags
    assert bad in shown.text
    assert "\\<b onload" in unlearn_markdown(found)


def test_the_account_is_a_section_of_any_report_as_well(tmp_path: Path) -> None:
    record = label_runs([read_run(write_unlearning_run(tmp_path / "run", ONE))])[0]
    section = unlearning(record, "run0")
    assert section.startswith("<h3>Unlearning</h3>")
    assert report_pages.run_body(record, "run0")  # the rest of the report still stands for such a run


def test_an_output_that_cannot_be_written_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    run = write_unlearning_run(tmp_path / "run", ONE)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ConfigError, match="choose another place"):
        write_unlearn_report(run, tmp_path / "taken" / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]
    assert json.loads((run / "summary.json").read_text())["unlearning"]["golds"] == 3
