"""What the baselines do, and what they leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedrec.algorithms.base import Problem
from fedrec.algorithms.fedease import FedEASE
from fedrec.algorithms.fedmf import FedMF
from fedrec.data.split import Split
from fedrec.errors import ConfigError
from tests.unlearning.small import federation, task, trained, vectors
from unlearning.forget import ForgetSet
from unlearning.state import State
from unlearning.strategies import Setting, build
from unlearning.strategies.gradient_ascent import Ascent


def margin(state: State, forget: ForgetSet) -> float:
    scores = vectors(state) @ state.server.shared["item"].numpy().T
    centred = scores - scores.mean(1, keepdims=True)
    return float(centred[forget.pairs.users, forget.pairs.items].mean())


def test_deleting_rows_changes_nothing_that_others_learned(tmp_path: Path, synthetic_split: Split) -> None:
    made = federation(synthetic_split)
    state = trained(made, tmp_path / "run", synthetic_split, 3)
    view, own = state.server.shared["item"].clone(), vectors(state)
    forget = ForgetSet.of(synthetic_split.train, users=[3], items=[7])
    done = build("delete_rows", {}).forget(task(made, state, synthetic_split, forget))
    others = np.delete(np.arange(120), 7)
    assert np.array_equal(done.state.server.shared["item"][others].numpy(), view[others].numpy())
    stay = np.delete(np.arange(60), 3)
    assert np.array_equal(vectors(done.state)[stay], own[stay])
    assert not np.array_equal(vectors(done.state)[3], own[3])
    assert done.cost.rounds == 0


def test_gradient_ascent_pushes_the_forgotten_down_and_touches_affected_devices_only(
    tmp_path: Path, synthetic_split: Split
) -> None:
    made = federation(synthetic_split)
    state = trained(made, tmp_path / "run", synthetic_split, 10)
    pairs = ([4, 9], [synthetic_split.train.row(4)[0], synthetic_split.train.row(9)[1]])
    forget = ForgetSet.of(synthetic_split.train, pairs=pairs)
    before, own = margin(state, forget), vectors(state)
    done = build("gradient_ascent", {"rounds": 2}).forget(task(made, state, synthetic_split, forget))
    assert margin(done.state, forget) < before
    changed = np.flatnonzero((vectors(done.state) != own).any(1))
    assert changed.tolist() == [4, 9]
    assert (done.cost.rounds, len(done.trace)) == (2, 2)


def test_the_compiled_kernel_never_trains_an_ascent() -> None:
    inner = FedMF(Problem(4, 12, 0))
    assert inner.dot_product(0) is not None
    assert Ascent(inner).dot_product(0) is None


def test_fine_tuning_trains_on_what_is_left_for_as_many_rounds_as_asked(tmp_path: Path, synthetic_split: Split) -> None:
    made = federation(synthetic_split)
    state = trained(made, tmp_path / "run", synthetic_split, 3)
    forget = ForgetSet.of(synthetic_split.train, users=[3])
    wanted = task(made, state.copy_to(tmp_path / "copy"), synthetic_split, forget)
    deleted = build("delete_rows", {}).forget(wanted).state
    expected = made.train(deleted, wanted.after, 4).state
    done = build("finetune", {"rounds": 4}).forget(task(made, state, synthetic_split, forget))
    assert np.array_equal(done.state.server.shared["item"].numpy(), expected.server.shared["item"].numpy())
    assert np.array_equal(vectors(done.state), vectors(expected))


def test_settings_that_make_no_sense_are_refused_by_name() -> None:
    for name, options in (("gradient_ascent", {"rounds": 0}), ("finetune", {"rounds": 0}), ("retrain", {"start": "x"})):
        with pytest.raises(ConfigError, match=rf"unlearning\.strategies\.{name}\."):
            build(name, options)
    rest = {"rounds": 3, "interactions": 10, "users": 5, "secure_aggregation": False, "optimizer": "adam"}
    with pytest.raises(ConfigError, match="fedease has no loss; write unlearning=retrain"):
        build("gradient_ascent", {}).check(Setting(algorithm=FedEASE(Problem(5, 5, 0)), privacy=None, **rest))
