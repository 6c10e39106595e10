"""A silo trains with DP-SGD on its users' interactions, and what it uploads carries noise in every row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from clients.silo import check_silo, train_silo
from clients.silo_batches import draw_silo_batches, examples_of
from clients.store import DeviceStore
from clients.update import CohortUpdate
from fedrec.algorithms.base import Examples, GradientRecommender, LocalTraining, Problem, Tensors, TensorSpec, dot
from fedrec.algorithms.fedease import FedEASE
from fedrec.algorithms.fedmf import FedMF
from fedrec.algorithms.fedrap import FedRAP
from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError
from tests.clients.small import small_split

SPLIT = small_split()
USERS = range(6, 18)
PLAIN: dict[str, Any] = {
    "n_items": SPLIT.n_items, "seed": 1, "round_number": 1, "sample_rate": 0.2, "steps": 15, "expected_batch": 30.0,
    "noise_multiplier": 0.0, "max_grad_norm": 0.1, "noise_seed": 5,
}  # fmt: skip
NOISY = {**PLAIN, "noise_multiplier": 1.3}


def fedmf(**options: Any) -> FedMF:
    return FedMF(Problem(SPLIT.n_users, SPLIT.n_items, 1), dim=8, **options)


@dataclass(frozen=True)
class Layered(GradientRecommender):
    """A small neural method: the item rows and a dense layer shared, a vector and a bias private."""

    name = "layered"
    problem: Problem

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        item = TensorSpec((self.problem.n_items, 4), per_item=True, init="normal", scale=0.5, learning_rate=0.7)
        return {"item": item, "layer": TensorSpec((4, 4), init="normal", learning_rate=0.3, weight_decay=0.1)}

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        return {"user": TensorSpec((4,), init="normal", learning_rate=0.5), "bias": TensorSpec((), learning_rate=0.5)}

    @property
    def local(self) -> LocalTraining:
        return LocalTraining(negatives=3)

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        scores = torch.tanh(params["item"] @ params["layer"]) @ params["user"] + params["bias"]
        losses = F.binary_cross_entropy_with_logits(scores, examples.label, reduction="none")
        return (losses * examples.weight).sum()

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return dot(torch.tanh(params["item"] @ params["layer"]), params["user"]) + params["bias"].unsqueeze(1)


def trained(
    folder: Path, algorithm: GradientRecommender, train: UserItems = SPLIT.train, users: range = USERS, **options: Any
) -> tuple[CohortUpdate, Tensors]:
    """A round in a new silo: its update, and its users' vectors afterwards."""
    store = DeviceStore(folder, algorithm.private, users, 3)
    store.begin(options["round_number"])
    update = train_silo(algorithm, algorithm.initial_shared(), store, train, users, **options)
    return update, store.vectors(np.asarray(users))


METHODS = {
    "bce": fedmf(item_weight_decay=0.05), "bpr": fedmf(objective="bpr", step_decay=0.9),
    "layered": Layered(Problem(SPLIT.n_users, SPLIT.n_items, 1)),
}  # fmt: skip


@pytest.mark.parametrize("algorithm", METHODS.values(), ids=METHODS)
def test_without_noise_lazy_and_opacus_train_the_same_silo(tmp_path: Path, algorithm: GradientRecommender) -> None:
    lazy, ours = trained(tmp_path / "lazy", algorithm, **PLAIN)
    opacus, theirs = trained(tmp_path / "opacus", algorithm, optimizer="opacus", **PLAIN)
    for found, wanted in ((lazy.sums, opacus.sums), (ours, theirs)):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
            assert float(value.abs().max()) > 1e-3
    assert lazy.loss == pytest.approx(opacus.loss, rel=1e-5)


