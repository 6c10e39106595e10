"""What noisy releases add up to: the epsilon of a list of (Poisson-subsampled) Gaussian mechanisms.

Neighbouring data sets differ in the presence of one unit (add/remove). Releases in which every unit takes part compose
exactly: Gaussian mechanisms of σ₁, σ₂, … are one of μ² = Σ 1/σᵢ² (Dong, Roth and Su 2022, "Gaussian differential
privacy", corollary 2), whose δ(ε) is known in closed form (``privacy.gaussian``). With sampling, the privacy random
variables are composed numerically (Gopi, Lee and Wutschitz 2021, "Numerical composition of differential privacy";
Opacus' PRVAccountant), and where that fails numerically Rényi DP bounds them (Mironov, Talwar and Zhang 2019, "Rényi
differential privacy of the sampled Gaussian mechanism"). Opacus' "gdp" accountant is a central limit approximation and
no bound: it is not offered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedrec.errors import ConfigError
from privacy.gaussian import check_delta, default_delta, gaussian_delta, gaussian_epsilon, gaussian_mu

__all__ = [
    "ACCOUNTANTS", "Epsilon", "Release", "check_accountant", "check_delta", "default_delta", "epsilon",
    "gaussian_delta", "gaussian_epsilon", "gaussian_mu", "merge",
]  # fmt: skip

ACCOUNTANTS = ("auto", "prv", "rdp")
_EPSILON_ERROR = 0.01  # what PRV adds to its estimate to make it a bound: at most this, and about 2 % of epsilon
_MESH_POINTS = 2**21  # of PRV's grid: a second or two, and 200 MB
_MANY = 24  # distinct sampled mechanisms that PRV composes as they are, at about 0.1 s each
_ROUNDING = 0.005  # beyond that, noise multipliers are rounded down to a grid as fine as this


@dataclass(frozen=True)
class Release:
    """A Gaussian mechanism on Poisson-sampled units, run ``steps`` times.

    ``noise_multiplier`` is the noise's standard deviation over the L2 sensitivity to adding or removing one unit.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if not self.noise_multiplier >= 0.0:
            raise ConfigError(f"privacy.noise_multiplier={self.noise_multiplier}: write 0 (no noise) or more")
        if not 0.0 < self.sample_rate <= 1.0:
            raise ConfigError(f"sample rate {self.sample_rate}: a Poisson rate lies in (0, 1]; write 1 for everybody")
        if self.steps < 0:
            raise ConfigError(f"{self.steps} releases: write a whole number, 0 or more")


@dataclass(frozen=True)
class Epsilon:
    """(``value``, ``delta``)-differential privacy; ``accountant`` is gaussian (exact), prv or rdp."""

    value: float
    delta: float
    accountant: str
    note: str | None = None


def epsilon(releases: Sequence[Release], delta: float, accountant: str = "auto") -> Epsilon:
    """What all the releases together spend; an upper bound, exact where ``accountant`` says gaussian.

    ``auto``: exact if no release is sampled, else PRV. ``prv`` and ``rdp`` choose one; PRV falls back to RDP, and the
    note says why. Any release without noise makes it infinite.

    Raises:
        ConfigError: an unknown accountant, gdp, or a delta outside (0, 1).
    """
    check_accountant(accountant)
    check_delta(delta)
    merged = merge(releases)
    sampled = any(release.sample_rate < 1.0 for release in merged)
    if accountant == "auto":
        accountant = "prv" if sampled else "gaussian"
    if any(release.noise_multiplier == 0.0 for release in merged):
        return Epsilon(math.inf, delta, accountant, "a release without noise: no guarantee")
    if not merged or accountant == "gaussian":
        return Epsilon(gaussian_epsilon(_mu(merged), delta), delta, "gaussian")
    if accountant == "rdp":
        return Epsilon(_rdp_epsilon(merged, delta), delta, "rdp")
    return _prv_or_rdp(merged, delta)


def merge(releases: Iterable[Release]) -> list[Release]:
    """The same releases, equal mechanisms counted together and unsampled ones composed into a single one; sorted.

    Composition has no order, and Gaussian mechanisms without sampling compose to one, so nothing is lost.
    """
    steps: dict[tuple[float, float], int] = {}
    full = []
    for release in releases:
        if release.steps == 0 or math.isinf(release.noise_multiplier):
            continue
        if release.sample_rate == 1.0:
            full.append(release)
        else:
            key = (release.sample_rate, release.noise_multiplier)
            steps[key] = steps.get(key, 0) + release.steps
    merged = [Release(sigma, rate, count) for (rate, sigma), count in sorted(steps.items())]
    if full:
        mu = _mu(full)
        merged.append(Release(1.0 / mu if mu < math.inf else 0.0))
    return merged


