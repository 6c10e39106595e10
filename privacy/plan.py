"""What a run will release, under which guarantee, decided and checked before anything starts.

=============  ==================  ===============================  =========================================
mode           unit, adjacency     noise, relative to               a unit's releases
=============  ==================  ===============================  =========================================
user_dp        user, add/remove    C, in the sum over users         one a round, Poisson sampled at rate q
local_dp       user, replace       2C, on every device's upload     one a round (the server knows who uploads)
example_dp     interaction, a./r.  C, in every local step           ``steps`` a round, Poisson sampled
=============  ==================  ===============================  =========================================
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedrec.errors import ConfigError
from privacy.accountants import Epsilon, Release, default_delta, gaussian_mu
from privacy.calibration import affordable_steps, cached_epsilon, noise_multiplier
from privacy.settings import PrivacySettings


@dataclass(frozen=True)
class Federation:
    """What a plan has to know of the federation, all of it public.

    ``rounds`` 0 asks for as many as the budget allows. ``shares`` are those of a one-shot method's rounds (None:
    a gradient method), ``n_interactions`` those of all users, ``silos`` how many data holders (0: devices).
    """

    n_users: int
    n_interactions: int
    sampler: str
    fraction: float
    rounds: int
    shares: tuple[float, ...] | None = None
    silos: int = 0


@dataclass(frozen=True)
class PrivacyPlan:
    """A guarantee and the noise that gives it.

    ``noise`` holds each round's noise multiplier (one entry: the same in all), already without the part that adaptive
    clipping spends; ``accounted`` the multipliers that the accountant is told. ``expected`` is qN, the divisor of the
    mean. ``epsilon`` is what all planned rounds cost, infinite without noise. Under
    ``example_dp`` ``expected_batch`` is the public divisor of a local step's sum, ``silos`` how many data holders there
    are (0: devices).
    """

    settings: PrivacySettings
    unit: str
    adjacency: str
    sampler: str
    sample_rate: float
    rounds: int
    steps: int
    delta: float
    noise: tuple[float, ...]
    accounted: tuple[float, ...]
    expected: float
    min_survivors: int
    epsilon: float
    accountant: str
    note: str | None
    mu: float
    allowed_rounds: int
    expected_batch: float = 0.0
    silos: int = 0

    def noise_multiplier(self, round_number: int) -> float:
        """Of round ``round_number`` (from 1), relative to the sensitivity."""
        return self.noise[min(round_number, len(self.noise)) - 1]

    def accounted_multiplier(self, round_number: int) -> float:
        """What the accountant is told of round ``round_number``: the joint release with adaptive clipping's count."""
        return self.accounted[min(round_number, len(self.accounted)) - 1]

    @property
    def sensitivity_factor(self) -> float:
        """The sensitivity in units of the clipping norm: replacing a user moves its upload by up to 2C."""
        return 2.0 if self.settings.mode == "local_dp" else 1.0

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on adaptive clipping's count of unclipped devices."""
        return self.settings.clip_count_noise or self.expected / 20.0

    @property
    def private(self) -> bool:
        """Whether the result may be called private: noise, from a generator that nobody can repeat."""
        return not self.settings.noiseless and self.settings.noise_seed is None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the run's files; JSON knows no infinity, so it is written as a word."""
        found = dataclasses.asdict(self)
        return {key: _plain(value) for key, value in found.items()}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> PrivacyPlan:
        """The plan that :meth:`to_dict` wrote."""
        values = {key: _numbers(value) for key, value in document.items()}
        return cls(**{**values, "settings": PrivacySettings(**values["settings"])})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    return "inf" if value == math.inf else value


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_numbers(inner) for inner in value)
    return math.inf if value == "inf" else value


