"""SIFU: the bound holds, the noise is what (ε, δ) asks for, and nothing is called certified without them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedrec.algorithms.base import Problem
from fedrec.algorithms.fedmf import FedMF
from fedrec.data.split import Split
from fedrec.errors import ConfigError, DataError
from privacy.gaussian import gaussian_epsilon
from server.optimizers import ServerOptimizer
from server.phase import ServerState
from tests.unlearning.small import FEDMF, federation, task, vectors
from unlearning.federation import Federation
from unlearning.forget import ForgetSet
from unlearning.state import State, erase
from unlearning.stores.checkpoints import Contributions, checkpoints, purge_checkpoints, read_checkpoint
from unlearning.stores.history import UpdateHistory
from unlearning.stores.recording import ServerRecording
from unlearning.strategies import Setting
from unlearning.strategies.base import Forgotten
from unlearning.strategies.sifu import SIFU, largest_step, sensitivity

AVERAGE: dict[str, Any] = {"server_optimizer": "average", "server_learning_rate": 1.0}
ROUNDS = 4


def recorded(made: Federation, folder: Path, split: Split, strategy: SIFU, late: tuple[int, ...] = ()) -> State:
    """Training in which the users ``late`` take part from round 3 on, with the store in ``folder``.history."""

    def take_part(number: int, sampled: Any) -> Any:
        return sampled if number >= 3 else np.setdiff1d(sampled, late)

    watch = ServerRecording(UpdateHistory(folder.with_name(f"{folder.name}.history"), strategy.store), made)
    return made.train(made.begin(folder, split), split, ROUNDS, watch=watch, participants=take_part).state


def forgotten(
    made: Federation, state: State, split: Split, forget: ForgetSet, strategy: SIFU, history: Path
) -> Forgotten:
    for leftover in ("work", "work.again"):
        assert not (state.folder.parent / leftover).exists()
    copy = state.copy_to(state.folder.with_name("work"))
    return strategy.forget(task(made, copy, split, forget, history=history))


def bound(made: Federation, history: Path, forget: ForgetSet, number: int) -> float:
    contributions = Contributions.open(history, forget.pairs.n_users)
    settings = made.federation
    return sensitivity(contributions, forget, number, made.algorithm, settings.optimizer(), settings.mean)


# -- the bound --------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=12), st.floats(0.0, 0.99),
    st.floats(0.01, 0.999), st.booleans(), st.floats(1e-3, 2.0),
)  # fmt: skip
def test_no_adam_step_is_larger_than_its_bound(
    gradients: list[float], beta1: float, beta2: float, correct: bool, rate: float
) -> None:
    optimizer = ServerOptimizer("adam", rate, beta1, beta2, 1e-12, correct)
    x = torch.zeros(1, dtype=torch.float64)
    state: dict[str, torch.Tensor] = {}
    for t, gradient in enumerate(gradients, 1):
        moved, state = optimizer.step(x, torch.tensor([gradient], dtype=torch.float64), state)
        assert abs(float(moved - x)) <= largest_step(optimizer, t) * (1 + 1e-6) + 1e-12
        x = moved


def test_the_bound_of_adam_is_attained() -> None:
    """Cauchy and Schwarz's equality: gradients that grow by β₂/β₁ each step. 200 of them come within 1e-6."""
    optimizer = ServerOptimizer("adam", 1.0, 0.9, 0.99, 1e-300)
    x, state = torch.zeros(1, dtype=torch.float64), {"v": torch.zeros(1, dtype=torch.float64)}
    state |= {"m": torch.zeros(1, dtype=torch.float64), "t": torch.zeros((), dtype=torch.float64)}
    for t in range(200):
        moved, state = optimizer.step(x, torch.tensor([1.1**t], dtype=torch.float64), state)
        step, x = float(moved - x), moved
    assert step == pytest.approx(largest_step(optimizer, 200), rel=1e-6)


@pytest.mark.parametrize("kind", ["average", "momentum", "yogi"])
def test_other_optimisers_have_no_bound(kind: Any) -> None:
    assert largest_step(ServerOptimizer(kind), 3) == math.inf


@pytest.mark.parametrize("leaving", [[4], [0, 4, 7]])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_first_round_apart_is_within_its_bound(
    tmp_path: Path, few_users: Split, leaving: list[int], decay: float
) -> None:
    """Against the run that never had them: the actual distance, for forget sets of one and of three."""
    made = federation(few_users, {**FEDMF, "item_learning_rate": 50.0, "item_weight_decay": decay / 50.0}, **AVERAGE)
    recorded(made, tmp_path / "run", few_users, SIFU(), tuple(leaving))
    forget = ForgetSet.of(few_users.train, users=leaving)
    history = tmp_path / "run.history"
    assert bound(made, history, forget, 2) == 0.0
    without = made.train(made.begin(tmp_path / "never", few_users), forget.remove_from(few_users), 3).state
    there = read_checkpoint(history, 3)["item"]
    actual = float((there.double() - without.server.shared["item"].double()).norm())
    assert 0.0 < actual <= bound(made, history, forget, 3)
    assert bound(made, history, forget, 3) < 20 * actual  # and it says something
    assert bound(made, history, forget, 4) == math.inf  # averaging: any upload may follow


