"""Request scripts: what is forgotten when, what the data are before and after, who comes back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.data import load_dataset
from fedrec.data.interactions import Interactions
from fedrec.data.split import Split
from fedrec.data.splits import leave_one_out
from fedrec.data.synthetic import SyntheticConfig, generate
from fedrec.evaluation.protocols import Protocol, make_split
from tests.evaluation.movielens import movielens_100k
from tests.unlearning.scripts import DATA, NOW, ROWS, SPLIT, histories, pairs, plan, same_split
from unlearning.forget import ForgetSet, union
from unlearning.requests import describe, plan_requests, report_fields


@pytest.fixture(scope="module")
def described() -> tuple[Interactions, Split]:
    data = generate(SyntheticConfig(users=60, items=120, seed=1, mean_activity=20))
    return data, make_split(data, Protocol(), 0)


def test_each_kind_forgets_exactly_its_training_interactions() -> None:
    train = pairs(SPLIT.train)
    (user,) = plan({"kind": "user", "users": ["12"]})
    assert pairs(user.forget.pairs) == {pair for pair in train if pair[0] == 2}
    (item,) = plan({"kind": "item", "items": ["i5"]})
    assert pairs(item.forget.pairs) == {pair for pair in train if pair[1] == 5}
    assert item.forget.items.tolist() == [5]
    (single,) = plan({"kind": "interaction", "pairs": [["12", "i5"], [14, "i8"]]})
    assert pairs(single.forget.pairs) == {(2, 5), (4, 8)}
    assert single.forget.users.size == single.forget.items.size == 0
    (both,) = plan({"kind": "user_item", "users": [12], "items": ["i8"]})
    assert pairs(both.forget.pairs) == {pair for pair in train if pair[0] == 2 or pair[1] == 8}
    for batch in (user, item, single, both):
        assert pairs(batch.after.train) == train - pairs(batch.forget.pairs)
        assert batch.before is SPLIT


def test_a_request_on_top_of_earlier_ones_forgets_what_they_left() -> None:
    first, second = plan(
        {"kind": "interaction", "pairs": [["12", "i5"]], "at_round": 10}, {"kind": "user", "users": ["12"]}
    )
    assert pairs(second.forget.pairs) == {(2, 6), (2, 0), (2, 1), (2, 2)}
    assert second.before is first.after
    assert pairs(second.forgotten.pairs) == pairs(first.forget.pairs) | pairs(second.forget.pairs)


def test_requests_come_by_round_then_received_then_place_in_the_list() -> None:
    batches = plan(
        {"id": "last", "kind": "user", "users": ["12"]},
        {"id": "b", "kind": "user", "users": ["13"], "at_round": 7, "received": "2025-06-10"},
        {"id": "c", "kind": "item", "items": ["i9"], "at_round": 7, "received": "2025-06-10"},
        {"id": "a", "kind": "item", "items": ["i8"], "at_round": 7, "received": "2025-06-09T23:00:00+02:00"},
        {"id": "first", "kind": "interaction", "pairs": [["12", "i5"]], "at_round": 3},
        {"id": "also last", "kind": "item", "items": ["i7"], "at_round": 50},
    )
    assert [(b.round, b.requests[0].id) for b in batches] == [
        (3, "first"), (7, "a"), (7, "b"), (7, "c"), (50, "last"), (50, "also last"),
    ]  # fmt: skip
    assert [b.requests[0].at_round for b in batches] == [3, 7, 7, 7, None, 50]


def test_batched_requests_of_a_round_are_one_batch_and_a_rejoin_stands_alone() -> None:
    script: list[dict[str, Any]] = [
        {"kind": "user", "users": ["12"], "at_round": 5},
        {"kind": "item", "items": ["i9"], "at_round": 5},
        {"kind": "interaction", "pairs": [["13", "i6"]]},
        {"kind": "rejoin", "users": ["12"]},
        {"kind": "user", "users": ["12"]},
        {"kind": "user", "users": ["14"]},
        {"kind": "rejoin", "users": ["12"]},
        {"kind": "rejoin", "users": ["14"]},
    ]
    batched = plan(*script, batching="batched")
    assert [[r.id for r in b.requests] for b in batched] == [["r1", "r2"], ["r3"], ["r4"], ["r5", "r6"], ["r7"], ["r8"]]
    assert [b.kinds for b in batched] == [{"user", "item"}, {"interaction"}, set(), {"user"}, set(), set()]
    assert [b.returning.tolist() for b in batched] == [[], [], [2], [], [2], [4]]
    assert pairs(batched[0].forget.pairs) == set().union(*(pairs(r.forget.pairs) for r in batched[0].requests))
    one_by_one = plan(*script)
    assert len(one_by_one) == 8
    assert same_split(batched[-1].after, one_by_one[-1].after)


def test_a_user_who_comes_back_whole_restores_the_data_bit_for_bit() -> None:
    away, back = plan({"kind": "user", "users": ["12", "14"], "at_round": 5}, {"kind": "rejoin", "users": [12, 14]})
    assert pairs(away.after.test) < pairs(SPLIT.test)
    assert back.returning.tolist() == [2, 4]
    assert back.forget.size == back.forgotten.size == 0
    assert back.requests[0].rejoin
    assert same_split(back.after, SPLIT)


def test_a_user_may_come_back_with_the_latest_part_of_the_history() -> None:
    _, back = plan({"kind": "user", "users": ["12"], "at_round": 5}, {"kind": "rejoin", "of": "r1", "share": 0.5})
    assert back.after.train.row(2).tolist() == [0, 1, 2]  # of 5, 6, 0, 1, 2, oldest first; rounded up
    assert back.after.test.row(2).tolist() == SPLIT.test.row(2).tolist()
    assert pairs(back.forgotten.pairs) == {(2, 5), (2, 6)}
    assert back.forgotten.users.size == 0


def test_what_was_forgotten_for_its_own_sake_does_not_come_back_with_its_user() -> None:
    batches = plan(
        {"kind": "interaction", "pairs": [["12", "i0"]], "at_round": 1},
        {"kind": "item", "items": ["i6"], "at_round": 2},
        {"kind": "user", "users": ["12"], "at_round": 3},
        {"kind": "rejoin", "users": ["12"], "at_round": 4},
    )
    assert batches[-1].after.train.row(2).tolist() == [5, 1, 2]


def test_the_share_that_comes_back_is_of_the_history_that_may_be_trained_on() -> None:
    _, _, back = plan(
        {"kind": "interaction", "pairs": [["12", "i2"]], "at_round": 1},
        {"kind": "user", "users": ["12"], "at_round": 2},
        {"kind": "rejoin", "users": ["12"], "share": 0.6},
    )
    assert back.after.train.row(2).tolist() == [6, 0, 1]  # three of 5, 6, 0, 1


def test_a_user_may_be_forgotten_again_and_come_back_with_more() -> None:
    batches = plan(
        {"kind": "user", "users": ["12"], "at_round": 1},
        {"kind": "rejoin", "users": ["12"], "share": 0.4, "at_round": 2},
        {"kind": "user", "users": ["12"], "at_round": 3},
        {"kind": "rejoin", "of": "r3"},
    )
    assert [b.after.train.row(2).tolist() for b in batches] == [[], [1, 2], [], [5, 6, 0, 1, 2]]
    assert pairs(batches[2].forget.pairs) == {(2, 1), (2, 2)}
    assert same_split(batches[-1].after, SPLIT)


def test_forgotten_users_and_withdrawn_items_are_not_judged_and_withdrawn_items_never_negatives() -> None:
    (batch,) = plan({"kind": "user_item", "users": ["12"], "items": ["i4"]})
    held_out = pairs(batch.after.validation) | pairs(batch.after.test)
    assert held_out == {(u, i) for u, row in enumerate(ROWS) for i in row[-2:] if u != 2 and i != 4}
    assert all(4 in batch.after.negatives_exclude.row(u) for u in range(6))


@st.composite
def disjoint(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Requests of which no two name the same subject, all due after the same round."""
    users = draw(st.lists(st.sampled_from([12, 13, 14]), unique=True, max_size=2))
    items = draw(st.lists(st.sampled_from(["i2", "i8", "i9"]), unique=True, max_size=2))
    free = [(10 + u, f"i{i}") for u, i in sorted(pairs(SPLIT.train)) if 10 + u not in users and f"i{i}" not in items]
    single = draw(st.lists(st.sampled_from(free), unique=True, max_size=4))
    entries: list[dict[str, Any]] = [{"kind": "user", "users": [user]} for user in users]
    entries += [{"kind": "item", "items": [item]} for item in items]
    entries += [{"kind": "interaction", "pairs": [list(pair)]} for pair in single]
    return [{"id": f"r{n}", "at_round": 4, **entry} for n, entry in enumerate(entries)]


