"""The audit log: every event is on disk, no fault goes unnoticed, nobody's data gets in."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedrec.errors import ConfigError, DataError
from unlearning.audit import AuditLog, Hashes, Scope, audit_key, open_requests, verify
from unlearning.audit_lines import canonical, content_hash, seal
from unlearning.purge import Finding, PurgeProof
from unlearning.strategies.base import Guarantee

KEY, OTHER_KEY = bytes(range(32)), bytes(range(1, 33))
NOW = datetime.now(UTC)
BEFORE, AFTER = Hashes("1" * 64, "2" * 64, None), Hashes("3" * 64, "4" * 64, "5" * 64)
RAW = ["planted-user-0042", "Zoë O'Neil", "7"]
PROOF = PurgeProof(12, 3456, 78, 9, (Finding("devices/user.f32", 5, "user embedding"),), "6" * 64)
APPROXIMATE = Guarantee("approximate")


@dataclass(frozen=True)
class Gate:
    name: str = "forget_recall@20"
    value: float = 0.123456789012345678
    gold: float = 0.1
    spread: float = float("nan")
    limit: str = "≤ gold + 2 sd"
    passed: bool | None = True


def start(folder: Path, key: bytes = KEY) -> AuditLog:
    folder.mkdir(parents=True, exist_ok=True)
    return AuditLog.start(
        folder, key, run="unlearn_ml100k/2026-01-01", dataset="ml-100k", data="a" * 64, seed=3,
        strategies=["reverse_bpr", "retrain"], versions={"python": "3.11.9", "torch": "2.13.0+cpu"},
    )  # fmt: skip


def receive(log: AuditLog, request: str = "r1", days: float = 30, raw: list[str] = RAW) -> None:
    log.received(request, "user", raw, Scope(len(raw), 0, 321), NOW - timedelta(days=1), NOW + timedelta(days=days))


def finish(log: AuditLog, request: str = "r1", strategy: str = "reverse_bpr", **changed: Any) -> str:
    settings: dict[str, Any] = {
        "after": AFTER, "guarantee": APPROXIMATE, "gates": [Gate(), Gate("fold_in_auc", passed=None)],
        "seconds": {"reverse": 1.5, "gates": 2.25}, "purge": PROOF, "notes": ["12 rounds, 2 of repair"],
    }  # fmt: skip
    return log.finished(request, strategy, **{**settings, **changed})


def story(folder: Path) -> AuditLog:
    """Two requests, three endings: 9 lines."""
    log = start(folder)
    receive(log)
    receive(log, "ticket 17", raw=["planted-user-0043"])
    log.started("r1", "reverse_bpr", seed=3, round=100, before=BEFORE)
    finish(log)
    log.started("r1", "retrain", seed=3, round=100, before=BEFORE)
    log.failed("r1", "retrain", "training diverged")
    log.started("ticket 17", "reverse_bpr", seed=3, round=100, before=AFTER)
    finish(log, "ticket 17", guarantee=Guarantee("certified", 2.0, 1e-5), fallback="retrain")
    return log


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("log")
    story(folder)
    return (folder / "requests.jsonl").read_bytes()


def said(path: Path, **known: Any) -> str:
    """All problems, one a line."""
    return "\n".join(map(str, verify(path, **known).problems))


def rewritten(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(content)
    return path


# -- what is written ----------------------------------------------------------------------------------------------


def test_a_log_of_honest_requests_verifies_with_and_without_the_key(tmp_path: Path) -> None:
    log = story(tmp_path)
    for key in (None, KEY):
        found = verify(tmp_path, log.head, log.count, key=key)
        assert (found.ok, found.head, len(found.lines), found.open) == (True, log.head, 9, ())
    assert [line["event"] for line in found.lines[:4]] == ["opened", "received", "received", "started"]
    line = found.lines[4]
    assert line["gates"][0] == {
        "name": "forget_recall@20", "value": 0.123456789012345678, "gold": 0.1, "spread": None,
        "limit": "≤ gold + 2 sd", "passed": True,
    }  # fmt: skip
    assert line["purge"]["findings"] == 1
    assert line["purge"]["first"] == [{"file": "devices/user.f32", "offset": 5, "what": "user embedding"}]
    assert line["in_time"] is True


def test_every_line_is_whole_on_disk_when_append_returns(tmp_path: Path) -> None:
    log = start(tmp_path)
    for number in range(2, 6):
        receive(log, f"r{number}")
        assert (tmp_path / "requests.jsonl").read_bytes().count(b"\n") == number == log.count
        assert verify(tmp_path, log.head, number).ok


def test_no_raw_id_gets_into_the_log(tmp_path: Path) -> None:
    log = start(tmp_path)
    receive(log)
    log.started("r1", "reverse_bpr", seed=3, round=0, before=BEFORE)
    log.failed("r1", "reverse_bpr", "the update of planted-user-0042 is not finite; Zoë O'Neil's is")
    log.started("r1", "retrain", seed=3, round=0, before=BEFORE)
    finish(log, strategy="retrain", notes=["planted-user-0042 took no part", "user 7 and 7 others"])
    text = (tmp_path / "requests.jsonl").read_text()
    for raw in RAW[:2]:
        assert raw not in text
        assert json.dumps(raw).strip('"') not in text
    assert "the update of [subject] is not finite; [subject]'s is" in text


def test_a_request_id_that_names_its_subject_is_refused(tmp_path: Path) -> None:
    log = start(tmp_path)
    with pytest.raises(ConfigError, match="holds the id of one of its subjects"):
        receive(log, "delete planted-user-0042")
    receive(log, "r7")  # holds "7", as half of all numbers do
    assert log.count == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"embedding": [0.1, 0.2]},
        {"seconds": {"0": 0.1, "1": 0.2}},
        {"seconds": {f"d{k}": 0.5 for k in range(64)}},
        {"notes": ["x" * 500]},
        {"after": {"data": "planted-user-0042", "checkpoint": None, "store": None}},
        {"gates": [[0.1, 0.2, 0.3]]},
        {"purge": [1, 2, 3, 4]},
    ],
)
def test_fields_that_could_carry_raw_data_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    log = start(tmp_path)
    receive(log)
    log.started("r1", "reverse_bpr", seed=3, round=0, before=BEFORE)
    good = {
        "request": "r1", "strategy": "reverse_bpr", "purge": None, "gates": [], "seconds": {}, "fallback": None,
        "in_time": True, "notes": [], "guarantee": {"kind": "exact", "epsilon": None, "delta": None},
        "after": {"data": None, "checkpoint": None, "store": None},
    }  # fmt: skip
    with pytest.raises(ValueError, match="audit log"):
        log.append("finished", **{**good, **fields})
    assert log.count == 3
    log.append("finished", **good)


def test_subjects_are_keyed_and_can_be_found_again_by_whoever_has_the_key(tmp_path: Path) -> None:
    log = story(tmp_path)
    assert log.find("planted-user-0043") == ("ticket 17",)
    assert log.find("7") == ("r1",)
    assert log.find("8") == ()
    assert log.subject(["b", "a"]) == log.subject(["a", "b"]) != log.subject(["ab"])
    assert log.subject(["7"]) != start(tmp_path / "other", OTHER_KEY).subject(["7"])


def test_certified_needs_an_epsilon_and_a_delta(tmp_path: Path) -> None:
    log = start(tmp_path)
    receive(log)
    log.started("r1", "reverse_bpr", seed=3, round=0, before=BEFORE)
    with pytest.raises(ValueError, match="certified without"):
        finish(log, notes=["this model is Certified clean"])
    with pytest.raises(ValueError, match="certified without"):
        log.failed("r1", "reverse_bpr", "certified removal needs noise")
    finish(log, guarantee=Guarantee("certified", 1.0, 1e-6), notes=["certified by its noise"])
    assert verify(tmp_path).ok


@pytest.mark.parametrize(("epsilon", "delta"), [(None, None), (0.0, 1e-5), (1.0, 1.5), (1.0, None), (True, 1e-5)])
def test_a_log_that_says_certified_for_nothing_is_found_though_its_chain_holds(
    tmp_path: Path, epsilon: float | None, delta: float | None
) -> None:
    log = story(tmp_path)
    lines = [json.loads(text) for text in log.path.read_text().splitlines()]
    lines[4]["guarantee"] = {"kind": "certified", "epsilon": epsilon, "delta": delta}
    rechain(log.path, lines)
    assert said(tmp_path).startswith("line 5: ")


def test_in_time_is_read_off_the_deadline(tmp_path: Path) -> None:
    log = start(tmp_path)
    receive(log, days=-0.5)
    log.started("r1", "retrain", seed=3, round=0, before=BEFORE)
    finish(log, strategy="retrain")
    lines = [json.loads(text) for text in log.path.read_text().splitlines()]
    assert lines[-1]["in_time"] is False
    lines[-1]["in_time"] = True
    rechain(log.path, lines)
    assert "line 4: in_time is True" in said(tmp_path)


def rechain(path: Path, lines: list[dict[str, Any]], key: bytes = KEY) -> None:
    """What a forger with the key would do: all hashes anew."""
    previous = "0" * 64
    for index, line in enumerate(lines):
        line |= {"previous": previous, "index": index}
        line["seal"] = seal(line, key)
        previous = line["hash"] = content_hash(line)
    path.write_bytes(b"".join(canonical(line) + b"\n" for line in lines))


# -- what verify finds --------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_byte_is_found_wherever_it_is(data: st.DataObject, whole: bytes, tmp_path: Path) -> None:
    position = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :]
    found = verify(rewritten(tmp_path, changed))
    assert not found.ok
    assert min(problem.line or 10 for problem in found.problems) == whole[:position].count(b"\n") + 1


def test_a_byte_that_means_the_same_is_found_as_well(whole: bytes, tmp_path: Path) -> None:
    assert whole.count(b"1e-05") == 1
    assert said(rewritten(tmp_path, whole.replace(b"1e-05", b"1E-05"))).startswith(
        "line 9: it is not written as fedrec"
    )


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_that_were_deleted_swapped_inserted_or_repeated_are_found(
    data: st.DataObject, whole: bytes, tmp_path: Path
) -> None:
    lines = whole.splitlines(keepends=True)
    at = data.draw(st.integers(0, len(lines) - 2))
    other = data.draw(st.integers(0, len(lines) - 1).filter(lambda place: place != at))
    swapped = list(lines)
    swapped[at], swapped[other] = lines[other], lines[at]
    for changed in (lines[:at] + lines[at + 1 :], swapped, [*lines[:at], lines[other], *lines[at:]]):
        assert not verify(rewritten(tmp_path, b"".join(changed))).ok
    assert f"line {at + 2}: it belongs to place {at + 1}" in said(
        rewritten(tmp_path, b"".join([*lines[: at + 1], *lines[at:]]))
    )


def test_a_deleted_line_is_named_with_what_follows(whole: bytes, tmp_path: Path) -> None:
    lines = whole.splitlines(keepends=True)
    text = said(rewritten(tmp_path, b"".join(lines[:3] + lines[5:])))
    assert text.splitlines()[0] == (
        "line 4: 2 line(s) before it are missing; lines were taken out, put in or moved here: the order is no evidence"
    )


def test_a_missing_end_is_found_by_what_was_noted_elsewhere(whole: bytes, tmp_path: Path) -> None:
    head = json.loads(whole.splitlines()[-1])["hash"]
    cut = rewritten(tmp_path, b"".join(whole.splitlines(keepends=True)[:7]))
    assert verify(cut).ok  # nothing in it says that it went on
    assert said(cut, count=9).startswith("the log: 2 line(s) are missing at its end")
    assert said(cut, head=head).startswith("the log: its last line is not the one")
    assert "line 8: it was written after the run's summary" in said(rewritten(tmp_path, whole), count=7)


def test_who_rewrites_the_whole_chain_without_the_key_is_found_by_the_seals(tmp_path: Path) -> None:
    log = story(tmp_path)
    lines = [json.loads(text) for text in log.path.read_text().splitlines()]
    lines[4]["gates"][0]["passed"] = False
    rechain(log.path, lines, OTHER_KEY)
    assert verify(tmp_path).ok
    assert not verify(tmp_path, head=log.head).ok
    assert "line 5: its seal is not of this key" in said(tmp_path, key=KEY)


def test_a_story_that_no_run_writes_is_found(tmp_path: Path) -> None:
    log = story(tmp_path)
    lines = [json.loads(text) for text in log.path.read_text().splitlines()]
    rechain(log.path, [*lines[:3], *lines[4:]])  # finished, and never started
    assert "line 4: finished: reverse_bpr had not started r1" in said(tmp_path)
    rechain(log.path, [lines[0], *lines[2:]])  # started, and nobody asked
    assert "line 3: request r1 was not received" in said(tmp_path)
    rechain(log.path, lines[1:])
    assert "line 1: received at place 1" in said(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n", b"[" * 100_000 + b"\n", b"\xff\xfe\n", b"null\n", b'{"index":NaN}\n'])
def test_rubbish_is_a_problem_and_not_a_crash(content: bytes, tmp_path: Path) -> None:
    assert not verify(rewritten(tmp_path, content)).ok


# -- crashes ------------------------------------------------------------------------------------------------------


def test_the_log_says_which_requests_a_crash_left_open(tmp_path: Path) -> None:
    log = start(tmp_path)
    receive(log)
    receive(log, "r2")
    log.started("r1", "reverse_bpr", seed=3, round=9, before=BEFORE)
    finish(log)
    log.started("r2", "reverse_bpr", seed=3, round=9, before=BEFORE)
    (found,) = open_requests(tmp_path)
    assert (found.request, found.strategy, found.line) == ("r2", "reverse_bpr", 6)
    AuditLog.open(tmp_path, KEY).recovered("r2", "reverse_bpr", "killed in round 3", "old")
    assert open_requests(tmp_path) == ()
    assert verify(tmp_path, key=KEY).ok


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_line_cut_short_by_a_crash_is_taken_off_and_the_log_says_so(
    data: st.DataObject, whole: bytes, tmp_path: Path
) -> None:
    last = len(whole[:-1].rpartition(b"\n")[0]) + 1
    size = data.draw(st.integers(last + 1, len(whole) - 1))
    path = rewritten(tmp_path, whole[:size])
    (problem,) = verify(path).problems
    assert (problem.line, problem.torn) == (9, True)
    log = AuditLog.open(path, KEY)
    assert path.read_bytes()[:last] == whole[:last]
    found = verify(path, log.head, log.count, key=KEY)
    assert found.ok
    assert (found.lines[-1]["event"], found.lines[-1]["cut_bytes"]) == ("repaired", size - last)
    assert [(one.request, one.strategy) for one in found.open] == [("ticket 17", "reverse_bpr")]


def test_a_broken_log_is_not_continued(whole: bytes, tmp_path: Path) -> None:
    path = rewritten(tmp_path, whole.replace(b'"seed":3', b'"seed":4', 1))
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"line 1: it was changed.*restore the file"):
        AuditLog.open(path, KEY)
    with pytest.raises(DataError, match="opened with another key"):
        AuditLog.open(rewritten(tmp_path, whole), OTHER_KEY)
    with pytest.raises(DataError, match="there is a log already"):
        start(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        verify(tmp_path / "nowhere")
    assert before != path.read_bytes() == whole


def test_two_processes_cannot_write_to_one_log(tmp_path: Path) -> None:
    first = start(tmp_path)
    second = AuditLog.open(tmp_path, KEY)
    receive(first)
    with pytest.raises(DataError, match="another process wrote"):
        receive(second, "r2")
    assert verify(tmp_path, first.head, first.count).ok


# -- the key ------------------------------------------------------------------------------------------------------


def test_the_key_is_made_once_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDREC_AUDIT_KEY", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    key = audit_key(None)
    assert len(key) == 32
    assert key == audit_key(None) == (tmp_path / "fedrec" / "audit.key").read_bytes()
    assert stat.S_IMODE((tmp_path / "fedrec" / "audit.key").stat().st_mode) == 0o600
    monkeypatch.setenv("FEDREC_AUDIT_KEY", str(tmp_path / "own.key"))
    assert audit_key(None) != key
    assert [path.name for path in (tmp_path / "fedrec").iterdir()] == ["audit.key"]


def test_a_key_that_cannot_serve_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "audit.key"
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="5 bytes, a key has 32"):
        audit_key(path)
    path.write_bytes(KEY)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"others on this machine may read it \(mode 0644\); chmod 600"):
        audit_key(path)
    with pytest.raises(ConfigError, match="cannot be made"):
        audit_key(path / "below" / "a" / "file")
    with pytest.raises(ConfigError, match="in the run directory"):
        audit_key(tmp_path / "run" / "audit.key", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    if os.geteuid():  # root reads everything
        path.chmod(0o000)
        with pytest.raises(ConfigError, match="cannot be read"):
            audit_key(path)