def test_adams_bound_holds_and_grows(tmp_path: Path, few_users: Split) -> None:
    made = federation(few_users)
    state = recorded(made, tmp_path / "run", few_users, SIFU())
    forget = ForgetSet.of(few_users.train, users=[3])
    without = made.begin(tmp_path / "never", few_users)
    found = [bound(made, tmp_path / "run.history", forget, number) for number in (1, 2, 3)]
    for number in (1, 2, 3):
        without = made.train(without, forget.remove_from(few_users), 1).state
        there = read_checkpoint(tmp_path / "run.history", number)["item"]
        actual = float((there.double() - without.server.shared["item"].double()).norm())
        assert 0.0 < actual <= found[number - 1] < math.inf
    assert found == sorted(found)
    assert state.round == ROUNDS


def test_interactions_and_items_are_bounded_by_what_can_be_known(tmp_path: Path, few_users: Split) -> None:
    made = federation(few_users, **AVERAGE)
    recorded(made, tmp_path / "run", few_users, SIFU(), (2,))
    history, train = tmp_path / "run.history", few_users.train
    single = ForgetSet.of(train, pairs=([2], [int(train.row(2)[0])]))
    assert bound(made, history, single, 2) == 0.0
    assert bound(made, history, single, 3) == math.inf  # what it would have sent without it, nobody knows
    item = ForgetSet.of(train, items=[int(train.row(2)[0])])
    assert bound(made, history, item, 1) == math.inf  # it changes what everybody draws


# -- what it does -----------------------------------------------------------------------------------------------------


def test_it_is_retraining_where_everybody_was_there_from_the_start(tmp_path: Path, few_users: Split) -> None:
    """Bit for bit, and called exact."""
    made, strategy = federation(few_users), SIFU(noise=0.1)
    state = recorded(made, tmp_path / "run", few_users, strategy)
    forget = ForgetSet.of(few_users.train, users=[3])
    done = forgotten(made, state, few_users, forget, strategy, tmp_path / "run.history")
    again = made.train(made.begin(tmp_path / "again", few_users), forget.remove_from(few_users), ROUNDS).state
    again = erase(again, forget, made.algorithm)
    assert torch.equal(done.state.server.shared["item"], again.server.shared["item"])
    assert np.array_equal(vectors(done.state), vectors(again))
    assert str(done.guarantee) == "exact"


def test_it_rolls_back_to_before_the_forgotten_joined_without_noise(tmp_path: Path, few_users: Split) -> None:
    made, strategy = federation(few_users), SIFU()
    state = recorded(made, tmp_path / "run", few_users, strategy, (3,))
    forget = ForgetSet.of(few_users.train, users=[3])
    done = forgotten(made, state, few_users, forget, strategy, tmp_path / "run.history")
    assert done.guarantee.kind == "certified"
    assert done.guarantee.epsilon == 0.0
    assert done.cost.rounds == ROUNDS - 2
    assert done.state.round == ROUNDS
    # The same as on a run that never had them: the checkpoint is, and so is all that follows.
    after = forget.remove_from(few_users)
    recorded(made, tmp_path / "other", after, strategy)
    start = made.begin(tmp_path / "start", after)
    start = start.at(ServerState(2, read_checkpoint(tmp_path / "other.history", 2)))
    never = made.train(start, after, ROUNDS - 2).state
    assert torch.equal(done.state.server.shared["item"], never.server.shared["item"])


def test_the_noise_has_its_size_and_the_epsilon_is_the_exact_curve(tmp_path: Path, few_users: Split) -> None:
    made = federation(few_users, {**FEDMF, "item_learning_rate": 1e-9}, **AVERAGE)
    made = Federation(**{**vars(made), "settings": {**made.settings, "noise_seed": 1}})
    forget = ForgetSet.of(few_users.train, users=[3])
    state = recorded(made, tmp_path / "run", few_users, SIFU(), (3,))
    history = tmp_path / "run.history"
    delta = bound(made, history, forget, 3)
    strategy = SIFU(noise=delta / 1.5, epsilon=8.0)
    done = forgotten(made, state, few_users, forget, strategy, history)
    assert done.guarantee.epsilon == pytest.approx(gaussian_epsilon(1.5, strategy.delta))
    assert done.cost.rounds == 1
    assert "certified (ε" in str(done.guarantee)
    # Devices that move nothing: what the item view differs by from the checkpoint is the noise.
    noise = (done.state.server.shared["item"] - read_checkpoint(history, 3)["item"]).double()
    assert float(noise.std()) == pytest.approx(strategy.noise, rel=0.2)


