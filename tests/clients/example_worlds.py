"""Small worlds for the tests of example-level DP-SGD, Opacus on one device as their oracle, and a whole round."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy.stats import chi2
from torch import Tensor, nn
from torch.nn import functional as F

from clients.example_batches import ExampleBatches, draw_batches
from clients.example_dp import train_example_dp
from clients.example_kernel import run_kernel
from clients.example_steps import DPSGD, Outcome, run_steps, schedule
from clients.store import DeviceStore
from clients.update import CohortUpdate
from fedrec.algorithms.base import (
    DotProduct,
    Examples,
    GradientRecommender,
    LocalTraining,
    Problem,
    Tensors,
    TensorSpec,
    dot,
)
from fedrec.algorithms.fedmf import FedMF
from fedrec.data.interactions import UserItems
from tests.algorithms import test_seam

SEED = 5
FUSED = pytest.mark.parametrize("fused", ["on", "off"])


@dataclass(frozen=True)
class BiasedMF(FedMF):
    """FedMF with a private bias: a member of the dot-product family of another shape, its gradients by vmap."""

    name = "biased_mf"

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        return {**super().private, "bias": TensorSpec((), learning_rate=0.7, weight_decay=0.05)}

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        logits = params["item"] @ params["user"] + params["bias"]
        return (F.binary_cross_entropy_with_logits(logits, examples.label, reduction="none") * examples.weight).sum()

    def gradients(self, params: Tensors, examples: Examples) -> tuple[Tensor, Tensors]:
        return GradientRecommender.gradients(self, params, examples)

    def dot_product(self, round_index: int) -> DotProduct:
        return DotProduct(user="user", item="item", bias="bias")

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return dot(params["item"], params["user"]) + params["bias"].unsqueeze(1)


@dataclass(frozen=True)
class FedNCF(test_seam.FedNCF):
    """Dense shared tensors, weight decay on all; one local pass, as example-level privacy wants it."""

    decay: float = 0.03

    @property
    def shared(self) -> Mapping[str, TensorSpec]:
        return {n: dataclasses.replace(spec, weight_decay=self.decay) for n, spec in super().shared.items()}

    @property
    def local(self) -> LocalTraining:
        return LocalTraining(negatives=2)


# -- the oracle: one device, Opacus hooks mode, dense tables in float64 ------------------------------------------------


class _Model(nn.Module):
    """The three methods as Opacus' users write them."""

    def __init__(self, tables: Tensors) -> None:
        super().__init__()
        n_items, width = tables["item"].shape
        self.item, self.user = nn.Embedding(n_items, width), nn.Embedding(1, width)
        if "bias" in tables:
            self.bias = nn.Embedding(1, 1)
        if "mlp.0" in tables:
            self.first = nn.Linear(*tables["mlp.0"].shape)
            self.second = nn.Linear(tables["mlp.1"].numel(), 1, bias=False)
        self.double()
        with torch.no_grad():
            for name, parameter in self.named().items():
                parameter.copy_(_stored(name, tables[name]))

    def named(self) -> dict[str, nn.Parameter]:
        out = {"item": self.item.weight, "user": self.user.weight}
        if hasattr(self, "bias"):
            out["bias"] = self.bias.weight
        if hasattr(self, "first"):
            out |= {"mlp.0": self.first.weight, "mlp.0.bias": self.first.bias, "mlp.1": self.second.weight}
        return out

    def forward(self, items: Tensor) -> Tensor:
        zero = torch.zeros_like(items)
        item, user = self.item(items), self.user(zero)
        if hasattr(self, "first"):
            out: Tensor = self.second(torch.relu(self.first(torch.cat([user, item], 2)))).squeeze(2)
            return out
        logits: Tensor = (item * user).sum(2)
        return logits + self.bias(zero).squeeze(2) if hasattr(self, "bias") else logits


def _stored(name: str, value: Tensor) -> Tensor:
    """A tensor of the seam in the shape of torch's layer (its own inverse but for the leading axis)."""
    return value.T if name == "mlp.0" else value.reshape(1, -1) if name in ("user", "bias", "mlp.1") else value


