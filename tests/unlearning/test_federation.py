"""Federated rounds on a state at rest: phases add up, retraining is exact, deletion leaves a fresh device."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from fedrec import random
from fedrec.data.interactions import Interactions
from fedrec.data.split import Split
from fedrec.data.synthetic import SyntheticConfig, generate
from fedrec.errors import DataError
from fedrec.evaluation.protocols import Protocol, make_split
from server.settings import RunnerSettings
from tests.unlearning.small import FEDRAP, federation, task, trained, vectors
from unlearning.forget import ForgetSet
from unlearning.purge import planted
from unlearning.state import State, erase, stores
from unlearning.strategies.retrain import Retrain
from unlearning.strategies.reverse_bpr import ReverseBPR


def same(one: State, other: State) -> bool:
    shared = all(
        np.array_equal(one.server.shared[k].numpy(), other.server.shared[k].numpy()) for k in one.server.shared
    )
    return shared and np.array_equal(vectors(one), vectors(other))


def test_two_phases_are_one_run_bit_for_bit(tmp_path: Path, synthetic_split: Split) -> None:
    made = federation(synthetic_split)
    whole = trained(made, tmp_path / "whole", synthetic_split, 5)
    half = trained(made, tmp_path / "half", synthetic_split, 2)
    rest = made.train(State.load(half.folder), synthetic_split, 3).state
    assert (rest.round, whole.round) == (5, 5)
    assert same(rest, whole)


@pytest.mark.parametrize("nodes", [1, 3])
def test_forgetting_then_retraining_is_the_run_that_never_had_the_interactions(tmp_path: Path, nodes: int) -> None:
    data = generate(SyntheticConfig(users=60, items=120, seed=1, mean_activity=20))
    split = make_split(data, Protocol(), 0)
    gone = np.flatnonzero(np.random.default_rng(0).random(split.train.items.size) < 0.1)
    forget = ForgetSet.of(split.train, pairs=(split.train.users[gone], split.train.items[gone]))
    made = federation(split, nodes=nodes)
    state = trained(made, tmp_path / "run", split, 4)
    retrained = Retrain().forget(task(made, state, split, forget)).state
    never = make_split(_without(data, forget), Protocol(), 0)
    assert same(retrained, trained(federation(never, nodes=nodes), tmp_path / "never", never, 4))


def _without(data: Interactions, forget: ForgetSet) -> Interactions:
    """The data set as a file without those rows gives it, users and items as before."""
    keep = ~np.isin(
        data.user.astype(np.int64) * data.n_items + data.item, forget.pairs.users * data.n_items + forget.pairs.items
    )
    return dataclasses.replace(
        data, user=data.user[keep], item=data.item[keep],
        timestamp=None if data.timestamp is None else data.timestamp[keep],
        rating=None if data.rating is None else data.rating[keep],
    )  # fmt: skip


def test_retraining_without_a_user_is_the_run_in_which_its_device_never_took_part(
    tmp_path: Path, synthetic_split: Split
) -> None:
    forget = ForgetSet.of(synthetic_split.train, users=[3, 17])
    made = federation(synthetic_split)
    state = trained(made, tmp_path / "run", synthetic_split, 3)
    retrained = Retrain().forget(task(made, state, synthetic_split, forget)).state
    empty = dataclasses.replace(made, joined=np.where(np.isin(np.arange(60), [3, 17]), 1000, 1).astype(np.int64))
    assert same(retrained, trained(empty, tmp_path / "never", synthetic_split, 3))


def test_from_the_join_point_equals_from_scratch(tmp_path: Path, synthetic_split: Split) -> None:
    late = np.ones(60, dtype=np.int64)
    late[[3, 17, 40]] = 3
    forget = ForgetSet.of(synthetic_split.train, users=[3, 17])
    made = federation(synthetic_split, joined=late)
    joined = trained(made, tmp_path / "joined", synthetic_split, 2)
    state = made.train(joined.copy_to(tmp_path / "run"), synthetic_split, 3).state
    scratch = Retrain().forget(task(made, state.copy_to(tmp_path / "a"), synthetic_split, forget))
    again = Retrain(start="join").forget(
        task(made, state.copy_to(tmp_path / "b"), synthetic_split, forget, joined=joined)
    )
    assert same(scratch.state, again.state)
    assert (scratch.cost.rounds, again.cost.rounds) == (5, 3)


def test_a_halted_round_leaves_no_trace(tmp_path: Path, synthetic_split: Split) -> None:
    made = federation(synthetic_split)
    state = trained(made, tmp_path / "run", synthetic_split, 2)
    before = state.copy_to(tmp_path / "before")
    done = made.train(state, synthetic_split, 3, halt=lambda measured: True)
    assert (done.halted, done.lines, done.state.round) == (True, [], 2)
    assert same(done.state, before)


def test_an_erased_user_is_a_fresh_device_and_its_vector_is_in_no_file(tmp_path: Path, synthetic_split: Split) -> None:
    made = federation(synthetic_split, nodes=2)
    state = trained(made, tmp_path / "run", synthetic_split, 3)
    old = vectors(state)
    forget = ForgetSet.of(synthetic_split.train, users=[3, 50], items=[7])
    assert planted(state.folder, {"user 3": old[3].tobytes()})
    after = erase(state, forget, made.algorithm)
    made.write(after.devices, forget.remove_from(synthetic_split))
    assert not planted(after.folder, {f"user {user}": old[user].tobytes() for user in (3, 50)})
    fresh = vectors(after)
    others = np.setdiff1d(np.arange(60), [3, 50])
    assert np.array_equal(fresh[others], old[others])
    spec = made.algorithm.private["user"]
    initial = spec.initial_many(random.streams(random.stream(5, "init:user"), np.asarray([3, 50]))).numpy()
    assert np.array_equal(fresh[[3, 50]], initial)
    item = after.server.shared["item"]
    assert np.array_equal(item[7].numpy(), made.algorithm.initial_shared()["item"][7].numpy())
    assert float(after.server.moments["item"]["m"][7].abs().sum()) == 0.0


def test_personal_rows_of_a_forgotten_pair_go_back_to_their_initial_value(
    tmp_path: Path, synthetic_split: Split
) -> None:
    made = federation(synthetic_split, FEDRAP)
    state = trained(made, tmp_path / "run", synthetic_split, 2)
    item = int(synthetic_split.train.row(5)[0])
    forget = ForgetSet.of(synthetic_split.train, pairs=([5], [item]))
    (store,) = stores(state.devices)
    assert float(np.abs(store.table("personal")[1][5 * 120 + item]).sum()) > 0.0
    erase(state, forget, made.algorithm)
    assert float(np.abs(store.table("personal")[1][5 * 120 + item]).sum()) == 0.0


def test_a_damaged_server_state_is_refused_by_name(tmp_path: Path, synthetic_split: Split) -> None:
    state = trained(federation(synthetic_split), tmp_path / "run", synthetic_split, 1)
    file = state.folder / "server.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"server\.safetensors: its checksum"):
        State.load(state.folder)


@pytest.mark.xdist_group("ray")
def test_rounds_of_unlearning_on_ray_are_those_in_one_process(tmp_path: Path, synthetic_split: Split) -> None:
    forget = ForgetSet.of(synthetic_split.train, users=[4, 9])
    made = federation(synthetic_split, nodes=2)
    state = trained(made, tmp_path / "run", synthetic_split, 3)
    strategy = ReverseBPR(user_repair_rounds=0, max_rounds=3)
    found = []
    for name in ("inline", "ray"):
        own = dataclasses.replace(made, runner=RunnerSettings(name=name, workers=min(2, os.cpu_count() or 1)))
        found.append(strategy.forget(task(own, state.copy_to(tmp_path / name), synthetic_split, forget)).state)
    assert same(*found)