def make_plan(
    settings: PrivacySettings, federation: Federation, spent: Sequence[Sequence[Release]] = ((),)
) -> PrivacyPlan:
    """Solve for what is not given among epsilon, noise and rounds; ``spent`` are the releases of an
    earlier ledger, one list for each group of units that may be the worst.

    Raises:
        ConfigError: a guarantee that cannot be given, or would be wrong; names the setting and the remedy.
    """
    _check_sampler(settings, federation)
    units = federation.n_users if settings.mode != "example_dp" else federation.n_interactions
    named = "users" if settings.mode != "example_dp" else "interactions"
    delta = settings.delta if settings.delta is not None else default_delta(units)
    if delta >= 1.0 / units:
        raise ConfigError(
            f"privacy.delta={delta:g}: with {units:,} {named} it must be below 1/{units} (else publishing one of them "
            f"outright would pass); leave it out for {default_delta(units):.2g}"
        )
    everybody = federation.sampler == "all" or settings.mode == "local_dp"
    rate = settings.sample_rate if settings.mode == "example_dp" else 1.0 if everybody else federation.fraction
    steps = settings.steps if settings.mode == "example_dp" else 1
    expected = federation.n_users * (1.0 if federation.sampler == "all" else federation.fraction)
    rounds = len(federation.shares) if federation.shares else federation.rounds
    if federation.shares:
        accounted = _shared_out(settings, total_mu(settings, federation.n_users), federation.shares)
    else:
        rounds, multiplier = _solve(settings, delta, rate, rounds, steps)
        accounted = (multiplier,)
    cost = _cost(accounted, rate, rounds, steps, delta, settings)
    plan = PrivacyPlan(
        settings, "interaction" if settings.mode == "example_dp" else "user", _ADJACENCY[settings.mode],
        "all" if rate == 1.0 else "poisson", rate, rounds, steps, delta, accounted, accounted, expected,
        _survivors(settings, expected), cost.value, cost.accountant, cost.note,
        _mu(cost.value, delta), rounds,
    )  # fmt: skip
    if settings.adaptive_clipping:
        plan = dataclasses.replace(plan, noise=tuple(_without_count(plan, z) for z in accounted))
    if settings.mode == "example_dp":
        holders = federation.silos or federation.n_users
        typical = max(1.0, federation.n_interactions / holders)
        plan = dataclasses.replace(plan, expected_batch=rate * typical, silos=federation.silos)
    return dataclasses.replace(plan, allowed_rounds=min(_allowed(plan, one) for one in spent))


def total_mu(settings: PrivacySettings, n_users: int) -> float:
    """The μ of all releases of a one-shot method together, before anything is planned; infinite without noise."""
    if settings.noiseless:
        return math.inf
    if settings.epsilon is None:
        assert settings.noise_multiplier is not None
        return 1.0 / settings.noise_multiplier
    return gaussian_mu(settings.epsilon, settings.delta if settings.delta is not None else default_delta(n_users))


_ADJACENCY = {
    "user_dp": "add/remove one user",
    "local_dp": "replace one user",
    "example_dp": "add/remove one interaction",
}


def _check_sampler(settings: PrivacySettings, federation: Federation) -> None:
    if settings.mode == "user_dp" and federation.sampler == "fixed":
        raise ConfigError(
            "federation.sampler=fixed: a cohort of fixed size is not a Poisson sample, and must not get its epsilon; "
            "write federation.sampler=poisson, or all"
        )
    if federation.shares and federation.sampler != "all":
        raise ConfigError(
            f"federation.sampler={federation.sampler}: a one-shot method asks everybody once; write "
            "federation.sampler=all"
        )
    if settings.trust == "secure_aggregation":
        expected = federation.n_users * (1.0 if federation.sampler == "all" else federation.fraction)
        if settings.min_survivors > expected:
            raise ConfigError(
                f"privacy.min_survivors={settings.min_survivors}: a round expects {expected:.0f} devices, fewer than "
                "secure aggregation's threshold; lower it, or raise federation.fraction"
            )


def _survivors(settings: PrivacySettings, expected: float) -> int:
    if settings.trust != "secure_aggregation":
        return 0
    return settings.min_survivors or max(1, math.floor(0.8 * expected))