def opacus_device(
    algorithm: GradientRecommender,
    tables: Tensors,
    batches: Sequence[Tensor],
    sgd: DPSGD,
    generator: torch.Generator | None = None,
) -> Tensors:
    """All tables of one device after DP-SGD by Opacus (GradSampleModule hooks, DPOptimizer) on its batches."""
    model = _Model({name: value.double() for name, value in tables.items()})
    hooked = GradSampleModule(model, batch_first=True, loss_reduction="sum")
    specs, named = {**algorithm.shared, **algorithm.private}, model.named()
    groups = [{"params": [named[n]], "lr": 1.0, "weight_decay": specs[n].weight_decay, "name": n} for n in named]
    optimizer = DPOptimizer(
        torch.optim.SGD(groups, lr=1.0), noise_multiplier=sgd.noise_multiplier,
        max_grad_norm=min(sgd.max_grad_norm, 1e9),  # of infinity, Opacus makes noise that is not a number
        expected_batch_size=sgd.expected_batch, loss_reduction="mean", generator=generator,
    )  # fmt: skip
    for step, items in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = specs[group["name"]].rate(0, step)
        optimizer.zero_grad()
        logits = hooked(items)
        if algorithm.local.pairwise:
            losses = F.softplus(logits[:, 1:] - logits[:, :1]).mean(1)
        else:
            label = torch.zeros_like(logits)
            label[:, 0] = 1.0
            losses = F.binary_cross_entropy_with_logits(logits, label, reduction="none").mean(1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # integers have no gradient
            losses.sum().backward()
        optimizer.step()
    found = {name: _stored(name, p.detach()) if name == "mlp.0" else p.detach() for name, p in named.items()}
    return {name: value.reshape(specs[name].shape) for name, value in found.items()}


def batches_of(batches: ExampleBatches, device: int) -> list[Tensor]:
    at = batches.example_ptr[device * batches.steps : (device + 1) * batches.steps + 1]
    return [torch.from_numpy(batches.items[a:b].astype(np.int64)) for a, b in itertools.pairwise(at)]


# -- worlds ------------------------------------------------------------------------------------------------------------

KINDS = ["bce", "bpr", "bias", "fedncf"]


def method(kind: str, n_users: int, n_items: int, negatives: int, width: int, decay: float) -> GradientRecommender:
    problem = Problem(n_users, n_items, SEED)
    if kind == "fedncf":
        return FedNCF(problem, dim=width, hidden=3, decay=decay / 2)
    rates: dict[str, Any] = {
        "dim": width, "negatives": negatives, "user_scale": 1.0, "item_scale": 1.0, "user_learning_rate": 0.8,
        "item_learning_rate": 1.5, "item_weight_decay": decay, "user_weight_decay": decay / 2, "step_decay": 0.9,
    }  # fmt: skip
    if kind == "bias":
        return BiasedMF(problem, **rates)
    return FedMF(problem, objective=kind, **rates)  # type: ignore[arg-type]


def train_items(n_users: int, n_items: int, seed: int, most: int = 6) -> UserItems:
    """0 to ``most`` different items a user."""
    draw = np.random.default_rng(seed)
    rows = [draw.permutation(n_items)[: draw.integers(0, most + 1)] for _ in range(n_users)]
    return UserItems.from_pairs(np.repeat(np.arange(n_users), [r.size for r in rows]), np.concatenate(rows), n_users)


def draw(train: UserItems, algorithm: GradientRecommender, sgd: DPSGD, round_number: int = 1) -> ExampleBatches:
    return draw_batches(
        train, np.arange(train.n_users), n_items=algorithm.problem.n_items, negatives=algorithm.local.negatives,
        seed=SEED, round_number=round_number, sample_rate=sgd.sample_rate, steps=sgd.steps,
    )  # fmt: skip


def start(algorithm: GradientRecommender, n_users: int) -> tuple[Tensors, Tensors]:
    """Shared tensors and B devices' private ones, float32."""
    keys = np.arange(1, n_users + 1, dtype=np.uint64)
    return algorithm.initial_shared(), {n: spec.initial_many(keys) for n, spec in algorithm.private.items()}


def run_program(
    fused: str,
    algorithm: GradientRecommender,
    shared: Tensors,
    private: Tensors,
    batches: ExampleBatches,
    sgd: DPSGD,
    generator: np.random.Generator | None = None,
) -> Outcome:
    """Either program, both in float64."""
    schedules = {n: schedule(spec, 0, sgd) for n, spec in {**algorithm.shared, **algorithm.private}.items()}
    noise = generator or np.random.default_rng(0)
    if fused == "on":
        form = algorithm.dot_product(0)
        assert form is not None
        return run_kernel(algorithm, form, shared, private, batches, schedules, sgd, noise)
    double = [{n: v.double() for n, v in tensors.items()} for tensors in (shared, private)]
    return run_steps(algorithm, double[0], double[1], batches, schedules, sgd, 0, noise)


def device_change(
    algorithm: GradientRecommender, outcome: Outcome, batches: ExampleBatches, b: int, n_items: int
) -> Tensors:
    """w − P·w_0 of the per-item tensors of one device, [n_items, width]."""
    mine = slice(int(batches.row_ptr[b]), int(batches.row_ptr[b + 1]))
    out = {}
    for name, rows in outcome.rows.items():
        out[name] = torch.zeros(n_items, rows.shape[1], dtype=torch.float64)
        out[name][torch.from_numpy(batches.rows[mine].astype(np.int64))] = rows[mine].double()
    return out


NUMBERS: dict[str, Any] = {
    "sample_rate": 0.5, "steps": 3, "expected_batch": 2.0, "noise_multiplier": 0.0, "max_grad_norm": 0.4,
    "noise_seed": 11,
}  # fmt: skip


def whole_round(
    folder: Path, algorithm: GradientRecommender, train: UserItems, *, nodes: int = 1, rounds: int = 1, **options: Any
) -> tuple[list[CohortUpdate], Tensors, Tensors]:
    """``rounds`` rounds of all users: the nodes' updates of the last one, shared tensors before it, private after."""
    shared, own, updates = algorithm.initial_shared(), [], []
    blocks = np.array_split(np.arange(train.n_users, dtype=np.int64), nodes)
    for number in range(1, rounds + 1):
        if updates:
            devices = sum(u.devices for u in updates)
            for name, value in shared.items():
                change = sum(u.sums[name] + u.decay[name] * value for u in updates) / devices
                shared = {**shared, name: value + change}
        updates, own = [], []
        for node, users in enumerate(blocks):
            store = DeviceStore(folder / str(node), algorithm.private, range(users[0], users[-1] + 1), SEED)
            store.begin(number)
            updates.append(
                train_example_dp(
                    algorithm, shared, store, train, users, n_items=algorithm.problem.n_items, seed=SEED,
                    round_number=number, **{**NUMBERS, **options},
                )
            )  # fmt: skip
            own.append(store.vectors(users))
    return updates, shared, {name: torch.cat([o[name] for o in own]) for name in algorithm.private}


def noise_only(steps: int = 4) -> tuple[FedMF, dict[str, Any]]:
    """Noise of deviation 1 on the gradient, beside which gradients (at most 1e-6 in all) vanish."""
    algorithm = FedMF(
        Problem(6, 150, SEED), dim=16, negatives=2, user_learning_rate=0.5, item_learning_rate=0.8, step_decay=0.8,
        item_weight_decay=0.3, user_weight_decay=0.2,
    )  # fmt: skip
    return algorithm, {
        "sample_rate": 0.5, "steps": steps, "expected_batch": 4.0, "noise_multiplier": 4e7, "max_grad_norm": 1e-7,
    }  # fmt: skip


def variance_after(spec: TensorSpec, steps: int) -> float:
    """Of one coordinate after ``steps`` of w ← (1 − ηλ)w − η z, step by step: no closed form here."""
    variance = 0.0
    for step in range(steps):
        rate = spec.rate(0, step)
        variance = variance * (1 - rate * spec.weight_decay) ** 2 + rate**2
    return variance


def chi_square(values: Tensor, variance: float) -> None:
    n = values.numel()
    statistic = float(values.double().square().sum()) / variance
    assert n > 200
    assert chi2.ppf(1e-5, n) < statistic < chi2.ppf(1 - 1e-5, n), f"variance {statistic / n:.3f} of what it must be"
