"""Example-level differential privacy on the devices: DP-SGD on each user's own interactions.

Neighbouring data sets differ in ONE interaction of one user, added or removed; this is not privacy of a user. Defined
as Opacus defines it: per-example gradients over all tensors that an example touches, the item rows and the private
tensors together, clipped flat to C; Poisson batches, empty ones included; every coordinate of every table noised in
every step; the mean taken over a public, constant expected batch. Private tensors are noised too, because every later
item gradient depends on them.

What it releases are the item views and the private tensors. ``loss`` and ``squared_norm`` of the update are the
simulation's own instruments: no device would send them, and no epsilon covers them.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import torch

from clients.example_batches import draw_batches
from clients.example_kernel import obstacle, run_kernel
from clients.example_steps import DPSGD, run_steps, schedule
from clients.example_sum import UploadSum, finite_devices
from clients.protection import noise_generator
from clients.store import DeviceStore
from clients.update import CohortUpdate
from fedrec.algorithms.base import GradientRecommender, Recommender, Tensors
from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError

Int64 = npt.NDArray[np.int64]


def check_example_dp(algorithm: Recommender) -> None:
    """ConfigError for a method that cannot be trained under ``privacy=example_dp``, or with settings that it would
    silently ignore.

    ``algorithm.batch_size`` alone is ignored: ``privacy.sample_rate`` and ``privacy.steps`` take its place.
    """
    mode = "privacy=example_dp"
    if not isinstance(algorithm, GradientRecommender):
        raise ConfigError(
            f"{mode}: {algorithm.name} takes no local gradient steps; write algorithm=fedmf, or privacy=user_dp"
        )
    for name, spec in algorithm.private.items():
        if spec.per_item:
            raise ConfigError(
                f"{mode}: {algorithm.name} keeps tensor {name}, private and per item, on every device, all of whose "
                "rows would need noise in every step; write algorithm=fedmf, or privacy=user_dp"
            )
    if not algorithm.shared:
        raise ConfigError(
            f"{mode}: {algorithm.name} shares nothing, so there is nothing to protect; write privacy=none"
        )
    if algorithm.needs_user_updates:
        raise ConfigError(
            f"{mode}: {algorithm.name} keeps every device's own upload and sends it a view made of others; "
            "write algorithm=fedmf"
        )
    local = algorithm.local
    for key, value, neutral, instead in (
        ("local_epochs", local.epochs, 1, "privacy.steps says how many local steps a round has"),
        ("tolerance", local.tolerance, 0.0, "a step that stops early would tell of the data"),
        ("max_positives", local.max_positives, 0, "privacy.sample_rate says how many interactions a step takes"),
    ):
        if value != neutral:
            raise ConfigError(f"{mode}: algorithm.{key}={value} has no meaning here ({instead}); write {neutral}")
    if local.negatives < 1:
        raise ConfigError(f"{mode}: algorithm.negatives={local.negatives}: write 1 or more negatives per positive")


def train_example_dp(
    algorithm: GradientRecommender,
    shared: Tensors,
    store: DeviceStore,
    train: UserItems,
    users: Int64,
    *,
    n_items: int,
    seed: int,
    round_number: int,
    sample_rate: float,
    steps: int,
    expected_batch: float,
    noise_multiplier: float,
    max_grad_norm: float,
    noise_seed: int | None,
    chunk: int = 64,
    keep_users: Collection[int] = (),
    fused: str = "auto",
) -> CohortUpdate:
    """One round of example-level DP-SGD on the devices of ``users``, whoever has interactions or not.

    Args:
        shared: the tensors that the devices downloaded, float32.
        store: their private tensors, with round ``round_number`` (from 1) begun.
        train: items per user; row ``u`` are user u's interactions.
        users: int64[n], distinct.
        sample_rate: Poisson rate of an interaction in a step, the same on every device.
        expected_batch: what a step's sum is divided by, a public constant (``sample_rate`` times a public typical
            number of interactions), never a device's own count.
        noise_multiplier: noise deviation relative to ``max_grad_norm``; 0 for none.
        chunk: devices trained as one program.
        noise_seed: None takes the noise from the operating system's randomness; a number makes it repeatable, and the
            result not private.
        keep_users: users whose whole upload, dense and noisy, is kept: ``user_updates[name][j]`` float32[*shape],
            without the view's decay, is that of the j-th of ``[u for u in update.users if u in keep_users]``;
            ``views`` holds their first per-item tensor, decay included.
        fused: ``off`` trains the dot-product family as a tensor program too, ``on`` insists on the compiled kernel.

    Returns:
        ``sums`` dense over all items, without the decay of the view (``decay``, as everywhere), ``counts`` all devices
        for every item. ``loss`` sums the devices' mean losses per example (0 for a device whose batches all came
        empty). ``squared_norm`` is the expected one given everything but the last noise of the item rows.

    Raises:
        ConfigError: a method or number that this mode cannot run, or ``fused`` that is impossible or unknown.
    """
    check_example_dp(algorithm)
    _check_numbers(sample_rate, steps, expected_batch, noise_multiplier, max_grad_norm)
    sgd = DPSGD(sample_rate, steps, expected_batch, noise_multiplier, max_grad_norm)
    round_index = round_number - 1
    why_not = _why_not_fused(algorithm, round_index, fused)
    form = algorithm.dot_product(round_index)
    specs = {**algorithm.shared, **algorithm.private}
    schedules = {name: schedule(spec, round_index, sgd) for name, spec in specs.items()}
    generator = noise_generator(noise_seed, round_number, int(users[0]) if users.size else 0)
    total = UploadSum(algorithm, schedules, shared, generator)
    for start in range(0, users.size, chunk):
        members = users[start : start + chunk]
        batches = draw_batches(
            train, members, n_items=n_items, negatives=algorithm.local.negatives, seed=seed,
            round_number=round_number, sample_rate=sample_rate, steps=steps,
        )  # fmt: skip
        private = store.vectors(members)
        if why_not or form is None:
            outcome = run_steps(algorithm, shared, private, batches, schedules, sgd, round_index, generator)
        else:
            outcome = run_kernel(algorithm, form, shared, private, batches, schedules, sgd, generator)
        good = finite_devices(outcome, batches)
        total.add(members, batches, outcome, good, keep_users)
        width = {name: math.prod(spec.shape) for name, spec in algorithm.private.items()}
        written = {
            name: value[torch.from_numpy(good)].float().reshape(int(good.sum()), width[name]).numpy()
            for name, value in outcome.private.items()
        }
        store.commit(members[good], written, {})
    return total.finish(steps)


def _check_numbers(rate: float, steps: int, expected: float, noise: float, bound: float) -> None:
    if not 0.0 < rate <= 1.0:
        raise ConfigError(f"privacy.sample_rate={rate}: write a Poisson rate in (0, 1]")
    if steps < 1:
        raise ConfigError(f"privacy.steps={steps}: write a whole number of local steps, 1 or more")
    if not 0.0 < expected < math.inf:
        raise ConfigError(f"an expected batch of {expected} interactions: it must be a public positive number")
    if not 0.0 <= noise < math.inf:
        raise ConfigError(f"privacy.noise_multiplier={noise}: write 0 (no noise) or more")
    if not bound > 0.0 or (noise and bound == math.inf):
        raise ConfigError(f"privacy.max_grad_norm={bound}: the clipping norm is a positive number")


def _why_not_fused(algorithm: GradientRecommender, round_index: int, fused: str) -> str | None:
    if fused not in ("auto", "on", "off"):
        raise ConfigError(f"runner.fused={fused!r}: write auto, on or off")
    reason = obstacle(algorithm, round_index) if fused != "off" else "switched off"
    if fused == "on" and reason:
        raise ConfigError(f"runner.fused=on: {reason}; write runner.fused=auto to train it as a tensor program")
    return reason
