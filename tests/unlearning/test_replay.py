"""Strategies with an update history: what is recorded, what of it is used, and whose."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.cohort import draw_examples
from fedrec import random
from fedrec.algorithms import build
from fedrec.algorithms.base import GradientRecommender, Problem
from fedrec.algorithms.fedease import FedEASE
from fedrec.algorithms.fedmf import FedMF
from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from fedrec.errors import ConfigError, RunFailed
from server.aggregation import RoundSum
from tests.unlearning.small import FEDMF, FEDRAP, federation, task, trained, vectors
from unlearning.federation import Federation
from unlearning.forget import ForgetSet
from unlearning.state import State, stores
from unlearning.stores.history import UpdateHistory
from unlearning.stores.recording import ServerRecording, device_histories, options_of
from unlearning.strategies import Setting, Strategy
from unlearning.strategies.base import StoreNeeds
from unlearning.strategies.cfru import CFRU
from unlearning.strategies.federaser import Calibrate, FedEraser, Lengths
from unlearning.strategies.fru import FRU, Replay, semi_hard_exclusions
from unlearning.strategies.fru import Lengths as AggregateLengths
from unlearning.strategies.replay import Calibration, lighter

ROUNDS = 4
SHORT: dict[str, Any] = {"interval": 1, "replays": 1, "finish_rounds": 1, "positives": 4, "negatives": 2}


def recorded(made: Federation, folder: Path, split: Split, strategy: Strategy, rounds: int = ROUNDS) -> State:
    """Training with the store that ``strategy`` asks for: the server's in ``folder``.history."""
    needs = strategy.store
    assert needs is not None
    state = made.begin(folder, split)
    if needs.where == "client":
        return made.train(state, split, rounds, recorder=options_of(needs)).state
    watch = ServerRecording(UpdateHistory(folder.with_name(f"{folder.name}.history"), needs), made)
    return made.train(state, split, rounds, watch=watch).state


def forgotten_by(
    strategy: Strategy, made: Federation, state: State, split: Split, forget: ForgetSet, work: str, **more: Any
) -> State:
    """The state after ``strategy`` honoured one request on a copy."""
    history = state.folder.with_name(f"{state.folder.name}.history")
    copy = state.copy_to(state.folder.with_name(work))
    more = {"history": history if history.exists() else None, **more}
    return strategy.forget(task(made, copy, split, forget, **more)).state


def initial(made: Federation) -> Any:
    """The vectors that devices start with."""
    users = random.streams(random.stream(made.seed, "init:user"), np.arange(made.problem.n_users))
    return made.algorithm.private["user"].initial_many(users).numpy()


def view(state: State) -> torch.Tensor:
    return state.server.shared["item"]


# -- what is recorded -------------------------------------------------------------------------------------------------


def test_a_recorded_training_is_the_training(tmp_path: Path, few_users: Split) -> None:
    made = federation(few_users)
    plain = trained(made, tmp_path / "plain", few_users, ROUNDS)
    watched = recorded(made, tmp_path / "watched", few_users, FedEraser(interval=2))
    kept = recorded(made, tmp_path / "kept", few_users, FRU(interval=2))
    for other in (watched, kept):
        # Recorded rounds take the tensor program, the others the kernel: equal up to rounding.
        assert torch.allclose(view(plain), view(other), atol=2e-4)
        assert np.allclose(vectors(plain), vectors(other), atol=2e-3)


@pytest.mark.parametrize("nodes", [1, 3])
def test_server_and_devices_record_the_same_updates(tmp_path: Path, few_users: Split, nodes: int) -> None:
    made = federation(few_users, nodes=nodes)
    server = UpdateHistory(tmp_path / "server.history", StoreNeeds("server", interval=2))
    made.train(made.begin(tmp_path / "server", few_users), few_users, 3, watch=ServerRecording(server, made))
    needs = StoreNeeds("client", interval=2)
    state = made.train(made.begin(tmp_path / "devices", few_users), few_users, 3, recorder=options_of(needs)).state
    parts = device_histories(state.devices, needs)
    assert len(parts) == nodes
    assert server.rounds == [1, 3]
    for number in (1, 3):
        whole, split_up = server.read(number), [part.read(number) for part in parts]
        assert np.array_equal(whole.users, np.concatenate([part.users for part in split_up]))
        assert np.array_equal(whole.rows, np.concatenate([part.rows for part in split_up]))
        assert np.array_equal(whole.values, np.concatenate([part.values for part in split_up]))


