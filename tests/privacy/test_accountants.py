"""Accountants: what they say equals the exact curve, the published-table values, and an independent library."""

from __future__ import annotations

import itertools
import logging
import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from fedrec.errors import ConfigError
from privacy import accountants
from privacy.accountants import Release, default_delta, epsilon, gaussian_delta, gaussian_epsilon, gaussian_mu, merge

ML100K = default_delta(943)

# (releases, delta): small and large rates, one step and very many, heterogeneous, with an unsampled part
LISTS = [
    ([Release(1.14, 0.1, 100)], ML100K),
    ([Release(1.0, 0.001, 100_000)], 1e-6),
    ([Release(5.21, 0.1, 100)], 1e-9),
    ([Release(0.9, 0.9, 4)], ML100K),
    ([Release(3.0, 0.1, 50), Release(4.0, 0.2, 50)], ML100K),
    ([Release(3.0, 0.1, 100), Release(10.0, 1.0, 1)], 1e-6),
]


def pld(releases: list[Release], delta: float) -> float:
    """dp-accounting's privacy loss distribution: discretised pessimistically, both directions of add/remove."""
    accountant = PLDAccountant()
    logging.disable(logging.WARNING)
    try:
        for one in releases:
            event = GaussianDpEvent(one.noise_multiplier)
            sampled = PoissonSampledDpEvent(one.sample_rate, event) if one.sample_rate < 1 else event
            accountant.compose(sampled, one.steps)
        return float(accountant.get_epsilon(delta))
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("releases", "delta"), LISTS)
def test_sampled_epsilon_is_a_bound_within_two_per_cent_of_an_independent_accountant(
    releases: list[Release], delta: float
) -> None:
    found, oracle = epsilon(releases, delta), pld(releases, delta)
    assert (found.accountant, found.note) == ("prv", None)
    assert 0.99 * oracle <= found.value <= 1.02 * oracle


@pytest.mark.parametrize(("sigma", "steps", "delta"), [(8.6, 100, ML100K), (1.0, 1, 1e-5), (50.0, 100, 1e-3)])
def test_unsampled_epsilon_is_exact(sigma: float, steps: int, delta: float) -> None:
    found = epsilon([Release(sigma, steps=steps)], delta)
    assert found.accountant == "gaussian"
    assert found.value == pytest.approx(pld([Release(sigma, steps=steps)], delta), rel=2e-3)


def test_the_delta_curve_is_that_of_a_planted_neighbour_pair() -> None:
    """N(0, s²) against N(1, s²): δ(ε) = E over the first of max(0, 1 − e^ε q(x)/p(x)), by drawing and counting."""
    draw = np.random.default_rng(0)
    for sigma in (0.5, 1.0, 3.0):
        x = draw.normal(0.0, sigma, 2_000_000)
        log_ratio = norm.logpdf(x, 1.0, sigma) - norm.logpdf(x, 0.0, sigma)
        for eps in (0.0, 0.2, 1.0, 3.0):
            loss = np.maximum(0.0, -np.expm1(eps + log_ratio))
            error = loss.std() / math.sqrt(x.size)
            assert abs(loss.mean() - gaussian_delta(1.0 / sigma, eps)) < 5.0 * error + 1e-12


@given(mu=st.floats(1e-3, 60.0), share=st.floats(0.0, 1.0))
def test_the_delta_curve_equals_its_integral(mu: float, share: float) -> None:
    eps = share * (mu * mu / 2.0 + 8.0 * mu)
    low = eps / mu + mu / 2.0  # where the density at μ is e^ε times the one at 0

    def excess(x: float) -> float:
        return -math.exp(-((x - mu) ** 2) / 2.0) / math.sqrt(2.0 * math.pi) * math.expm1(eps - x * mu + mu * mu / 2.0)

    ends = low + np.array([0.0, 0.1, 1.0, 4.0, 10.0, 40.0 + mu])
    integral = sum(quad(excess, *pair, epsabs=0.0, epsrel=1e-9)[0] for pair in itertools.pairwise(ends))
    assert gaussian_delta(mu, eps) == pytest.approx(integral, rel=1e-6, abs=1e-15)


@given(mu=st.floats(1e-6, 1e8), exponent=st.floats(-30.0, -0.3))
def test_epsilon_inverts_delta_without_overflow_and_never_below(mu: float, exponent: float) -> None:
    delta = 10.0**exponent
    eps = gaussian_epsilon(mu, delta)
    assert 0.0 <= eps < math.inf
    if 0.0 < eps < 1e4:  # beyond, ε's own rounding moves δ
        assert gaussian_delta(mu, eps) == pytest.approx(delta, rel=1e-6)
    if 1e-3 < eps < 1e4:
        assert gaussian_mu(eps, delta) == pytest.approx(mu, rel=1e-6)
        assert gaussian_delta(gaussian_mu(eps, delta), eps) <= delta


def test_mu_of_the_common_budgets() -> None:
    """Exact full-participation values at δ = N^-1.1 for 943 and 6040 users."""
    table = {943: [0.364, 0.655, 1.161, 2.009, 3.369], 6040: [0.305, 0.563, 1.022, 1.810, 3.105]}
    for users, row in table.items():
        found = [gaussian_mu(eps, default_delta(users)) for eps in (1, 2, 4, 8, 16)]
        assert found == pytest.approx(row, abs=6e-4)


