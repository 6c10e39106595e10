"""`fedrec unlearn` through its front door: requests honoured, judged, purged, logged; and what bad input gets."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrec.cli import main
from fedrec.experiment.config import load_config
from fedrec.experiment.unlearn.experiment import unlearn_experiment
from fedrec.experiment.unlearn.setup import prepare
from tests.unlearning.small import vectors
from unlearning.purge import planted
from unlearning.state import State
from unlearning.strategies import Cost, Forgotten, Guarantee, Strategy, Task

ROOT = Path(__file__).parents[2]
SMALL = (
    "dataset=synthetic", "dataset.users=80", "dataset.items=120", "runner=inline", "federation.rounds=8",
    "protocol=random", "algorithm.dim=8", "unlearning.gold_workers=1", "unlearning.relearn_rounds=2",
    "evaluation.every=1000",
)  # fmt: skip
REQUESTS = (
    "unlearning.requests=[{id: a, kind: interaction, fraction: 0.05, at_round: 4},"
    "{id: b, kind: user, fraction: 0.1, at_round: 6},{id: back, kind: rejoin, of: b, at_round: 7},"
    "{id: c, kind: item, fraction: 0.05}]"
)
ONE_USER = "unlearning.requests=[{id: r, kind: user, fraction: 0.1, at_round: 4}]"


@pytest.fixture(autouse=True, scope="module")
def own_key_and_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDREC_AUDIT_KEY", str(folder / "audit.key"))
        patch.setenv("FEDREC_CACHE_DIR", str(folder / "cache"))
        yield


def unlearn(folder: Path, *overrides: str) -> int:
    return main(["unlearn", *SMALL, f"output_dir={folder}", *overrides])


def only(folder: Path) -> Path:
    (run_dir,) = (path.parent for path in folder.glob("*/*/summary.json"))
    return run_dir


def account(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())["unlearning"]
    return found


@pytest.fixture(scope="module")
def honoured(own_key_and_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    unlearn(folder, REQUESTS, "unlearning=reverse_bpr", "+unlearning.strategies.delete_rows={}")
    return only(folder)


def test_every_request_has_its_gates_its_proof_and_its_times(honoured: Path) -> None:
    strategies = account(honoured)["strategies"]
    assert list(strategies) == ["reverse_bpr", "delete_rows"]
    for entry in strategies.values():
        batches = entry["batches"]
        assert [[request["id"] for request in batch["requests"]] for batch in batches] == [
            ["a"],
            ["b"],
            ["back"],
            ["c"],
        ]
        assert [batch["round"] for batch in batches] == [4, 6, 7, 8]
        assert batches[2]["returning"] == batches[1]["forgotten"]["users"] == 8
        for batch in (batches[0], batches[1], batches[3]):
            names = {gate["name"] for gate in batch["gates"]}
            assert {"forget_recall@20", "retain_ndcg@20", "mia_auc", "percentile", "time", "traffic"} <= names
            assert ("fold_in_auc" in names) == (batch["kinds"] == ["user"])
            assert len(batch["measured"]["golds"]) == 3
            assert batch["purge"]["ok"], batch["notes"]
            assert all(request["in_time"] for request in batch["requests"])
        assert entry["test"]["ndcg@10"] > 0.0
    assert strategies["delete_rows"]["batches"][0]["cost"]["rounds"] == 0


def test_golds_are_made_once_for_all_strategies_and_kept_for_the_next_run(honoured: Path, tmp_path: Path) -> None:
    assert account(honoured)["gold"]["made"] == 9
    first = unlearn(tmp_path, ONE_USER, "unlearning=delete_rows", "federation.rounds=4")
    again = tmp_path / "again"
    assert unlearn(again, ONE_USER, "unlearning=delete_rows", "federation.rounds=4") == first
    assert (account(only(again))["gold"]["made"], account(only(again))["gold"]["cached"]) == (0, 3)


def test_the_report_the_picture_and_the_tables_are_there(honoured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (honoured / "report.html").read_text()
    for text in ("reverse_bpr", "delete_rows", "fedrec unlearn --verify"):
        assert text in page
    assert (honoured / "unlearning.png").stat().st_size > 10_000
    assert "| " in (honoured / "unlearning.md").read_text()
    assert main(["report", str(honoured), "-o", str(honoured / "again.html")]) == 0


def test_the_log_is_whole_names_nobody_and_one_flipped_byte_is_found(
    honoured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["unlearn", "--verify", str(honoured)]) == 0
    assert capsys.readouterr().out.count("whole, ") == 2
    log = honoured / "reverse_bpr" / "requests.jsonl"
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events == ["opened", *["received"] * 4, *["started", "finished"] * 4]
    content = log.read_bytes()
    try:
        log.write_bytes(content[:900] + bytes([content[900] ^ 1]) + content[901:])
        assert main(["unlearn", "--verify", str(honoured)]) == 1
        assert "BROKEN" in capsys.readouterr().out
        log.write_bytes(b"".join(content.splitlines(keepends=True)[:-1]))
        assert main(["unlearn", "--verify", str(honoured)]) == 1
    finally:
        log.write_bytes(content)


@pytest.mark.parametrize("strategy", ["reverse_bpr", "federaser", "fru", "cfru", "sifu"])
def test_no_file_holds_what_a_forgotten_user_had(strategy: str, tmp_path: Path) -> None:
    more = [] if strategy == "reverse_bpr" else [f"unlearning.strategies.{strategy}.interval=2"]
    config = load_config([*SMALL, ONE_USER, f"unlearning={strategy}", f"output_dir={tmp_path}", *more])
    setup = prepare(config)
    (batch,) = setup.batches
    state = setup.federation.train(setup.federation.begin(tmp_path / "trial", batch.before), batch.before, 4).state
    held = {f"embedding of {user}": vectors(state)[user].tobytes() for user in batch.forget.users}
    held |= {f"history of {user}": batch.before.train.row(int(user))[:6].tobytes() for user in batch.forget.users}
    assert {finding.what for finding in planted(state.folder, held)} == set(held)  # the search does find them
    result = unlearn_experiment(config)
    assert not planted(result.run_dir, held)
    entry = result.summary["unlearning"]["strategies"][strategy]
    assert entry["store"]["where"] == {"reverse_bpr": "none", "fru": "client"}.get(strategy, "server")
    assert entry["store"]["bytes"] >= entry["store"]["bytes_left"]
    assert (entry["store"]["bytes"] > 0) == (strategy != "reverse_bpr")
    assert entry["batches"][0]["purge"]["ok"]
    after = State.load(Path(entry["state"]))
    assert not np.isclose(vectors(after)[batch.forget.users], vectors(state)[batch.forget.users]).all(1).any()
    assert not list(result.run_dir.parent.glob(".*.scratch"))


def test_a_failed_gate_exits_with_1_and_can_be_answered_by_retraining(tmp_path: Path) -> None:
    gate = "unlearning.gates.mia_auc=0.0", "unlearning.gates.seed_sds=0.0"
    assert unlearn(tmp_path / "a", ONE_USER, "unlearning=delete_rows", *gate) == 1
    unlearn(tmp_path / "b", ONE_USER, "unlearning=delete_rows", "unlearning.on_gate_fail=retrain", *gate)
    (batch,) = account(only(tmp_path / "b"))["strategies"]["delete_rows"]["batches"]
    assert (batch["fallback"], batch["guarantee"], batch["cost"]["rounds"]) == ("retrain", "exact", 4)


def test_where_a_failed_gate_is_an_error_the_old_state_stands_and_the_log_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unlearn(
        tmp_path, ONE_USER, "unlearning=delete_rows", "unlearning.on_gate_fail=error", "unlearning.gates.mia_auc=0.0",
        "unlearning.gates.seed_sds=0.0",
    ) == 1  # fmt: skip
    assert "the old state stands" in " ".join(capsys.readouterr().err.split())
    (log,) = tmp_path.glob("*/*/requests.jsonl")
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["event"], last["state"]) == ("failed", "old")
    assert json.loads((log.parent / "current.json").read_text())["round"] == 4
    assert [path.name for path in log.parent.glob("work*")] == []


def test_a_finished_run_can_be_taken_and_stays_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    assert main(["run", *SMALL[:7], f"output_dir={run}", "baselines.local_only=false", "baselines.ease=false"]) == 0
    source = only(run)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    request = "unlearning.requests=[{id: r, kind: user, fraction: 0.1}]"
    unlearn(tmp_path / "out", request, "unlearning=reverse_bpr", f"unlearning.run_dir={source}")
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    first = only(tmp_path / "out")
    again = "unlearning.requests=[{id: s, kind: item, fraction: 0.1}]"
    unlearn(
        tmp_path / "more",
        again,
        "unlearning=delete_rows",
        f"unlearning.run_dir={first}",
        "unlearning.purge_source=true",
    )
    (batch,) = account(only(tmp_path / "more"))["strategies"]["delete_rows"]["batches"]
    assert (batch["round"], batch["forgotten"]["items"] > 0) == (8, True)
    assert not list(first.glob("state-*"))


def test_a_kill_in_the_middle_of_a_request_leaves_the_old_state_and_the_log_says_so(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fedrec", "unlearn", *SMALL, ONE_USER, f"output_dir={tmp_path}",
         "unlearning=reverse_bpr", "unlearning.golds=40"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any('"started"' in log.read_text() for log in tmp_path.glob("*/*/requests.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (log,) = tmp_path.glob("*/*/requests.jsonl")
    head = json.loads((log.parent / "current.json").read_text())
    assert State.load(log.parent / head["state"]).round == 4
    done = subprocess.run(
        [sys.executable, "-m", "fedrec", "unlearn", "--verify", str(log.parent)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(
        rf"r: reverse_bpr started it .* did not finish; the state that counts is {head['state']}", done.stdout
    )
    assert main(["unlearn", "--recover", str(log.parent)]) == 0
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["event"], last["request"], last["state"]) == ("recovered", "r", "old")
    assert main(["unlearn", "--verify", str(log.parent)]) == 0
    assert {path.name for path in log.parent.glob("*/")} == {head["state"]}
    assert not list(log.parent.parent.glob(".*.scratch"))


@dataclass(frozen=True)
class Nothing(Strategy):
    """A strategy of somebody else: it does nothing at all."""

    name = "nothing"
    promise = "approximate"

    def forget(self, task: Task) -> Forgotten:
        return Forgotten(task.state, Cost(), Guarantee("approximate"), notes=["nothing was done"])


def test_a_strategy_of_another_package_is_named_by_its_target(tmp_path: Path) -> None:
    target = f"+unlearning.strategies.nothing={{_target_: {__name__}.Nothing}}"
    assert unlearn(tmp_path, ONE_USER, target, "unlearning.gates.seed_sds=0.0", "unlearning.gates.mia_auc=0.0") == 1
    (batch,) = account(only(tmp_path))["strategies"]["nothing"]["batches"]
    assert batch["notes"] == ["nothing was done"]


MISTAKES = [
    (["unlearning.requests=null"], r"unlearning\.requests: nothing is asked for; write unlearning\.requests=FILE"),
    (["unlearning.requests=nowhere.yaml"], r"nowhere\.yaml"),
    ([ONE_USER, "unlearning=reverse"], r"unlearning=reverse: no such choice; did you mean reverse_bpr"),
    ([ONE_USER, "+unlearning.strategies.nope={}"], r"unlearning\.strategies\.nope: no such strategy"),
    ([ONE_USER, "+unlearning.strategies.reverse_bpr.alfa=1"], r"did you mean alpha"),
    ([ONE_USER, "unlearning.golds=0"], r"unlearning\.golds=0: write a whole number, 1 or more"),
    ([ONE_USER, "unlearning.gates.mia_auc=-1"], r"unlearning\.gates\.mia_auc=-1"),
    ([ONE_USER, "unlearning.on_gate_fail=maybe"], r"write one of report, retrain, error"),
    ([ONE_USER, "unlearning.late_users=0.5"], r"unlearning\.late_users=0\.5, late_round=0"),
    ([ONE_USER, "unlearning.run_dir=/nowhere"], r"unlearning\.run_dir=/nowhere: no config\.yaml"),
    ([ONE_USER, "privacy=user_dp", "privacy.epsilon=4"], r"privacy=user_dp"),
    (
        [ONE_USER, "unlearning=federaser", "privacy=user_dp", "privacy.epsilon=4", "privacy.trust=secure_aggregation"],
        r"federaser.*secure",
    ),
    (["unlearning.requests=[{id: r, kind: user, users: [nobody]}]"], r"nobody"),
    (["unlearning.requests=[{id: r, kind: user, fraction: 0.1, at_round: 9}]"], r"at_round"),
    (["unlearning.requests=[{id: r, kind: user, users: []}]"], r"users"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "said"), MISTAKES)
def test_a_mistake_is_named_before_anything_is_written(
    overrides: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unlearn(tmp_path, *overrides) == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))
    assert not list(tmp_path.iterdir())


def test_a_run_on_other_data_or_with_a_broken_log_is_refused_untouched(
    honoured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = "unlearning.requests=[{id: z, kind: user, fraction: 0.1}]"
    place = honoured / "reverse_bpr"
    assert unlearn(tmp_path, request, "unlearning=delete_rows", f"unlearning.run_dir={honoured}") == 2
    assert "it compares 2 strategies" in " ".join(capsys.readouterr().err.split())
    summary = honoured / "summary.json"
    said = summary.read_text()
    try:
        document = json.loads(said)
        document["dataset"]["sha256"] = "0" * 64
        summary.write_text(json.dumps(document))
        assert unlearn(tmp_path, request, "unlearning=delete_rows", f"unlearning.run_dir={honoured}") == 2
        assert "fetch the data that it was trained on" in " ".join(capsys.readouterr().err.split())
    finally:
        summary.write_text(said)
    log = place / "requests.jsonl"
    content = log.read_bytes()
    try:
        log.write_bytes(content.replace(b'"seed":0', b'"seed":1', 1))
        assert unlearn(tmp_path, request, "unlearning=delete_rows", f"unlearning.run_dir={honoured}") == 2
        assert "a run whose evidence is broken is not continued" in " ".join(capsys.readouterr().err.split())
    finally:
        log.write_bytes(content)
    assert not list(tmp_path.iterdir())
