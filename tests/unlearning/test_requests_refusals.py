"""Bad request scripts: every mistake is an error that names entry, key, value and remedy, and nothing else happens."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.data.split import Split
from fedrec.data.splits import temporal
from fedrec.data.synthetic import SyntheticConfig, generate
from fedrec.errors import ConfigError, DataError, FedrecError
from fedrec.evaluation.protocols import Protocol, make_split
from tests.unlearning.scripts import DATA, NOW, SPLIT, histories, plan
from unlearning.requests import plan_requests

USER = {"kind": "user", "users": ["12"]}
SENSITIVE = {"policy": "sensitive", "fraction": 0.5}

WRONG_ENTRIES: list[tuple[dict[str, Any], str]] = [
    ({"kind": "user", "user": ["12"]}, r"user: no such key; did you mean users\?"),
    ({"kind": "usr", "users": ["12"]}, r"kind='usr': no such kind; did you mean user\?"),
    ({"kind": ["user"], "users": ["12"]}, r"no such kind"),
    ({"users": ["12"]}, r"kind is missing; write one of user, item, interaction, user_item, rejoin"),
    ({"kind": "user"}, r"forgets nothing; write users, or fraction with policy"),
    ({"kind": "user", "users": None}, r"forgets nothing"),
    ({"kind": "user", "users": []}, r"users is empty; write at least one id"),
    ({"kind": "user", "users": "12"}, r"users='12': write a list, users: \["),
    ({"kind": "user", "users": [12.0]}, r"users=12.0: write text or a whole number"),
    ({"kind": "user", "users": [True]}, r"users=True: write text or a whole number"),
    ({"kind": "user", "users": ["12", 12]}, r"users: '12' is listed twice; delete one"),
    ({"kind": "user", "items": ["i1"]}, r"items does not belong to kind user.*write kind: item or user_item"),
    ({"kind": "user_item", "users": ["12"]}, r"items is missing; kind user_item takes users and items, or.*kind: user"),
    ({"kind": "user", "users": ["12"], "fraction": 0.1}, r"users and fraction exclude each other"),
    ({"kind": "interaction", "pairs": ["12", "i5"]}, r"pairs: '12' is not a pair; write \[user, item\]"),
    ({"kind": "interaction", "pairs": [["12", "i5"], [12, "i5"]]}, r"\('12', 'i5'\) is listed twice"),
    ({"kind": "interaction", "pairs": []}, r"pairs is empty"),
    ({"kind": "user", "fraction": 0}, r"fraction=0: write a share between 0 and 1, neither included"),
    ({"kind": "user", "fraction": 1.0}, r"fraction=1.0: write a share between 0 and 1"),
    ({"kind": "user", "fraction": 5}, r"fraction=5: write a share"),
    ({"kind": "user", "fraction": float("nan")}, r"fraction=nan: write a share"),
    ({"kind": "user", "fraction": "5 %"}, r"fraction='5 %': write a share"),
    ({"kind": "user", "policy": "core"}, r"fraction is missing; write for example fraction: 0.05"),
    ({"kind": "user", "fraction": 0.1, "policy": "cores"}, r"policy='cores': no such policy; did you mean core\?"),
    ({"kind": "item", "fraction": 0.1, "genre": "Horror"}, r"genre belongs to policy: sensitive, not to random"),
    ({"kind": "user", **SENSITIVE}, r"attribute is missing.*attribute: \{gender: F\}"),
    ({"kind": "item", **SENSITIVE}, r"genre is missing.*genre: Horror"),
    ({"kind": "user", **SENSITIVE, "genre": "Horror"}, r"genre does not belong to kind user"),
    ({"kind": "interaction", **SENSITIVE}, r"policy=sensitive needs what is sensitive; write genre: Horror or"),
    ({"kind": "user", **SENSITIVE, "attribute": "F"}, r"attribute='F': write a name and a value"),
    ({"kind": "user", **SENSITIVE, "fraction": 1.5, "attribute": {"gender": "F"}}, r"above 0 and at most 1"),
    ({**USER, "at_round": 0}, r"at_round=0: the run has rounds 1 to 50"),
    ({**USER, "at_round": 51}, r"at_round=51: the run has rounds 1 to 50; .* or raise federation.rounds"),
    (
        {**USER, "at_round": "soon"},
        r"at_round='soon': write a whole number of rounds, or leave it out \(after training\)",
    ),
    ({**USER, "at_round": 1.5}, r"at_round=1.5: write a whole number"),
    ({**USER, "at_round": True}, r"at_round=True: write a whole number"),
    ({**USER, "received": "2025-06-15T13:00:00"}, r"received=2025-06-15T13:00:00 lies in the future"),
    ({**USER, "received": "June"}, r"received='June': write a date or a time, 2025-01-31 or"),
    ({**USER, "received": 20250601}, r"received=20250601: write a date or a time"),
    (
        {**USER, "received": "2025-06-10", "deadline": "2025-06-09"},
        r"deadline=2025-06-09 is before received=2025-06-10",
    ),
    ({**USER, "received": "2025-06-01", "deadline": "2025-06-14"}, r"deadline=2025-06-14 is in the past \(now is"),
    ({**USER, "received": "2025-05-01"}, r"deadline=30 days after received=2025-05-01 is in the past"),
    ({**USER, "deadline": "9999-12-31T23:00:00-05:00"}, r"deadline='9999-12-31T23:00:00-05:00': write a date"),
    ({**USER, "reason": 7}, r"reason=7: write text"),
    ({**USER, "share": 0.5}, r"share does not belong to kind user.*write kind: rejoin"),
    ({"kind": "rejoin"}, r"write who comes back, either users: \[ids\] or of: the id of"),
    ({"kind": "rejoin", "users": ["12"], "of": "r0"}, r"write who comes back"),
    ({"kind": "rejoin", "users": ["12"], "share": 0}, r"share=0: write a share above 0 and at most 1"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG_ENTRIES, ids=lambda value: value if isinstance(value, str) else "")
def test_an_entry_that_is_no_request_is_named_with_the_remedy(entry: dict[str, Any], message: str) -> None:
    good = {"kind": "item", "items": ["i2"]}
    with pytest.raises(ConfigError, match=rf"^unlearning\.requests, entry 2 \(id r2\): .*{message}"):
        plan(good, entry)


MISFITS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"kind": "user", "users": ["112"]}], r"entry 1 .*user 112 is not in sample \(6 users\); did you mean 12\?"),
    ([{"kind": "item", "items": ["i77"]}], r"item i77 is not in sample \(10 items\); did you mean i7\?"),
    ([{"kind": "item", "items": ["Toy Story"]}], r"item Toy Story is not in sample \(10 items\); ids look like i0"),
    ([{"kind": "interaction", "pairs": [["12", "x"]]}], r"item x is not in sample"),
    (
        [{"kind": "interaction", "pairs": [["12", "i7"]]}],
        r"\[12, i7\]: this interaction is held out for validation, so nothing was trained on it",
    ),
    ([{"kind": "interaction", "pairs": [["12", "i3"]]}], r"\[12, i3\]: this interaction is held out for test"),
    (
        [{"kind": "interaction", "pairs": [["12", "i9"]]}],
        r"\[12, i9\]: the user has no interaction with this item in sample",
    ),
    ([{"kind": "item", "items": ["i4"]}], r"entry 1 .*the forget set is empty.*of 1 item after round 50"),
    ([{"kind": "user", "fraction": 0.01}], r"forget set is empty: fraction=0.01 of 6 users is less than half of one"),
    ([{"kind": "user", "users": [str(u) for u in range(10, 16)]}], r"everything is forgotten: no user with training"),
    (
        [{"kind": "item", "items": [f"i{i}" for i in (0, 1, 2, 3, 5, 6, 7, 8)]}],
        r"too much is forgotten: fewer than two items with training interactions",
    ),
    (
        [{"kind": "user", "users": [10, 11, 12]}, {"kind": "user", "users": [13, 14, 15]}],
        r"entry 2 .*everything is forgotten.*; forget fewer, here or in the requests before it",
    ),
    (
        [{**USER, "at_round": 9}, {"kind": "user", "users": ["13", "12"]}],
        r"entry 2 \(id r2\): users: 12: user 12 was forgotten already by entry 1 \(id r1\), due after round 9; "
        r"delete one of the two, or bring the user back in between with kind: rejoin",
    ),
    (
        [{"kind": "user", "users": ["13", "12"]}, {**USER, "at_round": 9}],
        r"entry 1 \(id r1\): users: 12: .*by entry 2 \(id r2\), due after round 9",
    ),
    (
        [USER, {"kind": "rejoin", "users": ["12"]}, USER, USER],
        r"entry 4 \(id r4\): users: 12: .*by entry 3 \(id r3\)",
    ),
    (
        [USER, {"kind": "interaction", "pairs": [["12", "i5"]]}],
        r"entry 2 .*\[12, i5\]: user 12 was forgotten already by entry 1",
    ),
    (
        [{"kind": "interaction", "pairs": [["12", "i5"]]}] * 2,
        r"entry 2 .*\[12, i5\] was forgotten already by entry 1 \(id r1\)",
    ),
    (
        [{"kind": "item", "items": ["i5"]}, {"kind": "interaction", "pairs": [["12", "i5"]]}],
        r"entry 2 .*\[12, i5\] was forgotten already by entry 1 \(id r1\)",
    ),
    ([{"kind": "item", "items": ["i5"]}] * 2, r"entry 2 .*items: i5 was withdrawn already by entry 1 \(id r1\)"),
    (
        [USER, {"kind": "rejoin", "users": ["12"], "share": 0.4}, {"kind": "interaction", "pairs": [["12", "i5"]]}],
        r"entry 3 .*\[12, i5\] was forgotten already by entry 1",
    ),
    ([{"kind": "rejoin", "users": ["12"]}], r"users: 12 is not away: no earlier request forgot this user"),
    (
        [{"kind": "rejoin", "users": ["12"], "at_round": 3}, {**USER, "at_round": 4}],
        r"entry 1 .*users: 12 is not away.*place it after the request that does",
    ),
    ([USER, {"kind": "rejoin", "of": "r9"}], r"of=r9: no request of that id is due before it; before it come r1"),
    (
        [USER, {"kind": "rejoin", "of": "r1"}, {"kind": "rejoin", "of": "r1"}],
        r"entry 3 .*no user whom entry 1 \(id r1\).* forgot is still away",
    ),
    (
        [{"kind": "user", "users": ["15"]}, {"kind": "item", "items": ["i8", "i2"]},
         {"kind": "rejoin", "users": ["15"]}, {"kind": "interaction", "pairs": [["15", "i9"]]},
         {"kind": "user", "users": ["15"]}],
        r"entry 5 .*the forget set is empty: no training interaction is left of 1 user",
    ),
    ([{"kind": "item", **SENSITIVE, "genre": "Horror"}], r"genre=Horror: sample has no genres, and nothing else"),
    ([{"kind": "user", **SENSITIVE, "attribute": {"gender": "F"}}], r"attribute=gender: sample has no such user"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "message"), MISFITS)
def test_a_request_that_does_not_fit_the_data_is_named_with_the_remedy(
    script: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        plan(*script)


def test_a_returning_user_with_nothing_left_to_come_back_with_is_refused() -> None:
    with pytest.raises(DataError, match=r"entry 3 .*nothing is left of these users' history"):
        plan(
            {"kind": "user", "users": ["15"], "at_round": 1},
            {"kind": "item", "items": ["i9", "i2", "i8"], "at_round": 2},
            {"kind": "rejoin", "users": ["15"]},
        )


def test_a_request_before_its_user_joined_is_refused_and_one_in_the_joining_round_is_not() -> None:
    joined = np.array([1, 1, 20, 1, 1, 1])
    for entry in (
        USER,
        {"kind": "interaction", "pairs": [["12", "i5"]]},
        {**USER, "kind": "user_item", "items": ["i2"]},
    ):
        with pytest.raises(DataError, match=r"user 12 joins in round 20, and the request is due after round 19; write "
                                            r"at_round: 20 or later"):  # fmt: skip
            plan({**entry, "at_round": 19}, joined=joined)
        assert plan({**entry, "at_round": 20}, joined=joined)[0].forget.size


def test_an_interaction_that_the_split_does_not_use_is_not_called_unknown() -> None:
    data = histories([[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1]], items=4)
    split = temporal(data, cuts=(2, 3))
    cold = Split(
        split.name, split.n_items, split.train, split.validation.take([0, 1]), split.test, split.negatives_exclude
    )
    with pytest.raises(DataError, match=r"\[12, i0\]: this interaction is not used by the protocol's split"):
        plan({"kind": "interaction", "pairs": [["12", "i0"]]}, data=data, split=cold)


def test_two_requests_with_one_id_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"entry 2 \(id a\): the id is taken by entry 1"):
        plan({"id": "a", **USER}, {"id": "a", "kind": "item", "items": ["i2"]})


@pytest.mark.parametrize("wrong", ["", "x" * 65, "a\nb", 1.5, ["a"]])
def test_an_id_that_would_break_a_log_line_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"entry 1: id=.*write"):
        plan({"id": wrong, **USER})


def test_an_entry_without_id_is_called_by_its_position() -> None:
    with pytest.raises(ConfigError, match=r"entry 1: id is missing; .* for example id: r1"):
        plan_requests([USER], DATA, SPLIT, rounds=5, seed=0, now=NOW)


def test_an_unknown_batching_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unlearning.batching=batch: no such batching; did you mean batched\?"):
        plan(USER, batching="batch")


FILES: list[tuple[str, str]] = [
    ("- id: r1\n  kind: user\n users: [7]\n", r"requests.yaml, line 3, column 2: not valid YAML: "),
    ("- {id: r1, kind: user, users: [7\n", r"requests.yaml, line 2, column 1: not valid YAML: "),
    (
        "- id: r1\n  users: ['12']\n  users: ['13']\n",
        r"line 3, column 3: not valid YAML: the key users is written twice",
    ),
    ("- !!python/object/apply:os.getcwd []\n", r"line 1, column 3: not valid YAML: could not determine a constructor"),
    ("- id: a\x00b\n", r"line 1, column 8: not valid YAML: "),
    (
        "requests:\n  - id: r1\n",
        r"requests.yaml: must be one list of requests, got a mapping; write the entries without",
    ),
    ("id: r1\nkind: user\n", r"must be one list of requests, got a mapping; begin every entry with '- id:'"),
    ("", r"must be one list of requests, got nothing"),
    ("7", r"must be one list of requests, got '7'"),
    ("[]", r"holds no requests; write at least one entry"),
    ("- r1\n- r2\n", r"requests.yaml, entry 1: must be a mapping with the keys id and kind, got 'r1'"),
    ("[" * 3000, r"nested too deeply"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_a_malformed_file_is_named_with_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "requests.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        plan_requests(path, DATA, SPLIT, rounds=5, seed=0, now=NOW)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "requests.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"requests.yaml: is not UTF-8 text \(byte 0\)"):
        plan_requests(tmp_path / "requests.yaml", DATA, SPLIT, rounds=5, seed=0)
    with pytest.raises(ConfigError, match=r"request.yaml: no such file; did you mean requests.yaml\?"):
        plan_requests(tmp_path / "request.yaml", DATA, SPLIT, rounds=5, seed=0)
    with pytest.raises(ConfigError, match=r"nor is there a folder"):
        plan_requests(tmp_path / "no" / "request.yaml", DATA, SPLIT, rounds=5, seed=0)
    with pytest.raises(ConfigError, match=r"cannot be read"):
        plan_requests(tmp_path, DATA, SPLIT, rounds=5, seed=0)


def test_aliases_that_unfold_to_billions_are_cut_short_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "requests.yaml"
    doubled = [f"  - &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    path.write_text("\n".join(["- id: r1", "  users:", "  - &a0 [x, x]", *doubled, "  kind: *a39"]))
    with pytest.raises(ConfigError, match=r"entry 1 \(id r1\): kind=\[\[.*no such kind") as caught:
        plan_requests(path, DATA, SPLIT, rounds=5, seed=0, now=NOW)
    assert len(str(caught.value)) < 1000


def test_data_without_genres_or_attributes_say_which_they_have() -> None:
    data = generate(SyntheticConfig(users=30, items=60, seed=1, mean_activity=15))
    split = make_split(data, Protocol(), 0)
    with pytest.raises(
        DataError, match=r"entry 1 \(id r1\): attribute=sex: synthetic has no such user attribute; there"
    ):
        plan({"kind": "user", **SENSITIVE, "attribute": {"sex": "F"}}, data=data, split=split)
    with pytest.raises(DataError, match=r"genre=Dramas: no item of synthetic has it; did you mean Drama\?"):
        plan({"kind": "item", **SENSITIVE, "genre": "Dramas"}, data=data, split=split)


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 60) | st.floats() | st.text(max_size=4) | st.sampled_from(
        ["12", "i5", "user", "item", "rejoin", "core", "sensitive", "2025-06-10", "r1", NOW, NOW.date(), datetime.max]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip
KEYS = ["id", "kind", "users", "items", "pairs", "fraction", "policy", "genre", "attribute", "of", "share", "at_round",
        "received", "deadline", "reason", "typo"]  # fmt: skip


@settings(max_examples=150)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), values, max_size=6) | values, max_size=3))
def test_any_list_is_planned_or_refused_in_words(script: list[Any]) -> None:
    try:
        batches = plan_requests(script, DATA, SPLIT, rounds=50, seed=0, now=NOW)
    except FedrecError as error:
        assert str(error).startswith("unlearning.requests")  # noqa: PT017 - a plan is as good an answer
    else:
        assert batches


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=5))
def test_any_change_of_a_good_entry_is_planned_or_refused_by_name(changes: dict[str, Any]) -> None:
    entry = {"id": "r1", **USER, **changes}
    try:
        (batch,) = plan_requests([entry], DATA, SPLIT, rounds=50, seed=0, now=NOW)
    except FedrecError as error:
        assert "entry 1" in str(error)  # noqa: PT017
    else:
        assert batch.forget.size


@settings(max_examples=100)
@given(text=st.text(alphabet="-[]{}:,#&*!|>'\"% \n\tidkr1u2é\x85", max_size=60))
def test_any_text_in_a_file_is_planned_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"fuzzed\.yaml"):  # no such text makes a whole request
        plan_requests(path, DATA, SPLIT, rounds=5, seed=0, now=NOW)
