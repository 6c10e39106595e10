"""Poisson batches of interactions: independent, at the rate, and a function of each interaction alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from clients.example_batches import ExampleBatches
from clients.example_steps import DPSGD
from fedrec.data.interactions import UserItems
from tests.clients.example_worlds import draw, method, train_items


def _example_set(batches: ExampleBatches, device: int = 0) -> set[tuple[int, tuple[int, ...]]]:
    of = np.flatnonzero(batches.owner == device)
    return {(int(batches.step[e]), tuple(batches.items[e].tolist())) for e in of}


@given(seed=st.integers(0, 200), item=st.integers(0, 19))
def test_one_interaction_more_changes_no_other_example(seed: int, item: int) -> None:
    algorithm, sgd = method("bce", 1, 20, 3, 2, 0.0), DPSGD(0.5, 4, 1.0, 0.0, 1.0)
    have = [int(i) for i in train_items(1, 20, seed, 15).items if i != item]
    without, with_it = (UserItems.from_pairs([0] * len(r), r, 1) for r in (have, [*have[:3], item, *have[3:]]))
    before, after = _example_set(draw(without, algorithm, sgd)), _example_set(draw(with_it, algorithm, sgd))
    assert before <= after
    assert all(positive[0] == item for _, positive in after - before)


def test_interactions_join_batches_independently_at_the_rate_and_negatives_come_from_the_whole_catalogue() -> None:
    users, per_user, steps, rate, n_items = 200, 20, 25, 0.1, 40
    rows = np.concatenate([np.random.default_rng(u).permutation(n_items)[:per_user] for u in range(users)])
    train = UserItems.from_pairs(np.repeat(np.arange(users), per_user), rows, users)
    algorithm = method("bce", users, n_items, 3, 2, 0.0)
    batches = draw(train, algorithm, DPSGD(rate, steps, 1.0, 0.0, 1.0))
    size = np.diff(batches.example_ptr)
    n = users * steps
    # Sizes are binomial: mean, variance and share of empty batches within 4 standard errors.
    assert abs(size.mean() - per_user * rate) < 4 * np.sqrt(per_user * rate * (1 - rate) / n)
    assert abs(size.var() / (per_user * rate * (1 - rate)) - 1) < 4 * np.sqrt(2.2 / n)
    empty = (1 - rate) ** per_user
    assert abs((size == 0).mean() - empty) < 4 * np.sqrt(empty * (1 - empty) / n)
    # Consecutive batches of a device are not related.
    table = size.reshape(users, steps)
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 4 / np.sqrt(n)
    # Positives are the user's own interactions, at most once a batch, and come back in other steps by chance alone.
    visits = np.stack([batches.owner, batches.step, batches.items[:, 0]], axis=1)
    assert len(np.unique(visits, axis=0)) == len(visits)
    seen = np.zeros((users, n_items))
    np.add.at(seen, (visits[:, 0], visits[:, 2]), 1)
    own = np.zeros((users, n_items), dtype=bool)
    own[train.users, train.items] = True
    assert not seen[~own].any()
    assert abs(seen[own].var() / (steps * rate * (1 - rate)) - 1) < 4 * np.sqrt(2.2 / own.sum())
    # Negatives are uniform over all items, the user's own included, and may repeat within an example.
    drawn = np.bincount(batches.items[:, 1:].ravel(), minlength=n_items)
    expected = batches.items[:, 1:].size / n_items
    assert chi2.ppf(1e-4, n_items - 1) < ((drawn - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-4, n_items - 1)
    repeats = np.mean([len(set(row)) < 4 for row in batches.items.tolist()])
    chance = 1 - np.prod([1 - j / n_items for j in range(4)])
    assert abs(repeats - chance) < 4 * np.sqrt(chance * (1 - chance) / len(batches.items))


def test_rounds_users_and_seeds_draw_other_batches_and_the_same_address_the_same() -> None:
    algorithm, sgd = method("bce", 2, 30, 2, 2, 0.0), DPSGD(0.5, 3, 1.0, 0.0, 1.0)
    train = UserItems.from_pairs([0] * 15 + [1] * 15, list(range(15)) * 2, 2)
    first = draw(train, algorithm, sgd)
    assert _example_set(first, 0) != _example_set(first, 1)
    assert _example_set(first) != _example_set(draw(train, algorithm, sgd, round_number=2))
    assert _example_set(first) == _example_set(draw(train, algorithm, sgd))
    own = first.owner
    np.testing.assert_array_equal(first.rows[first.row_ptr[own][:, None] + first.slot], first.items)
    assert all(len(set(rows)) == rows.size for rows in np.split(first.rows, first.row_ptr[1:-1]))
