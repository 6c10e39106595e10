"""`fedrec budgets`: what it runs, what it runs again, and that its numbers are those of the runs."""

from __future__ import annotations

import csv
import io
import json
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedrec.cli import main
from fedrec.errors import ConfigError
from fedrec.experiment import budgets_plot
from fedrec.experiment.budgets import BudgetSettings, plan_comparison
from fedrec.experiment.budgets_points import Point, points, rounded_up
from fedrec.experiment.budgets_runs import RunState, _Bar, differences
from fedrec.experiment.budgets_values import Spread
from fedrec.experiment.config import load_config
from fedrec.experiment.plan import Plan
from fedrec.experiment.report import read_run

SMALL = [
    "dataset=synthetic", "dataset.users=60", "dataset.items=80", "runner=inline", "federation.rounds=3",
    "privacy=user_dp", "baselines.local_only_rounds=1", "evaluation.every=100", "name=small",
]  # fmt: skip
METHODS = [
    '+budgets.methods.ease=["algorithm=fedease_private"]',
    '+budgets.methods.fedmf={overrides:["algorithm=fedmf"],by_epsilon:{8:["federation.rounds=2"]}}',
]
BARE = ["baselines.popularity=false", "baselines.ease=false", "baselines.local_only=false"]
OPTIONS: dict[str, Any] = {"seeds": [0], "methods": {}, "metric": "hr@10", "attack_curve": None}


def budgets(folder: Path, *overrides: str) -> int:
    return main(["budgets", *SMALL, f"output_dir={folder}", *overrides])


def document_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "small" / "budgets.json").read_text())
    return found


def states_of(folder: Path, *overrides: str) -> list[RunState]:
    """The finished runs that a call with these overrides left in ``folder``."""
    comparison = plan_comparison([*SMALL, f"output_dir={folder}", *overrides])
    return [RunState(run, "finished", read_run(run.folder).summary) for run in comparison.runs]


@given(st.lists(st.floats(1e-3, 1e3).map(lambda value: float(f"{value:.3g}")), min_size=1, max_size=6, unique=True))
def test_budgets_are_ascending_and_infinity_is_last(values: list[float]) -> None:
    settings = BudgetSettings.from_config({**OPTIONS, "epsilons": [math.inf, *values]})
    assert settings.epsilons == (*sorted(values), math.inf)


@given(st.one_of(st.floats(max_value=0.0), st.just(math.nan), st.booleans(), st.text(alphabet="xyz"), st.none()))
def test_what_is_no_budget_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"budgets\.epsilons: .* is no budget; write a number above 0"):
        BudgetSettings.from_config({**OPTIONS, "epsilons": [1, value]})


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_the_interval_is_students(values: list[float]) -> None:
    spread = Spread.of([*values, None, math.nan])
    assert spread is not None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if error > 1e-9:
        low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
        assert (spread.low, spread.high) == pytest.approx((low, high))
    assert spread.n == len(values)


def test_one_seed_has_no_spread_and_no_interval() -> None:
    spread = Spread.of([0.25])
    assert spread == Spread(0.25, 1)
    assert Spread.of([None, math.nan]) is None


@given(st.floats(1e-6, 1e6))
def test_a_printed_epsilon_is_never_less_than_the_spent_one(value: float) -> None:
    assert float(rounded_up(value)) >= value * (1 - 2e-9)
    assert float(rounded_up(value)) <= value * 1.011


def test_a_comparison_is_every_method_at_every_budget_for_every_seed(tmp_path: Path) -> None:
    comparison = plan_comparison([*SMALL, *METHODS, f"output_dir={tmp_path}", "budgets.epsilons=[inf,8]"])
    assert [(run.seed, run.method, run.epsilon) for run in comparison.runs] == [
        (seed, method, epsilon) for seed in (0, 1, 2) for method in ("ease", "fedmf") for epsilon in (8.0, math.inf)
    ]
    assert len({run.folder for run in comparison.runs}) == len(comparison.runs)
    for run in comparison.runs:
        assert run.config["privacy"]["epsilon"] == run.epsilon
        assert run.config["seed"] == run.seed
        assert "budgets" not in run.config
    rounds = {(run.method, run.epsilon): run.config["federation"]["rounds"] for run in comparison.runs}
    assert rounds["fedmf", 8.0] == 2  # by_epsilon
    assert rounds["fedmf", math.inf] == 3
    central = [(run.method, run.seed) for run in comparison.runs if run.config["baselines"]["popularity"]]
    assert central == [("ease", 0), ("ease", 1), ("ease", 2)]
    local = [(run.method, run.seed) for run in comparison.runs if run.config["baselines"]["local_only"]]
    assert local == [("ease", 0), ("fedmf", 0)]


