"""Splits: who is held out, under which tie rule, and what is said about it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.data import splits
from fedrec.data.interactions import Interactions
from fedrec.data.split import Split
from fedrec.errors import ConfigError, DataError


def interactions(
    rows: list[tuple[int, int, int]], *, timed: bool = True, fold: list[int] | None = None, items: int | None = None
) -> Interactions:
    """Rows (user, item, time) in file order; sorted as ``Interactions`` demands."""
    table = np.array(rows, dtype=np.int64)
    order = np.lexsort((np.arange(len(rows)), table[:, 2] if timed else np.zeros(len(rows)), table[:, 0]))
    table = table[order]
    return Interactions(
        name="sample",
        user=table[:, 0].astype(np.int32),
        item=table[:, 1].astype(np.int32),
        user_ids=[f"u{u}" for u in range(int(table[:, 0].max()) + 1)],
        item_ids=[f"i{i}" for i in range(items or int(table[:, 1].max()) + 1)],
        timestamp=table[:, 2].copy() if timed else None,
        fold=None if fold is None else np.array(fold, dtype=np.int8)[order],
    )


@st.composite
def histories(draw: st.DrawFn) -> Interactions:
    n_users, n_items = draw(st.integers(1, 8)), draw(st.integers(4, 20))
    rows = []
    for user in range(n_users):
        for item in draw(st.permutations(range(n_items)))[: draw(st.integers(3, n_items))]:
            rows.append((user, item, draw(st.integers(0, 6))))
    return interactions(draw(st.permutations(rows)), items=n_items)


def pairs(split: Split) -> list[tuple[str, int, int]]:
    tables = {"train": split.train, "validation": split.validation, "test": split.test}
    return [(part, int(u), int(i)) for part, t in tables.items() for u, i in zip(t.users, t.items, strict=True)]


def cut(data: Interactions, how: str, seed: int) -> Split:
    if how == "random_ratio":
        return splits.random_ratio(data, seed=seed)
    return splits.leave_one_out(data, ties=how, tie_seed=seed)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(histories(), st.sampled_from(["file", "first_row", "random", "random_ratio"]), st.integers(0, 99))
def test_every_interaction_is_in_exactly_one_part(data: Interactions, how: str, seed: int) -> None:
    found = [(u, i) for _, u, i in pairs(cut(data, how, seed))]
    assert sorted(found) == sorted(zip(data.user.tolist(), data.item.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(histories(), st.sampled_from(["file", "first_row", "random"]), st.integers(0, 99))
def test_leave_one_out_holds_out_one_item_a_part_and_nothing_later_is_trained_on(
    data: Interactions, ties: str, seed: int
) -> None:
    split = cut(data, ties, seed)
    assert (split.validation.counts == 1).all()
    assert (split.test.counts == 1).all()
    assert data.timestamp is not None
    when = {(u, i): t for u, i, t in zip(data.user.tolist(), data.item.tolist(), data.timestamp.tolist(), strict=True)}
    for u in range(data.n_users):
        trained = [when[u, i] for i in split.train.row(u).tolist()]
        validated, tested = when[u, int(split.validation.row(u)[0])], when[u, int(split.test.row(u)[0])]
        assert trained == sorted(trained)
        assert trained[-1] <= validated <= tested


def test_file_rule_tests_the_last_row_of_those_tied() -> None:
    data = interactions([(0, 0, 1), (0, 1, 9), (0, 2, 9), (0, 3, 9)])
    split = splits.leave_one_out(data, ties="file")
    assert split.test.row(0).tolist() == [3]
    assert split.validation.row(0).tolist() == [2]
    assert split.train.row(0).tolist() == [0, 1]


def test_first_row_rule_is_pandas_rank_first_descending() -> None:
    # Golden: pandas 3.1.1, frame.groupby("u")["t"].rank(method="first", ascending=False) on u = [1,1,1,1,2,2,2],
    # t = [5,9,9,9,3,3,1] gives [4,1,2,3,1,2,3]; FedRAP and PFedRec test rank 1, validate rank 2, train on the rest.
    data = interactions([(0, 0, 5), (0, 1, 9), (0, 2, 9), (0, 3, 9), (1, 4, 3), (1, 5, 3), (1, 6, 1)])
    split = splits.leave_one_out(data, ties="first_row")
    assert split.test.items.tolist() == [1, 4]
    assert split.validation.items.tolist() == [2, 5]
    assert sorted(split.train.row(0).tolist()) == [0, 3]
    assert split.train.row(1).tolist() == [6]


def test_random_rule_tests_each_tied_row_equally_often_and_repeats_with_its_seed() -> None:
    rows = [(u, i, 9 if i else 0) for u in range(600) for i in range(5)]
    data = interactions(rows)
    split = splits.leave_one_out(data, ties="random", tie_seed=3)
    counts = np.bincount(split.test.items, minlength=5)
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 150) < 4 * np.sqrt(600 * 0.25 * 0.75)).all()
    again, other = (splits.leave_one_out(data, ties="random", tie_seed=s).test.items for s in (3, 4))
    np.testing.assert_array_equal(split.test.items, again)
    assert (split.test.items != other).mean() > 0.5


def test_tie_rules_agree_where_nothing_is_tied() -> None:
    data = interactions([(u, (u + i) % 9, i) for u in range(20) for i in range(5)])
    found = [pairs(splits.leave_one_out(data, ties=t)) for t in ("file", "first_row", "random")]
    assert found[0] == found[1] == found[2]


def test_ties_warn_with_a_count_only_above_a_tenth_of_the_users() -> None:
    def ending_tied(count: int) -> Interactions:
        return interactions([(u, i, min(i, 3) if u < count else i) for u in range(20) for i in range(5)])

    assert not [w for w in splits.leave_one_out(ending_tied(2)).warnings if "last moment" in w]
    (warning,) = [w for w in splits.leave_one_out(ending_tied(3)).warnings if "last moment" in w]
    assert warning.startswith("3 of 20 users")
    assert "protocol.ties=file tests the last row" in warning
    earlier_ties = interactions([(u, i, max(i, 2)) for u in range(20) for i in range(5)])
    assert not [w for w in splits.leave_one_out(earlier_ties).warnings if "last moment" in w]


def test_missing_timestamps_read_rows_in_file_order_and_say_so() -> None:
    split = splits.leave_one_out(interactions([(0, 4, 0), (0, 2, 0), (0, 3, 0)], timed=False))
    assert split.test.row(0).tolist() == [3]
    assert "no timestamps" in split.warnings[0]


def test_clean_negatives_exclude_training_items_and_paper_negatives_everything_touched() -> None:
    data = interactions([(0, 3, 1), (0, 1, 2), (0, 5, 3), (0, 0, 4)])
    clean = splits.leave_one_out(data, negatives_exclude="train")
    paper = splits.leave_one_out(data, negatives_exclude="all")
    assert clean.negatives_exclude.row(0).tolist() == [1, 3]
    assert paper.negatives_exclude.row(0).tolist() == [0, 1, 3, 5]


@pytest.mark.parametrize("make", [splits.leave_one_out, splits.random_ratio])
def test_users_with_too_few_interactions_are_counted_named_and_mended(make: object) -> None:
    data = interactions([(0, 0, 1), (0, 1, 2), (0, 2, 3), (1, 0, 1), (1, 1, 2), (2, 0, 1)])
    with pytest.raises(DataError, match=r"2 of 3 users.*'u1' has 2\); set dataset.min_user_interactions=3"):
        make(data)  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(histories())
def test_temporal_cut_never_trains_on_anything_later_than_what_it_tests(data: Interactions) -> None:
    assert data.timestamp is not None
    try:
        split = splits.temporal(data, cuts=[3, 5])
    except DataError:
        return
    when = {(u, i): t for u, i, t in zip(data.user.tolist(), data.item.tolist(), data.timestamp.tolist(), strict=True)}
    bounds = {"train": (-1, 3), "validation": (3, 5), "test": (5, 99)}
    kept = pairs(split)
    assert all(bounds[part][0] <= when[u, i] < bounds[part][1] for part, u, i in kept)
    trained = {u for part, u, _ in kept if part == "train"}
    expected = {(u, i) for (u, i), t in when.items() if t < 3 or u in trained}
    assert {(u, i) for _, u, i in kept} == expected


def test_cold_users_and_new_items_of_a_temporal_cut_are_counted() -> None:
    data = interactions([(0, 0, 1), (0, 1, 5), (0, 2, 9), (1, 0, 1), (1, 1, 9), (2, 0, 5), (2, 1, 9), (2, 2, 9)])
    split = splits.temporal(data, cuts=[4, 8])
    assert split.train.counts.tolist() == [1, 1, 0]
    assert split.validation.counts.tolist() == [1, 0, 0]
    assert split.test.counts.tolist() == [1, 1, 0]
    text = "\n".join(split.warnings)
    assert "1 of 3 users have no training interaction; their 3 held-out interactions are not evaluated" in text
    assert "3 of 3 held-out interactions are with 2 items that nobody has in training" in text
    assert "2 of 3 users have nothing to validate on and 1 nothing to test on" in text


def test_temporal_quantiles_cut_at_those_shares_of_the_interactions() -> None:
    data = interactions([(u, i, 10 * i + u) for u in range(10) for i in range(10)])
    split = splits.temporal(data, quantiles=(0.6, 0.8))
    sizes = [t.items.size for t in (split.train, split.validation, split.test)]
    assert sizes == [59, 20, 21]  # the interaction at the quantile itself belongs to the later part


def test_temporal_needs_timestamps_and_cuts_in_order() -> None:
    rows = [(0, i, i) for i in range(5)]
    with pytest.raises(DataError, match=r"no timestamps.*protocol\.split=random"):
        splits.temporal(interactions(rows, timed=False))
    with pytest.raises(ConfigError, match="0 < a < b < 1"):
        splits.temporal(interactions(rows), quantiles=(0.9, 0.8))
    with pytest.raises(ConfigError, match="no validation period"):
        splits.temporal(interactions(rows), cuts=[3, 3])


@settings(max_examples=40, deadline=None)
@given(histories(), st.integers(0, 9))
def test_random_split_gives_each_part_its_rounded_share(data: Interactions, seed: int) -> None:
    split = splits.random_ratio(data, ratios=(0.5, 0.2, 0.3), seed=seed)
    total = split.train.counts + split.validation.counts + split.test.counts
    assert (split.train.counts >= 1).all()
    assert (split.test.counts >= 1).all()
    assert (split.validation.counts >= 1).all()
    assert (np.abs(split.test.counts - 0.3 * total) <= 1).all()
    assert (np.abs(split.validation.counts - 0.2 * total) <= 1).all()


def test_random_split_depends_on_the_seed_and_not_on_other_users() -> None:
    rows = [(u, i, i) for u in range(30) for i in range(12)]
    one = splits.random_ratio(interactions(rows), seed=1)
    fewer = splits.random_ratio(interactions(rows[: 12 * 10], items=12), seed=1)
    other = splits.random_ratio(interactions(rows), seed=2)
    for u in range(10):
        np.testing.assert_array_equal(one.test.row(u), fewer.test.row(u))
    assert (one.test.items != other.test.items).any()


@pytest.mark.parametrize("ratios", [(0.8, 0.2), (0.8, 0.1, 0.2), (1.0, 0.0, 0.0)])
def test_ratios_that_are_not_three_positive_shares_of_one_are_refused(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"protocol\.random_ratios"):
        splits.random_ratio(interactions([(0, i, i) for i in range(9)]), ratios=ratios)


def test_given_split_follows_the_fold_of_every_row() -> None:
    data = interactions([(0, 0, 3), (0, 1, 2), (0, 2, 1), (1, 0, 1), (1, 3, 2)], fold=[0, 1, 2, 0, 2])
    split = splits.given(data)
    assert sorted(pairs(split)) == [
        ("test", 0, 2),
        ("test", 1, 3),
        ("train", 0, 0),
        ("train", 1, 0),
        ("validation", 0, 1),
    ]


def test_given_split_needs_folds_and_no_empty_part() -> None:
    data = interactions([(0, i, i) for i in range(4)], fold=[0, 0, 2, 2])
    with pytest.raises(DataError, match="no usable validation interactions"):
        splits.given(data)
    with pytest.raises(DataError, match="did not come split"):
        splits.given(replace(data, fold=None))
