"""Example-level DP-SGD on devices: Opacus as the oracle, layouts, single uploads, failures, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.example_dp import check_example_dp, train_example_dp
from clients.example_kernel import obstacle
from clients.example_steps import DPSGD, schedule
from clients.store import DeviceStore
from fedrec.algorithms.base import (
    Problem,
)
from fedrec.algorithms.fedease import FedEASE
from fedrec.algorithms.fedmf import FedMF
from fedrec.algorithms.fedrap import FedRAP
from fedrec.algorithms.wrapped import LocalOnly
from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError
from tests.algorithms import test_seam
from tests.clients import small
from tests.clients.example_worlds import (
    FUSED,
    KINDS,
    NUMBERS,
    SEED,
    batches_of,
    chi_square,
    device_change,
    draw,
    method,
    noise_only,
    opacus_device,
    run_program,
    start,
    train_items,
    variance_after,
    whole_round,
)

CASES = st.fixed_dictionaries({
    "kind": st.sampled_from(KINDS), "users": st.integers(1, 3), "items": st.integers(2, 9), "k": st.integers(1, 4),
    "width": st.integers(1, 4), "steps": st.integers(1, 4), "rate": st.sampled_from([0.05, 0.4, 1.0]),
    "bound": st.sampled_from([0.01, 0.3, 5.0, math.inf]), "decay": st.sampled_from([0.0, 0.2]),
    "seed": st.integers(0, 999),
})  # fmt: skip


@given(CASES)
@settings(max_examples=40)
def test_without_noise_both_programs_equal_opacus_hooks(case: dict[str, Any]) -> None:
    """To 1e-9 in float64, for catalogues so small that items repeat within an example, and batches that are empty."""
    algorithm = method(case["kind"], case["users"], case["items"], case["k"], case["width"], case["decay"])
    sgd = DPSGD(case["rate"], case["steps"], 1.7, 0.0, case["bound"])
    train = train_items(case["users"], case["items"], case["seed"])
    batches, (shared, private) = draw(train, algorithm, sgd), start(algorithm, case["users"])
    modes = ["off"] if obstacle(algorithm, 0) else ["on", "off"]
    for fused in modes:
        outcome = run_program(fused, algorithm, shared, private, batches, sgd)
        for b in range(case["users"]):
            tables = {**shared, **{name: value[b] for name, value in private.items()}}
            expected = opacus_device(algorithm, tables, batches_of(batches, b), sgd)
            change = device_change(algorithm, outcome, batches, b, case["items"])
            for name, spec in algorithm.shared.items():
                if spec.per_item:
                    product = schedule(spec, 0, sgd).product[-1]
                    found = change[name].view(spec.shape) + product * shared[name].double()
                else:
                    found = outcome.dense[name][b] + shared[name].double()
                torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-9)
            for name in algorithm.private:
                torch.testing.assert_close(outcome.private[name][b], expected[name], rtol=1e-9, atol=1e-9)


def test_the_methods_take_the_program_that_they_should() -> None:
    assert [obstacle(method(kind, 1, 5, 2, 2, 0.0), 0) is None for kind in KINDS] == [True, True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rounds_sum_and_private_state_are_those_of_opacus_on_every_device(tmp_path: Path, kind: str) -> None:
    algorithm, train = method(kind, 9, 12, 2, 4, 0.1), train_items(9, 12, 3)
    sgd = DPSGD(0.5, 3, 2.0, 0.0, 0.4)
    for fused in ["off"] if kind == "fedncf" else ["on", "off"]:
        (update,), shared, private = whole_round(tmp_path / fused, algorithm, train, fused=fused, chunk=4)
        batches = draw(train, algorithm, sgd)
        fresh = DeviceStore(tmp_path / f"fresh-{fused}", algorithm.private, range(9), SEED).vectors(np.arange(9))
        total = {name: torch.zeros(spec.shape, dtype=torch.float64) for name, spec in algorithm.shared.items()}
        for b in range(9):
            tables = {**shared, **{name: value[b] for name, value in fresh.items()}}
            expected = opacus_device(algorithm, tables, batches_of(batches, b), sgd)
            for name in total:
                total[name] += expected[name] - shared[name].double()
            for name in algorithm.private:
                assert small.apart(private[name][b], expected[name].float()) < 1e-5
        for name, value in total.items():
            found = update.sums[name] + update.decay[name] * shared[name]
            # Relative to the tensors themselves, of which an update is a small difference.
            assert float((found - value).abs().max()) < 1e-5 * float(shared[name].abs().max().clamp_min(0.1))
        assert update.devices == 9
        assert update.steps == 27
        assert update.counts.tolist() == [9] * 12


@FUSED
def test_who_is_on_which_node_and_in_which_chunk_changes_nothing_without_noise(tmp_path: Path, fused: str) -> None:
    algorithm, train = method("bpr", 10, 30, 3, 4, 0.05), train_items(10, 30, 1, 12)
    for rounds in (1, 2):
        runs = [
            whole_round(
                tmp_path / f"{rounds}-{nodes}-{chunk}", algorithm, train, nodes=nodes, chunk=chunk, rounds=rounds,
                fused=fused,
            )
            for nodes, chunk in ((1, 64), (1, 3), (4, 64), (10, 1))
        ]  # fmt: skip
        first, _, private = runs[0]
        for updates, _, own in runs[1:]:
            if fused == "on" and rounds == 1:
                assert torch.equal(own["user"], private["user"])  # a device's arithmetic sees nobody else
            assert small.apart(own["user"], private["user"]) < 1e-5
            assert small.apart(sum(u.sums["item"] for u in updates), first[0].sums["item"]) < 1e-5
            assert sum(u.loss for u in updates) == pytest.approx(first[0].loss, rel=1e-5)
            assert sum(u.devices for u in updates) == 10
            assert sum(u.decay["item"] for u in updates) == pytest.approx(first[0].decay["item"])


@FUSED
def test_devices_without_interactions_take_part_with_noise_and_decay(tmp_path: Path, fused: str) -> None:
    algorithm, numbers = noise_only()
    nothing = UserItems.from_pairs([], [], 6)
    (update,), _, private = whole_round(tmp_path, algorithm, nothing, fused=fused, **numbers)
    assert (update.devices, update.steps, update.loss) == (6, 24, 0.0)
    assert update.counts.tolist() == [6] * 150
    chi_square(update.sums["item"], 6 * variance_after(algorithm.shared["item"], 4))
    kept = math.prod(1 - algorithm.shared["item"].rate(0, s) * 0.3 for s in range(4))
    assert update.decay["item"] == pytest.approx(6 * (kept - 1))
    (still,), _, _ = whole_round(
        tmp_path / "still", algorithm, nothing, fused=fused, **{**numbers, "noise_multiplier": 0.0}
    )
    assert int(torch.count_nonzero(still.sums["item"])) == 0
    assert torch.isfinite(private["user"]).all()


@FUSED
def test_kept_uploads_are_dense_and_noisy_and_add_up_to_the_sum(tmp_path: Path, fused: str) -> None:
    algorithm, numbers = noise_only()
    train = train_items(6, 150, 2, 40)
    (update,), _, _ = whole_round(tmp_path / "all", algorithm, train, fused=fused, keep_users=range(6), **numbers)
    uploads = torch.stack(update.user_updates["item"])
    assert uploads.dtype == torch.float32
    kept = math.prod(1 - algorithm.shared["item"].rate(0, s) * 0.3 for s in range(4))
    for j, (user, rows, values) in enumerate(update.views):
        assert (user, rows.tolist()) == (j, list(range(150)))
        decay = (kept - 1) * algorithm.initial_shared()["item"]
        torch.testing.assert_close(torch.from_numpy(values), uploads[j] + decay, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(uploads.double().sum(0).float(), update.sums["item"], rtol=1e-5, atol=1e-5)
    variance = variance_after(algorithm.shared["item"], 4)
    for whole in uploads:
        chi_square(whole, variance)
    assert int((uploads == 0).sum()) == 0
    (some,), _, _ = whole_round(tmp_path / "some", algorithm, train, fused=fused, keep_users={4, 1, 99}, **numbers)
    assert len(some.user_updates["item"]) == len(some.views) == 2
    rest = some.sums["item"] - torch.stack(some.user_updates["item"]).sum(0)
    chi_square(rest, 4 * variance)
    # Without noise they are the users' own, in the order of ``users``.
    silent = {**numbers, "noise_multiplier": 0.0, "max_grad_norm": 1.0}
    (both,), _, _ = whole_round(tmp_path / "both", algorithm, train, fused=fused, keep_users={4, 1}, **silent)
    nodes, _, _ = whole_round(tmp_path / "single", algorithm, train, nodes=6, fused=fused, **silent)
    for own, user in zip(both.user_updates["item"], (1, 4), strict=True):
        torch.testing.assert_close(own, nodes[user].sums["item"], rtol=1e-5, atol=1e-6)


def test_kept_uploads_of_dense_tensors_add_up_too(tmp_path: Path) -> None:
    algorithm, train = method("fedncf", 5, 20, 2, 3, 0.1), train_items(5, 20, 2, 10)
    options = {"noise_multiplier": 1.0, "keep_users": range(5)}
    (update,), _, _ = whole_round(tmp_path, algorithm, train, **options)
    for name in algorithm.shared:
        uploads = torch.stack(update.user_updates[name])
        torch.testing.assert_close(uploads.sum(0), update.sums[name], rtol=1e-4, atol=1e-5)
        assert update.squared_norm[name] > 0.0


@FUSED
def test_a_device_that_diverged_is_left_out_and_named_and_its_state_stays(tmp_path: Path, fused: str) -> None:
    algorithm, train = method("bce", 6, 20, 2, 4, 0.0), train_items(6, 20, 1, 10)
    whole_round(tmp_path, algorithm, train, fused=fused)
    path = tmp_path / "0" / "user.f32"
    values = np.fromfile(path, dtype=np.float32).reshape(6, 4)
    values[2] = np.nan
    with path.open("r+b") as file:
        file.write(values.tobytes())
    store = DeviceStore(tmp_path / "0", algorithm.private, range(6), SEED)
    store.begin(2)
    users = np.arange(6)
    update = train_example_dp(
        algorithm, algorithm.initial_shared(), store, train, users, n_items=20, seed=SEED, round_number=2, fused=fused,
        **{**NUMBERS, "noise_multiplier": 1.0},
    )  # fmt: skip
    assert update.failed == [2]
    assert update.users == [0, 1, 3, 4, 5]
    assert update.counts.tolist() == [5] * 20
    assert torch.isfinite(update.sums["item"]).all()
    assert np.isfinite(update.loss)
    after = store.vectors(users)["user"]
    assert torch.isnan(after[2]).all()
    assert torch.isfinite(after[update.users]).all()
    assert not np.array_equal(after[0].numpy(), values[0])


@FUSED
def test_a_repeated_task_starts_from_what_the_first_one_saw(tmp_path: Path, fused: str) -> None:
    algorithm, train = method("bpr", 6, 20, 2, 4, 0.1), train_items(6, 20, 1, 10)
    noisy = {"fused": fused, "noise_multiplier": 1.0}
    (first,), _, private = whole_round(tmp_path, algorithm, train, **noisy)
    (again,), _, repeated = whole_round(tmp_path, algorithm, train, **noisy)
    assert torch.equal(first.sums["item"], again.sums["item"])
    assert torch.equal(private["user"], repeated["user"])
    for other in (None, 12):  # None: of the operating system
        (update,), _, own = whole_round(tmp_path, algorithm, train, **noisy, noise_seed=other)
        assert not torch.equal(first.sums["item"], update.sums["item"])
        assert not torch.equal(private["user"], own["user"])


@FUSED
def test_a_noise_seed_gives_every_round_and_node_its_own_noise(tmp_path: Path, fused: str) -> None:
    algorithm, numbers = noise_only()
    nothing = UserItems.from_pairs([], [], 6)
    for name, rounds in (("first", 1), ("second", 2)):
        found, _, _ = whole_round(tmp_path / name, algorithm, nothing, nodes=2, rounds=rounds, fused=fused, **numbers)
        noise = [u.sums["item"].flatten() for u in found]
        if name == "first":
            before = noise
    related = np.abs(np.corrcoef(torch.stack([*before, *noise]).numpy())[np.triu_indices(4, 1)])
    assert related.max() < 5 / np.sqrt(noise[0].numel())


def test_upload_bytes_are_a_dense_views(tmp_path: Path) -> None:
    train = train_items(4, 10, 1)
    for decay, scalar in ((0.1, 4), (0.0, 0)):
        (update,), _, _ = whole_round(tmp_path / str(decay), method("bce", 4, 10, 2, 3, decay), train)
        assert update.upload_bytes == 4 * (10 * 3 * 4 + scalar)
    (update,), _, _ = whole_round(tmp_path / "ncf", method("fedncf", 4, 10, 2, 3, 0.0), train)
    assert update.upload_bytes == 4 * 4 * (10 * 3 + 2 * 3 * 3 + 3 + 3)


def test_squared_norms_are_what_the_devices_uploads_have(tmp_path: Path) -> None:
    algorithm, numbers = noise_only()
    (update,), _, _ = whole_round(tmp_path, algorithm, train_items(6, 150, 2, 40), keep_users=range(6), **numbers)
    drawn = float(torch.stack(update.user_updates["item"]).double().square().sum())
    assert update.squared_norm["item"] == pytest.approx(drawn, rel=0.1)


# -- refusals ----------------------------------------------------------------------------------------------------------

PROBLEM = Problem(4, 10, 0)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (FedRAP(PROBLEM), "fedrap keeps tensor personal, private and per item.*algorithm=fedmf"),
        (FedEASE(PROBLEM), "fedease takes no local gradient steps.*algorithm=fedmf"),
        (test_seam.GPFedRec(PROBLEM), "gpfedrec keeps every device's own upload.*algorithm=fedmf"),
        (LocalOnly(FedMF(PROBLEM)), "local_only keeps tensor item"),
        (FedMF(PROBLEM, local_epochs=3), r"algorithm.local_epochs=3.*privacy.steps.*write 1"),
        (FedMF(PROBLEM, tolerance=0.1), r"algorithm.tolerance=0.1.*write 0"),
        (FedMF(PROBLEM, max_positives=5), r"algorithm.max_positives=5.*privacy.sample_rate.*write 0"),
    ],
)
def test_methods_and_settings_without_a_meaning_here_are_refused_with_the_remedy(algorithm: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"privacy=example_dp: .*{message}"):
        check_example_dp(algorithm)


def test_fedmf_and_methods_with_dense_tensors_are_accepted() -> None:
    for kind in KINDS:
        check_example_dp(method(kind, 4, 10, 2, 3, 0.1))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"sample_rate": 0.0}, "privacy.sample_rate=0.0"),
        ({"sample_rate": 1.5}, "privacy.sample_rate=1.5"),
        ({"steps": 0}, "privacy.steps=0"),
        ({"expected_batch": 0.0}, "expected batch of 0.0"),
        ({"noise_multiplier": -1.0}, "privacy.noise_multiplier=-1.0"),
        ({"noise_multiplier": math.nan}, "privacy.noise_multiplier=nan"),
        ({"max_grad_norm": 0.0}, "privacy.max_grad_norm=0.0"),
        ({"max_grad_norm": math.inf, "noise_multiplier": 1.0}, "privacy.max_grad_norm=inf"),
        ({"fused": "yes"}, "runner.fused='yes': write auto, on or off"),
    ],
)
def test_numbers_that_no_guarantee_can_use_are_refused_before_anything_is_written(
    tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    algorithm = method("bce", 4, 10, 2, 3, 0.0)
    with pytest.raises(ConfigError, match=message):
        whole_round(tmp_path, algorithm, train_items(4, 10, 1), **option)
    assert not np.fromfile(tmp_path / "0" / "user.f32", dtype=np.float32).any()


def test_insisting_on_the_kernel_where_it_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runner.fused=on: .*runner.fused=auto"):
        whole_round(tmp_path, method("fedncf", 4, 10, 2, 3, 0.0), train_items(4, 10, 1), fused="on")
