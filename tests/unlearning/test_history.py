"""The update history: what goes in comes out, it stays within its bounds, and what is purged is gone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError, DataError
from unlearning.purge import planted
from unlearning.search import search
from unlearning.stores.history import UpdateHistory, Updates
from unlearning.stores.size import check_size, estimate
from unlearning.strategies.base import StoreNeeds

EXACT = StoreNeeds("server")
N_ITEMS = 50


def updates(seed: int = 0, devices: int = 7, width: int = 8, most: int = 12, scale: float = 1.0) -> Updates:
    """Random updates of ``devices`` of 40 users, some of them without rows."""
    draw = np.random.default_rng(seed)
    users = np.sort(draw.permutation(40)[:devices])
    rows = [np.sort(draw.permutation(N_ITEMS)[: draw.integers(0, most + 1)]) for _ in users]
    indptr = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int64)
    flat = np.concatenate([np.zeros(0, np.int64), *rows]).astype(np.int32)
    most_of_all = float(np.finfo(np.float32).max)
    values = np.clip(draw.standard_normal((flat.size, width)) * scale, -most_of_all, most_of_all).astype(np.float32)
    return Updates(users, indptr, flat, values)


def filled(folder: Path, needs: StoreNeeds = EXACT, rounds: int = 5, **made: Any) -> UpdateHistory:
    history = UpdateHistory(folder, needs, rounds=rounds)
    for number in range(1, rounds + 1):
        history.add(number, *updates(number, **made))
    return history


def same(one: Updates, other: Updates) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


def of(update: Updates, user: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    at = int(np.flatnonzero(update.users == user)[0])
    span = slice(update.indptr[at], update.indptr[at + 1])
    return update.rows[span], update.values[span]


# -- what goes in comes out ---------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 20), st.integers(1, 9), st.floats(1e-30, 1e30))
@settings(max_examples=40)
def test_float32_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, seed: int, devices: int, width: int, scale: float
) -> None:
    folder = tmp_path_factory.mktemp("history")
    update = updates(seed, devices, width, scale=scale)
    order = np.random.default_rng(seed).permutation(devices)  # nodes answer in any order
    shuffled = [of(update, user) for user in update.users[order]]
    indptr = np.concatenate([[0], np.cumsum([rows.size for rows, _ in shuffled])]).astype(np.int64)
    rows = np.concatenate([update.rows[:0], *(rows for rows, _ in shuffled)])
    values = np.concatenate([update.values[:0], *(values for _, values in shuffled)])
    assert UpdateHistory(folder, EXACT).add(1, update.users[order], indptr, rows, values)
    history = UpdateHistory(folder, EXACT)
    assert history.rounds == [1]
    assert same(history.read(1), update)
    for user in update.users:
        assert all(np.array_equal(a, b) for a, b in zip(history.user(1, user), of(update, user), strict=True))
    assert history.user(1, 99)[0].size == 0


@given(st.integers(0, 2**32 - 1), st.integers(-37, 38))
@settings(max_examples=40)
def test_float16_keeps_eleven_bits_of_updates_of_any_scale(
    tmp_path_factory: pytest.TempPathFactory, seed: int, magnitude: int
) -> None:
    update = updates(seed, scale=10.0**magnitude)
    history = UpdateHistory(tmp_path_factory.mktemp("history"), StoreNeeds("server", precision="float16"))
    history.add(1, *update)
    read = history.read(1).values
    assert np.isfinite(read).all()
    largest = float(np.abs(update.values).max(initial=0.0))
    # Half a unit of the eleventh bit, or of float16's smallest step below the largest value.
    bound = np.maximum(np.abs(update.values.astype(np.float64)) * 2.0**-11, largest * 2.0**-38)
    subnormal = float(np.finfo(np.float32).smallest_subnormal)
    assert (np.abs(read.astype(np.float64) - update.values) <= bound + subnormal).all()


def test_float16_takes_the_largest_float32(tmp_path: Path) -> None:
    most = np.finfo(np.float32).max
    values = np.array([[most, -most, most / 2, 1.0]], dtype=np.float32)
    history = UpdateHistory(tmp_path, StoreNeeds("client", precision="float16"))
    history.add(1, np.array([3]), np.array([0, 1]), np.array([9]), values)
    read = history.read(1).values[0]
    assert np.array_equal(read[:2], values[0, :2])
    assert read[2] == pytest.approx(float(most) / 2, rel=2**-11)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0))
@settings(max_examples=40)
def test_of_every_device_the_largest_rows_stay_and_the_norm_is_of_all(
    tmp_path_factory: pytest.TempPathFactory, seed: int, top: float
) -> None:
    update = updates(seed, most=30)
    history = UpdateHistory(tmp_path_factory.mktemp("history"), StoreNeeds("client", top=top))
    history.add(1, *update)
    users, norms = history.norms(1)
    assert np.array_equal(users, update.users)
    for user, norm in zip(users, norms, strict=True):
        rows, values = of(update, user)
        kept, kept_values = history.user(1, user)
        lengths = np.linalg.norm(values.astype(np.float64), axis=1)
        count = min(rows.size, max(1, int(np.ceil(round(top * rows.size, 9)))))
        assert kept.size == count
        assert set(kept) == set(rows[np.argsort(-lengths, kind="stable")[:count]])
        assert np.array_equal(kept_values, values[np.isin(rows, kept)])
        assert norm == pytest.approx(np.sqrt((lengths**2).sum()), rel=1e-6)


def test_equal_rows_are_kept_in_their_order(tmp_path: Path) -> None:
    history = UpdateHistory(tmp_path, StoreNeeds("client", top=0.5))
    history.add(1, np.array([0]), np.array([0, 4]), np.array([8, 2, 5, 1]), np.ones((4, 3), np.float32))
    assert history.user(1, 0)[0].tolist() == [8, 2]


def test_the_first_and_every_interval_th_round_are_stored(tmp_path: Path) -> None:
    history = UpdateHistory(tmp_path, StoreNeeds("server", interval=3))
    stored = [number for number in range(1, 11) if history.add(number, *updates(number))]
    assert stored == history.rounds == [1, 4, 7, 10]
    assert history.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_a_repeated_round_changes_nothing_twice(tmp_path: Path) -> None:
    history = filled(tmp_path)
    size = history.bytes
    history.add(3, *updates(3))
    assert (history.rounds, history.bytes) == ([1, 2, 3, 4, 5], size)
    assert same(history.read(3), updates(3))


def test_bytes_per_user_add_up_to_the_store(tmp_path: Path) -> None:
    history = filled(tmp_path, StoreNeeds("client", top=0.5, precision="float16"), devices=30)
    per_user = history.bytes_per_user(40)
    headers = history.bytes - per_user.sum()
    assert 0 < headers < 5 * 700 + 100
    rows = history.user(1, 7)[0].size
    history.purge(np.setdiff1d(np.arange(40), [7]))
    later = sum(history.user(number, 7)[0].size for number in range(2, 6))
    took_part = sum(7 in history.read(number).users for number in history.rounds)
    assert per_user[7] == (rows + later) * (4 + 8 * 2) + 20 * took_part


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"users": np.array([1, 1])}, "occurs twice"),
        ({"indptr": np.array([0, 3, 2])}, "indptr"),
        ({"rows": np.array([1])}, "rows"),
        ({"values": np.array([[1.0, np.nan], [0.0, 0.0]])}, "the update of user 4 is not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    good = {
        "users": np.array([4, 6]),
        "indptr": np.array([0, 1, 2]),
        "rows": np.array([1, 2]),
        "values": np.ones((2, 2)),
    }
    history = UpdateHistory(tmp_path, EXACT)
    with pytest.raises(ValueError, match=match):
        history.add(1, **{**good, **change})
    assert history.rounds == []
    assert history.add(1, **good)


# -- bounds -------------------------------------------------------------------------------------------------------


def test_a_full_store_refuses_the_round_and_every_remedy_it_names_holds(tmp_path: Path) -> None:
    large: dict[str, Any] = {"devices": 30, "most": 48, "width": 16}
    whole = filled(tmp_path / "whole", rounds=20, **large).bytes
    needs = StoreNeeds("server", max_bytes=int(whole * 0.7))
    history = UpdateHistory(tmp_path / "small", needs, rounds=20)
    with pytest.raises(ConfigError, match="20 rounds need about") as caught:
        filled(tmp_path / "small", needs, rounds=20, **large)
    assert history.bytes <= needs.max_bytes
    assert history.rounds == list(range(1, 1 + len(history.rounds)))
    assert 11 <= len(history.rounds) <= 16
    assert same(history.read(1), updates(1, **large))
    remedies = re.findall(r"(interval|top|precision|max_bytes)=([\w.]*\w)", str(caught.value).partition(": write ")[2])
    assert [name for name, _ in remedies] == ["interval", "top", "precision", "max_bytes"]
    for name, text in remedies:
        value = {"interval": int, "top": float, "precision": str, "max_bytes": int}[name](text)
        filled(tmp_path / name, replace(needs, **{name: value}), rounds=20, **large)


@pytest.mark.parametrize("needs", [EXACT, StoreNeeds("client", 3, 0.3, "float16"), StoreNeeds("server", 2, 0.02)])
def test_the_estimate_is_near_what_is_written(tmp_path: Path, needs: StoreNeeds) -> None:
    history = filled(tmp_path, needs, rounds=20, devices=38, most=48, width=16)
    mean_rows = float(np.mean([np.diff(updates(n, 38, 16, 48).indptr).mean() for n in range(1, 21)]))
    found = estimate(needs, devices=38, mean_rows=mean_rows, width=16, rounds=20)
    assert found == pytest.approx(history.bytes, rel=0.15)


def test_what_will_not_fit_is_refused_before_training() -> None:
    ml100k = {"devices": 943, "mean_rows": 400.0, "width": 64, "rounds": 100}
    assert 9.7e9 < estimate(EXACT, **ml100k) < 10e9
    with pytest.raises(ConfigError, match=r"100 rounds need about 9\.8\d GB.*write interval=6, top=0\.15, or max"):
        check_size(EXACT, **ml100k)
    assert check_size(StoreNeeds("server", interval=5), **ml100k) < 2**31


@pytest.mark.parametrize("bad", [{"interval": 0}, {"top": 0.0}, {"top": 1.5}, {"precision": "int8"}, {"max_bytes": 0}])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(bad))}="):
        UpdateHistory(tmp_path / "new", StoreNeeds("server", **bad))
    assert not (tmp_path / "new").exists()


def test_a_history_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(ConfigError, match="was made with"):
        UpdateHistory(tmp_path, StoreNeeds("server", precision="float16"))


# -- purge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_purged_users_leave_no_byte_and_the_others_keep_every_one(tmp_path: Path, precision: Any) -> None:
    needs = StoreNeeds("server", precision=precision)
    history = filled(tmp_path / "history", needs, devices=20)
    gone = np.array([2, 5, 11, 30])
    before = {number: history.read(number) for number in history.rounds}
    needles = history.needles(gone)
    assert len(needles) > 20
    assert {one.what for one in search(tmp_path, needles).findings} == {"stored update"}
    with pytest.raises(DataError, match="still in the update history"):
        history.verify_absent(gone)
    changed = history.purge(gone)
    assert changed == sum(np.isin(gone, update.users).sum() for update in before.values())
    history.verify_absent(gone)
    assert search(tmp_path, needles).findings == ()
    for number, update in before.items():
        after = UpdateHistory(tmp_path / "history", needs).read(number)
        assert np.array_equal(after.users, np.setdiff1d(update.users, gone))
        for user in after.users:
            assert all(np.array_equal(a, b) for a, b in zip(of(after, user), of(update, user), strict=True))
    assert history.purge(gone) == 0


def test_forgotten_pairs_lose_their_rows_and_only_those(tmp_path: Path) -> None:
    history = filled(tmp_path, devices=20)
    before = history.read(2)
    users = before.users[np.diff(before.indptr) > 3][:3]
    pairs = UserItems.from_pairs(np.repeat(users, 2), np.concatenate([of(before, user)[0][:2] for user in users]), 40)
    norms = history.norms(2)[1]
    assert set(history.present([], pairs)) == set(users)
    assert history.purge([], pairs) >= 3
    assert history.present([], pairs).size == 0
    after = history.read(2)
    assert np.array_equal(after.users, before.users)
    for place, user in enumerate(before.users):
        rows, values = of(before, user)
        skip = 2 if user in users else 0
        assert np.array_equal(of(after, user)[0], rows[skip:])
        assert np.array_equal(of(after, user)[1], values[skip:])
        assert history.norms(2)[1][place] == pytest.approx(
            np.linalg.norm(values[skip:]) if skip else norms[place], rel=1e-5
        )


def test_whoever_forgets_an_interaction_can_lose_the_updates_made_from_it(tmp_path: Path) -> None:
    history = filled(tmp_path, devices=20)
    history.purge([4], UserItems.from_pairs([9], [1], 40), purge_affected=True)
    history.verify_absent([4, 9])
    assert sum(history.read(number).users.size for number in history.rounds) > 60


def test_an_interrupted_purge_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = filled(tmp_path, devices=20)
    import unlearning.stores.history as module

    replace, calls = module.replace_file, []

    def killed(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.with_name(f".{path.name}.new").write_bytes(content[:100])
            raise KeyboardInterrupt
        replace(path, content)

    monkeypatch.setattr(module, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        history.purge(np.arange(10))
    monkeypatch.undo()
    again = UpdateHistory(tmp_path, EXACT)
    assert again.present(np.arange(10)).size
    again.purge(np.arange(10))
    again.verify_absent(np.arange(10))
    assert again.rounds == [1, 2, 3, 4, 5]
    assert not list(tmp_path.glob(".*"))


def test_an_erased_history_leaves_nothing(tmp_path: Path) -> None:
    history = filled(tmp_path / "history")
    value = history.read(1).values[:1].tobytes()
    assert planted(tmp_path, {"update": value})
    history.erase()
    assert not list(tmp_path.iterdir())


# -- damage -------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=80)
def test_one_flipped_byte_of_a_file_is_an_error_that_names_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("history")
    history = filled(folder, rounds=1)
    path = folder / "round-000001.safetensors"
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"round-000001\.safetensors: damaged"):
        history.read(1)


def test_cut_swapped_and_missing_files_are_errors_that_name_them(tmp_path: Path) -> None:
    history = filled(tmp_path)
    second, third = tmp_path / "round-000002.safetensors", tmp_path / "round-000003.safetensors"
    kept = second.read_bytes()
    for content in (b"", kept[:50], kept[:-1], kept + b"\0", third.read_bytes()):
        second.write_bytes(content)
        with pytest.raises(DataError, match=r"round-000002\.safetensors: damaged"):
            history.purge([1])
    second.unlink()
    with pytest.raises(DataError, match=r"round-000002\.safetensors: missing"):
        _ = history.rounds
    with pytest.raises(DataError, match="round 9 cannot be read"):
        history.read(9)


def test_a_file_is_plain_safetensors(tmp_path: Path) -> None:
    filled(tmp_path, StoreNeeds("server", precision="float16"))
    with safe_open(tmp_path / "round-000001.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"users", "indptr", "rows", "values", "norms"}
        assert file.get_tensor("values").dtype == np.float16
        assert np.array_equal(file.get_tensor("rows"), updates(1).rows)