def test_without_clipping_and_noise_a_silo_of_all_examples_takes_the_step_of_their_sum(tmp_path: Path) -> None:
    """One step, every interaction in the batch: autograd on the sum of the examples' losses, over a public constant."""
    algorithm = fedmf(user_learning_rate=0.4, item_learning_rate=0.9)
    shared, users = algorithm.initial_shared()["item"], np.asarray(USERS)
    options = {**PLAIN, "sample_rate": 1.0, "steps": 1, "max_grad_norm": math.inf}
    start = DeviceStore(tmp_path / "start", algorithm.private, USERS, 3).vectors(users)["user"]
    rows = SPLIT.train.take(users)
    items = examples_of(
        rows.users + USERS.start, rows.items.astype(np.int64), n_items=SPLIT.n_items, negatives=4, seed=1,
        round_number=1, step=0,
    )  # fmt: skip
    item, user = shared.clone().requires_grad_(), start.clone().requires_grad_()
    scores = (item[items] * user[torch.from_numpy(rows.users)].unsqueeze(1)).sum(2)
    label = torch.zeros_like(scores)
    label[:, 0] = 1.0
    F.binary_cross_entropy_with_logits(scores, label, reduction="none").mean(1).sum().backward()  # type: ignore[no-untyped-call]
    update, vectors = trained(tmp_path / "silo", algorithm, **options)
    assert item.grad is not None
    assert user.grad is not None
    torch.testing.assert_close(update.sums["item"], -0.9 / 30.0 * item.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(vectors["user"], start - 0.4 / 30.0 * user.grad, rtol=1e-4, atol=1e-7)


def without(table: UserItems, at: int) -> UserItems:
    return UserItems.from_pairs(np.delete(table.users, at), np.delete(table.items, at), table.n_users)


@pytest.mark.parametrize("algorithm", METHODS.values(), ids=METHODS)
def test_one_interaction_less_moves_a_step_by_at_most_the_clipping_norm(
    tmp_path: Path, algorithm: GradientRecommender
) -> None:
    """Item table and user vectors together; every rate 1, so that the silo's change is the clipped sum itself."""

    class Unit(type(algorithm)):  # type: ignore[misc]
        shared = property(lambda self: unit(algorithm.shared))
        private = property(lambda self: unit(algorithm.private))

    def unit(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {n: dataclasses.replace(spec, learning_rate=1.0, weight_decay=0.0) for n, spec in specs.items()}

    method = Unit(**{f.name: getattr(algorithm, f.name) for f in dataclasses.fields(algorithm)})
    options = {**PLAIN, "sample_rate": 1.0, "steps": 1, "expected_batch": 1.0, "max_grad_norm": 0.05}

    def moved(name: str, train: UserItems) -> Tensor:
        update, vectors = trained(tmp_path / name, method, train, **options)
        return torch.cat([value.double().flatten() for value in (*update.sums.values(), *vectors.values())])

    everything, first = moved("all", SPLIT.train), int(SPLIT.train.indptr[USERS.start])
    sizes = [
        float((everything - moved(str(at), without(SPLIT.train, at))).norm()) for at in range(first, first + 60, 7)
    ]
    # Float32 tables round: a sum of about a hundred examples of norm 0.05.
    assert max(sizes) <= 0.05 * (1.0 + 1e-4)
    assert max(sizes) > 0.045


@given(seed=st.integers(0, 2**32 - 1), rate=st.floats(0.01, 1.0), steps=st.integers(1, 12))
def test_an_interaction_more_changes_no_other_example(seed: int, rate: float, steps: int) -> None:
    draw = np.random.default_rng(seed)
    rows = UserItems.from_pairs(np.repeat(np.arange(5), 6), np.tile(draw.permutation(40)[:6], 5), 5)
    left_out = int(draw.integers(rows.items.size))

    def appearances(table: UserItems) -> list[set[tuple[int, ...]]]:
        batches = draw_silo_batches(
            table, 100, n_items=40, seed=seed, round_number=3, sample_rate=rate, steps=steps
        )  # fmt: skip
        found = []
        for step in range(steps):
            at = batches.chosen[batches.ptr[step] : batches.ptr[step + 1]]
            users = table.users[at] + 100
            items = examples_of(
                users, table.items[at].astype(np.int64), n_items=40, negatives=4, seed=seed, round_number=3, step=step
            )
            found.append({(int(u), *map(int, row)) for u, row in zip(users, items, strict=True)})
            assert len(found[-1]) == at.size
        return found

    gone = (int(rows.users[left_out]) + 100, int(rows.items[left_out]))
    for with_it, without_it in zip(appearances(rows), appearances(without(rows, left_out)), strict=True):
        assert {example for example in with_it if example[:2] != gone} == without_it


@pytest.mark.parametrize("rate", [0.003, 0.3, 1.0])
def test_batches_are_poisson_samples(rate: float) -> None:
    n, steps = 4000, 25
    rows = UserItems.from_pairs(np.repeat(np.arange(10), n // 10), np.tile(np.arange(n // 10), 10), 10)
    batches = draw_silo_batches(rows, 0, n_items=n, seed=2, round_number=1, sample_rate=rate, steps=steps)
    sizes = np.diff(batches.ptr)
    if rate == 1.0:
        assert (sizes == n).all()
        return
    assert stats.binomtest(int(sizes.sum()), n * steps, rate).pvalue > 1e-3
    spread = float(((sizes - n * rate) ** 2).sum() / (n * rate * (1.0 - rate)))
    assert 1e-3 < stats.chi2.cdf(spread, steps) < 1.0 - 1e-3
    often = np.bincount(batches.chosen, minlength=n)
    observed = np.bincount(often, minlength=steps + 1)
    expected = n * stats.binom.pmf(np.arange(steps + 1), steps, rate)
    big = expected > 5
    assert stats.chisquare([*observed[big], observed[~big].sum()], [*expected[big], expected[~big].sum()]).pvalue > 1e-3
    follows = np.intersect1d(*(batches.chosen[batches.ptr[s] : batches.ptr[s + 1]] for s in (3, 4))).size
    assert stats.binomtest(follows, n, rate**2).pvalue > 1e-3


def test_negatives_come_from_the_whole_catalogue() -> None:
    users, positives = np.arange(3000), np.full(3000, 7)
    items = examples_of(users, positives, n_items=20, negatives=4, seed=1, round_number=1, step=0)
    assert bool((items[:, 0] == 7).all())
    counts = np.bincount(items[:, 1:].flatten().numpy(), minlength=20)
    assert stats.chisquare(counts).pvalue > 1e-3  # the positive itself included
    again = examples_of(users, positives, n_items=20, negatives=4, seed=1, round_number=1, step=1)
    assert stats.chisquare(np.bincount((items[:, 1] - again[:, 1]).numpy() % 20, minlength=20)).pvalue > 1e-3


@pytest.mark.parametrize("optimizer", ["lazy", "opacus"])
def test_every_row_of_the_upload_and_every_vector_is_noised(tmp_path: Path, optimizer: str) -> None:
    """Nobody's data: the silo still takes its steps, and what comes out is the noise that they add up to."""
    algorithm = fedmf(item_learning_rate=0.5, user_learning_rate=0.8, item_weight_decay=0.2, step_decay=0.8)
    nothing = UserItems(np.zeros(SPLIT.n_users + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
    update, vectors = trained(tmp_path, algorithm, nothing, optimizer=optimizer, **NOISY)
    start = algorithm.initial_shared()["item"]
    scale, keep, spread, own = 1.3 * 0.1 / 30.0, 1.0, 0.0, 0.0
    for step in range(15):
        rate, shrink = 0.8**step, 1.0 - 0.5 * 0.8**step * 0.2
        keep, spread = keep * shrink, spread * shrink**2 + (0.5 * rate * scale) ** 2
        own += (0.8 * rate * scale) ** 2
    noise = (update.sums["item"] - (keep - 1.0) * start).numpy() / spread**0.5
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert 1e-3 < stats.chi2.cdf(float((noise.astype(np.float64) ** 2).sum()), noise.size) < 1.0 - 1e-3
    first = DeviceStore(tmp_path / "fresh", algorithm.private, USERS, 3).vectors(np.asarray(USERS))["user"]
    moved = (vectors["user"] - first).numpy() / own**0.5
    assert 1e-3 < stats.chi2.cdf(float((moved.astype(np.float64) ** 2).sum()), moved.size) < 1.0 - 1e-3
    assert update.loss == 0.0
    assert bool((update.counts == 1).all())


def test_lazy_and_opacus_noise_a_trained_silo_alike(tmp_path: Path) -> None:
    algorithm = fedmf(step_decay=0.9)
    base, _ = trained(tmp_path / "base", algorithm, **PLAIN)
    noise = {}
    for optimizer, seed in (("lazy", 1), ("opacus", 2)):
        options = {**NOISY, "noise_seed": seed, "optimizer": optimizer}
        update, _ = trained(tmp_path / optimizer, algorithm, **options)
        noise[optimizer] = (update.sums["item"] - base.sums["item"]).flatten().numpy()
        assert bool((update.sums["item"] != 0.0).all())
    assert stats.ks_2samp(noise["lazy"], noise["opacus"]).pvalue > 1e-3


def test_a_silo_counts_once_and_uploads_everything(tmp_path: Path) -> None:
    update, _ = trained(tmp_path, fedmf(), **NOISY)
    assert update.devices == 1
    assert update.steps == 15
    assert update.users == list(USERS)
    assert update.failed == []
    assert update.upload_bytes == 4 * SPLIT.n_items * 8
    assert update.squared_norm["item"] == pytest.approx(float(update.sums["item"].double().square().sum()))
    assert update.decay == {"item": 0.0}
    assert bool((update.counts == 1).all())  # which rows were touched does not show


def test_a_repeated_task_starts_from_what_the_first_one_saw(tmp_path: Path) -> None:
    first, vectors = trained(tmp_path, fedmf(), **NOISY)
    again, the_same = trained(tmp_path, fedmf(), **NOISY)
    assert torch.equal(first.sums["item"], again.sums["item"])
    assert torch.equal(vectors["user"], the_same["user"])
    following, _ = trained(tmp_path, fedmf(), **{**NOISY, "round_number": 2})
    assert float((following.sums["item"] - first.sums["item"]).abs().max()) > 1e-3


def test_without_a_noise_seed_a_repeated_task_draws_other_noise(tmp_path: Path) -> None:
    options = {**NOISY, "noise_seed": None}
    first, _ = trained(tmp_path / "first", fedmf(), **options)
    second, _ = trained(tmp_path / "second", fedmf(), **options)
    assert bool((first.sums["item"] != second.sums["item"]).all())


def test_fixed_noise_differs_between_rounds_and_silos(tmp_path: Path) -> None:
    nothing = UserItems(np.zeros(SPLIT.n_users + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
    runs = [(USERS, 1), (USERS, 2), (range(6), 1)]
    found = [
        trained(tmp_path / str(k), fedmf(), nothing, users, **{**NOISY, "round_number": number})[0].sums["item"]
        for k, (users, number) in enumerate(runs)
    ]
    for k in (1, 2):
        correlation = np.corrcoef(found[0].flatten(), found[k].flatten())[0, 1]
        assert abs(correlation) < 4.0 / found[0].numel() ** 0.5


@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_a_silo_that_diverges_contributes_and_stores_nothing(tmp_path: Path, rate: float) -> None:
    algorithm = fedmf(item_learning_rate=rate, user_learning_rate=rate)
    fresh = DeviceStore(tmp_path / "fresh", algorithm.private, USERS, 3).vectors(np.asarray(USERS))
    update, vectors = trained(tmp_path / "silo", algorithm, **PLAIN)
    assert update.failed == list(USERS)
    assert update.devices == 0
    assert float(update.sums["item"].abs().sum()) == 0.0
    assert torch.equal(vectors["user"], fresh["user"])


PROBLEM = Problem(SPLIT.n_users, SPLIT.n_items, 1)
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "per-item private tensors": (FedRAP(PROBLEM), {}, r"personal.*algorithm=fedmf"),
    "statistics": (FedEASE(PROBLEM), {}, "algorithm=fedmf"),
    "several epochs": (fedmf(local_epochs=3), {}, "privacy.steps"),
    "momentum": (fedmf(), {"optimizer": "momentum"}, r"privacy.optimizer=momentum.*server_optimizer.*lazy or opacus"),
    "adam": (fedmf(), {"optimizer": "adam"}, r"privacy.optimizer=adam.*plain SGD.*lazy or opacus"),
    "ghost": (fedmf(), {"optimizer": "ghost"}, r"ghost clipping.*padding.*used twice.*lazy or opacus"),
    "memory": (
        fedmf(), {"optimizer": "opacus", "expected_batch": 1e6, "silo_users": 10},
        r"privacy.optimizer=opacus.*GiB; write privacy.optimizer=lazy",
    ),
    "memory of dense layers": (METHODS["layered"], {"expected_batch": 1e9}, r"layer.*GiB; lower privacy.sample_rate"),
}  # fmt: skip


@pytest.mark.parametrize(("algorithm", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_silo_cannot_train_is_refused_with_the_remedy(
    algorithm: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_silo(algorithm, **options)


@pytest.mark.parametrize("algorithm", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("optimizer", ["lazy", "opacus"])
def test_what_a_silo_can_train_is_accepted(algorithm: GradientRecommender, optimizer: str) -> None:
    check_silo(algorithm, optimizer=optimizer, expected_batch=1000.0, silo_users=100)
