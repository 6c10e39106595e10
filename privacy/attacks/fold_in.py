"""Folding users in: fit what would be private on a fresh device to some items, with the released tensors frozen.

The classical fold-in of matrix factorisation (Sarwar et al., "Incremental SVD-based algorithms", ICCIT 2002), as an
attacker runs it who holds the released item view and a guess of somebody's history. Generic over the algorithms: the
gradients are the algorithm's own; methods that solve for statistics need no fitting at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrec import random
from fedrec.algorithms.base import Examples, GradientRecommender, LocalTraining, Recommender, Tensors
from fedrec.data.interactions import UserItems
from fedrec.data.negatives import sample_negatives
from fedrec.errors import ConfigError

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FoldIn:
    """How the private tensors are fitted: full-batch Adam (Kingma & Ba, ICLR 2015) for ``steps`` steps of
    ``learning_rate``, on the given items and ``negatives`` uniformly drawn ones for each of them.

    Not the devices' own SGD: its rates are tuned for rounds of one step, and the attacker need not imitate it.
    """

    steps: int = 40
    learning_rate: float = 0.2
    negatives: int = 4
    chunk_values: int = 4_000_000  # at most so many float32 values of one tensor at once

    def __post_init__(self) -> None:
        for name in ("steps", "negatives", "chunk_values"):
            if getattr(self, name) < 1:
                raise ConfigError(f"attack fold_in.{name}={getattr(self, name)}: write a whole number, 1 or more")
        if not 0.0 < self.learning_rate < math.inf:
            raise ConfigError(f"attack fold_in.learning_rate={self.learning_rate}: write a positive number")


def folded_scores(
    algorithm: Recommender,
    shared: Tensors,
    given: UserItems,
    exclude: UserItems,
    seed: int,
    settings: FoldIn,
    purpose: str = "fold-in",
) -> Iterator[tuple[Int64, npt.NDArray[np.float32]]]:
    """Scores of users who are folded in on ``given`` (oldest first), chunk by chunk.

    Args:
        shared: the released tensors, never changed.
        exclude: items (ascending per user, ``given`` among them) that are not drawn as negatives.
        seed, purpose: address initial values and negatives; a user's result does not depend on who else is scored.

    Yields:
        (positions int64[b] in ``given``, scores float32[b, n_items]).
    """
    frozen = {name: value.detach() for name, value in shared.items()}
    users = np.arange(given.n_users, dtype=np.int64)
    if not isinstance(algorithm, GradientRecommender):
        block = max(1, settings.chunk_values // algorithm.problem.n_items)
        for start in range(0, users.size, block):
            part = users[start : start + block]
            yield part, algorithm.score(frozen, given.take(part)).detach().cpu().numpy()
        return
    for part in _chunks(algorithm, given, settings):
        private = _fit(algorithm, frozen, given, exclude, part, random.stream(seed, purpose), settings)
        yield part, algorithm.score({**frozen, **private}, given.take(part)).detach().cpu().numpy()


def _chunks(algorithm: GradientRecommender, given: UserItems, settings: FoldIn) -> Iterator[Int64]:
    """Users of similar history lengths together, so that little is padded."""
    n_items = algorithm.problem.n_items
    specs = {**algorithm.shared, **algorithm.private}
    width = max((math.prod(s.shape[1:]) for s in specs.values() if s.per_item), default=1)
    own = max((math.prod(s.shape) for s in algorithm.private.values()), default=1)
    order = np.argsort(-given.counts, kind="stable")
    start = 0
    while start < order.size:
        rows = min(int(given.counts[order[start]]) * (1 + settings.negatives), n_items)
        # Compact rows while fitting, a score of every item and the whole private tensors afterwards.
        stop = start + max(1, settings.chunk_values // max(rows * width, n_items, own))
        yield order[start:stop]
        start = stop


def _fit(
    algorithm: GradientRecommender, shared: Tensors, given: UserItems, exclude: UserItems, users: Int64,
    key: np.uint64, settings: FoldIn,
) -> Tensors:  # fmt: skip
    """The private tensors of ``users``, each with a leading axis of users."""
    examples, items, valid = _examples(algorithm.local, given, exclude, users, algorithm.problem.n_items, key, settings)
    params: Tensors = {
        name: shared[name][items] if spec.per_item else shared[name].expand(users.size, *spec.shape).clone()
        for name, spec in algorithm.shared.items()
    }
    whole: Tensors = {}
    for name, spec in algorithm.private.items():
        start = (
            spec.initial(random.stream(algorithm.problem.seed, f"init:{name}")).expand(users.size, *spec.shape)
            if spec.common or spec.per_item
            else spec.initial_many(random.streams(random.child64(key, np.uint64(0)), users))
        )
        whole[name] = start.clone()
        params[name] = _rows(whole[name], items) if spec.per_item else start.clone()
    fitted = {name: params[name] for name in algorithm.private}
    first = {name: torch.zeros_like(value) for name, value in fitted.items()}
    second = {name: torch.zeros_like(value) for name, value in fitted.items()}
    for step in range(1, settings.steps + 1):
        _, gradients = algorithm.gradients(params, examples)
        for name, value in fitted.items():
            gradient = gradients[name] + algorithm.private[name].weight_decay * value
            first[name].lerp_(gradient, 0.1)
            second[name].lerp_(gradient.square(), 0.001)
            scale = (second[name] / (1.0 - 0.999**step)).sqrt_().add_(1e-12)
            value.sub_((first[name] / (1.0 - 0.9**step)).div_(scale), alpha=settings.learning_rate)
    owner, column = torch.nonzero(valid, as_tuple=True)
    for name, spec in algorithm.private.items():
        if spec.per_item:
            whole[name][owner, items[owner, column]] = params[name][owner, column]
        else:
            whole[name] = params[name]
    return whole


def _rows(values: Tensor, items: Tensor) -> Tensor:
    """Rows ``items`` [B, T] of every user's own table [B, n_items, …]."""
    return values[torch.arange(len(items)).unsqueeze(1), items].clone()