def check_accountant(name: str) -> None:
    """ConfigError unless it is one of ours; gdp is told why."""
    if name == "gdp":
        raise ConfigError(
            "privacy.accountant=gdp: it is a central limit approximation, no bound on epsilon; write auto, prv or rdp"
        )
    if name not in ACCOUNTANTS:
        raise ConfigError(f"privacy.accountant={name}: write {', '.join(ACCOUNTANTS[:-1])} or {ACCOUNTANTS[-1]}")


def _mu(releases: Sequence[Release]) -> float:
    if any(release.noise_multiplier == 0.0 for release in releases):
        return math.inf
    return math.hypot(*(math.sqrt(release.steps) / release.noise_multiplier for release in releases))


@lru_cache(maxsize=1)
def _orders() -> tuple[float, ...]:
    """Opacus' Rényi orders, and larger ones, which decide where epsilon is small."""
    from opacus.accountants import RDPAccountant

    return (*RDPAccountant.DEFAULT_ALPHAS, 80, 96, 128, 192, 256, 384, 512, 768, 1024)


@lru_cache(maxsize=4096)
def _rdp_curve(noise_multiplier: float, sample_rate: float) -> npt.NDArray[np.float64]:
    """Rényi divergence of one release at every order, float64; infinite at orders where Opacus' sums break down."""
    from opacus.accountants.analysis.rdp import compute_rdp

    curve = np.full(len(_orders()), np.inf)
    with np.errstate(all="ignore"):
        for i, order in enumerate(_orders()):
            try:
                value = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=float(order))
            except (ValueError, ArithmeticError):
                continue
            if value >= 0.0:
                curve[i] = value
    curve.flags.writeable = False
    return curve


def _rdp_epsilon(releases: Sequence[Release], delta: float) -> float:
    """Converted with theorem 21 of Balle et al. 2020 ("Hypothesis testing interpretations and Rényi DP")."""
    total = sum(release.steps * _rdp_curve(release.noise_multiplier, release.sample_rate) for release in releases)
    orders = np.array(_orders())
    bounds = total - (np.log(delta) + np.log(orders)) / (orders - 1.0) + np.log1p(-1.0 / orders)
    return max(0.0, float(np.min(bounds)))


def _prv_or_rdp(releases: Sequence[Release], delta: float) -> Epsilon:
    exact = len(releases) <= _MANY
    note = None
    if not exact:
        releases = merge(_rounded_down(release) for release in releases)
        note = f"noise multipliers rounded down by at most {_ROUNDING:.1%}"
    bound = _rdp_epsilon(releases, delta)
    try:
        value = _prv_epsilon(releases, delta, bound)
    except (ArithmeticError, IndexError, RuntimeError, ValueError) as error:
        return Epsilon(bound, delta, "rdp", f"RDP's bound, as PRV failed numerically: {error}")
    if value > bound:
        return Epsilon(bound, delta, "rdp", f"RDP's bound, as PRV's {value:.4g} is above it")
    return Epsilon(value, delta, "prv", note)


def _rounded_down(release: Release) -> Release:
    grid = math.log1p(_ROUNDING)
    return Release(
        math.exp(math.floor(math.log(release.noise_multiplier) / grid) * grid), release.sample_rate, release.steps
    )


def _prv_epsilon(releases: Sequence[Release], delta: float, bound: float) -> float:
    """PRV's upper end. RuntimeError where the composed distribution is not one, or does not have the delta asked for:
    Opacus looks epsilon up in a curve that rounding may have made worthless, and says nothing."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(release.noise_multiplier, release.sample_rate, release.steps) for release in releases]
    delta_error = delta / 1000.0
    error = min(_EPSILON_ERROR, 0.02 * bound)
    reach = 3.0 + _rdp_epsilon(releases, delta_error / 4.0)  # half the grid, as Opacus will choose it
    if not reach < 700.0:
        raise RuntimeError("the privacy loss is beyond the range of double precision")
    per_point = math.sqrt(sum(release.steps for release in releases) * math.log(12.0 / delta_error) / 2.0)
    error = max(error, 2.0 * reach * per_point / _MESH_POINTS)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        composed = accountant._get_dprv(eps_error=error, delta_error=delta_error)
        lower, estimate, upper = composed.compute_epsilon(delta, delta_error, error)
        mass, found = float(np.sum(composed.pmf)), float(composed.compute_delta_estimate(estimate))
        noise = -float(np.minimum(composed.pmf, 0.0).sum())  # the FFT's rounding, of which half falls below zero
    if not (math.isfinite(upper) and lower <= estimate <= upper):
        raise RuntimeError("no finite epsilon")
    if not (abs(mass - 1.0) <= 1e-4 and noise <= 0.02 * delta and abs(found - delta) <= 0.01 * delta):
        raise RuntimeError("delta drowns in rounding errors")
    return max(0.0, float(upper))