@settings(max_examples=60)
@given(disjoint().filter(bool), st.randoms(use_true_random=False), st.sampled_from(["sequential", "batched"]))
def test_disjoint_requests_of_a_round_commute(script: list[dict[str, Any]], chance: Any, batching: str) -> None:
    shuffled = list(script)
    chance.shuffle(shuffled)
    first, second = plan(*script, batching=batching)[-1], plan(*shuffled, batching=batching)[-1]
    assert same_split(first.after, second.after)
    assert pairs(first.forgotten.pairs) == pairs(second.forgotten.pairs)
    assert first.forgotten.users.tolist() == second.forgotten.users.tolist()
    assert first.forgotten.items.tolist() == second.forgotten.items.tolist()


@settings(max_examples=60)
@given(disjoint().filter(bool), st.randoms(use_true_random=False))
def test_forget_sets_commute_and_removing_one_by_one_is_removing_their_union(
    script: list[dict[str, Any]], chance: Any
) -> None:
    sets = [batch.forget for batch in plan(*script)]
    shuffled = list(sets)
    chance.shuffle(shuffled)
    whole, other = union(sets, SPLIT.n_users), union(shuffled, SPLIT.n_users)
    assert pairs(whole.pairs) == pairs(other.pairs)
    one_by_one = SPLIT
    for forget in shuffled:
        one_by_one = forget.remove_from(one_by_one)
    at_once = whole.remove_from(SPLIT)
    for part in ("train", "validation", "test"):
        assert pairs(getattr(one_by_one, part)) == pairs(getattr(at_once, part))
    present = np.setdiff1d(np.arange(SPLIT.n_users), whole.users)
    for user in present:
        assert set(one_by_one.negatives_exclude.row(user)) == set(at_once.negatives_exclude.row(user))