REFUSED = {
    "epsilon 0": (["budgets.epsilons=[1,0]"], "budgets.epsilons: 0 is no budget"),
    "one seed": (["seed=3"], "budgets.seeds=[0,1,2]"),
    "a method's epsilon": (['+budgets.methods.x=["privacy.epsilon=2"]'], "budgets.methods.x: privacy.epsilon=2: set"),
    "no mechanism": (["privacy=none"], "write privacy=user_dp"),
    "other data": ([*METHODS, '+budgets.methods.x=["dataset.items=90"]'], "the methods differ in dataset"),
    "no such metric": (["budgets.metric=hr@7"], "protocol.ks=[5, 10, 20] does not measure it"),
    "no attack": (["budgets.attack_curve=membership.score"], "nothing measures it; write attack=membership"),
    "fixed cohort": (["federation.sampler=fixed"], "epsilon 1: federation.sampler=fixed"),
    "delta at one budget": (['+budgets.methods.x={overrides:[],by_epsilon:{4:["privacy.delta=0.3"]}}'], "x, epsilon 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_costs_one_line_before_any_training(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, expected = REFUSED[case]
    assert budgets(tmp_path / "out", *overrides) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_take_a_comparison_for_one_experiment(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start it with `fedrec budgets`"):
        Plan(load_config([*SMALL, *METHODS, f"output_dir={tmp_path}"]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods at two budgets with two seeds, attacked."""
    folder = tmp_path_factory.mktemp("finished")
    assert budgets(folder, *CALL) == 0
    return folder


CALL = [*METHODS, "budgets.epsilons=[8,inf]", "budgets.seeds=[0,1]", "attack=membership", "attack.holdout=0.2"]


def test_the_numbers_are_the_means_of_the_runs(finished: Path) -> None:
    document = document_in(finished)
    assert document["complete"] is True
    assert [(point["method"], point["epsilon"]) for point in document["points"]] == [
        ("ease", 8), ("ease", None), ("fedmf", 8), ("fedmf", None),
    ]  # fmt: skip
    for point in document["points"]:
        budget = "inf" if point["epsilon"] is None else "8"
        place = finished / "small" / point["method"]
        runs = [
            json.loads((place / f"epsilon-{budget}/seed-{seed}/summary.json").read_bytes())
            for seed in (0, 1)
        ]  # fmt: skip
        for name in ("hr@10", "ndcg@10"):
            values = [run["test"][name] for run in runs]
            assert point[name]["mean"] == pytest.approx(np.mean(values))
            assert point[name]["sd"] == pytest.approx(np.std(values, ddof=1))
        areas = [run["attacks"]["membership"]["fold_in"]["auc"] for run in runs]
        assert point["attacks"]["membership.fold_in"]["mean"] == pytest.approx(np.mean(areas))
        assert point["private"] is (budget == "8")


def test_every_epsilon_is_the_one_that_the_ledgers_compose(finished: Path) -> None:
    for point in document_in(finished)["points"]:
        if point["epsilon"] is not None:
            folder = finished / "small" / point["method"] / "epsilon-8"
            ledgers = [json.loads((folder / f"seed-{seed}" / "ledger.json").read_text()) for seed in (0, 1)]
            composed = [ledger["composed"]["user"] for ledger in ledgers]
            assert point["epsilon_spent"] == pytest.approx(max(one["epsilon"] for one in composed))
            assert point["epsilon_spent"] <= 8 * (1 + 1e-9)
            assert point["delta"] == composed[0]["delta"]


def test_baselines_stand_once_beside_all_budgets(finished: Path) -> None:
    lines = {(line["name"], line["method"]): line["hr@10"]["n"] for line in document_in(finished)["baselines"]}
    # The statistics of one device's own history rank nothing outside of it: no local-only line for ease.
    assert lines == {("popularity", None): 2, ("ease", None): 2, ("local_only", "fedmf"): 1}


def test_table_and_csv_hold_the_same_points(finished: Path) -> None:
    table = (finished / "small" / "budgets.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len({len(line) for line in rows}) == 1  # aligned
    assert [row.split("|")[2].strip() for row in rows[2:6]] == ["8", "∞", "8", "∞"]
    assert "ε is for add/remove one user (ease, fedmf)" in table
    assert "Every ε is that of one run alone." in table
    assert "12 of 60 users are held out of the data" in table
    lines = list(csv.DictReader(io.StringIO((finished / "small" / "budgets.csv").read_text())))
    document = document_in(finished)
    assert [float(line["hr@10"]) for line in lines[:4]] == [point["hr@10"]["mean"] for point in document["points"]]
    assert [line["epsilon"] for line in lines] == ["8.0", "inf", "8.0", "inf", "", "", ""]


def test_pictures_and_page_are_whole(finished: Path) -> None:
    folder = finished / "small"
    assert (folder / "budgets.png").read_bytes().startswith(b"\x89PNG")
    svg = (folder / "budgets.svg").read_text()
    assert all(text in svg for text in ("membership AUC", "signal to noise", "popularity", "fedmf, local only", "∞"))
    page = (folder / "budgets.html").read_text()
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http://www.w3.org/", "")
    assert budgets_plot._PAGE.muted not in page  # every colour became one of the page's
    assert "differential privacy for one user" in page


def run_times(folder: Path) -> dict[str, int]:
    return {str(path.parent): path.stat().st_mtime_ns for path in folder.rglob("summary.json")}


def test_a_second_call_runs_only_what_is_new(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = run_times(finished)
    assert budgets(finished, *CALL) == 0
    assert "8 of 8 runs are finished already" in capsys.readouterr().out
    assert run_times(finished) == before
    # Another runner and other baselines change no number; one more budget costs its own runs only.
    more = [*METHODS, "budgets.epsilons=[2,8,inf]", *CALL[3:], "budgets.seeds=[0]", "runner.workers=1"]
    assert budgets(finished, *more) == 0
    after = run_times(finished)
    assert {path: after[path] for path in before} == before
    assert len(after) - len(before) == 2


def test_a_run_with_other_settings_is_kept_aside_and_run_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [*BARE, "algorithm=fedease_private", "budgets.epsilons=[4]", "budgets.seeds=[0]"]
    assert budgets(tmp_path, *call) == 0
    place = tmp_path / "small" / "privatefedease" / "epsilon-4"
    first = (place / "seed-0" / "summary.json").read_text()
    assert budgets(tmp_path, *call, "algorithm.decay=0.5") == 0
    said = capsys.readouterr().out
    assert "ran with other settings (algorithm.decay 0.9 → 0.5); it is kept as seed-0-earlier-1" in said
    assert (place / "seed-0-earlier-1" / "summary.json").read_text() == first
    assert "decay: 0.5" in (place / "seed-0" / "config.yaml").read_text()


def test_half_a_run_is_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = [*BARE, "algorithm=fedease_private", "budgets.epsilons=[2,4,8]", "budgets.seeds=[0]"]
    assert budgets(tmp_path, *call) == 0
    place = tmp_path / "small" / "privatefedease"
    killed, cut, interrupted = (place / f"epsilon-{epsilon}" / "seed-0" / "summary.json" for epsilon in (2, 4, 8))
    killed.unlink()
    cut.write_text(cut.read_text()[:900])
    interrupted.write_text(interrupted.read_text().replace('"status": "finished"', '"status": "interrupted"'))
    assert budgets(tmp_path, *call) == 0
    said = capsys.readouterr().out
    for epsilon, why in ((2, "was cut off"), (4, "was cut off"), (8, "was interrupted")):
        assert f"ε {epsilon}, seed 0: the earlier run {why}; it is repeated from the start" in said
    assert all(json.loads(path.read_text())["status"] == "finished" for path in (killed, cut, interrupted))


def test_a_run_that_diverges_does_not_lose_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = '+budgets.methods.wild=["federation.server_learning_rate=1e30"]'
    assert budgets(tmp_path, wild, METHODS[0], *BARE, "budgets.epsilons=[4]", "budgets.seeds=[0]") == 1
    document = document_in(tmp_path)
    assert [run["status"] for run in document["runs"]] == ["failed", "finished"]
    assert document["complete"] is False
    assert "Failed runs of wild: 1, the first: wild, ε 4, seed 0: training diverged" in capsys.readouterr().out
    assert (tmp_path / "small" / "budgets.png").exists()


def test_ctrl_c_keeps_what_is_finished_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = _Bar._heard

    def interrupt_the_second_run(bar: _Bar, current: int, total: int) -> None:
        heard(bar, current, total)
        if current == 1 and bar._count == 1:
            signal.raise_signal(signal.SIGINT)

    call = [*BARE, "budgets.epsilons=[4,8,inf]", "budgets.seeds=[0]"]
    monkeypatch.setattr(_Bar, "_heard", interrupt_the_second_run)
    assert budgets(tmp_path, *call) == 130
    said = capsys.readouterr().out
    assert "2 of 3 runs are missing; the same command runs them" in said
    assert [run["status"] for run in document_in(tmp_path)["runs"]] == ["finished", "missing", "missing"]
    assert (tmp_path / "small" / "budgets.png").exists()
    monkeypatch.undo()
    before = run_times(tmp_path / "small" / "fedmf" / "epsilon-4")
    assert budgets(tmp_path, *call) == 0
    assert run_times(tmp_path / "small" / "fedmf" / "epsilon-4") == before
    assert document_in(tmp_path)["complete"] is True


def test_ctrl_c_between_runs_ends_with_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say = _Bar.say

    def interrupt(bar: _Bar, text: str) -> None:
        say(bar, text)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(_Bar, "say", interrupt)
    assert budgets(tmp_path, "algorithm=fedease_private", "budgets.epsilons=[4,8]", "budgets.seeds=[0]") == 130
    assert [run["status"] for run in document_in(tmp_path)["runs"]] == ["finished", "missing"]


UNITS = [
    '+budgets.methods.server=["privacy=user_dp"]', '+budgets.methods.device=["privacy=local_dp"]',
    '+budgets.methods.interaction=["privacy=example_dp"]',
    '+budgets.methods.fixed=["privacy=user_dp","privacy.noise_seed=3"]', "budgets.epsilons=[4]", "budgets.seeds=[0]",
    *BARE,
]  # fmt: skip


def test_epsilons_of_different_things_never_share_an_axis_or_an_unlabelled_column(tmp_path: Path) -> None:
    assert budgets(tmp_path, *UNITS) == 0
    found = points(states_of(tmp_path, *UNITS), "hr@10")
    columns = budgets_plot.facets(found)
    assert {key: [point.method for point in these] for key, these in columns.items()} == {
        "add/remove one user": ["server", "fixed"], "replace one user": ["device"],
        "add/remove one interaction": ["interaction"],
    }  # fmt: skip
    figure = budgets_plot.draw(found, [], "hr@10", None, "units")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    assert "ε of one interaction (add/remove one interaction): no guarantee for a user" in titles
    assert len(titles) == 3
    table = (tmp_path / "small" / "budgets.md").read_text()
    assert "ε protects |" in table
    assert "is not a guarantee for a user" in table
    assert "4 (not private)" in table


def synthetic_point(method: str, epsilon: float, private: bool) -> Point:
    spread = Spread(0.1, 3, 0.01, 0.08, 0.12)
    return Point(
        method, "fedmf", epsilon, epsilon, private, 3, (0, 1, 2), (), {"hr@10": spread}, {}, None, 0, (1.0,), spread,
        1e-3, "user", "add/remove one user", "gaussian", "the server", "everyone in every release", "", "", "",
    )  # fmt: skip


def test_points_without_a_guarantee_are_hollow() -> None:
    found = [
        synthetic_point(method, epsilon, private and math.isfinite(epsilon))
        for method, private in (("seeded", False), ("private", True))
        for epsilon in (4.0, math.inf)
    ]
    axes = budgets_plot.draw(found, [], "hr@10", None, "hollow").axes[0]
    hollow = {
        (line.get_color(), round(float(np.asarray(line.get_xdata())[0]), 6)):
        line.get_markerfacecolor() == budgets_plot.PAPER.paper
        for line in axes.lines if line.get_marker() in ("o", "s")
    }  # fmt: skip
    first, second = budgets_plot.PAPER.series[:2]
    scale = budgets_plot.Scale.of(found)
    finite, infinite = round(scale.place(4.0), 6), round(scale.place(math.inf), 6)
    assert hollow == {(first, finite): True, (first, infinite): True, (second, finite): False, (second, infinite): True}
    assert [text.get_text() for text in axes.texts].count("not private") == 1


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6, unique=True))
def test_infinity_is_right_of_every_budget(values: Sequence[float]) -> None:
    scale = budgets_plot.Scale.of([synthetic_point("a", value, True) for value in [*values, math.inf]])
    places = [scale.place(value) for value in sorted(values)]
    assert places == sorted(places)
    assert scale.place(math.inf) >= places[-1] + 1.0
    assert scale.limits[0] < places[0] < scale.place(math.inf) < scale.limits[1]


def test_where_it_runs_and_what_stands_beside_it_make_no_other_run() -> None:
    config = load_config(SMALL)
    same = json.loads(json.dumps(config))
    same["runner"]["workers"], same["output_dir"], same["baselines"]["ease"] = 7, "elsewhere", False
    assert differences(same, config) == []
    same["federation"]["rounds"] = 4
    assert differences(same, config) == ["federation.rounds 4 → 3"]


def test_help_teaches_with_examples_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["budgets", "--help"])
    told = capsys.readouterr().out
    for line in ("fedrec budgets experiment=budgets_ml100k\n", "'~budgets.methods.fedmf'", "by_epsilon:{8:"):
        assert line in told
    comparison = plan_comparison(["experiment=budgets_ml100k", "~budgets.methods.fedmf"])
    assert {run.method for run in comparison.runs} == {"fedease"}


def test_the_time_left_is_that_of_the_missing_runs() -> None:
    comparison = plan_comparison([*SMALL, "budgets.epsilons=[4,8]", "budgets.seeds=[0,1]"])
    states = [RunState(run) for run in comparison.runs]
    states[0] = RunState(comparison.runs[0], "finished", {"timing": {"wall_s": 20.0}})
    assert _Bar(Console(quiet=True), states)._left() == "about 1 min 00 s left"
