"""Negative sampling: uniform, outside what is excluded, distinct in a group, addressed, fast."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fedrec.data.interactions import UserItems
from fedrec.data.negatives import sample_negatives
from fedrec.errors import ConfigError
from fedrec.random import stream, streams


def excluded(rows: list[list[int]]) -> UserItems:
    indptr = np.cumsum([0, *(len(r) for r in rows)]).astype(np.int64)
    return UserItems(indptr, np.array([i for r in rows for i in sorted(r)], dtype=np.int32))


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, list[list[int]], list[int], int]:
    n_items = draw(st.integers(1, 40))
    distinct = draw(st.integers(1, n_items))
    row = st.sets(st.integers(0, n_items - 1), max_size=n_items - distinct).map(sorted)
    rows = draw(st.lists(row, min_size=1, max_size=6))
    draws = draw(st.lists(st.integers(0, 3 * n_items), min_size=len(rows), max_size=len(rows)))
    return n_items, rows, draws, distinct


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 2**63))
def test_draws_avoid_excluded_items_and_repeat_nothing_inside_a_group(
    problem: tuple[int, list[list[int]], list[int], int], seed: int
) -> None:
    n_items, rows, draws, distinct = problem
    users = np.arange(len(rows))
    keys = streams(stream(seed, "test"), users)
    drawn = sample_negatives(excluded(rows), users, draws, n_items, keys, distinct=distinct)
    assert drawn.dtype == np.int32
    assert drawn.size == sum(draws)
    at = 0
    for row, count in zip(rows, draws, strict=True):
        mine = drawn[at : at + count].tolist()
        at += count
        assert set(mine) <= set(range(n_items)) - set(row)
        for start in range(0, count, distinct):
            group = mine[start : start + distinct]
            assert len(set(group)) == len(group)


@settings(max_examples=50, deadline=None)
@given(problems(), st.integers(0, 2**63))
def test_a_users_draws_do_not_depend_on_the_batch(
    problem: tuple[int, list[list[int]], list[int], int], seed: int
) -> None:
    n_items, rows, draws, distinct = problem
    users = np.arange(len(rows))
    keys = streams(stream(seed, "test"), users)
    together = sample_negatives(excluded(rows), users, draws, n_items, keys, distinct=distinct)
    alone = [
        sample_negatives(excluded(rows), [u], [draws[u]], n_items, keys[u : u + 1], distinct=distinct)
        for u in reversed(range(len(rows)))
    ]
    np.testing.assert_array_equal(together, np.concatenate(alone[::-1]))


@pytest.mark.parametrize("distinct", [1, 4, 7])
def test_every_untouched_item_is_equally_likely_at_every_place_of_a_group(distinct: int) -> None:
    table, n_items = excluded([[0, 3, 4, 9, 11]]), 12
    free = np.setdiff1d(np.arange(n_items), table.items)
    groups = 4000
    drawn = sample_negatives(
        table, [0], [groups * distinct], n_items, [stream(7, "uniform", distinct)], distinct=distinct
    ).reshape(groups, distinct)
    for place in range(distinct):
        counts = np.bincount(drawn[:, place], minlength=n_items)[free]
        assert chisquare(counts).pvalue > 1e-4


def test_every_pair_of_distinct_items_is_equally_likely() -> None:
    groups, n_items = 20_000, 6
    drawn = sample_negatives(excluded([[2]]), [0], [groups * 2], n_items, [stream(1, "pairs")], distinct=2)
    pairs = drawn.reshape(groups, 2).astype(np.int64) @ np.array([n_items, 1])
    counts = np.unique(pairs, return_counts=True)[1]
    assert counts.size == 5 * 4
    assert chisquare(counts).pvalue > 1e-4


def test_another_key_gives_other_draws_and_the_same_key_the_same() -> None:
    table = excluded([[5]])
    one, again, other = (
        sample_negatives(table, [0], [200], 1000, [stream(seed, "k")], distinct=1) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.9


def test_a_user_with_too_few_untouched_items_is_named_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"user 1 has touched all but 2 of the 5 items.*at most 2 negatives"):
        sample_negatives(excluded([[0], [0, 1, 2]]), [0, 1], [4, 4], 5, [1, 2], distinct=4)


def test_too_few_untouched_items_do_not_matter_where_nothing_is_drawn() -> None:
    assert sample_negatives(excluded([[0, 1, 2]]), [0], [0], 3, [1], distinct=4).size == 0


def test_an_unsorted_exclusion_is_refused_rather_than_sampled_wrongly() -> None:
    table = UserItems(np.array([0, 2]), np.array([3, 1], dtype=np.int32))
    with pytest.raises(ValueError, match="user 0 are not strictly ascending"):
        sample_negatives(table, [0], [1], 5, [1])


def test_four_hundred_thousand_draws_take_under_40_ms() -> None:
    rng = np.random.default_rng(0)
    n_users, n_items = 943, 1682
    table = excluded([rng.choice(n_items, 106, replace=False).tolist() for _ in range(n_users)])
    users, draws = np.arange(n_users), np.full(n_users, 424)
    keys = streams(stream(0, "speed"), users)
    times = []
    for _ in range(5):
        start = time.thread_time()
        drawn = sample_negatives(table, users, draws, n_items, keys, distinct=4)
        times.append(time.thread_time() - start)
    assert drawn.size == 399_832
    assert min(times) < 0.040