def test_what_the_server_records_adds_up_to_what_it_applied(tmp_path: Path, few_users: Split) -> None:
    made = federation(few_users, server_optimizer="average", server_learning_rate=1.0)
    history = UpdateHistory(tmp_path / "h", StoreNeeds("server"))
    start = made.begin(tmp_path / "run", few_users)
    before = view(start).clone()
    done = made.train(start, few_users, 1, watch=ServerRecording(history, made)).state
    found = history.read(1)
    total = torch.zeros_like(before)
    total.index_add_(0, torch.from_numpy(found.rows.astype(np.int64)), torch.from_numpy(found.values))
    assert torch.allclose(view(done) - before, total / found.users.size, atol=1e-6)


# -- FedEraser --------------------------------------------------------------------------------------------------------


@given(st.data())
def test_every_calibrated_upload_has_its_stored_length_and_keeps_its_direction(data: st.DataObject) -> None:
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n_users, n_items, width = data.draw(st.integers(1, 6)), 8, 3
    known = np.sort(draw.choice(20, n_users, replace=False)).astype(np.int64)
    norms = draw.uniform(0.1, 3.0, n_users).astype(np.float32)
    uploads = [draw.normal(size=(draw.integers(1, 5), width)).astype(np.float32) for _ in known]
    rows = [np.sort(draw.choice(n_items, len(part), replace=False)).astype(np.int32) for part in uploads]
    unwatched = torch.from_numpy(draw.normal(size=(n_items, width)).astype(np.float32))
    sums = unwatched.double()
    expected = np.zeros((n_items, width))
    for one, part, norm in zip(rows, uploads, norms, strict=True):
        sums[torch.from_numpy(one.astype(np.int64))] += torch.from_numpy(part)
        expected[one] += part * (norm / np.linalg.norm(part))  # |U| Û / ‖Û‖
    ratios = [norm / np.linalg.norm(part) for norm, part in zip(norms, uploads, strict=True)]
    expected += unwatched.numpy() * np.mean(ratios)
    pointers = np.concatenate([[0], np.cumsum([len(part) for part in uploads])])
    views = [{"users": known, "indptr": pointers, "rows": np.concatenate(rows), "values": np.concatenate(uploads)}]
    total = RoundSum({"item": sums.float()}, devices=n_users + 1, views=views)
    algorithm = FedMF(Problem(20, n_items, 0), dim=width)
    lengths = Lengths(known, norms[None], np.zeros(0, dtype=np.int64))
    found = Calibrate(algorithm, lengths, "participants", 0, 1).combine(1, total, {"item": torch.zeros(n_items, width)})
    assert np.allclose(found["item"].numpy(), expected / (n_users + 1), atol=2e-4, rtol=1e-3)


