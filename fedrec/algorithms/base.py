"""What a federated recommender is: the seam between an algorithm's file and the rooms that run it.

An algorithm names its tensors, says how one device learns (or what it counts), how the server finishes a round, and how
items are scored. Nothing in ``clients/`` or ``server/`` names an algorithm. Two families share the seam:

* :class:`GradientRecommender`: a device takes local SGD steps on a loss; the server sums the updates. Write ``loss``
  for *one* device, as the paper does; the clients' room trains a whole cohort of devices as one tensor program by
  ``vmap``. An analytic, batched ``gradients`` may replace it for speed (a test holds it to ``loss``).
* :class:`StatisticsRecommender`: a device uploads statistics of its history; the server sums and solves.

How other published methods fit, without touching another room:

* **FedNCF** (Perifanis & Efraimidis 2022): ``shared = {"item": per item, "mlp.0": dense, "mlp.1": dense, …}``,
  ``private = {"user": vector}``; dense shared tensors arrive in ``loss`` as the device's own copies and are averaged.
* **PFedRec** (Zhang et al. 2023): ``shared = {"item": per item}``, ``private = {"score": [d, 1], "bias": []}``; its
  dual personalisation fine-tunes the downloaded item view before scoring, which is a per-item *private* tensor.
* **GPFedRec** (Zhang et al. 2024): ``needs_user_updates = True``; ``aggregate_users`` receives every device's update,
  keeps each user's item view in the server's memory, builds the user graph, and ``personal_views`` sends every device
  its own neighbours' view, which replaces the shared tensor of that name on that device.
* **Graph models** (LightGCN-style): propagation over a device's own star graph happens inside ``loss`` (positives are
  ``examples.label > 0``); propagation over a server-side item graph happens in ``finish_round``.
* **Content models**: ``problem.item_features`` is public catalogue data, ``float32[n_items, n_features]``; ``loss``
  indexes it with ``examples.items``.
* **iALS-like methods**: a :class:`StatisticsRecommender` of several rounds whose ``contribute`` reads the shared
  tensors.

``tests/algorithms/test_seam.py`` holds FedNCF, PFedRec and GPFedRec written against this file alone, and runs them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor

from fedrec import random
from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """What everybody may know before training: sizes, public item features, the seed of the initial values, the
    budget."""

    n_users: int
    n_items: int
    seed: int
    item_features: Tensor | None = None
    #: The planned privacy budget as the μ of one Gaussian release of sensitivity 1; infinite without privacy.
    privacy_mu: float = math.inf


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of an algorithm.

    ``shape`` excludes any user axis; ``per_item`` says that its first axis is the catalogue, so that a device needs
    only the rows it touches. Initial values: ``init`` is ``normal`` (standard deviation ``scale``), ``uniform``
    (±``scale``) or ``zeros``; a private tensor starts equal on all devices when ``common`` (always so when it is per
    item). The learning rate of local step ``s`` of round ``r`` (both from 0) is ``learning_rate · round_decay^r ·
    step_decay^s``; weight decay acts on all rows, touched or not, as SGD's does. ``symmetric`` statistics travel as
    their upper triangle.
    """

    shape: tuple[int, ...]
    per_item: bool = False
    init: Literal["normal", "uniform", "zeros"] = "zeros"
    scale: float = 1.0
    common: bool = False
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    round_decay: float = 1.0
    step_decay: float = 1.0
    symmetric: bool = False
    # The initial tensor itself (pre-trained, or another program's draw); equal on all devices.
    value: Tensor | None = dataclasses.field(default=None, compare=False)

    def rate(self, round_index: int, step: int) -> float:
        """The learning rate of local step ``step`` (from 0) in round ``round_index`` (from 0)."""
        return self.learning_rate * self.round_decay**round_index * self.step_decay**step

    def initial(self, key: np.uint64) -> Tensor:
        """The initial tensor addressed by ``key``, float32 of ``shape``."""
        return self.initial_many(np.asarray([key], dtype=np.uint64))[0]

    def initial_many(self, keys: np.ndarray[Any, np.dtype[np.uint64]]) -> Tensor:
        """One initial tensor per key, float32[len(keys), *shape]."""
        size = int(np.prod(self.shape))
        if self.value is not None:
            return self.value.expand(len(keys), *self.shape).clone()
        if self.init == "zeros":
            return torch.zeros((len(keys), *self.shape))
        if self.init == "normal":
            values = random.normal(keys, size) * self.scale
        else:
            values = (2.0 * random.uniform(keys, size) - 1.0) * self.scale
        return torch.from_numpy(values.astype(np.float32)).reshape(len(keys), *self.shape)


