"""Selections: who a fraction forgets, and that chance and nothing else decides what a policy leaves open."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedrec.data import load_dataset
from fedrec.data.interactions import Interactions, UserItems
from fedrec.data.split import Split
from fedrec.data.synthetic import SyntheticConfig, generate
from fedrec.errors import DataError
from tests.evaluation.movielens import movielens_100k
from unlearning.selection import (
    POLICIES,
    Policy,
    choose,
    choose_interactions,
    how_many,
    items_of_genre,
    selection_key,
    users_with,
)

policies = st.sampled_from(POLICIES)
fractions = st.floats(0.01, 1.0)
activity = st.lists(st.integers(0, 9), min_size=1, max_size=60).map(lambda counts: np.array(counts, dtype=np.int64))


@pytest.fixture(scope="module")
def described() -> Interactions:
    return generate(SyntheticConfig(users=60, items=120, seed=1, mean_activity=20))


def key(name: str = "r1", seed: int = 0) -> np.uint64:
    return selection_key(seed, "users", name)


@st.composite
def histories(draw: st.DrawFn) -> UserItems:
    n_users, n_items = draw(st.integers(1, 12)), 15
    rows = [draw(st.permutations(range(n_items)))[: draw(st.integers(0, n_items))] for _ in range(n_users)]
    users = np.repeat(np.arange(n_users), [len(row) for row in rows])
    return UserItems.from_pairs(users, np.array([i for row in rows for i in row], dtype=np.int32), n_users)


@given(activity, policies, fractions)
def test_a_fraction_is_rounded_to_whole_subjects_that_have_interactions(
    counts: np.ndarray, policy: Policy, fraction: float
) -> None:
    chosen = choose(counts, policy, fraction, key())
    eligible = np.flatnonzero(counts)
    assert abs(chosen.size - fraction * eligible.size) <= 0.5 + 1e-9
    assert np.isin(chosen, eligible).all()
    assert (np.diff(chosen) > 0).all()


@pytest.mark.parametrize(("fraction", "n", "expected"), [(0.05, 943, 47), (0.5, 3, 2), (0.1, 4, 0), (1.0, 7, 7)])
def test_halves_are_rounded_up(fraction: float, n: int, expected: int) -> None:
    assert how_many(fraction, n) == expected


@given(activity, policies, fractions, fractions)
def test_a_larger_fraction_contains_a_smaller_one(
    counts: np.ndarray, policy: Policy, first: float, second: float
) -> None:
    small, large = sorted((first, second))
    assert set(choose(counts, policy, small, key())) <= set(choose(counts, policy, large, key()))


@given(activity, fractions)
def test_core_are_the_most_active_and_edge_the_least(counts: np.ndarray, fraction: float) -> None:
    for policy, sign in (("core", 1), ("edge", -1)):
        chosen = choose(counts, policy, fraction, key())  # type: ignore[arg-type]
        others = np.setdiff1d(np.flatnonzero(counts), chosen)
        if chosen.size and others.size:
            assert (sign * counts[chosen]).min() >= (sign * counts[others]).max()


def test_ties_of_core_and_edge_are_broken_by_chance_not_by_code() -> None:
    counts = np.full(200, 5, dtype=np.int64)
    for policy in POLICIES:
        chosen = choose(counts, policy, 0.1, key())
        assert np.abs(chosen.mean() - 99.5) < 5 * 200 / np.sqrt(12 * 20)
        assert set(chosen) != set(range(20))
        assert set(chosen) != set(range(180, 200))


def test_every_subject_is_equally_likely() -> None:
    n, draws, fraction = 40, 4000, 0.25
    counts = np.arange(1, n + 1, dtype=np.int64)
    hits = np.zeros(n)
    for draw in range(draws):
        hits[choose(counts, "random", fraction, key(f"r{draw}"))] += 1
    sd = np.sqrt(draws * fraction * (1 - fraction))
    assert np.abs(hits - draws * fraction).max() < 4.5 * sd


def test_a_selection_is_addressed_by_seed_and_request_id() -> None:
    counts = np.ones(300, dtype=np.int64)
    drawn = {(seed, name): tuple(choose(counts, "random", 0.1, key(name, seed))) for seed in (0, 1) for name in "ab"}
    assert len(set(drawn.values())) == 4
    assert drawn[1, "b"] == tuple(choose(counts, "random", 0.1, key("b", 1)))


def order_of(counts: np.ndarray) -> list[int]:
    """The order in which ``random`` takes the eligible, from one more at a time."""
    m = int((counts > 0).sum())
    taken = [set(choose(counts, "random", n / m, key()).tolist()) for n in range(m + 1)] if m else []
    return [u for before, after in itertools.pairwise(taken) for u in after - before]


@given(activity, st.data())
def test_who_left_earlier_does_not_change_the_order_of_the_others(counts: np.ndarray, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(0, counts.size - 1)))
    fewer = counts.copy()
    fewer[list(gone)] = 0
    assert order_of(fewer) == [u for u in order_of(counts) if u not in gone]


@given(histories(), policies, fractions, fractions)
def test_chosen_interactions_exist_are_distinct_and_nested(
    train: UserItems, policy: Policy, first: float, second: float
) -> None:
    there = set(zip(train.users.tolist(), train.items.tolist(), strict=True))
    small, large = sorted((first, second))
    sets = []
    for fraction in (small, large):
        users, items = choose_interactions(train, policy, fraction, key())
        pairs = list(zip(users.tolist(), items.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs) == how_many(fraction, len(there))
        sets.append(set(pairs))
    assert sets[0] <= sets[1] <= there


@given(histories(), st.floats(0.01, 0.4))
def test_interactions_of_core_and_edge_users_are_spread_and_empty_nobody(train: UserItems, fraction: float) -> None:
    half = train.counts // 2
    for policy, sign in (("core", 1), ("edge", -1)):
        users, _ = choose_interactions(train, policy, fraction, key())  # type: ignore[arg-type]
        if users.size > half.sum():
            continue
        taken = np.bincount(users, minlength=train.n_users)
        assert (taken <= half).all()
        giving, sparing = train.counts[taken > 0], train.counts[(taken == 0) & (half > 0)]
        if giving.size and sparing.size:
            assert (sign * giving).min() >= (sign * sparing).max()
        assert ((taken > 0) & (taken < half)).sum() <= 1  # only the last user gives less than half


def test_which_half_of_a_core_users_interactions_go_is_random() -> None:
    train = UserItems.from_pairs(np.zeros(100, dtype=np.int64), np.arange(100, dtype=np.int32), 1)
    _, items = choose_interactions(train, "core", 0.5, key())
    assert items.size == 50
    assert 12 < (items < 50).sum() < 38  # hypergeometric: mean 25, sd 2.5
    assert set(items) != set(choose_interactions(train, "core", 0.5, key("r2"))[1])


@given(histories(), policies, fractions)
def test_only_eligible_interactions_are_chosen(train: UserItems, policy: Policy, fraction: float) -> None:
    eligible = train.items % 2 == 0
    users, items = choose_interactions(train, policy, fraction, key(), eligible)
    assert (items % 2 == 0).all()
    assert users.size == how_many(fraction, int(eligible.sum()))


def test_sensitive_items_and_users_are_those_that_the_tables_name(described: Interactions) -> None:
    assert described.item_table is not None
    assert described.user_table is not None
    genres = described.item_table["genres"].to_list()
    for genre in {genre for row in genres for genre in row}:
        expected = [genre in row for row in genres]
        assert items_of_genre(described, genre, "r1").tolist() == expected
    gender, age = described.user_table["gender"].to_list(), described.user_table["age"].to_list()
    found = users_with(described, [("gender", ["F"]), ("age", [str(age[0]), str(age[1])])], "r1")
    assert found.tolist() == [g == "F" and a in age[:2] for g, a in zip(gender, age, strict=True)]


def test_an_item_without_genres_and_a_user_without_attributes_are_not_sensitive(described: Interactions) -> None:
    sparse = replace(
        described,
        item_table=pl.DataFrame({"genres": [["Horror"], None, []] + [["Drama"]] * 117}),
        user_table=pl.DataFrame({"gender": ["F", None] + ["M"] * 58}),
    )
    assert np.flatnonzero(items_of_genre(sparse, "Horror", "r1")).tolist() == [0]
    assert np.flatnonzero(users_with(sparse, [("gender", ["F"])], "r1")).tolist() == [0]


@pytest.mark.parametrize("drop", [True, False])
def test_data_without_what_a_sensitive_policy_needs_says_what_it_has(described: Interactions, drop: bool) -> None:
    assert described.item_table is not None
    assert described.user_table is not None
    bare = replace(
        described,
        item_table=None if drop else described.item_table.drop("genres"),
        user_table=None if drop else described.user_table.drop("occupation"),
    )
    with pytest.raises(DataError, match=r"entry 1: genre=Horror: synthetic has no genres, " + (
        "and nothing else is known of its items" if drop else "only title, year"
    )):  # fmt: skip
        items_of_genre(bare, "Horror", "entry 1")
    with pytest.raises(DataError, match=r"entry 1: attribute=occupation: synthetic has no such user attribute" + (
        ", and nothing else is known of its users" if drop else "; there are gender, age"
    )):  # fmt: skip
        users_with(bare, [("occupation", ["doctor"])], "entry 1")


def test_an_unknown_genre_or_value_gets_the_nearest_one(described: Interactions) -> None:
    assert described.item_table is not None
    known = described.item_table["genres"].explode().drop_nulls()[0]
    with pytest.raises(DataError, match=f"genre={known}x: no item of synthetic has it; did you mean {known}"):
        items_of_genre(described, f"{known}x", "r1")
    with pytest.raises(DataError, match=r"attribute.gender=X: no user of synthetic has it; there are F, M"):
        users_with(described, [("gender", ["X"])], "r1")
    with pytest.raises(DataError, match=r"attribute=genders: .*did you mean gender\?"):
        users_with(described, [("genders", ["F"])], "r1")


def test_movielens_has_the_published_numbers_of_horror_films_women_and_doctors() -> None:
    movielens_100k()  # skips where the data are not at hand
    data = load_dataset("ml-100k")
    assert items_of_genre(data, "Horror", "r1").sum() == 92  # the genre flags of u.item
    assert users_with(data, [("gender", ["F"])], "r1").sum() == 273  # u.user
    assert users_with(data, [("occupation", ["doctor"])], "r1").sum() == 7


def test_core_users_of_a_real_split_have_most_of_the_interactions(synthetic_split: Split) -> None:
    counts = synthetic_split.train.counts
    share = {policy: counts[choose(counts, policy, 0.1, key())].sum() / counts.sum() for policy in POLICIES}
    assert share["edge"] < 0.05 < share["random"] < 0.2 < share["core"]