@given(st.lists(st.tuples(st.sampled_from([0.7, 1.0, 4.0]), st.integers(0, 50)), min_size=1, max_size=8), st.data())
def test_two_runs_together_cost_what_one_run_of_the_sum_costs(
    parts: list[tuple[float, int]], data: st.DataObject
) -> None:
    releases = [Release(sigma, steps=steps) for sigma, steps in parts]
    cut = data.draw(st.integers(0, len(releases)))
    split = [*releases[cut:], *releases[:cut]]
    total = sum(steps / sigma**2 for sigma, steps in parts)
    whole = epsilon([Release(1 / math.sqrt(total))] if total else [], 1e-5).value
    assert epsilon(split, 1e-5).value == pytest.approx(whole, rel=1e-9)


def test_sampled_runs_compose_like_one_run_of_the_sum() -> None:
    halves = [Release(1.14, 0.1, 30), Release(2.0, 0.1, 10), Release(1.14, 0.1, 70)]
    assert epsilon(halves, ML100K) == epsilon([Release(2.0, 0.1, 10), Release(1.14, 0.1, 100)], ML100K)
    assert merge(halves) == [Release(1.14, 0.1, 100), Release(2.0, 0.1, 10)]


@settings(max_examples=8)
@given(sigma=st.floats(1.0, 30.0), rate=st.floats(0.01, 0.99), steps=st.integers(1, 100))
def test_sampled_bounds_lie_between_one_step_and_no_sampling(sigma: float, rate: float, steps: int) -> None:
    releases, delta = [Release(sigma, rate, steps)], 1e-5
    rdp, auto = epsilon(releases, delta, "rdp").value, epsilon(releases, delta).value
    # One step in closed form: removing a unit from (1−q)N(0)+qN(1) has δ(ε) = q·δ_full(log(1 + (e^ε − 1)/q)).
    one_step = math.log1p(rate * math.expm1(gaussian_epsilon(1.0 / sigma, delta / rate)))
    assert one_step * (1.0 - 1e-9) <= auto <= rdp
    assert rdp <= epsilon([Release(sigma, 1.0, steps)], delta, "rdp").value * (1.0 + 1e-9)


def test_more_noise_fewer_steps_and_less_sampling_cost_less() -> None:
    base = epsilon([Release(5.0, 0.1, 100)], ML100K).value
    for cheaper in (Release(5.3, 0.1, 100), Release(5.0, 0.09, 100), Release(5.0, 0.1, 90)):
        assert epsilon([cheaper], ML100K).value < base


def test_where_prv_fails_numerically_rdp_answers_and_the_note_says_so() -> None:
    tiny_noise = [Release(0.1, 0.1, 100)]
    found = epsilon(tiny_noise, 1e-6)
    assert found.accountant == "rdp"
    assert "PRV failed" in str(found.note)
    assert found.value == epsilon(tiny_noise, 1e-6, "rdp").value


def test_an_epsilon_read_from_rounding_noise_is_not_believed() -> None:
    """At δ = 1e-11 the FFT's rounding is as large as δ; Opacus answers all the same, here below the true 3.4."""
    found = epsilon([Release(1.0, 0.001, 100_000)], 1e-11)
    assert found.accountant == "rdp"
    assert "rounding" in str(found.note)


def test_many_noise_levels_are_rounded_down_and_cost_a_little_more() -> None:
    releases = [Release(4.0 + 0.004 * i, 0.1, 1) for i in range(26)]
    found = epsilon(releases, ML100K)
    assert found.accountant == "prv"
    assert "rounded down" in str(found.note)
    assert epsilon([Release(4.1, 0.1, 26)], ML100K).value < found.value
    assert found.value <= 1.02 * epsilon([Release(4.0, 0.1, 26)], ML100K).value


def test_no_noise_is_no_guarantee_and_nothing_released_costs_nothing() -> None:
    assert epsilon([Release(5.0, 0.1, 10), Release(0.0)], 1e-5).value == math.inf
    assert epsilon([], 1e-5).value == 0.0
    assert epsilon([Release(0.0, steps=0), Release(math.inf, 0.1, 5)], 1e-5).value == 0.0


def test_gdp_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="no bound on epsilon"):
        epsilon([Release(1.0)], 1e-5, "gdp")


@pytest.mark.parametrize(
    ("call", "key"),
    [
        (lambda: epsilon([Release(1.0)], 0.0), "privacy.delta=0.0"),
        (lambda: epsilon([Release(1.0)], 1.0), "privacy.delta=1.0"),
        (lambda: epsilon([Release(1.0)], 1e-5, "moments"), "privacy.accountant=moments"),
        (lambda: Release(-1.0), "privacy.noise_multiplier=-1.0"),
        (lambda: Release(math.nan), "privacy.noise_multiplier=nan"),
        (lambda: Release(1.0, 0.0), "sample rate 0.0"),
        (lambda: Release(1.0, 1.5), "sample rate 1.5"),
        (lambda: gaussian_mu(-1.0, 1e-5), "privacy.epsilon=-1.0"),
        (lambda: default_delta(1), "privacy.delta"),
    ],
)
def test_values_without_a_meaning_are_refused_by_name(call: object, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        call()  # type: ignore[operator]


def test_a_broken_prv_library_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution that loses a tenth of the mass must not yield an epsilon."""
    from opacus.accountants.analysis.prv import compose

    whole = compose._compose_fourier

    def lossy(dprv: object, count: int) -> object:
        found = whole(dprv, count)
        found.pmf[: len(found.pmf) // 2] *= 0.9
        return found

    monkeypatch.setattr(compose, "_compose_fourier", lossy)
    assert accountants.epsilon([Release(1.14, 0.1, 100)], ML100K).accountant == "rdp"
