"""Calibration: the noise of the known table, never too little, and answered at once the second time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedrec.errors import ConfigError
from privacy import calibration
from privacy.accountants import Release, default_delta, epsilon
from privacy.calibration import affordable_steps, cached_epsilon, noise_multiplier

# Noise multipliers of 100 releases at δ = N^-1.1 by RDP and by PRV, both computed with Opacus 1.6 alone.
TABLE = [
    (943, 0.1, 0.5, 5.81, 5.21),
    (943, 0.1, 4.0, 1.24, 1.14),
    (6040, 0.1, 1.0, 3.82, 3.50),
    (943, 1.0, 2.0, 16.9, 15.4),
    (943, 1.0, 16.0, 3.17, 2.97),
    (6040, 1.0, 0.5, 67.3, 62.0),
    (6040, 1.0, 8.0, 5.91, 5.53),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDREC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "accounting"


@pytest.mark.parametrize(("users", "rate", "target", "rdp", "prv"), TABLE)
def test_noise_multipliers_of_the_table(users: int, rate: float, target: float, rdp: float, prv: float) -> None:
    for accountant, expected in (("rdp", rdp), ("prv", prv)):
        sigma = noise_multiplier(target, default_delta(users), rate, 100, accountant)
        assert sigma == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("rate", "accountant"), [(0.1, "auto"), (0.1, "rdp"), (1.0, "auto"), (1.0, "prv")])
def test_the_noise_is_the_least_that_keeps_the_budget(rate: float, accountant: str) -> None:
    delta = default_delta(943)
    sigma = noise_multiplier(2.0, delta, rate, 60, accountant)
    assert epsilon([Release(sigma, rate, 60)], delta, accountant).value <= 2.0
    assert epsilon([Release(sigma / 1.001, rate, 60)], delta, accountant).value > 2.0


@given(target=st.floats(0.01, 50.0), exponent=st.floats(-12.0, -1.0), steps=st.integers(1, 10_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_without_sampling_the_noise_is_exact(target: float, exponent: float, steps: int) -> None:
    delta = 10.0**exponent
    sigma = noise_multiplier(target, delta, 1.0, steps)
    assert epsilon([Release(sigma, steps=steps)], delta).value <= target
    assert epsilon([Release(sigma * (1.0 - 1e-6), steps=steps)], delta).value > target


@pytest.mark.parametrize(
    ("release", "spent", "accountant"),
    [
        (Release(10.0), [], "auto"),
        (Release(10.0), [Release(12.0, steps=30)], "auto"),
        (Release(1.2, 0.1), [Release(1.2, 0.1, 30), Release(20.0)], "auto"),
        (Release(1.2, 0.1), [], "rdp"),
    ],
)
def test_as_many_steps_as_fit_and_not_one_more(release: Release, spent: list[Release], accountant: str) -> None:
    delta = default_delta(943)
    count = affordable_steps(3.0, delta, release, spent, accountant)

    def cost(steps: int) -> float:
        return epsilon([*spent, Release(release.noise_multiplier, release.sample_rate, steps)], delta, accountant).value

    assert count > 10
    assert cost(count) <= 3.0 < cost(count + 1)


def test_steps_at_the_edges() -> None:
    delta = 1e-3
    assert affordable_steps(1.0, delta, Release(0.5)) == 0
    assert affordable_steps(1.0, delta, Release(1e4), most=50) == 50
    assert affordable_steps(math.inf, delta, Release(0.0), most=7) == 7
    assert affordable_steps(1.0, delta, Release(0.0)) == 0
    assert affordable_steps(1.0, delta, Release(20.0), spent=[Release(0.3)]) == 0


def test_an_infinite_budget_asks_for_no_noise() -> None:
    assert noise_multiplier(math.inf, 1e-5, 0.1, 100) == 0.0


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ((0.0, 1e-5, 0.1, 100), "privacy.epsilon=0"),
        ((math.nan, 1e-5, 0.1, 100), "privacy.epsilon=nan"),
        ((1.0, 0.0, 0.1, 100), "privacy.delta=0"),
        ((1.0, 1e-5, 0.0, 100), "sample rate 0"),
        ((1.0, 1e-5, 1.1, 100), "sample rate 1.1"),
        ((1.0, 1e-5, 0.1, 0), "federation.rounds=1"),
        ((1.0, 1e-5, 0.1, 100, "gdp"), "privacy.accountant=gdp"),
        ((1e-4, 1e-5, 1.0, 100, "rdp"), "privacy.accountant=auto"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused_by_name(arguments: tuple[float, ...], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        noise_multiplier(*arguments)  # type: ignore[arg-type]


def test_the_second_call_is_a_look_up_also_in_another_process(cache: Path) -> None:
    first = noise_multiplier(4.0, 1e-4, 0.1, 100)
    steps = affordable_steps(4.0, 1e-4, Release(1.5, 0.1), [Release(3.0, 0.1, 9)])
    spent = cached_epsilon([Release(1.5, 0.1, 80)], 1e-4)
    program = (
        "import json, sys\n"
        "from privacy.accountants import Release\n"
        "from privacy.calibration import affordable_steps, cached_epsilon, noise_multiplier\n"
        "a = noise_multiplier(4.0, 1e-4, 0.1, 100)\n"
        "b = affordable_steps(4.0, 1e-4, Release(1.5, 0.1), [Release(3.0, 0.1, 4), Release(3.0, 0.1, 5)])\n"
        "c = cached_epsilon([Release(1.5, 0.1, 80)], 1e-4).value\n"
        "print(json.dumps([a, b, c, 'opacus' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    sigma, count, value, imported = json.loads(done.stdout)
    assert (sigma, count, value) == (first, steps, spent.value)
    assert not imported  # nothing was computed again: that needs Opacus
    assert len(list(cache.iterdir())) == 3


DAMAGE = ["", "{", "[]", "null", '"text"', '{"question": {}, "answer": 1.0}', "\x00\xff", "[" * 5000]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_computed_again(cache: Path, damage: str) -> None:
    first = noise_multiplier(3.0, 1e-4, 1.0, 10)
    (file,) = cache.iterdir()
    whole = file.read_text()
    file.write_bytes(damage.encode("latin-1"))
    assert noise_multiplier(3.0, 1e-4, 1.0, 10) == first
    assert file.read_text() == whole


@pytest.mark.parametrize("answer", [0.001, -1.0, None, "12", [1.0], True])
def test_an_answer_that_was_changed_is_not_believed(cache: Path, answer: object) -> None:
    first = noise_multiplier(3.0, 1e-4, 1.0, 10)
    (file,) = cache.iterdir()
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "answer": answer}))
    assert noise_multiplier(3.0, 1e-4, 1.0, 10) == first


def test_another_version_of_opacus_asks_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_multiplier(3.0, 1e-4, 1.0, 10)
    monkeypatch.setattr(calibration, "_opacus_version", lambda: "9.9")
    noise_multiplier(3.0, 1e-4, 1.0, 10)
    assert len(list(cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("FEDREC_CACHE_DIR", str(tmp_path / "a file"))
    assert noise_multiplier(3.0, 1e-4, 1.0, 10) == noise_multiplier(3.0, 1e-4, 1.0, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["a file"]


def test_different_questions_have_different_answers(cache: Path) -> None:
    questions = [(3.0, 1e-4, 1.0, 10), (3.0, 1e-4, 1.0, 11), (3.1, 1e-4, 1.0, 10), (3.0, 2e-4, 1.0, 10)]
    answers = {noise_multiplier(*question) for question in questions}
    assert len(answers) == len(list(cache.iterdir())) == 4
    assert answers == {noise_multiplier(*question) for question in questions}