def test_those_who_sat_out_a_stored_round_sit_out_its_replay(few_users: Split) -> None:
    norms = np.asarray([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]], dtype=np.float32)
    lengths = Lengths(np.asarray([1, 4, 7]), norms, np.asarray([9]))
    replay = Calibrate(FedMF(Problem(few_users.n_users, few_users.n_items, 0)), lengths, "participants", 10, 2)
    everybody = np.arange(few_users.n_users)
    assert [replay.participants(number, everybody).tolist() for number in (11, 12, 13)] == [
        [1, 7, 9], [1, 7, 9], [4, 7, 9]
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", [FedEraser(**SHORT), FRU(**SHORT, top=1.0, refresh=2)], ids=["federaser", "fru"])
def test_nothing_that_the_forgotten_stored_is_used(tmp_path: Path, few_users: Split, strategy: Strategy) -> None:
    """Purged before or after: bit for bit the same. Without somebody else's updates: not the same."""
    made = federation(few_users)
    state = recorded(made, tmp_path / "run", few_users, strategy)
    train = few_users.train
    forget = ForgetSet.of(train, users=[2, 5], pairs=([7], [int(train.row(7)[0])]))
    needs = strategy.store
    assert needs is not None

    def purged(name: str, users: list[int], pairs: UserItems | None) -> State:
        copy = state.copy_to(tmp_path / name)
        history = tmp_path / "run.history"
        if history.exists():
            shutil.copytree(history, tmp_path / f"{name}.history")
        there = [tmp_path / f"{name}.history"] if history.exists() else sorted(copy.devices.glob("node-*/history"))
        for folder in there:
            UpdateHistory(folder, needs).purge(users, pairs, purge_affected=True)
        return copy

    after = forgotten_by(strategy, made, state, few_users, forget, "work")
    before = forgotten_by(
        strategy, made, purged("first", [2, 5], forget.pairs), few_users, forget, "work-first"
    )  # fmt: skip
    other = forgotten_by(strategy, made, purged("else", [0, 3], None), few_users, forget, "work-else")
    assert torch.equal(view(after), view(before))
    assert np.array_equal(vectors(after), vectors(before))
    assert not torch.equal(view(after), view(other))


@pytest.mark.parametrize(
    "strategy", [FedEraser(**SHORT), FRU(**SHORT), CFRU(interval=1, top=1.0)], ids=["federaser", "fru", "cfru"]
)
def test_the_deleted_are_as_if_new_and_the_run_goes_on(tmp_path: Path, few_users: Split, strategy: Strategy) -> None:
    made = federation(few_users)
    state = recorded(made, tmp_path / "run", few_users, strategy)
    forget = ForgetSet.of(few_users.train, users=[4], items=[3])
    done = forgotten_by(strategy, made, state, few_users, forget, "work")
    fresh = initial(made)
    assert np.array_equal(vectors(done)[4], fresh[4])
    assert (np.delete(vectors(done), 4, 0) != np.delete(fresh, 4, 0)).any(1).all()
    assert torch.equal(view(done)[3], made.algorithm.initial_shared()["item"][3])
    assert not torch.equal(view(done), view(state))
    assert done.round == ROUNDS
    more = made.train(done, forget.remove_from(few_users), 1)
    assert more.state.round == ROUNDS + 1
    assert more.lines[0]["users"] == few_users.n_users - 1
    assert made.algorithm.name == "fedmf"  # the devices are back to the run's own algorithm
    assert '"_target_": "fedrec.algorithms.fedmf.FedMF"' in (done.devices / "workspace.json").read_text()


@pytest.mark.parametrize("strategy", [FedEraser(**SHORT), FRU(**SHORT)], ids=["federaser", "fru"])
def test_retained_devices_keep_their_vectors_and_the_affected_start_anew(
    tmp_path: Path, few_users: Split, strategy: Strategy
) -> None:
    """With steps of next to nothing what devices end with is what they began with."""
    still = {**FEDMF, "user_learning_rate": 1e-9, "item_learning_rate": 1e-9}
    made = federation(few_users, still)
    state = recorded(made, tmp_path / "run", few_users, strategy)
    moved = {**vars(made), "algorithm_config": still}
    forget = ForgetSet.of(few_users.train, pairs=([6], [int(few_users.train.row(6)[0])]))
    marked = vectors(state)
    done = forgotten_by(strategy, Federation(**moved), state, few_users, forget, "work")
    assert np.allclose(vectors(done), marked, atol=1e-6)
    # A trained federation: of the two only the affected device goes back.
    strong = recorded(federation(few_users), tmp_path / "strong", few_users, strategy)
    done = forgotten_by(strategy, Federation(**moved), strong, few_users, forget, "work-strong")
    near = np.abs(vectors(done) - vectors(strong)).max(1)
    assert near[6] > 1e-3
    assert np.delete(near, 6).max() < 1e-6


def test_only_rounds_after_the_join_point_are_replayed(tmp_path: Path, few_users: Split) -> None:
    made, strategy = federation(few_users), FedEraser(**SHORT)
    start = made.begin(tmp_path / "run", few_users)
    watch = ServerRecording(UpdateHistory(tmp_path / "run.history", strategy.store), made)
    half = made.train(start, few_users, 2, watch=watch).state
    joined = half.copy_to(tmp_path / "joined")
    state = made.train(half, few_users, 3, watch=watch).state
    forget = ForgetSet.of(few_users.train, users=[1])
    copy = state.copy_to(tmp_path / "work")
    done = strategy.forget(task(made, copy, few_users, forget, joined=joined, history=tmp_path / "run.history"))
    assert [entry["phase"] for entry in done.trace] == ["replay"] * 3 + ["train"]
    assert done.cost.rounds == 4
    late = task(made, state, few_users, forget, joined=state, history=tmp_path / "run.history")
    with pytest.raises(RunFailed, match="no round after round 5"):
        strategy.forget(late)


@pytest.mark.parametrize("strategy", [FedEraser(**SHORT), FRU(**SHORT)], ids=["federaser", "fru"])
def test_methods_with_personal_views_are_replayed_as_well(tmp_path: Path, few_users: Split, strategy: Strategy) -> None:
    """FedRAP: per-item private tensors stay on retained devices, and go where there is something to forget."""
    gentle = {**FEDRAP, "item_learning_rate": 1.0, "personal_learning_rate": 1.0, "local_epochs": 2}
    made = federation(few_users, gentle, server_optimizer="average", server_learning_rate=1.0)
    state = recorded(made, tmp_path / "run", few_users, strategy)
    done = forgotten_by(strategy, made, state, few_users, ForgetSet.of(few_users.train, users=[2]), "work")
    first = next(name for name, spec in made.algorithm.shared.items() if spec.per_item)
    assert torch.isfinite(done.server.shared[first]).all()
    assert not torch.equal(done.server.shared[first], state.server.shared[first])
    personal = next(name for name, spec in made.algorithm.private.items() if spec.per_item)
    store = next(iter(stores(done.devices, scratch=True)))
    assert torch.equal(store.whole(personal, np.asarray([2]))[0].flatten(), store.base(personal).flatten())
    assert not torch.equal(store.whole(personal, np.asarray([3]))[0].flatten(), store.base(personal).flatten())


# -- FRU --------------------------------------------------------------------------------------------------------------


@given(st.floats(0.01, 10.0), st.integers(0, 2**32 - 1))
def test_the_aggregate_keeps_its_direction_and_gets_the_stored_length(length: float, seed: int) -> None:
    delta = torch.from_numpy(np.random.default_rng(seed).normal(size=(6, 3)).astype(np.float32))
    algorithm = FedMF(Problem(5, 6, 0), dim=3)
    nobody = np.zeros(0, dtype=np.int64)
    replay = Replay(algorithm, AggregateLengths([length], [nobody], nobody, 0.0), "participants", 0, 1)
    found = replay.combine(1, RoundSum({"item": delta.clone()}, devices=4), {"item": torch.zeros(6, 3)})["item"]
    assert float(found.norm()) == pytest.approx(length, rel=1e-4)
    assert torch.allclose(found / found.norm(), delta / delta.norm(), atol=1e-5)


def test_the_stored_length_is_that_of_the_retained_devices_mean(tmp_path: Path, few_users: Split) -> None:
    made, strategy = federation(few_users, nodes=2), FRU(interval=3, top=1.0, precision="float32")
    state = recorded(made, tmp_path / "run", few_users, strategy)
    forget = ForgetSet.of(few_users.train, users=[0, 9])
    lengths = AggregateLengths.of(task(made, state, few_users, forget), strategy.store)
    assert len(lengths.norms) == 2  # rounds 1 and 4
    total, rows = torch.zeros(few_users.n_items, 8), 0
    for user in range(few_users.n_users):
        if user in (0, 9):
            continue
        for history in device_histories(state.devices, strategy.store):
            own, values = history.user(4, user)
            total[torch.from_numpy(own.astype(np.int64))] += torch.from_numpy(values)
            rows += own.size + history.user(1, user)[0].size
    assert lengths.norms[1] == pytest.approx(float(total.norm()) / (few_users.n_users - 2), rel=1e-5)
    assert lengths.bytes == rows * (4 + 4 * 8)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_negatives_are_semi_hard(tmp_path: Path, few_users: Split, share: float) -> None:
    """Against the definition, user by user."""
    made = federation(few_users)
    state = trained(made, tmp_path / "run", few_users, 3)
    scorer = made.scorer(state, few_users)
    table = semi_hard_exclusions(few_users, scorer, share, 2)
    scores, items = scorer.raw_scores(np.arange(few_users.n_users)), view(state).numpy()
    wanted = int(np.ceil(share * few_users.n_items))
    for user in range(few_users.n_users):
        away = np.linalg.norm(items - items[few_users.train.row(user)].mean(0), axis=1)
        union = set(np.argsort(-scores[user])[:wanted]) | set(np.argsort(away)[:wanted])
        union -= set(few_users.negatives_exclude.row(user).tolist())
        free = set(range(few_users.n_items)) - set(table.row(user).tolist())
        assert free == union if len(union) >= 2 else free >= union
    drawn = replace(few_users, negatives_exclude=table)
    inner = made.algorithm
    assert isinstance(inner, GradientRecommender)
    cohort = draw_examples(drawn, np.asarray([3]), replace(inner.local, negatives=2), 1, 1)
    negatives = set(cohort.rows.tolist()) - set(few_users.train.row(3).tolist())
    assert negatives
    assert not negatives & set(table.row(3).tolist())


def test_a_device_with_too_few_semi_hard_items_draws_as_in_training(tmp_path: Path, few_users: Split) -> None:
    made = federation(few_users)
    state = made.begin(tmp_path / "run", few_users)
    table = semi_hard_exclusions(few_users, made.scorer(state, few_users), 0.01, few_users.n_items)
    assert np.array_equal(table.items, few_users.negatives_exclude.items)
    assert np.array_equal(table.indptr, few_users.negatives_exclude.indptr)


# -- lighter local training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [FEDMF, FEDRAP], ids=["fedmf", "fedrap"])
def test_calibration_changes_how_much_a_device_trains_and_nothing_else(few_users: Split, config: Any) -> None:
    made = federation(few_users, {**config, "local_epochs": 4})
    light = lighter(made, 0.5, 3, 2)
    algorithm, inner = light.algorithm, made.algorithm
    assert isinstance(algorithm, Calibration)
    assert isinstance(inner, GradientRecommender)
    assert algorithm.local == replace(inner.local, epochs=2, max_positives=3, negatives=2)
    assert algorithm.shared == inner.shared
    assert algorithm.private == inner.private
    assert algorithm.dot_product(2) == inner.dot_product(2)
    assert lighter(made, 1.0, 0, 0).algorithm.local == inner.local  # type: ignore[attr-defined]
    rebuilt = build(light.algorithm_config, light.problem)
    assert isinstance(rebuilt, Calibration)
    assert rebuilt.local == algorithm.local


# -- CFRU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["average", "adam"])
def test_cfru_subtracts_exactly_what_one_round_owes_to_a_user(tmp_path: Path, few_users: Split, optimizer: str) -> None:
    """One averaging round: M + η(S − u_k)/m. One round of Adam, whose v stays: the same with its elementwise rate."""
    options: dict[str, Any] = {
        "server_optimizer": optimizer,
        "server_learning_rate": 0.5 if optimizer == "average" else 0.05,
    }
    made = federation(few_users, {**FEDMF, "item_weight_decay": 0.0}, **options)
    strategy = CFRU(interval=1, top=1.0, precision="float32", damping=0.0)
    state = recorded(made, tmp_path / "run", few_users, strategy, rounds=1)
    rows, values = UpdateHistory(tmp_path / "run.history", strategy.store).user(1, 6)
    own = torch.zeros_like(view(state))
    own[torch.from_numpy(rows.astype(np.int64))] = torch.from_numpy(values)
    rate: Any = 0.5
    if optimizer == "adam":
        v = state.server.moments["item"]["v"] / (1 - 0.99)
        rate = torch.where(v > 0, 0.05 / (v.sqrt() + 1e-8), 0.0)
    expected = view(state) - rate * own / few_users.n_users
    done = forgotten_by(strategy, made, state, few_users, ForgetSet.of(few_users.train, users=[6]), "work")
    assert torch.allclose(view(done), expected, atol=1e-5)
    others = np.delete(np.arange(few_users.n_users), 6)
    assert np.array_equal(vectors(done)[others], vectors(state)[others])  # no device works


def test_cfru_takes_single_interactions_from_their_own_rows(tmp_path: Path, few_users: Split) -> None:
    made, strategy = federation(few_users), CFRU(interval=1, top=1.0)
    state = recorded(made, tmp_path / "run", few_users, strategy)
    item = int(few_users.train.row(8)[0])
    done = forgotten_by(strategy, made, state, few_users, ForgetSet.of(few_users.train, pairs=([8], [item])), "work")
    changed = torch.nonzero((view(done) != view(state)).any(1)).flatten().tolist()
    assert changed == [item]


# -- refusals ---------------------------------------------------------------------------------------------------------


def setting(**more: Any) -> Setting:
    given: dict[str, Any] = {
        "algorithm": FedMF(Problem(5, 6, 0)), "rounds": 10, "interactions": 100, "users": 5,
        "secure_aggregation": False, "privacy": None, "optimizer": "adam", **more,
    }  # fmt: skip
    return Setting(**given)


@pytest.mark.parametrize("strategy", [FedEraser(), CFRU()], ids=["federaser", "cfru"])
def test_a_server_store_is_refused_under_secure_aggregation(strategy: Strategy) -> None:
    strategy.check(setting())
    with pytest.raises(ConfigError, match=r"never sees single updates.*unlearning=fru"):
        strategy.check(setting(secure_aggregation=True))


def test_a_store_on_the_devices_needs_sums_only() -> None:
    FRU().check(setting(secure_aggregation=True))


@pytest.mark.parametrize("strategy", [FedEraser(), FRU(), CFRU()], ids=["federaser", "fru", "cfru"])
def test_methods_without_local_training_and_privacy_are_refused(strategy: Strategy) -> None:
    with pytest.raises(ConfigError, match="no local training"):
        strategy.check(setting(algorithm=FedEASE(Problem(5, 6, 0))))
    with pytest.raises(ConfigError, match="no budget accounts for"):
        strategy.check(setting(privacy="user_dp"))


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (FedEraser, {"replays": 0}, "replays=0: write 1 or more"),
        (FedEraser, {"step": 0.0}, "step=0.0: write a positive number"),
        (FedEraser, {"calibration": 2.0}, "calibration=2.0: write a share"),
        (FedEraser, {"interval": 0}, "interval=0"),
        (FRU, {"semi_hard": 1.5}, "semi_hard=1.5: write a share"),
        (FRU, {"top": 0.0}, "top=0.0"),
        (FRU, {"refresh": 0}, "refresh=0: write 1 or more"),
        (CFRU, {"damping": 1.5}, "damping=1.5: write a number from 0 to 1"),
        (CFRU, {"strength": -1.0}, "strength=-1.0: write a positive number"),
    ],
)
def test_bad_settings_are_refused(make: type[Strategy], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make.from_config(options)


def test_cfru_does_not_support_items_alone() -> None:
    assert "item" not in CFRU.supports
    assert {"user", "user_item", "interaction"} <= CFRU.supports