def _solve(settings: PrivacySettings, delta: float, rate: float, rounds: int, steps: int) -> tuple[int, float]:
    """Rounds and noise multiplier."""
    target, given = settings.epsilon, settings.noise_multiplier
    if rounds == 0 and (target is None or given is None or settings.noiseless):
        raise ConfigError(
            "federation.rounds=0 asks for as many rounds as a budget allows; give privacy.epsilon and "
            "privacy.noise_multiplier, or write how many rounds"
        )
    if settings.noiseless:
        return rounds, 0.0
    if given is None:
        assert target is not None
        return rounds, noise_multiplier(target, delta, rate, rounds * steps, settings.accountant)
    if target is None:
        return rounds, given
    release = Release(given, rate, 1)
    if rounds == 0:
        rounds = affordable_steps(target, delta, release, (), settings.accountant) // steps
        if rounds == 0:
            raise ConfigError(
                f"privacy.epsilon={target:g} does not pay for one round at privacy.noise_multiplier={given:g}; raise "
                "either"
            )
        return rounds, given
    cost = cached_epsilon([Release(given, rate, rounds * steps)], delta, settings.accountant)
    if cost.value > target:
        raise ConfigError(
            f"privacy.epsilon={target:g}: {rounds} rounds at privacy.noise_multiplier={given:g} cost "
            f"{cost.value:.4g}; leave one of the three out (federation.rounds=0 takes as many as the budget allows)"
        )
    return rounds, given


def _shared_out(settings: PrivacySettings, mu: float, shares: tuple[float, ...]) -> tuple[float, ...]:
    """Each round's noise multiplier: round r gets ``shares[r]`` of μ²."""
    if settings.noiseless:
        return (0.0,) * len(shares)
    if settings.epsilon is not None and settings.noise_multiplier is not None:
        raise ConfigError(
            "privacy.noise_multiplier: a one-shot method has a fixed number of rounds; give privacy.epsilon or it, "
            "not both"
        )
    return tuple(1.0 / (mu * math.sqrt(share)) for share in shares)


def _releases(accounted: Sequence[float], rate: float, rounds: int, steps: int) -> list[Release]:
    if len(accounted) == 1:
        return [Release(accounted[0], rate, rounds * steps)]
    return [Release(z, rate, steps) for z in accounted[:rounds]]


def _cost(
    accounted: Sequence[float], rate: float, rounds: int, steps: int, delta: float, settings: PrivacySettings
) -> Epsilon:
    return cached_epsilon(_releases(accounted, rate, rounds, steps), delta, settings.accountant)


def _mu(value: float, delta: float) -> float:
    return math.inf if math.isinf(value) else gaussian_mu(value, delta)


def _without_count(plan: PrivacyPlan, multiplier: float) -> float:
    """The update's noise multiplier when the count of unclipped devices is released beside it.

    Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, theorem 1: z_Δ = (z⁻² −
    (2σ_b)⁻²)^−½.
    """
    if multiplier == 0.0:
        return 0.0
    left = multiplier**-2 - (2.0 * plan.count_noise) ** -2
    if left <= 0.0:
        raise ConfigError(
            f"privacy.clip_count_noise={plan.count_noise:.3g}: the count alone costs more than the whole budget; write "
            f"more than {multiplier / 2:.3g}"
        )
    return float(left**-0.5)


def _allowed(plan: PrivacyPlan, spent: Sequence[Release]) -> int:
    """How many of the planned rounds ``privacy.budget`` pays for, after what was spent before."""
    budget = plan.settings.budget
    if budget is None:
        return plan.rounds
    if plan.settings.noiseless:
        raise ConfigError(f"privacy.budget={budget:g}: a run without noise spends any budget; write privacy.epsilon")
    if len(plan.accounted) == 1:
        release = Release(plan.accounted[0], plan.sample_rate, 1)
        count = affordable_steps(
            budget, plan.delta, release, spent, plan.settings.accountant, most=plan.rounds * plan.steps
        )
        allowed = min(plan.rounds, count // plan.steps)
    else:
        releases = _releases(plan.accounted, plan.sample_rate, plan.rounds, plan.steps)
        costs = [
            cached_epsilon([*spent, *releases[: n + 1]], plan.delta, plan.settings.accountant).value
            for n in range(plan.rounds)
        ]
        allowed = int(np.searchsorted(costs, budget, side="right"))
    if allowed == 0:
        already = cached_epsilon(spent, plan.delta, plan.settings.accountant).value if spent else 0.0
        raise ConfigError(
            f"privacy.budget={budget:g}: {already:.4g} of it is spent in the ledger, and not one more round fits; "
            "raise the budget, or write a smaller privacy.epsilon"
        )
    return allowed
