"""The seam carries other published methods: each is written here against ``fedrec.algorithms.base`` alone and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clients.cohort import chunks, draw_examples
from clients.node import NodeResult, PersonalViews, run_task
from clients.workspace import Workspace
from fedrec import random
from fedrec.algorithms.base import (
    Collected,
    Examples,
    GradientRecommender,
    LocalTraining,
    Problem,
    StatisticsRecommender,
    Tensors,
    TensorSpec,
    dot,
)
from fedrec.data.interactions import UserItems
from tests.clients import small

HERE = "tests.algorithms.test_seam"
NOBODY = np.zeros(0, dtype=np.int64)


def _bce(logits: Tensor, examples: Examples) -> Tensor:
    return (F.binary_cross_entropy_with_logits(logits, examples.label, reduction="none") * examples.weight).sum()


@dataclass(frozen=True)
class FedNCF(GradientRecommender):
    """Perifanis & Efraimidis, "Federated Neural Collaborative Filtering" (KBS 2022): a shared MLP on [user, item]."""

    name = "fedncf"
    problem: Problem
    dim: int = 8
    hidden: int = 16
    learning_rate: float = 0.5

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        rate, d, h = self.learning_rate, self.dim, self.hidden
        return {
            "item": TensorSpec((self.problem.n_items, d), True, "normal", 0.3, learning_rate=10 * rate),
            "mlp.0": TensorSpec((2 * d, h), init="normal", scale=0.3, learning_rate=rate),
            "mlp.0.bias": TensorSpec((h,), learning_rate=rate),
            "mlp.1": TensorSpec((h,), init="normal", scale=0.3, learning_rate=rate),
        }

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        return {"user": TensorSpec((self.dim,), init="normal", scale=0.3, learning_rate=self.learning_rate)}

    @property
    def local(self) -> LocalTraining:
        return LocalTraining(epochs=2, batch_size=40)

    def _logits(self, p: Tensors) -> Tensor:
        d = self.dim
        hidden = p["item"] @ p["mlp.0"][d:] + p["user"] @ p["mlp.0"][:d] + p["mlp.0.bias"]
        return torch.relu(hidden) @ p["mlp.1"]

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        return _bce(self._logits(params), examples)

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        shared = {name: params[name] for name in self.shared}
        return torch.stack([self._logits({**shared, "user": user}) for user in params["user"]])


@dataclass(frozen=True)
class PFedRec(GradientRecommender):
    """Zhang et al., "Dual Personalization on Federated Recommendation" (IJCAI 2023): a private score function, and an
    item view that the device fine-tunes for itself; here the fine-tuning is a private per-item offset."""

    name = "pfedrec"
    problem: Problem
    dim: int = 8

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        return {"item": TensorSpec((self.problem.n_items, self.dim), True, "normal", 0.3, learning_rate=10.0)}

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        shape = (self.problem.n_items, self.dim)
        return {
            "tuned": TensorSpec(shape, True, "zeros", common=True, learning_rate=5.0, weight_decay=0.01),
            "score": TensorSpec((self.dim, 1), init="uniform", scale=0.3, learning_rate=1.0),
            "bias": TensorSpec((), learning_rate=1.0),
        }

    @property
    def local(self) -> LocalTraining:
        return LocalTraining(epochs=1, batch_size=256)

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        return _bce(((params["item"] + params["tuned"]) @ params["score"]).squeeze(1) + params["bias"], examples)

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        view = params["item"] + params["tuned"]
        return torch.bmm(view, params["score"]).squeeze(2) + params["bias"].unsqueeze(1)


@dataclass(frozen=True)
class GPFedRec(GradientRecommender):
    """Zhang et al., "GPFedRec" (KDD 2024): the server keeps every device's item view, builds a graph of similar
    users, and sends each device its neighbourhood's mean view. The score function is private."""

    name = "gpfedrec"
    needs_user_updates: ClassVar[bool] = True
    problem: Problem
    dim: int = 8
    neighbours: int = 4

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        return {"item": TensorSpec((self.problem.n_items, self.dim), True, "normal", 0.3, learning_rate=30.0)}

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        return {"score": TensorSpec((self.dim,), init="uniform", scale=0.3, learning_rate=3.0)}

    @property
    def local(self) -> LocalTraining:
        return LocalTraining(epochs=1)

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        return _bce(params["item"] @ params["score"], examples)

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return dot(params["item"], params["score"])

    def _view(self, shared: Tensors, memory: Tensors) -> Tensor:
        return memory.get("view", shared["item"].expand(self.problem.n_users, *shared["item"].shape))

    def aggregate_users(
        self, shared: Tensors, memory: Tensors, users: np.ndarray[Any, Any], updates: Tensors, round_index: int
    ) -> tuple[Tensors, Tensors]:
        own = self._view(shared, memory).clone()
        own[torch.from_numpy(users)] += updates["item"]
        flat = F.normalize((own - own.mean(0)).flatten(1), dim=1)
        near = torch.topk(flat @ flat.T, self.neighbours, dim=1).indices
        return {"item": own.mean(0)}, {"view": own[near].mean(1)}

    def personal_views(self, shared: Tensors, memory: Tensors, users: np.ndarray[Any, Any]) -> Tensors:
        return {"item": self._view(shared, memory)[torch.from_numpy(users)]}


