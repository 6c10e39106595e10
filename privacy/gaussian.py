"""The exact privacy curve of the Gaussian mechanism, and its inverses.

A mechanism of sensitivity 1 and noise σ is tested against its neighbour as N(0, 1) against N(μ, 1), μ = 1/σ, and
δ(ε) = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2) (Balle and Wang 2018, "Improving the Gaussian mechanism for differential
privacy", theorem 8; Dong, Roth and Su 2022, "Gaussian differential privacy", corollary 1).
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import erfcx, ndtr, ndtri

from fedrec.errors import ConfigError


def gaussian_delta(mu: float, epsilon: float) -> float:
    """The smallest δ with which a mechanism of ``mu`` is (``epsilon``, δ)-differentially private; ``epsilon`` ≥ 0."""
    if mu == 0.0:
        return 0.0
    return 1.0 if math.isinf(mu) else _delta_at(mu, epsilon / mu - mu / 2.0)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The smallest ε with δ(ε) ≤ ``delta``; 0 where δ(0) is already enough, infinite for an infinite ``mu``."""
    check_delta(delta)
    if math.isinf(mu) or gaussian_delta(mu, 0.0) <= delta:
        return mu if math.isinf(mu) else 0.0
    # In x = ε/μ − μ/2 nothing overflows for any μ. Φ(−x) alone is no smaller than δ, so it ends the bracket.
    x = brentq(lambda x: math.log(max(_delta_at(mu, x), 1e-320) / delta), -mu / 2.0, -ndtri(delta), xtol=1e-13)
    while _delta_at(mu, x) > delta:  # the root is good to rounding; the guarantee needs the right side of it
        x += max(abs(x), 1e-3) * 1e-13
    return max(0.0, float(mu * (x + mu / 2.0)))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The largest μ = 1/σ of a Gaussian mechanism that is (``epsilon``, ``delta``)-differentially private."""
    check_delta(delta)
    if not epsilon >= 0.0:
        raise ConfigError(f"privacy.epsilon={epsilon}: write a positive number, for example privacy.epsilon=4")
    if math.isinf(epsilon):
        return math.inf
    high = 1.0
    while gaussian_delta(high, epsilon) <= delta:
        high *= 2.0
    low = high / 2.0
    while gaussian_delta(low, epsilon) > delta:
        low /= 2.0
    mu = brentq(lambda m: math.log(max(gaussian_delta(m, epsilon), 1e-320) / delta), low, high, xtol=1e-300, rtol=1e-14)
    while gaussian_delta(mu, epsilon) > delta:
        mu *= 1.0 - 1e-14
    return float(mu)


def default_delta(n: int) -> float:
    """N^-1.1: below 1/N, at which publishing one unit in full would count as private."""
    if n < 2:
        raise ConfigError(f"privacy.delta: {n} unit(s) are too few for a default; write privacy.delta below 1/N")
    return float(n**-1.1)


def check_delta(delta: float) -> None:
    """ConfigError outside (0, 1)."""
    if not 0.0 < delta < 1.0:
        raise ConfigError(f"privacy.delta={delta}: write a number between 0 and 1 over the number of units")


def _delta_at(mu: float, x: float) -> float:
    """δ at ε = μ(x + μ/2). As e^ε φ(x + μ) = φ(x), it is φ(x) times a difference of Mills ratios: no exponential."""
    density = math.exp(-x * x / 2.0) / math.sqrt(2.0 * math.pi)
    if x < 0.0:  # the ratio itself would overflow far out
        return float(ndtr(-x) - density * _mills(x + mu))
    return density * (_mills(x) - _mills(x + mu))


def _mills(z: float) -> float:
    return math.sqrt(math.pi / 2.0) * float(erfcx(z / math.sqrt(2.0)))
