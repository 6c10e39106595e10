"""Cross-silo training: a node is one data holder that runs DP-SGD on the interactions of all of its users together.

A silo downloads the item table, takes ``steps`` local steps of DP-SGD on it and on its own table of user vectors, and
uploads the difference, every row noised. Neighbouring data sets differ in ONE interaction; this is not privacy of a
user, nor of a silo. An example is one interaction with k negatives (``clients.silo_batches``). ``privacy.optimizer``
chooses lazy noise (``privacy.lazy``) or Opacus (``privacy.eager``).

``loss`` and ``squared_norm`` of the update are the simulation's own instruments, which no epsilon covers.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from clients.example_dp import check_example_dp
from clients.per_example import per_example_gradients
from clients.silo_batches import draw_silo_batches, examples_of
from clients.store import DeviceStore
from clients.update import CohortUpdate, start_update
from fedrec.algorithms.base import GradientRecommender, Recommender, Tensors
from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError
from privacy.dpsgd import DPSGD, NonFiniteGradient
from privacy.lazy import LazyNoiseSGD
from privacy.settings import check_optimizer

Int64 = npt.NDArray[np.int64]
_LIMIT = 2**31  # bytes of per-example gradients of one batch


def check_silo(
    algorithm: Recommender, *, optimizer: str = "lazy", expected_batch: float = 0.0, silo_users: int = 0
) -> None:
    """ConfigError for a method or optimizer with which a silo cannot train, named with its remedy, before any training.

    ``expected_batch`` and ``silo_users`` (users of the largest silo), where given, are for the memory that
    per-example gradients of dense tensors need: of whole tables under ``opacus``, else of dense shared tensors.
    """
    check_optimizer(optimizer)
    check_example_dp(algorithm)
    shapes = {name: spec.shape for name, spec in algorithm.shared.items() if optimizer == "opacus" or not spec.per_item}
    numbers = sum(math.prod(shape) for shape in shapes.values())
    if optimizer == "opacus":
        numbers += silo_users * sum(math.prod(spec.shape) for spec in algorithm.private.values())
    needed = 4.0 * numbers * expected_batch
    if needed > _LIMIT:
        remedy = "write privacy.optimizer=lazy" if optimizer == "opacus" else "lower privacy.sample_rate"
        raise ConfigError(
            f"privacy.optimizer={optimizer}: per-example gradients of {', '.join(shapes)} for {expected_batch:.0f} "
            f"examples need {needed / 2**30:.1f} GiB; {remedy}"
        )


def make_optimizer(kind: str, tables: Tensors, noise_seed: tuple[int, ...] | None) -> DPSGD:
    """``privacy.optimizer``: lazy noise, or Opacus' DPOptimizer."""
    if kind == "opacus":
        from privacy.eager import OpacusSGD  # seconds to import

        return OpacusSGD(tables, noise_seed=noise_seed)
    return LazyNoiseSGD(tables, noise_seed=noise_seed)


