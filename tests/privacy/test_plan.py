"""What a run will release is decided before it starts: two of epsilon, noise and rounds give the third."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fedrec.errors import ConfigError
from privacy.accountants import Release, epsilon, gaussian_mu
from privacy.plan import Federation, PrivacyPlan, make_plan, total_mu
from privacy.settings import PrivacySettings

ML100K = Federation(943, 98_114, "poisson", 0.1, 100)


def plan(facts: Federation = ML100K, mode: Any = "user_dp", **settings: Any) -> Any:
    return make_plan(PrivacySettings(mode, **settings), facts)


def facts(**changes: Any) -> Federation:
    return Federation(**{**ML100K.__dict__, **changes})


def test_epsilon_and_rounds_give_the_noise() -> None:
    found = plan(epsilon=4.0)
    # shared facts, N 943, q .1, T 100, delta N^-1.1: PRV 1.14, PLD 1.14
    assert found.noise_multiplier(1) == pytest.approx(1.14, rel=0.01)
    assert 3.98 < found.epsilon <= 4.0
    assert found.delta == pytest.approx(943**-1.1)
    assert found.expected == pytest.approx(94.3)


def test_noise_and_rounds_give_epsilon() -> None:
    found = plan(noise_multiplier=1.14)
    assert found.epsilon == pytest.approx(4.0, rel=0.02)
    assert found.accountant == "prv"


def test_epsilon_and_noise_give_the_rounds() -> None:
    found = plan(facts(rounds=0), epsilon=4.0, noise_multiplier=1.5)
    assert found.epsilon <= 4.0
    one_more = epsilon([Release(1.5, 0.1, found.rounds + 1)], found.delta)
    assert one_more.value > 4.0 * 0.999
    assert found.rounds > 100


def test_three_that_agree_are_accepted_and_three_that_do_not_are_refused() -> None:
    assert plan(epsilon=5.0, noise_multiplier=1.14).rounds == 100
    with pytest.raises(ConfigError, match=r"privacy\.epsilon=2: 100 rounds at privacy\.noise_multiplier=1\.14 cost"):
        plan(epsilon=2.0, noise_multiplier=1.14)


def test_full_participation_is_accounted_for_exactly() -> None:
    found = plan(facts(sampler="all", fraction=1.0), epsilon=8.0)
    assert found.accountant == "gaussian"
    # μ = √T/σ of the exact Gaussian mechanism; facts: PLD 4.98
    assert found.noise_multiplier(1) == pytest.approx(10.0 / gaussian_mu(8.0, found.delta), rel=1e-6)
    assert found.noise_multiplier(1) == pytest.approx(4.98, rel=0.01)


def test_local_privacy_replaces_a_user_and_gets_no_amplification_from_the_servers_sampling() -> None:
    found = plan(mode="local_dp", epsilon=8.0)
    assert (found.adjacency, found.sampler, found.sample_rate) == ("replace one user", "all", 1.0)
    assert found.sensitivity_factor == 2.0
    assert found.noise_multiplier(1) == pytest.approx(10.0 / gaussian_mu(8.0, found.delta), rel=1e-6)


def test_example_level_privacy_counts_local_steps_and_interactions() -> None:
    found = plan(mode="example_dp", epsilon=8.0, steps=10, sample_rate=0.2)
    assert (found.unit, found.sample_rate, found.steps) == ("interaction", 0.2, 10)
    assert found.delta == pytest.approx(98_114**-1.1)
    assert found.epsilon == pytest.approx(
        epsilon([Release(found.noise_multiplier(1), 0.2, 1000)], found.delta).value, rel=1e-6
    )
    assert found.expected_batch == pytest.approx(0.2 * 98_114 / 943)
    silo = plan(facts(silos=4), mode="example_dp", epsilon=8.0)
    assert silo.expected_batch == pytest.approx(0.1 * 98_114 / 4)


def test_a_one_shot_method_shares_its_budget_out_among_its_rounds() -> None:
    found = plan(facts(sampler="all", fraction=1.0, shares=(0.05, 0.95)), epsilon=2.0)
    mu = gaussian_mu(2.0, found.delta)
    assert total_mu(found.settings, 943) == pytest.approx(mu)
    assert found.noise == pytest.approx((1 / (mu * math.sqrt(0.05)), 1 / (mu * math.sqrt(0.95))))
    assert found.epsilon == pytest.approx(2.0, rel=1e-6)
    assert found.rounds == 2


def test_an_infinite_epsilon_is_no_noise_and_not_private() -> None:
    found = plan(epsilon=math.inf)
    assert found.noise == (0.0,)
    assert math.isinf(found.epsilon)
    assert not found.private


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"epsilon": 1.0, "delta": 1 / 943}, r"privacy\.delta=0\.00106.* below 1/943"),
        ({"rounds": 0}, {"epsilon": 1.0}, r"federation\.rounds=0 asks for as many rounds as a budget allows; give"),
        ({"rounds": 0}, {"epsilon": 0.01, "noise_multiplier": 0.5}, r"privacy\.epsilon=0\.01 does not pay for one"),
        ({"sampler": "fixed"}, {"epsilon": 1.0}, r"federation\.sampler=fixed: .*write federation\.sampler=poisson"),
        (
            {}, {"epsilon": 1.0, "trust": "secure_aggregation", "min_survivors": 100},
            r"privacy\.min_survivors=100: a round expects 94 devices",
        ),
        ({"shares": (0.5, 0.5)}, {"epsilon": 1.0}, r"federation\.sampler=poisson: a one-shot method asks everybody"),
        (
            {"sampler": "all", "fraction": 1.0, "shares": (0.5, 0.5)}, {"epsilon": 1.0, "noise_multiplier": 1.0},
            r"privacy\.noise_multiplier: a one-shot method has a fixed number of rounds",
        ),
        ({}, {"noise_multiplier": 0.0, "budget": 3.0}, r"privacy\.budget=3: a run without noise spends any budget"),
        ({}, {"noise_multiplier": 0.3, "budget": 0.1}, r"privacy\.budget=0\.1: .* not one more round fits"),
    ],
)  # fmt: skip
def test_a_guarantee_that_cannot_be_given_is_refused(
    changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(facts(**changes), **settings)


@pytest.mark.parametrize("settings", [{"epsilon": math.inf}, {"epsilon": 3.0, "adaptive_clipping": True}])
def test_a_plan_survives_being_written_as_json(settings: dict[str, Any]) -> None:
    found = plan(**settings)
    document = json.dumps(found.to_dict(), allow_nan=False)
    assert PrivacyPlan.from_dict(json.loads(document)) == found