@dataclass(frozen=True)
class FedALS(StatisticsRecommender):
    """iALS (Hu, Koren, Volinsky 2008) with exact per-item statistics: a device solves its own p_u from the item view,
    and uploads α·p pᵀ and (1 + α)·p for its items and the shared p pᵀ for all; the server solves the item view."""

    name = "fedals"
    problem: Problem
    dim: int = 4
    alpha: float = 4.0
    ridge: float = 0.5

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        return {"item": TensorSpec((self.problem.n_items, self.dim), True, "normal", 0.1)}

    @property
    def statistics(self) -> Mapping[str, TensorSpec]:
        n, d = self.problem.n_items, self.dim
        return {"gram": TensorSpec((d, d), symmetric=True), "own": TensorSpec((n, d, d)), "target": TensorSpec((n, d))}

    def _users(self, item: Tensor, history: UserItems) -> Tensor:
        eye, gram = torch.eye(self.dim), item.T @ item
        rows = [item[torch.from_numpy(history.row(u).astype(np.int64))] for u in range(history.n_users)]
        left = torch.stack([gram + self.alpha * q.T @ q + self.ridge * eye for q in rows])
        right = torch.stack([(1 + self.alpha) * q.sum(0) for q in rows])
        return torch.linalg.solve(left, right)

    def contribute(self, shared: Tensors, history: UserItems, round_index: int) -> Tensors:
        p = self._users(shared["item"], history)
        x = torch.zeros(history.n_users, self.problem.n_items)
        x[torch.from_numpy(history.users), torch.from_numpy(history.items.astype(np.int64))] = 1.0
        own = self.alpha * torch.einsum("ui,ud,ue->ide", x, p, p)
        return {"gram": p.T @ p, "own": own, "target": (1 + self.alpha) * x.T @ p}

    def solve(self, shared: Tensors, collected: Collected) -> Tensors:
        sums = collected.sums
        left = sums["gram"] + sums["own"] + self.ridge * torch.eye(self.dim)
        return {"item": torch.linalg.solve(left, sums["target"])}

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return dot(params["item"], self._users(params["item"], history))


@dataclass(frozen=True)
class Content(GradientRecommender):
    """A content model: the item view is a shared projection of public item features; there is no per-item tensor at
    all."""

    name = "content"
    problem: Problem
    dim: int = 6

    @property
    def _features(self) -> Tensor:
        assert self.problem.item_features is not None
        return self.problem.item_features

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        shape = (self._features.shape[1], self.dim)
        return {"projection": TensorSpec(shape, init="normal", scale=0.3, learning_rate=2.0, weight_decay=0.001)}

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        return {"user": TensorSpec((self.dim,), init="normal", scale=0.3, learning_rate=2.0)}

    @property
    def local(self) -> LocalTraining:
        return LocalTraining(epochs=2)

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        return _bce(self._features[examples.items] @ params["projection"] @ params["user"], examples)

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return dot(self._features @ params["projection"], params["user"])