@dataclass(frozen=True)
class Examples:
    """One mini-batch of a device (in ``gradients``: of B devices, every field with a leading axis B).

    Rows are the T distinct items that the device touches in this round; per-item tensors arrive compacted to them.
    ``weight`` is a row's share of the batch (multiplicity divided by the number of examples; 0 for padding), so sums
    with it are the batch means of the papers. Pairwise algorithms read ``positive`` and ``negative`` (positions among
    the T rows) and ``pair_weight`` of the E pairs.
    """

    items: Tensor  # int64[T]: catalogue numbers of the rows
    label: Tensor  # float32[T]: 1 for a positive, 0 for a negative; −1 for one to be forgotten (unlearning only)
    weight: Tensor  # float32[T]
    positive: Tensor | None = None  # int64[E]
    negative: Tensor | None = None  # int64[E]
    pair_weight: Tensor | None = None  # float32[E]
    round_index: int = 0  # from 0; curricula read it


@dataclass(frozen=True)
class LocalTraining:
    """How a device visits its examples in one round."""

    epochs: int = 1
    batch_size: int = 2048
    negatives: int = 4  # per positive, redrawn each round, distinct within their positive
    tolerance: float = 0.0  # stop a device when its epoch loss changes relatively less than this; 0 never
    max_positives: int = 0  # at most so many positives a device and round, drawn anew each round; 0 takes all
    pairwise: bool = False


def require_at_least(algorithm: Recommender, least: int, *names: str) -> None:
    """ConfigError unless every one of these settings is ``least`` or more."""
    for name in names:
        if not getattr(algorithm, name) >= least:
            raise ConfigError(f"algorithm.{name}={getattr(algorithm, name)!r}: write a number, {least} or more")