def test_the_order_of_entries_does_not_matter_where_received_tells_them_apart(
    described: tuple[Interactions, Split],
) -> None:
    data, split = described
    script = [
        {"id": "a", "kind": "user", "fraction": 0.1, "at_round": 9, "received": "2025-06-01"},
        {"id": "b", "kind": "interaction", "fraction": 0.1, "policy": "core", "at_round": 9, "received": "2025-06-02"},
        {"id": "c", "kind": "item", "fraction": 0.1, "policy": "edge", "at_round": 9, "received": "2025-06-03"},
        {"id": "d", "kind": "user_item", "fraction": 0.05, "at_round": 20},
    ]
    forwards, backwards = (plan(*s, data=data, split=split) for s in (script, script[::-1]))
    for first, second in zip(forwards, backwards, strict=True):
        assert first.requests[0].id == second.requests[0].id
        assert pairs(first.forget.pairs) == pairs(second.forget.pairs)
        assert same_split(first.after, second.after)


@pytest.mark.parametrize("kind", ["user", "item", "interaction", "user_item"])
@pytest.mark.parametrize("policy", ["random", "core", "edge"])
def test_nothing_is_selected_twice(described: tuple[Interactions, Split], kind: str, policy: str) -> None:
    data, split = described
    script = [{"kind": kind, "fraction": 0.2, "policy": policy, "at_round": r} for r in (3, 6, 9)]
    batches = plan(*script, data=data, split=split)
    sets = [batch.forget for batch in batches]
    for name in ("users", "items"):
        codes = np.concatenate([getattr(forget, name) for forget in sets])
        assert np.unique(codes).size == codes.size
    assert sum(forget.size for forget in sets) == batches[-1].forgotten.size
    assert batches[-1].after.train.items.size == split.train.items.size - batches[-1].forgotten.size
    left = split.train.counts
    for forget, batch in zip(sets, batches, strict=True):
        if kind == "user":
            assert forget.users.size == int(0.2 * (left > 0).sum() + 0.5)
        if kind == "interaction":
            assert forget.size == int(0.2 * left.sum() + 0.5)
        left = batch.after.train.counts


