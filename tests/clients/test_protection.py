"""What leaves a device is clipped per user and, where devices noise it themselves, carries exactly that noise.

The exact, cheap checks here (norm of every user's contribution, χ² of the noise) are the gates that catch planted
faults: ../privacy/test_faults.py plants them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from clients.node import run_task
from clients.protection import Protection, noise_generator
from clients.workspace import Workspace
from fedrec.algorithms.base import Tensors
from tests.clients import small
from tests.clients.test_fused import CASES

NOBODY = np.zeros(0, dtype=np.int64)
FEDNCF: dict[str, Any] = {"_target_": "tests.algorithms.test_seam.FedNCF"}
METHODS = {
    **{name: CASES[name] for name in ("fedmf-bce", "fedmf-bpr-mini-batches", "fedrap-subgradient")}, "fedncf": FEDNCF,
}  # fmt: skip


def contribution(space: Workspace, users: Any, protection: Protection, round_number: int = 1) -> tuple[Tensors, Any]:
    """Σ of whole updates of ``users`` (the decay of untouched rows included), float64, and the cohort's report."""
    shared = space.algorithm.initial_shared()
    update = run_task(
        space, 0, round_number, shared, np.asarray(users, dtype=np.int64), NOBODY, protection=protection
    ).update
    return {
        name: total.double() + update.decay.get(name, 0.0) * shared[name].double()
        for name, total in update.sums.items()
    }, update


def norm(tensors: Tensors) -> float:
    return float(torch.stack([value.square().sum() for value in tensors.values()]).sum().sqrt())


@pytest.mark.parametrize("fused", ["auto", "off"])
@pytest.mark.parametrize("method", METHODS)
def test_one_user_more_moves_the_sum_by_at_most_the_clipping_norm(tmp_path: Path, method: str, fused: str) -> None:
    space = small.workspace(tmp_path, METHODS[method], fused=fused)
    free = [norm(contribution(space, [user], Protection())[0]) for user in range(8)]
    clip = float(np.median(free))
    assert max(free) > clip > min(free)
    for user in range(8):
        own = norm(contribution(space, [user], Protection(clip=clip))[0])
        assert own <= clip * (1 + 1e-6)
        assert own == pytest.approx(min(free[user], clip), rel=1e-4)


@pytest.mark.parametrize("method", ["fedmf-bce", "fedmf-bpr-mini-batches", "fedrap-subgradient"])
def test_the_fused_kernel_clips_as_the_tensor_program_does(tmp_path: Path, method: str) -> None:
    found = []
    clip = 0.15 if method == "fedmf-bce" else 0.3
    for fused in ("on", "off"):
        space = small.workspace(tmp_path / fused, METHODS[method], fused=fused)
        found.append(contribution(space, small.everybody(space), Protection(clip=clip)))
    (first, report), (second, expected) = found
    assert small.apart(first["item"], second["item"]) < 1e-5
    assert report.unclipped == expected.unclipped < report.devices == len(report.users)
    assert report.decay["item"] == pytest.approx(expected.decay["item"], rel=1e-6)


def test_clipping_is_per_user_and_so_independent_of_the_layout_of_nodes(tmp_path: Path) -> None:
    one = small.workspace(tmp_path / "one", METHODS["fedmf-bce"])
    together, _ = contribution(one, small.everybody(one), Protection(clip=0.2))
    many = small.workspace(tmp_path / "many", METHODS["fedmf-bce"], n_nodes=6)
    shared, apart = many.algorithm.initial_shared(), torch.zeros(together["item"].shape, dtype=torch.float64)
    for node in range(6):
        mine = np.asarray(many.users_of(node), dtype=np.int64)
        update = run_task(many, node, 1, shared, mine, NOBODY, protection=Protection(clip=0.2)).update
        apart += update.sums["item"].double() + update.decay["item"] * shared["item"].double()
    assert small.apart(apart, together["item"]) < 1e-6


def test_an_update_within_the_norm_is_left_as_it_is(tmp_path: Path) -> None:
    space = small.workspace(tmp_path, METHODS["fedmf-bce"])
    plain, _ = contribution(space, [3, 5], Protection())
    clipped, report = contribution(space, [3, 5], Protection(clip=1e6))
    assert torch.equal(plain["item"], clipped["item"])
    assert report.unclipped == 2


def noise_of(space: Workspace, users: Any, protection: Protection) -> tuple[Tensors, Any]:
    """The noise alone: the noisy sum less the noise-free one of the same users (and the same chosen rows)."""
    noisy, report = contribution(space, users, protection)
    plain, _ = contribution(space, users, Protection(clip=protection.clip))
    return {name: noisy[name] - plain[name] for name in plain}, report


def assert_variance(values: torch.Tensor, variance: float) -> None:
    """χ²: Σ values²/variance of n normal draws, two-sided at 1e-4 (a fixed noise seed repeats the draw)."""
    total = float(values.square().sum()) / variance
    n = values.numel()
    assert stats.chi2.ppf(5e-5, n) < total < stats.chi2.ppf(1 - 5e-5, n)