def train_silo(
    algorithm: GradientRecommender,
    shared: Tensors,
    store: DeviceStore,
    train: UserItems,
    users: range,
    *,
    n_items: int,
    seed: int,
    round_number: int,
    sample_rate: float,
    steps: int,
    expected_batch: float,
    noise_multiplier: float,
    max_grad_norm: float,
    optimizer: str = "lazy",
    noise_seed: int | None = None,
) -> CohortUpdate:
    """One round of DP-SGD in the silo that holds ``users``.

    Args:
        shared: the tensors that the silo downloaded, float32.
        store: its users' vectors, with round ``round_number`` (from 1) begun.
        train: items per user of the data set; rows ``users`` are the silo's.
        sample_rate: Poisson rate of an interaction in a step.
        expected_batch: what a step's sum is divided by: ``sample_rate`` times a public number, the same in every silo
            (its own number of interactions would be released by its step size).
        noise_multiplier: noise deviation relative to ``max_grad_norm``; 0 for none.
        optimizer: ``lazy`` or ``opacus``.

    Returns:
        ``sums`` are the flushed tables minus the downloaded ones, weight decay included, so ``decay`` is 0; all rows
        count as sent. ``devices`` is 1: a mean weighted by size would release sizes. A silo whose tables or gradients
        are not finite contributes nothing, changes nothing, and lists its users as failed.
    """
    check_silo(algorithm, optimizer=optimizer)
    ids = np.asarray(users, dtype=np.int64)
    rows = train.take(ids)
    specs = {**algorithm.shared, **algorithm.private}
    height = {name: spec.shape[0] if spec.per_item else 1 for name, spec in algorithm.shared.items()}
    height |= dict.fromkeys(algorithm.private, len(users))
    width = {name: math.prod(spec.shape) // (height[name] if spec.per_item else 1) for name, spec in specs.items()}
    start = {**shared, **store.vectors(ids)}
    tables = {name: value.reshape(height[name], width[name]) for name, value in start.items() if name in specs}
    sgd = make_optimizer(optimizer, tables, None if noise_seed is None else (noise_seed, round_number, users.start))
    batches = draw_silo_batches(
        rows, users.start, n_items=n_items, seed=seed, round_number=round_number, sample_rate=sample_rate, steps=steps
    )
    owner, loss = rows.users, 0.0
    for step in range(steps):
        batch = batches.chosen[batches.ptr[step] : batches.ptr[step + 1]]
        member = owner[batch]
        items = examples_of(
            ids[member], rows.items[batch].astype(np.int64), n_items=n_items, negatives=algorithm.local.negatives,
            seed=seed, round_number=round_number, step=step,
        )  # fmt: skip
        device = torch.from_numpy(member).unsqueeze(1)
        where = {name: device if name in algorithm.private else torch.zeros_like(device) for name in specs}
        where |= {name: items for name, spec in algorithm.shared.items() if spec.per_item}
        params = {}
        for name, spec in specs.items():
            tail = (items.shape[1], *spec.shape[1:]) if spec.per_item else spec.shape
            params[name] = sgd.read(name, where[name]).reshape(len(batch), *tail)
        losses, gradients = per_example_gradients(algorithm, params, items, round_number - 1)
        loss += float(losses.detach().double().sum())
        try:
            sgd.step(
                where,
                {name: value.reshape(*where[name].shape, width[name]) for name, value in gradients.items()},
                learning_rate={name: spec.rate(round_number - 1, step) for name, spec in specs.items()},
                noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, expected_batch=expected_batch,
                weight_decay={name: spec.weight_decay for name, spec in specs.items()},
            )  # fmt: skip
        except NonFiniteGradient:
            break
    else:
        released = {name: value.reshape(start[name].shape) for name, value in sgd.release().items()}
        if all(bool(torch.isfinite(value).all()) for value in released.values()):
            return _absorb(algorithm, shared, store, ids, released, n_items, loss / max(batches.chosen.size, 1), steps)
    failed = start_update(algorithm, n_items)
    failed.failed = ids.tolist()
    return failed


def _absorb(
    algorithm: GradientRecommender, shared: Tensors, store: DeviceStore, users: Int64, released: Tensors, n_items: int,
    loss: float, steps: int,
) -> CohortUpdate:  # fmt: skip
    """Store the users' vectors; the update of the shared tensors."""
    update = start_update(algorithm, n_items)
    nowhere = torch.zeros(0, dtype=torch.int64)
    store.write(users, {name: released[name] for name in algorithm.private}, nowhere, nowhere, {}, {})
    for name in algorithm.shared:
        moved = released[name].sub_(shared[name])
        update.sums[name] = moved
        update.squared_norm[name] = float(moved.double().square().sum())
        update.upload_bytes += moved.numel() * moved.element_size()
    update.devices, update.users, update.loss, update.steps = 1, users.tolist(), loss, steps
    # Every row carries noise, so every row is sent.
    update.counts[:] = 1
    update.noised[:] = 1
    return update