def _space(folder: Path, name: str, n_nodes: int = 1, **settings: Any) -> Workspace:
    return small.workspace(folder, {"_target_": f"{HERE}.{name}"}, n_nodes=n_nodes, **settings)


def _round(space: Workspace, number: int, shared: Tensors, memory: Tensors, evaluate: bool = False) -> list[NodeResult]:
    replies = []
    for node in range(space.settings.n_nodes):
        users = np.asarray(space.users_of(node), dtype=np.int64)
        views = PersonalViews(users, space.algorithm.personal_views(shared, memory, users))
        replies.append(run_task(space, node, number, shared, users, users if evaluate else NOBODY, views))
    return replies


def _losses(replies: list[NodeResult]) -> list[float]:
    return [r.update.loss / r.update.devices for r in replies]


def _features() -> np.ndarray[Any, np.dtype[np.float32]]:
    split = small.small_split()
    return np.random.default_rng(5).normal(size=(split.n_items, 5)).astype(np.float32)


@pytest.mark.parametrize("name", ["FedNCF", "PFedRec", "Content"])
def test_a_gradient_method_of_another_shape_learns_through_the_same_rooms(tmp_path: Path, name: str) -> None:
    space = _space(tmp_path, name, item_features=_features())
    first = space.algorithm.initial_shared()
    shared, replies = small.train(space, 6)
    losses = _losses(replies)
    assert losses[-1] < 0.97 * losses[0]
    for tensor in first:
        assert shared[tensor].shape == first[tensor].shape
        assert not torch.equal(shared[tensor], first[tensor])
    users = small.everybody(space)
    reply = run_task(space, 0, 7, shared, NOBODY, users)
    assert reply.evaluation is not None
    assert reply.evaluation.users[0, 0] == space.split.n_users


@pytest.mark.parametrize("name", ["FedNCF", "PFedRec", "Content"])
def test_dense_shared_tensors_and_private_views_give_the_same_on_any_number_of_nodes(tmp_path: Path, name: str) -> None:
    runs = [
        small.train(_space(tmp_path / str(n), name, n, item_features=_features(), chunk_rows=100 * n), 2)[0]
        for n in (1, 5)
    ]
    for run in runs[1:]:
        for tensor in run:
            assert small.apart(run[tensor], runs[0][tensor]) < 1e-5


