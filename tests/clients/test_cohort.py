"""A cohort's examples: what a device touches in a round, compacted; addressed, so no layout changes them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.cohort import chunks, draw_examples
from fedrec.algorithms.base import LocalTraining
from tests.clients.small import small_split

SPLIT = small_split()
LOCAL = st.builds(
    LocalTraining,
    epochs=st.just(2),
    batch_size=st.integers(1, 200),
    negatives=st.integers(0, 5),
    max_positives=st.integers(0, 12),
    pairwise=st.just(False),
)
USERS = st.lists(st.integers(0, SPLIT.n_users - 1), min_size=1, max_size=SPLIT.n_users, unique=True)


def _of(users: list[int], local: LocalTraining, round_number: int = 1) -> dict[int, tuple[bytes, bytes, int, int]]:
    drawn = draw_examples(SPLIT, np.array(users, dtype=np.int64), local, 7, round_number)
    return {
        user: (
            drawn.rows[drawn.row_ptr[b] : drawn.row_ptr[b + 1]].tobytes(),
            drawn.example[drawn.example_ptr[b] : drawn.example_ptr[b + 1]].tobytes(),
            int(drawn.positives[b]),
            int(drawn.shuffle_keys[b]),
        )
        for b, user in enumerate(users)
    }


@given(users=USERS, local=LOCAL)
@settings(max_examples=25, deadline=None)
def test_rows_are_distinct_ascending_and_examples_are_positives_then_their_negatives(
    users: list[int], local: LocalTraining
) -> None:
    drawn = draw_examples(SPLIT, np.array(users, dtype=np.int64), local, 7, 1)
    for b, user in enumerate(users):
        rows = drawn.rows[drawn.row_ptr[b] : drawn.row_ptr[b + 1]]
        assert (np.diff(rows) > 0).all()
        items = rows[drawn.example[drawn.example_ptr[b] : drawn.example_ptr[b + 1]]]
        assert set(items) == set(rows)
        history, n = SPLIT.train.row(user), int(drawn.positives[b])
        assert n == (min(len(history), local.max_positives) if local.max_positives else len(history))
        where = [list(history).index(item) for item in items[:n]]
        assert where == sorted(set(where))  # a subset in the history's own order
        negatives = items[n:].reshape(n, local.negatives)
        assert not np.isin(negatives, SPLIT.negatives_exclude.row(user)).any()
        assert all(len(set(group)) == local.negatives for group in negatives)


@given(users=USERS, local=LOCAL, cut=st.integers(0, SPLIT.n_users))
@settings(max_examples=25, deadline=None)
def test_a_device_draws_the_same_examples_in_any_grouping(users: list[int], local: LocalTraining, cut: int) -> None:
    whole = _of(users, local)
    parts = [part for part in (users[:cut][::-1], users[cut:]) if part]
    assert {user: own for part in parts for user, own in _of(part, local).items()} == whole


def test_another_round_draws_other_negatives_and_other_positives() -> None:
    users, local = list(range(SPLIT.n_users)), LocalTraining(max_positives=3)
    first, second = _of(users, local, 1), _of(users, local, 2)
    assert all(first[u][:2] != second[u][:2] for u in users)


def test_every_positive_is_equally_likely_to_be_kept() -> None:
    """3 of n positives, 3000 rounds: each one's count within 5 standard deviations of 3/n."""
    user = int(np.argmax(SPLIT.train.counts))
    history = SPLIT.train.row(user)
    local = LocalTraining(max_positives=3, negatives=1)
    rounds, counts = 3000, np.zeros(SPLIT.n_items)
    for number in range(rounds):
        drawn = draw_examples(SPLIT, np.array([user]), local, 7, number)
        counts[drawn.rows[drawn.example[:3]]] += 1
    share = 3 / len(history)
    spread = np.sqrt(rounds * share * (1 - share))
    assert counts[history].sum() == 3 * rounds
    assert np.abs(counts[history] - rounds * share).max() < 5 * spread


@given(local=LOCAL, max_rows=st.integers(1, 400))
@settings(max_examples=15, deadline=None)
def test_mini_batches_visit_every_example_once_an_epoch(local: LocalTraining, max_rows: int) -> None:
    drawn = draw_examples(SPLIT, np.arange(SPLIT.n_users), local, 7, 1)
    seen = []
    for chunk in chunks(drawn, local, max_rows):
        seen += chunk.devices.tolist()
        for epoch in range(2):
            visits = torch.zeros(chunk.items.shape)
            for number in range(chunk.batches):
                batch, count = chunk.batch(epoch, number, 0, torch.device("cpu"))
                full = batch.weight.sum(1)
                assert torch.allclose(full[count > 0], torch.ones(()))
                assert (count <= local.batch_size).all()
                visits += batch.weight * count.unsqueeze(1)
            for i, b in enumerate(chunk.devices):
                own = drawn.example[drawn.example_ptr[b] : drawn.example_ptr[b + 1]]
                expected = torch.bincount(torch.from_numpy(own.astype(np.int64)), minlength=visits.shape[1])
                assert torch.allclose(visits[i], expected.float(), atol=1e-3)
                assert bool(
                    (chunk.label[i].bool() == torch.isin(torch.arange(visits.shape[1]), _positive(drawn, b))).all()
                )
    assert sorted(seen) == list(range(SPLIT.n_users))


def _positive(drawn: object, b: int) -> torch.Tensor:
    start, n = drawn.example_ptr[b], drawn.positives[b]  # type: ignore[attr-defined]
    return torch.from_numpy(drawn.example[start : start + n].astype(np.int64))  # type: ignore[attr-defined]


def test_epochs_are_shuffled_differently() -> None:
    local = LocalTraining(batch_size=8)
    drawn = draw_examples(SPLIT, np.arange(SPLIT.n_users), local, 7, 1)
    chunk = next(iter(chunks(drawn, local, 10_000)))
    cpu = torch.device("cpu")
    first, again = (chunk.batch(0, 0, 0, cpu)[0].weight for _ in range(2))
    other = chunk.batch(1, 0, 0, cpu)[0].weight
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("batch_size", [3, 7, 1000])
def test_pairs_hold_each_positive_with_each_of_its_own_negatives(batch_size: int) -> None:
    local = LocalTraining(batch_size=batch_size, negatives=3, pairwise=True)
    drawn = draw_examples(SPLIT, np.arange(SPLIT.n_users), local, 7, 1)
    for chunk in chunks(drawn, local, 200):
        found: list[list[tuple[int, int]]] = [[] for _ in chunk.devices]
        for number in range(chunk.batches):
            batch, count = chunk.batch(0, number, 0, torch.device("cpu"))
            assert batch.positive is not None
            assert batch.negative is not None
            assert batch.pair_weight is not None
            for i in range(len(chunk.devices)):
                used = batch.pair_weight[i] > 0
                assert int(used.sum()) == int(count[i])
                found[i] += zip(batch.positive[i][used].tolist(), batch.negative[i][used].tolist(), strict=True)
        for i, b in enumerate(chunk.devices):
            own = drawn.example[drawn.example_ptr[b] : drawn.example_ptr[b + 1]].tolist()
            n = int(drawn.positives[b])
            expected = [(own[k], own[n + 3 * k + j]) for k in range(n) for j in range(3)]
            assert sorted(found[i]) == sorted(expected)