def _examples(
    local: LocalTraining, given: UserItems, exclude: UserItems, users: Int64, n_items: int, key: np.uint64,
    settings: FoldIn,
) -> tuple[Examples, Tensor, Tensor]:  # fmt: skip
    """One full batch of every user: the examples, the rows int64[B, T] and which of them are real, bool[B, T]."""
    positives = given.take(users)
    free = n_items - exclude.take(users).counts
    per = int(min(settings.negatives, max(1, free.min(initial=n_items))))
    keys = random.streams(key, users)
    negative = sample_negatives(exclude, users, positives.counts * per, n_items, keys, distinct=per)
    owner = np.concatenate([positives.users, np.repeat(positives.users, per)])
    item = np.concatenate([positives.items, negative]).astype(np.int64)
    cell, place, times = np.unique(owner * n_items + item, return_inverse=True, return_counts=True)
    user, row = np.divmod(cell, n_items)
    starts = np.searchsorted(user, np.arange(users.size + 1))
    column = np.arange(cell.size) - starts[user]
    shape = (users.size, max(int(np.diff(starts).max(initial=0)), 1))
    items = np.zeros(shape, dtype=np.int64)
    label, weight = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    valid = np.zeros(shape, dtype=bool)
    items[user, column], valid[user, column] = row, True
    total = np.maximum(positives.counts * (1 + per), 1)
    weight[user, column] = times / total[user]
    label[positives.users, column[place[: positives.items.size]]] = 1.0
    pairs = _pairs(positives, column[place], per) if local.pairwise else {}
    examples = Examples(torch.from_numpy(items), torch.from_numpy(label), torch.from_numpy(weight), **pairs)
    return examples, torch.from_numpy(items), torch.from_numpy(valid)


def _pairs(positives: UserItems, column: Int64, per: int) -> dict[str, Any]:
    """Every positive with each of its negatives: (positive row, negative row, weight), [B, E] each."""
    longest = max(int(positives.counts.max(initial=0)) * per, 1)
    first = np.zeros((positives.n_users, longest), dtype=np.int64)
    second, weight = np.zeros_like(first), np.zeros(first.shape, dtype=np.float32)
    user = np.repeat(positives.users, per)
    at = np.arange(user.size) - positives.indptr[user] * per
    first[user, at] = np.repeat(column[: positives.items.size], per)
    second[user, at] = column[positives.items.size :]
    weight[user, at] = 1.0 / (positives.counts[user] * per)
    return {
        "positive": torch.from_numpy(first), "negative": torch.from_numpy(second),
        "pair_weight": torch.from_numpy(weight),
    }  # fmt: skip