def test_a_selection_leaves_out_users_who_have_not_joined(described: tuple[Interactions, Split]) -> None:
    data, split = described
    joined = np.where(np.arange(60) < 30, 1, 40).astype(np.int64)
    for kind in ("user", "interaction"):
        early, late = plan(
            {"kind": kind, "fraction": 0.4, "at_round": 39},
            {"kind": kind, "fraction": 0.4, "at_round": 40},
            data=data, split=split, joined=joined,
        )  # fmt: skip
        assert early.forget.affected.max() < 30 <= late.forget.affected.max()


def test_a_sensitive_request_forgets_all_of_the_genre_or_group_and_its_fraction_is_of_these(
    described: tuple[Interactions, Split],
) -> None:
    data, split = described
    assert data.item_table is not None
    assert data.user_table is not None
    drama = {i for i, genres in enumerate(data.item_table["genres"].to_list()) if "Drama" in genres}
    women = {u for u, gender in enumerate(data.user_table["gender"].to_list()) if gender == "F"}
    train = pairs(split.train)
    dramas = {pair for pair in train if pair[1] in drama}

    def one(**entry: Any) -> ForgetSet:
        return plan({"policy": "sensitive", **entry}, data=data, split=split)[0].forget

    assert pairs(one(kind="interaction", genre="Drama").pairs) == dramas
    part = pairs(one(kind="interaction", genre="Drama", fraction=0.25).pairs)
    assert part < dramas
    assert len(part) == int(0.25 * len(dramas) + 0.5)
    assert set(one(kind="user", attribute={"gender": "F"}).users.tolist()) == women
    by_women = one(kind="interaction", genre="Drama", attribute={"gender": "F"})
    assert pairs(by_women.pairs) == {pair for pair in dramas if pair[0] in women}
    assert set(one(kind="item", genre="Drama").items.tolist()) == {i for _, i in dramas}


PROTECTED = [[0, 1, 2, 3, 4], [1, 0, 3, 2, 4], [2, 4, 1, 0, 3]]


