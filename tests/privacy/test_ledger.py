"""The ledger: every release is on disk before it leaves, nothing can be edited out, and the sum is the right one."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedrec.errors import ConfigError
from privacy.accountants import Release, epsilon
from privacy.ledger import Ledger, Subject

DATA = Subject("ml-100k", "a" * 64, 943, 100_000)
OTHER = Subject("ml-100k", "b" * 64, 943, 100_000)
DELTA = 943**-1.1


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDREC_CACHE_DIR", str(tmp_path / "cache"))


def add(ledger: Ledger, number: int = 1, **changed: Any) -> None:
    settings: dict[str, Any] = {
        "run": "first", "round": number, "unit": "user", "what": ["item_embedding"], "sampler": "all",
        "sample_rate": 1.0, "noise_multiplier": 10.0, "max_grad_norm": 0.5,
    }  # fmt: skip
    ledger.record(**{**settings, **changed})


def poisson(ledger: Ledger, rounds: int, **changed: Any) -> None:
    for number in range(1, rounds + 1):
        add(ledger, number, sampler="poisson", sample_rate=0.1, noise_multiplier=1.14, **changed)


def three(folder: Path) -> Ledger:
    """Two releases about users and one about interactions."""
    ledger = Ledger.start(folder, DATA, DELTA)
    add(ledger, 1)
    add(ledger, 2, noise_multiplier=9.0, survivors=850, trust="secure_aggregation")
    add(ledger, 3, unit="interaction", noise_multiplier=4.0, steps=10, group="silo-1", max_grad_norm=None)
    return ledger


def test_every_release_is_on_disk_when_record_returns(tmp_path: Path) -> None:
    ledger = Ledger.start(tmp_path, DATA, DELTA)
    for number in range(1, 4):
        add(ledger, number)
        assert Ledger.read(tmp_path).entries == ledger.entries
        assert len(ledger.entries) == number
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["ledger.json"]


def test_what_is_read_says_what_was_written(tmp_path: Path) -> None:
    written = three(tmp_path)
    read = Ledger.read(tmp_path / "ledger.json")
    assert (read.subject, read.delta, read.accountant, read.entries) == (DATA, DELTA, "auto", written.entries)
    assert read.composed() == written.composed()
    entry = read.entries[1]
    assert (entry.adjacency, entry.noise_seed, entry.survivors) == ("add/remove one user", "operating system", 850)


def test_unsampled_releases_compose_exactly(tmp_path: Path) -> None:
    found = three(tmp_path).composed()["user"]
    assert found == epsilon([Release(10.0), Release(9.0)], DELTA)
    assert found.accountant == "gaussian"


def test_units_are_never_mixed(tmp_path: Path) -> None:
    both = three(tmp_path).composed()
    alone = Ledger.start(tmp_path / "alone", DATA, DELTA)
    add(alone, unit="interaction", noise_multiplier=4.0, steps=10)
    assert set(both) == {"user", "interaction"}
    assert both["interaction"] == alone.composed()["interaction"]
    assert Ledger.read(tmp_path).spent("user") == [[Release(10.0), Release(9.0)]]


def test_disjoint_groups_compose_in_parallel_and_the_worst_counts(tmp_path: Path) -> None:
    ledger = Ledger.start(tmp_path, DATA, DELTA)
    add(ledger, unit="interaction", noise_multiplier=20.0)
    for group, steps in (("silo-1", 5), ("silo-2", 8), ("silo-3", 8)):
        add(ledger, unit="interaction", noise_multiplier=6.0, steps=steps, group=group)
    assert ledger.composed()["interaction"] == epsilon([Release(20.0), Release(6.0, steps=8)], DELTA)
    assert ledger.spent("interaction") == [[Release(20.0), Release(6.0, steps=8)]]
    assert "9 releases in each of 3 disjoint groups" in ledger.finish()["interaction"]["statement"]


def test_groups_that_no_other_one_covers_are_all_asked(tmp_path: Path) -> None:
    ledger = Ledger.start(tmp_path, DATA, DELTA)
    add(ledger, unit="interaction", noise_multiplier=3.0, steps=2, group="few strong ones")
    add(ledger, unit="interaction", noise_multiplier=30.0, steps=50, group="many weak ones")
    assert len(ledger.spent("interaction")) == 2
    assert ledger.composed()["interaction"] == epsilon([Release(3.0, steps=2)], DELTA)


def test_two_runs_cost_what_one_run_of_the_sum_costs(tmp_path: Path) -> None:
    first = Ledger.start(tmp_path / "first", DATA, DELTA)
    poisson(first, 12)
    second = Ledger.start(tmp_path / "second", DATA, DELTA, previous=tmp_path / "first")
    poisson(second, 8, run="second")
    whole = Ledger.start(tmp_path / "whole", DATA, DELTA)
    poisson(whole, 20)
    assert Ledger.read(tmp_path / "second").composed() == whole.composed()
    assert [entry.run for entry in second.entries] == ["first"] * 12 + ["second"] * 8
    assert first.composed()["user"].value < whole.composed()["user"].value


def test_a_follow_up_of_other_data_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    three(tmp_path / "first")
    with pytest.raises(ConfigError, match=r"privacy\.ledger=null"):
        Ledger.start(tmp_path / "second", OTHER, DELTA, previous=tmp_path / "first")
    assert not (tmp_path / "second").exists()


def test_the_same_data_under_another_name_continues(tmp_path: Path) -> None:
    three(tmp_path / "first")
    renamed = Subject("my copy", DATA.sha256, DATA.users, DATA.interactions)
    add(Ledger.start(tmp_path / "second", renamed, DELTA, previous=tmp_path / "first" / "ledger.json"))
    assert len(Ledger.read(tmp_path / "second").entries) == 4


def test_a_run_directory_keeps_the_ledger_it_has(tmp_path: Path) -> None:
    ledger = three(tmp_path)
    with pytest.raises(ConfigError, match="choose another run directory"):
        Ledger.start(tmp_path, DATA, DELTA)
    assert Ledger.read(tmp_path).entries == ledger.entries


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    three(tmp_path)
    resumed = Ledger.read(tmp_path)
    add(resumed, 2)
    assert [entry.round for entry in Ledger.read(tmp_path).entries] == [1, 2, 3, 2]
    assert resumed.composed()["user"] == epsilon([Release(10.0, steps=2), Release(9.0)], DELTA)


# -- tampering ----------------------------------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, (dict, list)) and value:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 2000), st.floats(0.0, 100.0), st.sampled_from(["", "user", "all", "auto"])
)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ledger")
    three(folder).finish()
    loaded: dict[str, Any] = json.loads((folder / "ledger.json").read_text())
    return loaded


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_edit_of_any_field_is_found(tmp_path: Path, document: dict[str, Any], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(list(leaves(document))))
    value = data.draw(scalars)
    edited = copy.deepcopy(document)
    inner: Any = edited
    for key in path[:-1]:
        inner = inner[key]
    if json.dumps(inner[path[-1]]) == json.dumps(value):
        return
    inner[path[-1]] = value
    file = tmp_path / "ledger.json"
    file.write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=r"privacy\.ledger="):
        Ledger.read(file)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_lost_entry_is_found(tmp_path: Path, document: dict[str, Any], position: int) -> None:
    edited = copy.deepcopy(document)
    del edited["entries"][position]
    (tmp_path / "ledger.json").write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match="does not continue" if position < 2 else "missing at its end"):
        Ledger.read(tmp_path)


def test_a_reordered_chain_is_found(tmp_path: Path, document: dict[str, Any]) -> None:
    edited = copy.deepcopy(document)
    edited["entries"][0], edited["entries"][1] = edited["entries"][1], edited["entries"][0]
    (tmp_path / "ledger.json").write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match="entry 0 does not continue"):
        Ledger.read(tmp_path)


def test_a_changed_entry_is_named_with_the_remedy(tmp_path: Path, document: dict[str, Any]) -> None:
    edited = copy.deepcopy(document)
    edited["entries"][1]["noise_multiplier"] = 90.0
    (tmp_path / "ledger.json").write_text(json.dumps(edited))
    with pytest.raises(ConfigError, match=r"entry 1 was changed.*restore the file"):
        Ledger.start(tmp_path / "next", DATA, DELTA, previous=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a ledger"),
        ("\x00", "not a ledger"),
        ("[1, 2]", "not a ledger of fedrec"),
        ('{"schema": 1, "test": {"hr@10": 0.1}}', "not a ledger of fedrec"),
        ('{"kind": "fedrec privacy ledger", "schema": 2}', "schema 2"),
        ('{"kind": "fedrec privacy ledger", "schema": 1}', "its head"),
        ('{"delta": 1, "delta": 2}', "stands twice"),
        ("[" * 100_000, "not a ledger"),
    ],
)
def test_files_that_are_no_ledger_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Ledger.read(tmp_path)


def test_a_missing_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*privacy\.ledger=null"):
        Ledger.read(tmp_path / "no such run")


# -- what it refuses and what it says --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampler": "fixed", "sample_rate": 0.1}, "federation.sampler=poisson"),
        ({"sampler": "all", "sample_rate": 0.5}, "everybody takes part"),
        ({"mechanism": "laplace"}, "only gaussian"),
        ({"unit": "group"}, "unit group"),
        ({"adjacency": "add/remove one interaction"}, "adjacency"),
        ({"adjacency": "replace one user", "sampler": "poisson", "sample_rate": 0.1}, "add/remove only"),
        ({"noise_multiplier": -1.0}, "privacy.noise_multiplier=-1.0"),
        ({"noise_multiplier": math.inf}, "not a release"),
        ({"steps": 0}, "not a release"),
        ({"sampler": "poisson", "sample_rate": 0.0}, "sample rate 0.0"),
    ],
)
def test_releases_that_no_accountant_covers_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    ledger = Ledger.start(tmp_path, DATA, DELTA)
    with pytest.raises(ConfigError, match=message):
        add(ledger, **changed)
    assert Ledger.read(tmp_path).entries == []


def test_gdp_and_a_meaningless_delta_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no bound"):
        Ledger.start(tmp_path, DATA, DELTA, "gdp")
    with pytest.raises(ConfigError, match=r"privacy\.delta"):
        Ledger.start(tmp_path, DATA, 0.0)
    assert not (tmp_path / "ledger.json").exists()


def test_the_file_says_in_one_sentence_what_is_guaranteed(tmp_path: Path) -> None:
    ledger = Ledger.start(tmp_path, DATA, DELTA)
    poisson(ledger, 100)
    during = json.loads((tmp_path / "ledger.json").read_text())["composed"]["user"]
    ledger.finish()
    after = json.loads((tmp_path / "ledger.json").read_text())["composed"]["user"]
    assert after["statement"] == (
        "(4.03, 0.00054)-differential privacy for one user (add or remove), Poisson sampling at 0.1, 100 releases, "
        "PRV accountant"
    )
    assert (after["accountant"], after["private"], after["releases"]) == ("prv", True, 100)
    assert after["epsilon"] == ledger.composed()["user"].value
    assert during["epsilon"] > after["epsilon"]
    assert "ignores sampling" in during["note"]
    assert "ignores sampling" in during["statement"]


@given(sigma=st.floats(0.5, 200.0))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_the_sentence_never_promises_more_than_was_kept(tmp_path_factory: pytest.TempPathFactory, sigma: float) -> None:
    ledger = Ledger.start(tmp_path_factory.mktemp("run"), DATA, DELTA)
    add(ledger, noise_multiplier=sigma)
    result = ledger.finish()["user"]
    printed, delta = (float(part) for part in result["statement"][1:].split(")")[0].split(","))
    assert result["epsilon"] <= printed <= result["epsilon"] * 1.01 + 1e-12
    assert delta >= DELTA


def test_a_fixed_seed_or_no_noise_is_not_private(tmp_path: Path) -> None:
    seeded = Ledger.start(tmp_path / "seeded", DATA, DELTA)
    add(seeded)
    assert seeded.private
    add(seeded, noise_seed=7)
    silent = Ledger.start(tmp_path / "silent", DATA, DELTA)
    add(silent, noise_multiplier=0.0, max_grad_norm=math.inf)
    for ledger, reason in ((seeded, "its seed is fixed"), (silent, "without noise")):
        assert not ledger.private
        assert not Ledger.read(ledger.path).private
        statement = ledger.finish()["user"]["statement"]
        assert statement.startswith("no differential privacy for one user")
        assert reason in statement
        assert json.loads(ledger.path.read_text())["private"] is False
    assert seeded.entries[1].noise_seed == "fixed: 7 (not private)"
    assert silent.composed()["user"].value == math.inf
    assert json.loads(silent.path.read_text())["composed"]["user"]["epsilon"] is None


def test_a_fault_in_one_unit_says_nothing_about_the_other(tmp_path: Path) -> None:
    ledger = Ledger.start(tmp_path, DATA, DELTA)
    add(ledger)
    add(ledger, unit="interaction", noise_seed=1)
    results = ledger.finish()
    assert results["user"]["private"] is True
    assert results["interaction"]["private"] is False
    assert not ledger.private


def test_replace_one_is_said_only_where_every_release_keeps_it(tmp_path: Path) -> None:
    ledger = Ledger.start(tmp_path, DATA, DELTA)
    add(ledger, adjacency="replace one user")
    assert "one user (replace)" in ledger.finish()["user"]["statement"]
    add(ledger)
    assert "one user (add or remove)" in ledger.finish()["user"]["statement"]


def test_a_thousand_rounds_are_written_and_read(tmp_path: Path) -> None:
    ledger = Ledger.start(tmp_path, DATA, DELTA)
    poisson(ledger, 1000)
    assert len(Ledger.read(tmp_path).entries) == 1000


def test_an_interrupted_write_leaves_the_ledger_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = three(tmp_path)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        add(ledger, 4)
    assert len(Ledger.read(tmp_path).entries) == 3