def test_a_dense_tensors_update_is_the_devices_own_change_with_its_weight_decay(tmp_path: Path) -> None:
    """One device, two steps of SGD with decay on the projection, against torch.optim.SGD."""
    space = _space(tmp_path, "Content", item_features=_features())
    assert isinstance(space.algorithm, Content)
    shared = space.algorithm.initial_shared()
    user = np.array([2])
    spec = space.algorithm.private["user"]
    reply = run_task(space, 0, 1, shared, user, NOBODY).update
    local = space.algorithm.local
    chunk = next(iter(chunks(draw_examples(space.split, user, local, 3, 1), local, 1000)))
    batch, _ = chunk.batch(0, 0, 0, torch.device("cpu"))
    one = Examples(batch.items[0], batch.label[0], batch.weight[0])
    key = random.streams(random.stream(3, "init:user"), user)
    params = {"projection": shared["projection"].clone(), "user": spec.initial_many(key)[0]}
    for value in params.values():
        value.requires_grad_(True)
    groups = [
        {"params": [params["projection"]], "lr": 2.0, "weight_decay": 0.001},
        {"params": [params["user"]], "lr": 2.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=2.0)
    for _ in range(2):
        optimizer.zero_grad()
        space.algorithm.loss(params, one).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    change = (params["projection"] - shared["projection"]).detach()
    decay = reply.decay["projection"] * shared["projection"]
    assert small.apart(reply.sums["projection"] + decay, change) < 1e-5


def test_gpfedrec_gets_every_devices_update_and_gives_every_device_its_own_view(tmp_path: Path) -> None:
    space = _space(tmp_path, "GPFedRec", n_nodes=2)
    shared, memory = space.algorithm.initial_shared(), {}
    losses = []
    for number in range(1, 9):
        replies = _round(space, number, shared, memory)
        losses.append(np.mean(_losses(replies)))
        users = np.concatenate([r.update.users for r in replies])
        updates = {"item": torch.stack([u for r in replies for u in r.update.user_updates["item"]])}
        total = sum(r.update.sums["item"] for r in replies)
        assert small.apart(updates["item"].sum(0), total) < 1e-5
        shared, memory = space.algorithm.aggregate_users(shared, memory, users, updates, number - 1)
    assert losses[-1] < 0.9 * losses[0]
    assert float(memory["view"].std(0).max()) > 1e-2


def test_a_device_starts_from_its_personal_view_and_is_scored_on_it(tmp_path: Path) -> None:
    """Zero views give logits of zero: every device's loss is log 2, and its scores tie (ranked last)."""
    space = _space(tmp_path, "GPFedRec")
    users, shared = small.everybody(space), space.algorithm.initial_shared()
    views = PersonalViews(users, {"item": torch.zeros(users.size, *shared["item"].shape)})
    reply = run_task(space, 0, 1, shared, users, users, views)
    assert reply.update.loss / users.size == pytest.approx(np.log(2.0), rel=1e-6)
    assert reply.evaluation is not None
    assert reply.evaluation.metrics("test")["hr@10"] == 0.0
    again = run_task(space, 0, 1, shared, users, users)
    assert again.update.loss != reply.update.loss
    assert again.evaluation is not None
    assert again.evaluation.metrics("test")["hr@20"] > 0.0


def test_an_iterated_statistics_method_equals_its_central_form_on_any_number_of_nodes(tmp_path: Path) -> None:
    items = []
    for n_nodes in (1, 3):
        space = _space(tmp_path / str(n_nodes), "FedALS", n_nodes)
        algorithm = space.algorithm
        assert isinstance(algorithm, FedALS)
        shared = algorithm.initial_shared()
        for number in range(1, 5):
            replies = _round(space, number, shared, {})
            sums = {}
            for name, spec in algorithm.statistics.items():
                total = torch.from_numpy(np.sum([r.statistics[name] for r in replies], axis=0))
                if spec.symmetric:
                    full = torch.zeros(spec.shape)
                    full[tuple(torch.triu_indices(*spec.shape))] = total
                    total = full.triu() + full.triu(1).T
                sums[name] = total
            shared = algorithm.solve(shared, Collected(sums, sum(r.update.devices for r in replies), number - 1))
        items.append(shared["item"])
    assert small.apart(items[1], items[0]) < 1e-4
    assert small.apart(items[0], _central_ials(algorithm, algorithm.initial_shared()["item"], space.split.train)) < 1e-4


def _central_ials(algorithm: FedALS, item: Tensor, train: UserItems) -> Tensor:
    """Textbook iALS in float64 with dense confidence C = 1 + αX, one user and one item at a time."""
    x = np.zeros((train.n_users, algorithm.problem.n_items))
    x[train.users, train.items] = 1.0
    confidence, q, ridge = 1.0 + algorithm.alpha * x, item.double().numpy(), algorithm.ridge * np.eye(algorithm.dim)

    def solved(other: np.ndarray, c: np.ndarray, row: np.ndarray) -> np.ndarray:
        return np.linalg.solve((other.T * c) @ other + ridge, (other.T * c) @ row)

    for _ in range(4):
        p = np.stack([solved(q, c, row) for c, row in zip(confidence, x, strict=True)])
        q = np.stack([solved(p, c, column) for c, column in zip(confidence.T, x.T, strict=True)])
    return torch.from_numpy(q).float()


@dataclass(frozen=True)
class ItemBias(Content):
    """A per-item tensor of numbers rather than vectors, shared and private at once."""

    name = "itembias"

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        return {"level": TensorSpec((self.problem.n_items,), True, learning_rate=5.0, weight_decay=0.01)}

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        return {"own": TensorSpec((self.problem.n_items,), True, common=True, learning_rate=5.0)}

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        return _bce(params["level"] + params["own"], examples)

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return params["level"] + params["own"]


def test_a_per_item_tensor_may_hold_one_number_an_item(tmp_path: Path) -> None:
    space = _space(tmp_path, "ItemBias")
    shared, replies = small.train(space, 3)
    losses = _losses(replies)
    assert losses[2] < losses[1] < losses[0]
    assert shared["level"].shape == (space.split.n_items,)
