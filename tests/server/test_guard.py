"""The server's side of user-level privacy: the noise is there, on every coordinate, in the right size, and recorded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedrec.algorithms.base import StatisticsRecommender, Tensors
from fedrec.data.split import Split
from fedrec.errors import ConfigError
from privacy.accountants import gaussian_epsilon
from privacy.attacks.audit import CanaryAudit
from privacy.ledger import Ledger, Subject
from privacy.plan import Federation, PrivacyPlan, make_plan, total_mu
from privacy.settings import PrivacySettings
from server.guard import Guard
from server.outcome import Outcome
from server.runners import run_federation
from server.settings import EvaluationSettings, FederationSettings
from tests.conftest import WorkspaceFactory
from tests.server.federations import FEDMF, INLINE
from tests.server.test_guards import fedmf

DENSE = {"upload": {"kind": "dense"}}
PRIVATE_EASE: dict[str, Any] = {"_target_": "fedrec.algorithms.fedease_private.PrivateFedEASE"}
SUBJECT = Subject("synthetic", "0" * 64, 60, 1000)


def plan_of(split: Split, rounds: int = 3, shares: tuple[float, ...] | None = None, **settings: Any) -> PrivacyPlan:
    sampler, fraction = settings.pop("sampler", "all"), settings.pop("fraction", 1.0)
    chosen = PrivacySettings(**{"mode": "user_dp", "max_grad_norm": 0.3, "noise_seed": 4, **settings})
    facts = Federation(split.n_users, split.train.items.size, sampler, fraction, rounds, shares)
    return make_plan(chosen, facts)


def run(
    space: Any, plan: PrivacyPlan, folder: Path, audit: CanaryAudit | None = None, **federation: Any
) -> tuple[Outcome, Ledger, Guard]:
    ledger = Ledger.start(folder / f"ledger-{len(list(folder.iterdir()))}.json", SUBJECT, plan.delta)
    guard = Guard(plan, space.algorithm, ledger, "run", 3, audit)
    settings = FederationSettings(
        **{"rounds": plan.rounds, "sampler": plan.sampler, "fraction": plan.sample_rate, **federation}
    )
    outcome = run_federation(space, settings, EvaluationSettings(every=100), INLINE, guard=guard)
    return outcome, ledger, guard


def noise_of_one_round(make: WorkspaceFactory, plan: PrivacyPlan, folder: Path, nodes: int, **settings: Any) -> Tensors:
    """What the mechanism added to the sum of one round, per tensor, float64."""
    space = make(FEDMF, nodes, **DENSE, **settings)
    noisy, _, _ = run(space, plan, folder)
    quiet = replace(plan, noise=(0.0,), accounted=(0.0,))
    plain, _, _ = run(make(FEDMF, nodes, **DENSE, **settings), quiet, folder)
    return {
        name: (noisy.final_shared[name].double() - plain.final_shared[name].double()) * plan.expected
        for name in noisy.final_shared
    }


@pytest.mark.parametrize("nodes", [1, 5])
@pytest.mark.parametrize("trust", ["server", "secure_aggregation"])
def test_the_sum_carries_gaussian_noise_of_sigma_times_c_on_every_coordinate(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path, trust: str, nodes: int
) -> None:
    plan = plan_of(synthetic_split, 1, noise_multiplier=2.0, trust=trust, min_survivors=45 * (trust != "server"))
    survivors = 60 / 45 if trust != "server" else 1.0  # more came than were needed, and brought their noise
    settings = {} if trust == "server" else {"noise_seed": 4}
    noise = noise_of_one_round(workspace, plan, tmp_path, nodes, **settings)["item"].flatten().numpy()
    deviation = 2.0 * 0.3 * math.sqrt(survivors)
    total = float((noise**2).sum()) / deviation**2
    assert stats.chi2.ppf(1e-4, noise.size) < total < stats.chi2.ppf(1 - 1e-4, noise.size)
    assert stats.kstest(noise / deviation, "norm").pvalue > 1e-4
    assert (noise != 0.0).all()  # rows that nobody touched as well


def test_without_noise_the_result_does_not_depend_on_the_number_of_nodes(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(synthetic_split, 3, noise_multiplier=0.0)
    views = [run(workspace(FEDMF, nodes, **DENSE), plan, tmp_path)[0].final_shared["item"] for nodes in (1, 4)]
    assert float((views[0] - views[1]).abs().max()) < 1e-6


def test_the_mean_divides_by_the_expected_cohort_not_by_the_one_that_came(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(synthetic_split, 1, noise_multiplier=0.0, sampler="poisson", fraction=0.3)
    space = workspace(FEDMF, **DENSE)
    outcome, _, guard = run(space, plan, tmp_path)
    came = outcome.rounds[0]["users"]
    assert came != plan.expected == pytest.approx(18.0)
    moved = outcome.final_shared["item"] - space.algorithm.initial_shared()["item"]
    assert float(moved.norm()) == pytest.approx(outcome.rounds[0]["signal_norm"], rel=1e-4)
    assert guard.divisor(None) == plan.expected  # type: ignore[arg-type]


def test_a_poisson_round_that_nobody_joins_still_releases_noise(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(synthetic_split, 2, noise_multiplier=1.0, sampler="poisson", fraction=1e-6)
    space = workspace(FEDMF, **DENSE)
    outcome, ledger, _ = run(space, plan, tmp_path)
    assert [line["users"] for line in outcome.rounds] == [0, 0]
    assert (outcome.final_shared["item"] != space.algorithm.initial_shared()["item"]).all()
    assert len(ledger.entries) == 2


def test_every_release_is_in_the_ledger_with_what_the_accountant_needs(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(synthetic_split, 4, epsilon=4.0, sampler="poisson", fraction=0.5, noise_seed=None)
    _, ledger, _ = run(workspace(FEDMF, **DENSE), plan, tmp_path)
    assert [entry.round for entry in ledger.entries] == [1, 2, 3, 4]
    entry = ledger.entries[0]
    assert (entry.unit, entry.sampler, entry.sample_rate, entry.what) == ("user", "poisson", 0.5, ("item",))
    assert (entry.noise_multiplier, entry.max_grad_norm, entry.steps) == (plan.accounted[0], 0.3, 1)
    assert ledger.private
    assert 3.9 < ledger.composed()["user"].value <= 4.0
    assert len(Ledger.read(ledger.path).entries) == 4


def test_what_devices_noised_themselves_is_recorded_even_when_the_round_fails(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(synthetic_split, 3, mode="local_dp", epsilon=4.0)
    space = workspace(fedmf(synthetic_split, "nan"), **DENSE, noise_seed=4)
    outcome, ledger, _ = run(space, plan, tmp_path, min_success=1.0)
    assert outcome.status == "diverged"
    assert [entry.round for entry in ledger.entries] == [1]


def test_a_fixed_noise_seed_repeats_the_result_and_is_called_not_private(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(synthetic_split, 2, epsilon=4.0)
    runs = [run(workspace(FEDMF, **DENSE), plan, tmp_path) for _ in range(2)]
    assert torch.equal(runs[0][0].final_shared["item"], runs[1][0].final_shared["item"])
    assert not runs[0][1].private
    assert not plan.private
    private = replace(plan, settings=replace(plan.settings, noise_seed=None))
    apart = [run(workspace(FEDMF, **DENSE), private, tmp_path) for _ in range(2)]
    assert not torch.equal(apart[0][0].final_shared["item"], apart[1][0].final_shared["item"])
    assert apart[0][2].sampling_seed != apart[1][2].sampling_seed  # who takes part is as secret as the noise


def test_secure_aggregation_abandons_a_round_below_its_threshold_and_accounts_for_those_who_came(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(
        synthetic_split, 12, noise_multiplier=1.5, trust="secure_aggregation", min_survivors=18, sampler="poisson",
        fraction=0.3,
    )  # fmt: skip
    outcome, ledger, _ = run(workspace(FEDMF, 3, noise_seed=4), plan, tmp_path)
    cohorts = {line["round"]: line["users"] for line in outcome.rounds}
    abandoned = [line["round"] for line in outcome.rounds if "abandoned" in line]
    assert 0 < len(abandoned) < 12
    assert {entry.round for entry in ledger.entries} == set(cohorts) - set(abandoned)
    for entry in ledger.entries:
        assert entry.survivors == cohorts[entry.round] >= 18
        assert entry.noise_multiplier == pytest.approx(1.5 * math.sqrt(entry.survivors / 18))
        assert entry.trust == "simulated secure aggregation"


def test_the_run_stops_before_the_release_that_would_exceed_the_budget(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(synthetic_split, 10, noise_multiplier=3.0, budget=2.0)
    assert 0 < plan.allowed_rounds < 10
    outcome, ledger, _ = run(workspace(FEDMF, **DENSE), plan, tmp_path)
    assert outcome.status == "early_stopped"
    assert "privacy.budget=2" in str(outcome.reason)
    assert len(outcome.rounds) == len(ledger.entries) == plan.allowed_rounds
    assert "validation" in outcome.rounds[-1]
    assert ledger.composed()["user"].value <= 2.0
    over = plan_of(synthetic_split, plan.allowed_rounds + 1, noise_multiplier=3.0)
    assert over.epsilon > 2.0


def test_a_follow_up_run_counts_what_an_earlier_one_spent(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(synthetic_split, 3, noise_multiplier=3.0)
    _, first, _ = run(workspace(FEDMF, **DENSE), plan, tmp_path)
    facts = Federation(60, synthetic_split.train.items.size, "all", 1.0, 10)
    settings = PrivacySettings("user_dp", noise_multiplier=3.0, budget=2.0)
    fresh, after = make_plan(settings, facts), make_plan(settings, facts, first.spent("user"))
    assert after.allowed_rounds == fresh.allowed_rounds - 3
    with pytest.raises(ConfigError, match=r"privacy\.budget=0\.5: .* of it is spent in the ledger"):
        make_plan(replace(settings, budget=0.5), facts, first.spent("user"))


def test_adaptive_clipping_finds_the_quantile_of_the_norms(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(
        synthetic_split, 40, noise_multiplier=0.0, adaptive_clipping=True, clip_quantile=0.5, max_grad_norm=20.0,
        clip_learning_rate=0.4,
    )  # fmt: skip
    outcome, _, guard = run(workspace(FEDMF, **DENSE), plan, tmp_path)
    shares = [line["clipped_share"] for line in outcome.rounds]
    assert shares[0] == 0.0
    assert 0.3 < float(np.mean(shares[-8:])) < 0.7
    assert guard.clip < 20.0


def test_the_noise_of_the_quantile_is_paid_for_by_more_noise_on_the_update() -> None:
    settings = PrivacySettings("user_dp", noise_multiplier=2.0, adaptive_clipping=True, clip_count_noise=5.0)
    plan = make_plan(settings, Federation(1000, 50_000, "poisson", 0.1, 100))
    assert plan.accounted == (2.0,)
    # Two Gaussian releases of one user, of sensitivities 1 and 1/2, compose to one of noise multiplier 2.
    assert plan.noise[0] ** -2 + (2 * 5.0) ** -2 == pytest.approx(2.0**-2)
    with pytest.raises(ConfigError, match=r"privacy\.clip_count_noise=0\.5: the count alone costs more"):
        make_plan(replace(settings, clip_count_noise=0.5), Federation(1000, 50_000, "poisson", 0.1, 100))


def test_the_quantile_keeps_its_noise_in_both_placements(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    for trust in ("server", "secure_aggregation"):
        plan = plan_of(
            synthetic_split, 1, noise_multiplier=1.0, adaptive_clipping=True, trust=trust, clip_count_noise=6.0,
            min_survivors=60 * (trust != "server"),
        )  # fmt: skip
        clips = []
        for seed in range(24):
            own = replace(plan, settings=replace(plan.settings, noise_seed=seed))
            space = workspace(FEDMF, 2, noise_seed=seed, **DENSE)
            clips.append(run(space, own, tmp_path)[2].clip)
        # log C moves by −η(count/60 + …): the count's deviation is 6.
        counts = -np.log(np.asarray(clips) / 0.3) / 0.2 * 60
        ratio = float(((counts - counts.mean()) ** 2).sum()) / 36.0
        assert stats.chi2.ppf(1e-4, 23) < ratio < stats.chi2.ppf(1 - 1e-4, 23)


def test_a_one_shot_method_is_noised_round_by_round_as_its_shares_say(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    settings = PrivacySettings("user_dp", epsilon=6.0, noise_seed=1)
    mu = total_mu(settings, 60)
    space = workspace(PRIVATE_EASE, 2, privacy_mu=mu)
    assert isinstance(space.algorithm, StatisticsRecommender)
    facts = Federation(60, 1000, "all", 1.0, 100, space.algorithm.budget_shares)
    plan = make_plan(settings, facts)
    outcome, ledger, _ = run(space, plan, tmp_path)
    assert len(outcome.rounds) == len(ledger.entries) == len(space.algorithm.budget_shares)
    assert sum(entry.noise_multiplier**-2 for entry in ledger.entries) == pytest.approx(mu**2)
    assert ledger.composed()["user"].value == pytest.approx(6.0, rel=1e-6)
    assert ledger.composed()["user"].accountant == "gaussian"


def test_canaries_are_clipped_noised_and_found_out_only_as_far_as_epsilon_allows(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(synthetic_split, 4, epsilon=4.0)
    audit = CanaryAudit(60, 1.0, seed=5)
    run(workspace(FEDMF, **DENSE), plan, tmp_path, audit)
    # With a delta of 60^-1.1 so few canaries prove nothing; the mechanism's epsilon at 1e-6 is larger than its 4.0.
    honest = audit.result(1e-6, gaussian_epsilon(plan.mu, 1e-6))
    assert honest["rounds"] == 4
    assert not honest["violated"]
    quiet = replace(plan, noise=(0.001,))
    caught = CanaryAudit(60, 1.0, seed=5)
    run(workspace(FEDMF, **DENSE), quiet, tmp_path, caught)
    assert caught.result(1e-6, 2.0)["violated"]


def test_a_private_run_reports_its_last_round(
    workspace: WorkspaceFactory, synthetic_split: Split, tmp_path: Path
) -> None:
    plan = plan_of(synthetic_split, 4, noise_multiplier=0.5)
    space = workspace(FEDMF, **DENSE)
    ledger = Ledger.start(tmp_path / "ledger.json", SUBJECT, plan.delta)
    guard = Guard(plan, space.algorithm, ledger, "run", 3)
    outcome = run_federation(space, FederationSettings(rounds=4), EvaluationSettings(every=1), INLINE, guard=guard)
    assert outcome.best_round == 4
    assert torch.equal(outcome.best_shared["item"], outcome.final_shared["item"])