class Recommender(ABC):
    """What both families share. Implementations are frozen dataclasses with a ``problem`` field."""

    name: ClassVar[str]
    #: The server needs every device's own update, not only the sum; excludes secure aggregation.
    needs_user_updates: ClassVar[bool] = False
    problem: Problem

    @property
    @abstractmethod
    def shared(self) -> Mapping[str, TensorSpec]:
        """The tensors that the server owns and devices download."""

    @property
    def private(self) -> Mapping[str, TensorSpec]:
        """The tensors that never leave a device."""
        return {}

    @property
    def max_rounds(self) -> int | None:
        """The number of rounds after which another one changes nothing (1 for one-shot methods)."""
        return None

    @abstractmethod
    def score(self, params: Tensors, history: UserItems) -> Tensor:
        """float32[B, n_items] for B devices. Shared tensors come as they are, private ones with a leading axis B."""

    def initial_shared(self) -> Tensors:
        """The server's tensors before round 1."""
        seed = self.problem.seed
        return {name: spec.initial(random.stream(seed, f"init:{name}")) for name, spec in self.shared.items()}

    def finish_round(self, shared: Tensors, round_index: int) -> Tensors:
        """The server's own step after aggregation (a proximal step, a graph); default: nothing."""
        return shared

    def aggregate_users(
        self, shared: Tensors, memory: Tensors, users: np.ndarray[Any, Any], updates: Tensors, round_index: int
    ) -> tuple[Tensors, Tensors]:
        """Server step of methods with ``needs_user_updates``: ``updates[name]`` is float32[len(users), *shape].

        Returns the new shared tensors and the server's memory.
        """
        raise NotImplementedError(f"{self.name} sets needs_user_updates but does not define aggregate_users")

    def personal_views(self, shared: Tensors, memory: Tensors, users: np.ndarray[Any, Any]) -> Tensors:
        """Shared tensors that differ per device: name → float32[len(users), *shape]; default: none."""
        return {}

    @classmethod
    def from_config(cls, options: Mapping[str, Any], problem: Problem) -> Self:
        """An instance from the keys of its configuration file; unknown keys and bad values are ConfigErrors."""
        known = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.name != "problem"}
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean algorithm.{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
                raise ConfigError(f"algorithm.{key}: {cls.name} has no such setting; {hint}")
        make: Any = cls  # a dataclass, whose fields the type of this base class does not know
        made: Self = make(problem=problem, **options)
        return made


class GradientRecommender(Recommender):
    """A method in which devices take local SGD steps."""

    @property
    @abstractmethod
    def local(self) -> LocalTraining:
        """How a device visits its examples."""

    @abstractmethod
    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        """The loss of ONE device on one mini-batch, a scalar (paper's equation in the docstring).

        ``params`` holds the device's own copies: per-item tensors as [T, …] rows, all others in their shape.
        """

    def gradients(self, params: Tensors, examples: Examples) -> tuple[Tensor, Tensors]:
        """Losses float32[B] and gradients of B devices at once, by default ``vmap`` of the gradient of ``loss``."""
        flat = {f.name: getattr(examples, f.name) for f in dataclasses.fields(examples)}
        batched: dict[str, Any] = {k: v for k, v in flat.items() if isinstance(v, Tensor)}
        fixed: dict[str, Any] = {k: v for k, v in flat.items() if not isinstance(v, Tensor)}

        def one(device: Tensors, batch: dict[str, Any]) -> Tensor:
            return self.loss(device, Examples(**batch, **fixed))

        grads, losses = torch.func.vmap(torch.func.grad_and_value(one))(params, batched)
        return losses, grads

    def dot_product(self, round_index: int) -> DotProduct | None:
        """This method as a member of the dot-product family, if it is one: then a fused kernel may train it."""
        return None


@dataclass(frozen=True)
class DotProduct:
    """score = ⟨user, item (+ personal)⟩ (+ bias), trained by pointwise BCE or BPR: what the fused kernel needs to know.

    Fields name tensors of the algorithm. ``repel`` is FedRAP's λ on −MSE(personal, item), ``l1`` its μ on mean|item|
    (as a subgradient). Everything else (rates, decays) is read from the tensors' specs.
    """

    user: str
    item: str
    personal: str | None = None
    bias: str | None = None
    repel: float = 0.0
    l1: float = 0.0


@dataclass(frozen=True)
class Collected:
    """What the server has of a round: the sums of the statistics, of how many devices, in which round (from 0).

    ``noise`` is the standard deviation that a privacy mechanism added to every coordinate, 0 without one; a symmetric
    statistic got a symmetric noise of which that is the deviation on the diagonal, and 1/√2 of it elsewhere.
    """

    sums: Tensors
    devices: int
    round_index: int = 0
    noise: float = 0.0


class StatisticsRecommender(Recommender):
    """A method in which devices upload sums over their history and the server solves."""

    #: Bound on the L2 norm of what one device uploads in a round, all statistics together (a symmetric one counted as
    #: the whole matrix). None: there is no bound, and no guarantee can be given.
    sensitivity: ClassVar[float | None] = None

    @property
    @abstractmethod
    def statistics(self) -> Mapping[str, TensorSpec]:
        """What one device uploads, over all rounds."""

    def statistics_in(self, round_index: int) -> Mapping[str, TensorSpec]:
        """What one device uploads in a round; default: everything."""
        return self.statistics

    @property
    def budget_shares(self) -> tuple[float, ...]:
        """How a privacy budget (in μ² of Gaussian noise) is shared out among the rounds; sums to 1."""
        rounds = self.max_rounds or 1
        return (1.0 / rounds,) * rounds

    @abstractmethod
    def contribute(self, shared: Tensors, history: UserItems, round_index: int) -> Tensors:
        """The *sum* of the statistics of the devices whose histories (oldest first) are given."""

    @abstractmethod
    def solve(self, shared: Tensors, collected: Collected) -> Tensors:
        """The server's new shared tensors."""


def dot(items: Tensor, users: Tensor) -> Tensor:
    """⟨user, item⟩ for all pairs: float32[B, n] from ``users`` [B, d] and ``items`` [n, d] shared or [B, n, d] own."""
    if items.ndim == 2:
        return users @ items.T
    return torch.bmm(items, users.unsqueeze(2)).squeeze(2)