def test_a_smaller_budget_rolls_back_further(tmp_path: Path, few_users: Split) -> None:
    made = federation(few_users, **AVERAGE)
    state = recorded(made, tmp_path / "run", few_users, SIFU(), (3,))
    forget = ForgetSet.of(few_users.train, users=[3])
    noise = bound(made, tmp_path / "run.history", forget, 3) / 1.5
    done = forgotten(made, state, few_users, forget, SIFU(noise=noise, epsilon=0.5), tmp_path / "run.history")
    assert done.cost.rounds == ROUNDS - 2  # round 2, at ε = 0
    assert done.guarantee.epsilon == 0.0


def test_noise_is_not_predictable_from_the_seed(tmp_path: Path, few_users: Split) -> None:
    strategy, shared = SIFU(noise=1.0), {"item": torch.zeros(4, 2)}
    assert not torch.equal(strategy._noisy(shared, None, 1)["item"], strategy._noisy(shared, None, 1)["item"])


# -- the store --------------------------------------------------------------------------------------------------------


def test_purged_checkpoints_are_those_that_the_forgotten_had_a_part_in(tmp_path: Path, few_users: Split) -> None:
    made = federation(few_users, **AVERAGE)
    recorded(made, tmp_path / "run", few_users, SIFU(), (3,))
    history = tmp_path / "run.history"
    assert checkpoints(history) == [1, 2, 3]
    forget = ForgetSet.of(few_users.train, users=[3])
    assert purge_checkpoints(history, forget) == [3]
    assert checkpoints(history) == [1, 2]
    left = Contributions.open(history, few_users.n_users)
    assert left.first_round[3] == 0
    assert math.isnan(left.first_norm[3])
    # What came after is not known any more: the next one may not rely on it.
    other = ForgetSet.of(few_users.train, users=[5])
    assert bound(made, history, other, 3) == math.inf
    assert purge_checkpoints(tmp_path, forget) == []


def test_recording_goes_on_where_it_ended(tmp_path: Path, few_users: Split) -> None:
    """In two calls of train: the gap of one round's move makes a bound infinite, never smaller."""
    made, strategy = federation(few_users), SIFU()
    whole = recorded(made, tmp_path / "run", few_users, strategy)
    parts = UpdateHistory(tmp_path / "parts", strategy.store)
    state = made.begin(tmp_path / "half", few_users)
    for rounds in (2, 2):
        state = made.train(state, few_users, rounds, watch=ServerRecording(parts, made)).state
    assert torch.equal(state.server.shared["item"], whole.server.shared["item"])
    forget = ForgetSet.of(few_users.train, users=[3])
    assert checkpoints(parts.folder) == checkpoints(tmp_path / "run.history")
    assert bound(made, parts.folder, forget, 1) == bound(made, tmp_path / "run.history", forget, 1)
    assert bound(made, parts.folder, forget, 3) == math.inf


def test_a_damaged_store_says_so(tmp_path: Path, few_users: Split) -> None:
    made = federation(few_users)
    recorded(made, tmp_path / "run", few_users, SIFU())
    history = tmp_path / "run.history"
    (history / "checkpoint-000002.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="checkpoint-000002"):
        read_checkpoint(history, 2)
    (history / "contributions.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"contributions.safetensors: cannot be read.*retrain"):
        Contributions.open(history, few_users.n_users)


def test_the_store_is_bounded(tmp_path: Path, few_users: Split) -> None:
    made, strategy = federation(few_users), SIFU(max_bytes=4000)
    with pytest.raises(ConfigError, match=r"checkpoint of round 2 .*max_bytes=4000; write a larger interval"):
        recorded(made, tmp_path / "run", few_users, strategy)


def test_bad_settings_and_runs_are_refused() -> None:
    for options, text in (
        ({"noise": 0.0}, "noise=0.0: write a positive number"), ({"delta": 1.0}, "delta=1.0"),
        ({"epsilon": math.inf}, "must be finite"), ({"interval": 0}, "interval=0"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            SIFU.from_config(options)
    secure = Setting(FedMF(Problem(5, 6, 0)), 10, 100, 5, True, None, "adam")
    with pytest.raises(ConfigError, match="never sees single updates"):
        SIFU().check(secure)