@st.composite
def scripts(draw: st.DrawFn) -> tuple[Interactions, list[dict[str, Any]], list[set[tuple[int, int]]]]:
    """Data, a script of explicit requests one a round, and the training pairs after each, by plain sets.

    The first three users and their items stay, so that there is always something left.
    """
    rows = PROTECTED + [draw(st.permutations(range(12)))[: draw(st.integers(4, 9))] for _ in range(4)]
    data = histories(rows, items=12)
    base = {u: row[:-2] for u, row in enumerate(rows)}
    gone: set[int] = set()
    withdrawn: set[int] = set()
    singled: set[tuple[int, int]] = set()
    left: set[tuple[int, int]] = set()

    def now() -> set[tuple[int, int]]:
        return {
            (u, i) for u, row in base.items() for i in row
            if u not in gone and i not in withdrawn and (u, i) not in singled | left
        }  # fmt: skip

    script: list[dict[str, Any]] = []
    expected: list[set[tuple[int, int]]] = []
    for round_ in range(1, draw(st.integers(1, 8)) + 1):
        pairs_now = now()
        users = sorted({u for u, _ in pairs_now if u > 2})
        items = sorted({i for _, i in pairs_now if i > 4})
        single = sorted(pair for pair in pairs_now if pair[0] > 2)
        returning = sorted(
            u for u in gone if any(i not in withdrawn and (u, i) not in singled for i in base[u])
        )  # fmt: skip
        options = [("user", users), ("item", items), ("interaction", single), ("rejoin", returning)]
        kind, pool = draw(st.sampled_from([option for option in options if option[1]] or [("", [])]))
        if not pool:
            break
        subject = draw(st.sampled_from(pool))
        entry: dict[str, Any] = {"kind": kind, "at_round": round_}
        if kind == "user":
            gone.add(subject)
            entry["users"] = [10 + subject]
        elif kind == "item":
            withdrawn.add(subject)
            entry["items"] = [f"i{subject}"]
        elif kind == "interaction":
            singled.add(subject)
            entry["pairs"] = [[10 + subject[0], f"i{subject[1]}"]]
        else:
            share = draw(st.sampled_from([0.25, 0.5, 1.0]))
            history = [i for i in base[subject] if i not in withdrawn and (subject, i) not in singled]
            keep = -(-len(history) * int(share * 4) // 4)
            gone.remove(subject)
            left = {pair for pair in left if pair[0] != subject}
            left |= {(subject, i) for i in history[: len(history) - keep]}
            entry |= {"users": [10 + subject], "share": share}
        script.append(entry)
        expected.append(now())
    return data, script, expected


@settings(max_examples=80)
@given(scripts().filter(lambda case: bool(case[1])))
def test_any_script_leaves_the_data_that_plain_sets_say(
    case: tuple[Interactions, list[dict[str, Any]], list[set[tuple[int, int]]]],
) -> None:
    data, script, expected = case
    split = leave_one_out(data)
    batches = plan(*script, data=data, split=split)
    train = pairs(split.train)
    for batch, after in zip(batches, expected, strict=True):
        assert pairs(batch.after.train) == after
        assert pairs(batch.forgotten.pairs) == train - after
        assert pairs(batch.forget.pairs) == pairs(batch.before.train) - after
        assert same_split(batch.after, batch.forgotten.remove_from(split))


def test_received_and_deadline_have_defaults_and_are_utc() -> None:
    request = plan({"kind": "user", "users": ["12"]})[0].requests[0]
    assert (request.received, request.deadline) == (NOW, NOW + timedelta(days=30))
    dated = plan({"kind": "user", "users": ["12"], "received": "2025-06-01", "deadline": "2025-06-20"})[0].requests[0]
    assert dated.received == datetime(2025, 6, 1, tzinfo=UTC)
    assert dated.deadline == datetime(2025, 6, 20, 23, 59, 59, tzinfo=UTC)
    zoned = plan({"kind": "user", "users": ["12"], "received": "2025-06-01T02:00:00+05:00"})[0].requests[0]
    assert zoned.received == datetime(2025, 5, 31, 21, tzinfo=UTC)
    assert zoned.received.utcoffset() == timedelta(0)


def test_a_file_keeps_ids_as_they_are_written(tmp_path: Path) -> None:
    # YAML 1.1 alone would read 010 as 8, 12:30 as 750, 1_0 as 10 and no as false.
    names = ["010", "12:30", "1_0", "no", "1e3", "8"]
    rows = [[u % 3, 3 + u % 2, 5, 6] for u in range(6)]
    data = Interactions(
        name="awkward",
        user=np.repeat(np.arange(6), 4).astype(np.int32),
        item=np.array(rows, dtype=np.int32).ravel(),
        user_ids=names,
        item_ids=["0", "1", "2", "3", "4", "5", "06"],
    )
    path = tmp_path / "requests.yaml"
    path.write_text("- {id: 007, kind: user, users: [010, 12:30, 1_0, no, 1e3], at_round: 4, reason: no}\n")
    (batch,) = plan_requests(path, data, leave_one_out(data), rounds=5, seed=0, now=NOW)
    assert batch.forget.users.tolist() == [0, 1, 2, 3, 4]
    assert (batch.requests[0].id, batch.requests[0].reason, batch.round) == ("007", "no", 4)


def test_a_file_and_the_same_list_inline_make_the_same_plan(tmp_path: Path) -> None:
    path = tmp_path / "requests.yaml"
    path.write_text(
        """
- id: r1
  kind: user
  fraction: 0.2
  policy: core
  at_round: 40
  received: 2025-06-01
  reason: "account closed"
- id: r2
  kind: interaction
  pairs: [[13, i6]]
  deadline: 2025-07-01T12:00:00Z
- {id: r3, kind: rejoin, of: r1, share: 0.5}
"""
    )
    from_file = plan_requests(str(path), DATA, SPLIT, rounds=50, seed=0, now=NOW)
    inline = plan(
        {"kind": "user", "fraction": 0.2, "policy": "core", "at_round": 40, "received": datetime(2025, 6, 1).date(),
         "reason": "account closed"},
        {"kind": "interaction", "pairs": [[13, "i6"]], "deadline": datetime(2025, 7, 1, 12, tzinfo=UTC)},
        {"kind": "rejoin", "of": "r1", "share": 0.5},
    )  # fmt: skip
    for first, second in zip(from_file, inline, strict=True):
        assert [report_fields(r) for r in first.requests] == [report_fields(r) for r in second.requests]
        assert same_split(first.after, second.after)


def test_logs_and_reports_name_nobody(described: tuple[Interactions, Split]) -> None:
    batches = plan(
        {"kind": "user", "users": [12, 14], "at_round": 5, "reason": "the account of Jo", "received": "2025-06-01"},
        {"kind": "interaction", "pairs": [[13, "i6"]]},
        {"kind": "item", "fraction": 0.125, "policy": "edge"},
        {"kind": "rejoin", "of": "r1", "share": 0.5},
    )
    lines = [describe(batch.requests[0]) for batch in batches]
    assert lines == [
        "r1: forget 2 users (2 users, 9 interactions) after round 5; "
        "received 2025-06-01 00:00 UTC, deadline 2025-07-01 00:00 UTC",
        "r2: forget 1 interaction (1 interaction) after training; "
        "received 2025-06-15 12:00 UTC, deadline 2025-07-15 12:00 UTC",
        f"r3: forget 12.5 % of items, edge (1 item, {batches[2].forget.size} interaction) after training; "
        "received 2025-06-15 12:00 UTC, deadline 2025-07-15 12:00 UTC",
        "r4: 2 users come back with the latest 50 % of their history after training; "
        "received 2025-06-15 12:00 UTC, deadline 2025-07-15 12:00 UTC",
    ]
    assert report_fields(batches[0].requests[0]) == {
        "id": "r1",
        "kind": "user",
        "selector": "2 users",
        "reason": "the account of Jo",
        "received": "2025-06-01T00:00:00+00:00",
        "deadline": "2025-07-01T00:00:00+00:00",
    }
    assert report_fields(batches[-1].requests[0])["kind"] == "rejoin"
    data, split = described
    sensitive = {"policy": "sensitive", "attribute": {"gender": "F"}, "genre": "Drama"}
    (both,) = plan({"kind": "interaction", "fraction": 0.5, **sensitive}, data=data, split=split)
    assert both.requests[0].selector == "50 % of interactions with Drama items of users with gender F"


def test_five_percent_of_movielens_is_what_the_benchmarks_forget() -> None:
    movielens_100k()  # skips where the data are not at hand
    data = load_dataset("ml-100k")
    split = make_split(data, Protocol(), 0)
    sizes = {}
    for kind in ("user", "item", "interaction"):
        (batch,) = plan({"kind": kind, "fraction": 0.05}, data=data, split=split)
        sizes[kind] = (batch.forget.users.size, batch.forget.items.size)
        if kind == "interaction":
            assert batch.forget.size == round(0.05 * (100_000 - 2 * 943))
    trained = np.unique(split.train.items).size
    assert sizes == {"user": (47, 0), "item": (0, round(0.05 * trained)), "interaction": (0, 0)}
