"""Recorded views come back as they were, and damaged files are refused in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fedrec.data.interactions import UserItems
from fedrec.errors import DataError
from privacy.attacks import views as v


def _view(seed: int, width: int, user: int = 3) -> v.UserView:
    draw = np.random.default_rng(seed)
    rows = np.sort(draw.permutation(40)[: draw.integers(0, 20)]).astype(np.int32)
    return v.UserView(user, 2, rows, draw.normal(size=(rows.size, width)).astype(np.float32))


def _same(a: v.UserView, b: v.UserView) -> bool:
    return (
        (a.user, a.round) == (b.user, b.round) and np.array_equal(a.rows, b.rows) and np.array_equal(a.values, b.values)
    )


@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6), width=st.integers(1, 5))
def test_user_views_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seeds: list[int], width: int
) -> None:
    path = tmp_path_factory.mktemp("views") / "views.safetensors"
    saved = [_view(seed, width, user) for user, seed in enumerate(seeds)]
    v.save_user_views(path, saved)
    loaded = v.load_user_views(path)
    assert len(loaded) == len(saved)
    assert all(_same(a, b) for a, b in zip(saved, loaded, strict=True))


def test_rounds_and_their_truth_come_back_from_files_of_their_own(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rounds = [v.RoundView(n, 4 + n, draw.normal(size=(9, 3)).astype(np.float32)) for n in (1, 5)]
    truth = [v.RoundTruth(n, np.arange(n, dtype=np.int64), _rows(n, seed=n), _rows(n, seed=10 + n)) for n in (1, 3)]
    v.save_rounds(tmp_path / "rounds.safetensors", rounds)
    v.save_truth(tmp_path / "truth.safetensors", truth)
    for a, b in zip(rounds, v.load_rounds(tmp_path / "rounds.safetensors"), strict=True):
        assert (a.round, a.devices) == (b.round, b.devices)
        assert np.array_equal(a.total, b.total)
    for one, other in zip(truth, v.load_truth(tmp_path / "truth.safetensors"), strict=True):
        assert one.round == other.round
        assert np.array_equal(one.users, other.users)
        for name in ("rows", "positives"):
            x, y = getattr(one, name), getattr(other, name)
            assert np.array_equal(x.indptr, y.indptr)
            assert np.array_equal(x.items, y.items)
    assert np.array_equal(truth[1].positives_of(2), truth[1].positives.row(2))
    with pytest.raises(KeyError, match="user 9 did not take part in round 3"):
        truth[1].positives_of(9)


def _rows(users: int, seed: int) -> UserItems:
    draw = np.random.default_rng(seed)
    owner = np.repeat(np.arange(users), 4)
    return UserItems.from_pairs(owner, draw.integers(0, 30, owner.size), users)


def test_files_that_are_not_views_are_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "views.safetensors"
    with pytest.raises(DataError, match=r"views\.safetensors: there is no such file; record it again"):
        v.load_user_views(path)
    save_file({"rows": np.zeros(3, dtype=np.int32)}, path)
    with pytest.raises(DataError, match="no label of fedrec"):
        v.load_user_views(path)
    v.save_user_views(path, [_view(0, 2)])
    with pytest.raises(DataError, match="expected truth"):
        v.load_truth(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="not a complete safetensors file"):
        v.load_user_views(path)
    assert not list(tmp_path.glob("*.new"))


def test_views_of_the_wrong_shape_are_refused() -> None:
    rows, values = np.array([1, 4], dtype=np.int32), np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(TypeError, match="int32"):
        v.UserView(0, 1, rows.astype(np.int64), values)
    with pytest.raises(ValueError, match="2 rows, but values for 1"):
        v.UserView(0, 1, rows, values[:1])
    with pytest.raises(ValueError, match="ascend"):
        v.UserView(0, 1, rows[::-1].copy(), values)
    with pytest.raises(ValueError, match="2 users, rows of 1"):
        v.RoundTruth(1, np.arange(2), _rows(1, 0), _rows(2, 0))
    for save in (v.save_user_views, v.save_rounds, v.save_truth):
        with pytest.raises(ValueError, match="to save"):
            save(Path("nowhere"), [])  # type: ignore[operator]