@pytest.mark.parametrize("watch", [frozenset(), frozenset({0, 4})], ids=["all-in-one-draw", "two-drawn-apart"])
@pytest.mark.parametrize("method", ["fedmf-bce", "fedncf"])
def test_every_coordinate_carries_the_noise_of_all_devices(tmp_path: Path, method: str, watch: frozenset[int]) -> None:
    space = small.workspace(tmp_path, METHODS[method], upload={"kind": "dense"})
    protection = Protection(clip=0.3, noise=0.7, watch=watch, generator=noise_generator(11))
    noise, report = noise_of(space, range(9), protection)
    for values in noise.values():
        assert_variance(values, 9 * 0.7**2)
        assert (values != 0.0).all()
    assert (report.counts == 9).all()
    assert report.decay.get("item", 0.0) == 0.0  # sent apart it would be sent without noise
    assert sorted(user for user, _, _ in report.views) == sorted(watch)


def test_a_watched_upload_is_the_users_clipped_update_and_its_own_noise(tmp_path: Path) -> None:
    space = small.workspace(tmp_path, METHODS["fedmf-bce"], upload={"kind": "dense"})
    plain, _ = contribution(space, [4], Protection(clip=0.3))
    _, quiet = contribution(space, [2, 4, 6], Protection(clip=0.3, watch=frozenset({4})))
    user, rows, values = quiet.views[0]
    assert user == 4
    assert np.array_equal(rows, np.arange(space.split.n_items))
    assert np.allclose(values, plain["item"].numpy(), atol=1e-6)
    _, noisy = contribution(space, [2, 4, 6], Protection(0.3, 0.5, watch=frozenset({4}), generator=noise_generator(5)))
    assert_variance(torch.from_numpy(noisy.views[0][2]).double() - plain["item"], 0.25)


def test_a_sparse_upload_shows_the_rows_that_its_user_touched(tmp_path: Path) -> None:
    space = small.workspace(tmp_path, METHODS["fedmf-bce"])
    _, report = contribution(space, [4], Protection(watch=frozenset({4})))
    assert set(space.split.train.row(4)) <= set(report.views[0][1].tolist())
    assert len(report.views[0][1]) < space.split.n_items


def test_a_padded_row_set_has_the_same_size_for_everybody_and_hides_the_own_rows_among_decoys(tmp_path: Path) -> None:
    algorithm = {**small.FEDMF, "negatives": 1}
    space = small.workspace(tmp_path, algorithm, padded_rows=45)
    everybody = frozenset(range(12))
    protection = Protection(clip=0.3, noise=0.5, padded_rows=45, watch=everybody, generator=noise_generator(7))
    _, report = contribution(space, range(12), protection)
    own = small.workspace(tmp_path / "plain", algorithm)
    _, plain = contribution(own, range(12), Protection(watch=everybody))
    touched = {user: set(rows.tolist()) for user, rows, _ in plain.views}
    assert {len(rows) for _, rows, _ in report.views} == {45}
    truncated = 0
    for user, rows, values in report.views:
        assert (values != 0.0).all()
        if len(touched[user]) <= 45:
            assert touched[user] <= set(rows.tolist())
        else:
            assert set(rows.tolist()) <= touched[user]
            truncated += 1
    assert 0 < truncated < 12
    assert int(report.counts.sum()) == 12 * 45
    assert report.upload_bytes == 12 * 45 * (4 + 4 * 8)


def test_padded_noise_lies_on_the_sent_rows_only(tmp_path: Path) -> None:
    space = small.workspace(tmp_path, {**small.FEDMF, "negatives": 1}, padded_rows=60)
    protection = Protection(clip=0.3, noise=0.5, padded_rows=60, generator=noise_generator(3))
    noise, report = noise_of(space, range(10), protection)
    counts = report.counts.double()
    assert int((counts < 10).sum()) > 0
    scaled = noise["item"] / (0.5 * counts.clamp_min(1).sqrt().unsqueeze(1))
    assert_variance(scaled[counts > 0], 1.0)
    assert (noise["item"][counts == 0] == 0.0).all()


def test_noise_of_the_operating_system_is_never_the_same_twice_and_a_fixed_seed_is(tmp_path: Path) -> None:
    first, second = (noise_generator(None, 1, 0).normal(size=4) for _ in range(2))
    assert not np.array_equal(first, second)
    assert np.array_equal(noise_generator(5, 1, 0).normal(size=4), noise_generator(5, 1, 0).normal(size=4))
    assert not np.array_equal(noise_generator(5, 1, 0).normal(size=4), noise_generator(5, 2, 0).normal(size=4))


def test_the_count_of_unclipped_devices_carries_noise_of_its_own(tmp_path: Path) -> None:
    space = small.workspace(tmp_path, METHODS["fedmf-bce"])
    _, exact = contribution(space, range(9), Protection(clip=0.3))
    draws = [
        contribution(space, range(9), Protection(0.3, 0.0, 2.0, generator=noise_generator(1, n)))[1].unclipped
        for n in range(60)
    ]
    assert_variance(torch.tensor(draws) - exact.unclipped, 9 * 4.0)
