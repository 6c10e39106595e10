"""Nothing leaves while noise is pending, and what lazy noise cannot do rightly is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedrec.errors import ConfigError
from privacy.dpsgd import NoisePending, NonFiniteGradient
from privacy.eager import OpacusSGD
from privacy.lazy import LazyNoiseSGD
from privacy.normals import NoiseSource
from tests.privacy.lazy_gates import USUAL

BOTH = pytest.mark.parametrize("make", [LazyNoiseSGD, OpacusSGD])


def started(make: Any = LazyNoiseSGD) -> Any:
    return make({"user": torch.zeros(4, 2), "item": torch.zeros(6, 2)}, noise_seed=1)


def one_step(sgd: Any, **changes: Any) -> None:
    """A batch of two examples, read as it must be."""
    rows = changes.pop("rows", {"user": torch.tensor([[0], [1]]), "item": torch.tensor([[2, 2], [3, 4]])})
    gradients = changes.pop("gradients", {name: torch.ones(*at.shape, 2) for name, at in rows.items()})
    for name, at in rows.items():
        sgd.read(name, at)
    sgd.step(rows, gradients, **{"learning_rate": 0.1, **USUAL, **changes})


RELEASES: dict[str, Callable[[Any], Any]] = {
    "tables": lambda sgd: sgd.tables,
    "state_dict": lambda sgd: sgd.state_dict(),
    "iteration": list,
    "item": lambda sgd: sgd["item"],
    "dict": lambda sgd: {name: sgd[name] for name in sgd},
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": pickle.dumps,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": lambda sgd: torch.save(sgd, io.BytesIO()),
}


@pytest.mark.parametrize("release", RELEASES.values(), ids=RELEASES)
def test_nothing_is_released_while_noise_is_pending(release: Callable[[Any], Any]) -> None:
    sgd = started()
    release(sgd)
    one_step(sgd)
    with pytest.raises(NoisePending, match="flush"):
        release(sgd)
    sgd.read("item", torch.arange(6))  # reading rows by training's door is no release
    with pytest.raises(NoisePending, match="flush"):
        release(sgd)
    sgd.flush()
    release(sgd)
    sgd.step({}, {}, learning_rate=0.1, **USUAL)
    with pytest.raises(NoisePending, match="flush"):
        release(sgd)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_it_is_never_copied_or_saved_whole(duplicate: Callable[[Any], Any]) -> None:
    with pytest.raises(NoisePending, match="save its tables"):
        duplicate(started())


def test_after_the_release_nothing_more_is_trained() -> None:
    sgd = started()
    one_step(sgd)
    assert set(sgd.release()) == {"user", "item"}
    for again in (sgd.release, sgd.flush, lambda: one_step(sgd), lambda: sgd.tables):
        with pytest.raises(RuntimeError, match="released"):
            again()


def test_a_step_on_rows_that_were_not_read_is_refused_and_changes_nothing() -> None:
    sgd = started()
    rows = {"item": torch.tensor([[1]])}
    one_step(sgd)
    with pytest.raises(ValueError, match=r"not read since the last step.*read\(\)"):
        sgd.step(rows, {"item": torch.ones(1, 1, 2)}, learning_rate=0.1, **USUAL)
    sgd.read("item", rows["item"])
    sgd.step(rows, {"item": torch.ones(1, 1, 2)}, learning_rate=0.1, **USUAL)
    with pytest.raises(ValueError, match="not read"):
        sgd.step(rows, {"item": torch.ones(1, 1, 2)}, learning_rate=0.1, **USUAL)


def test_an_interrupted_draw_closes_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    sgd = started()
    one_step(sgd)

    def interrupt(self: NoiseSource, count: int) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(NoiseSource, "normal", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sgd.flush()
    for use in (sgd.flush, lambda: sgd.tables, lambda: sgd.read("item", torch.tensor([0])), lambda: one_step(sgd)):
        with pytest.raises(RuntimeError, match="interrupted"):
            use()


@BOTH
def test_momentum_is_refused_with_the_remedy(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"momentum=0\.9.*Adam.*momentum=0.*server_optimizer=adam"):
        make({"item": torch.zeros(3, 2)}, momentum=0.9)


TABLES: dict[str, tuple[dict[str, Tensor], str]] = {
    "none": ({}, "no tables"),
    "one axis": ({"bias": torch.zeros(3)}, r"'bias' has shape \(3,\).*reshape\(1, -1\)"),
    "three axes": ({"item": torch.zeros(3, 2, 2)}, "rows, width"),
    "whole numbers": ({"item": torch.zeros(3, 2, dtype=torch.int64)}, "float32 or float64"),
    "half": ({"item": torch.zeros(3, 2, dtype=torch.float16)}, "float32 or float64"),
}


@BOTH
@pytest.mark.parametrize(("tables", "said"), TABLES.values(), ids=TABLES)
def test_what_is_no_table_is_refused(make: Any, tables: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(tables)


@BOTH
def test_one_tensor_under_two_names_is_refused(make: Any) -> None:
    table = torch.zeros(3, 2)
    with pytest.raises(ConfigError, match="'positive' and 'negative' are one tensor"):
        make({"positive": table, "negative": table})


STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "noise below 0": ({"noise_multiplier": -1.0}, "noise_multiplier=-1"),
    "noise is no number": ({"noise_multiplier": float("nan")}, "noise_multiplier=nan"),
    "no clipping norm": ({"max_grad_norm": 0.0}, "max_grad_norm=0"),
    "infinite norm with noise": ({"max_grad_norm": float("inf")}, "only without noise"),
    "no batch": ({"expected_batch": 0.0}, "expected_batch=0"),
    "rate below 0": ({"learning_rate": -0.1}, "learning_rate=-0.1"),
    "decay of all": ({"learning_rate": 1.0, "weight_decay": 1.0}, "product is below 1"),
    "a rate missing": ({"learning_rate": {"item": 0.1}}, "none for table 'user'"),
    "one axis": ({"rows": {"item": torch.tensor([1])}, "gradients": {"item": torch.ones(1, 2)}}, r"unsqueeze\(1\)"),
    "another width": (
        {"rows": {"item": torch.tensor([[1]])}, "gradients": {"item": torch.ones(1, 1, 3)}},
        r"expected \(1, 1, 2\)",
    ),
    "another type": (
        {"rows": {"item": torch.tensor([[1]])}, "gradients": {"item": torch.ones(1, 1, 2, dtype=torch.float64)}},
        "float64, their table is torch.float32",
    ),
    "other sizes": (
        {"rows": {"item": torch.zeros(2, 1, dtype=torch.int64), "user": torch.zeros(3, 1, dtype=torch.int64)}},
        "disagree",
    ),
    "gradients missing": ({"gradients": {}}, "give both"),
}


@BOTH
@pytest.mark.parametrize(("changes", "said"), STEPS.values(), ids=STEPS)
def test_a_step_without_a_right_result_is_refused(make: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        one_step(started(make), **changes)


@BOTH
@pytest.mark.parametrize("row", [-1, 6])
def test_there_is_no_padding_row(make: Any, row: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0…5.*no padding row"):
        started(make).read("item", torch.tensor([[0, row]]))
    rows = {"item": torch.tensor([[0, row]])}
    with pytest.raises(ValueError, match=r"outside 0…5.*no padding row"):
        started(make).step(rows, {"item": torch.ones(1, 2, 2)}, learning_rate=0.1, **USUAL)


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_no_clipping_bounds_is_refused(make: Any, bad: float) -> None:
    sgd = started(make)
    rows = {"item": torch.tensor([[1, 2]])}
    sgd.read("item", rows["item"])
    gradients = {"item": torch.tensor([[[1.0, 1.0], [bad, 1.0]]])}
    with pytest.raises(NonFiniteGradient, match="learning rate"):
        sgd.step(rows, gradients, learning_rate=0.1, **USUAL)
    assert float(sgd.release()["item"].abs().sum()) == 0.0


def test_opacus_is_not_given_more_memory_than_there_is() -> None:
    sgd = OpacusSGD({"item": torch.zeros(200_000, 32)})
    rows = {"item": torch.zeros(100, 1, dtype=torch.int64)}
    with pytest.raises(ConfigError, match=r"privacy.optimizer=opacus.*GiB; write privacy.optimizer=lazy"):
        sgd.step(rows, {"item": torch.ones(100, 1, 32)}, learning_rate=0.1, **USUAL)


def test_an_infinite_clipping_norm_without_noise_is_plain_sgd() -> None:
    for make in (LazyNoiseSGD, OpacusSGD):
        sgd = started(make)
        one_step(sgd, noise_multiplier=0.0, max_grad_norm=float("inf"), learning_rate=1.0)
        wanted = -np.asarray([0, 0, 2, 1, 1, 0]) / USUAL["expected_batch"]
        np.testing.assert_allclose(sgd.release()["item"].numpy(), np.repeat(wanted, 2).reshape(6, 2), rtol=1e-6)
