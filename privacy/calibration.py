"""How much noise, or how many releases, a budget allows; answered once, and looked up from then on.

Answers lie in the user's cache folder (``fedrec.data.download.cache_folder``), one small JSON file each, under all
arguments of the question and the version of Opacus. A file that is missing, damaged or cannot be written costs the
calculation again and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import lru_cache
from importlib import metadata
from typing import Any

from fedrec.data.download import cache_folder
from fedrec.errors import ConfigError
from privacy.accountants import Epsilon, Release, check_accountant, epsilon, gaussian_mu, merge

_VERSION = 1  # of these solvers: another number forgets every stored answer
_TOLERANCE = 5e-4  # relative width at which the search for a noise multiplier ends


def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: str = "auto") -> float:
    """The smallest σ, to 0.1 %, with which ``steps`` releases spend at most ``epsilon``; 0 for an infinite epsilon.

    Never one that spends more. Exact (to rounding) where no sampling is at work.

    Raises:
        ConfigError: epsilon or steps that are not positive, a delta outside (0, 1), a rate outside (0, 1], or an
            epsilon that the accountant cannot certify with any noise.
    """
    check_accountant(accountant)
    _check_budget("privacy.epsilon", epsilon)
    if steps < 1:
        raise ConfigError(f"{steps} releases: there is nothing to add noise to; write federation.rounds=1 or more")
    gaussian_mu(epsilon, delta)  # these two refuse what is no delta and no rate, before anything is looked up
    Release(1.0, sample_rate)
    if math.isinf(epsilon):
        return 0.0
    question = {
        "find": "noise_multiplier", "epsilon": epsilon, "delta": delta, "sample_rate": sample_rate, "steps": steps,
        "accountant": accountant,
    }  # fmt: skip
    return float(cached(question, lambda: _search_noise(epsilon, delta, sample_rate, steps, accountant), _is_number))


def affordable_steps(
    budget: float,
    delta: float,
    release: Release,
    spent: Sequence[Release] = (),
    accountant: str = "auto",
    most: int = 10**6,
) -> int:
    """How many more steps of ``release`` (its own ``steps`` is ignored) fit after ``spent``, ``most`` at most.

    So many spend at most ``budget`` together with ``spent``, and one more does not; where releases are sampled and
    thousands fit, the answer may stay up to 0.05 % below that. 0 where ``spent`` is already too much.
    """
    check_accountant(accountant)
    _check_budget("privacy.budget", budget)
    if math.isinf(budget) or math.isinf(release.noise_multiplier):
        return most
    spent = merge(spent)
    question = {
        "find": "affordable_steps", "budget": budget, "delta": delta, "release": asdict(replace(release, steps=1)),
        "spent": [asdict(one) for one in spent], "accountant": accountant, "most": most,
    }  # fmt: skip
    return int(cached(question, lambda: _search_steps(budget, delta, release, spent, accountant, most), _is_number))


def cached_epsilon(releases: Sequence[Release], delta: float, accountant: str = "auto") -> Epsilon:
    """:func:`privacy.accountants.epsilon`, looked up where it is slow: where releases are sampled."""
    releases = merge(releases)
    if accountant == "auto" and all(release.sample_rate == 1.0 for release in releases):
        return epsilon(releases, delta, accountant)
    question = {
        "find": "epsilon", "releases": [asdict(one) for one in releases], "delta": delta, "accountant": accountant,
    }  # fmt: skip

    def compute() -> list[Any]:
        found = epsilon(releases, delta, accountant)
        return [found.value if math.isfinite(found.value) else None, found.accountant, found.note]

    def usable(answer: object) -> bool:
        return isinstance(answer, list) and len(answer) == 3 and (answer[0] is None or _is_number(answer[0]))

    value, used, note = cached(question, compute, usable)
    return Epsilon(math.inf if value is None else float(value), delta, used, note)


def cached(question: Mapping[str, Any], compute: Callable[[], Any], usable: Callable[[object], bool]) -> Any:
    """The stored answer (JSON) to ``question``, or ``compute()``'s, stored. One that is not ``usable`` is computed."""
    key = {**question, "solver": _VERSION, "opacus": _opacus_version()}
    path = cache_folder() / "accounting" / f"{_digest(key)[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        whole = stored["question"] == key and stored["check"] == _digest([key, stored["answer"]])
        if whole and usable(stored["answer"]):
            return stored["answer"]
    answer = compute()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps({"question": key, "answer": answer, "check": _digest([key, answer])}))
    return answer


def _write(path: os.PathLike[str], text: str) -> None:
    """Whole or not at all, also when several processes answer the same question."""
    with tempfile.NamedTemporaryFile(
        "w", dir=os.path.dirname(path), prefix=".", suffix=".json", delete=False, encoding="utf-8"
    ) as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@lru_cache(maxsize=1)
def _opacus_version() -> str:
    return metadata.version("opacus")  # without importing it, which takes a second or more


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < math.inf


def _check_budget(key: str, value: float) -> None:
    if not value > 0.0:
        raise ConfigError(f"{key}={value}: write a positive number, for example {key}=4")


def _search_noise(target: float, delta: float, sample_rate: float, steps: int, accountant: str) -> float:
    def spent(sigma: float, by: str = accountant) -> float:
        return epsilon([Release(sigma, sample_rate, steps)], delta, by).value

    # What suffices without sampling suffices with it. The bound of an accountant may ask for a little more.
    enough = math.sqrt(steps) / gaussian_mu(target, delta)
    if accountant == "auto" and sample_rate == 1.0:
        while spent(enough) > target:
            enough *= 1.0 + 1e-14
        return enough
    if (coarse := _narrow(lambda sigma: spent(sigma, "rdp"), target, enough)) is not None:
        enough = coarse
    if accountant == "rdp" and coarse is not None:
        return coarse
    # PRV's answer lies a few per cent below RDP's: ask it only from there on, as it costs 0.1 to 1 s a question.
    fine = _narrow(spent, target, enough, step=1.06)
    if fine is None:
        raise ConfigError(
            f"privacy.epsilon={target:g}: accountant {accountant} certifies no such small epsilon at delta {delta:.2g} "
            "with any noise; write a larger privacy.epsilon, or privacy.accountant=auto"
        )
    return fine


def _narrow(spent: Callable[[float], float], target: float, start: float, step: float = 2.0) -> float | None:
    """The smallest σ with ``spent(σ)`` ≤ ``target``, to ``_TOLERANCE``; None if there is none up to 10⁶ ``start``."""
    low = high = start
    below = above = spent(start)
    while above > target:
        low, below, high = high, above, high * step
        if high > 1e6 * start:
            return None
        above, step = spent(high), step * step
    while below <= target:
        high, above, low = low, below, low / step
        below, step = spent(low), step * step
    side = 0
    while high > low * (1.0 + _TOLERANCE):
        # Regula falsi on log ε against log σ, which is close to a line. It aims a little above the root, and after
        # that a little below it, so that both ends close in; a step that hardly helps is followed by a bisection.
        low_log, high_log = math.log(low), math.log(high)
        share = 0.5
        if side < 4 and above > 0.0 and below < math.inf:
            share = math.log(below / target) / math.log(below / above)
        nudge = (0.4 if side % 2 == 0 else -0.4) * _TOLERANCE
        guess = low_log + share * (high_log - low_log) + nudge
        margin = min(0.2 * _TOLERANCE, 0.25 * (high_log - low_log))
        sigma = math.exp(min(max(guess, low_log + margin), high_log - margin))
        value = spent(sigma)
        if value <= target:
            high, above = sigma, value
        else:
            low, below = sigma, value
        side += 1
    return high


def _search_steps(
    budget: float, delta: float, release: Release, spent: Sequence[Release], accountant: str, most: int
) -> int:
    def used(count: int, by: str = accountant) -> float:
        return epsilon([*spent, replace(release, steps=count)], delta, by).value

    if used(most) <= budget:
        return most
    if used(0) > budget:
        return 0
    sampled = release.sample_rate < 1.0 or any(one.sample_rate < 1.0 for one in spent)
    if accountant == "rdp" or (accountant == "auto" and not sampled):
        return _last(used, budget, 0, most)
    # PRV affords more than RDP: ask it only from RDP's answer on, as it costs 0.1 to 1 s a question.
    start = _last(lambda count: used(count, "rdp"), budget, 0, most) if used(0, "rdp") <= budget else 0
    return _last(used, budget, start, most, coarseness=2000)


def _last(used: Callable[[int], float], budget: float, low: int, most: int, coarseness: int = 10**9) -> int:
    """The last count from ``low`` on, which fits, whose ``used`` is within ``budget``; ``most`` does not fit.

    It may end early, too low by one part in ``coarseness``.
    """
    below, step = used(low), max(1, low // 8)
    high, above = min(most, low + step), used(min(most, low + step))
    while above <= budget:
        low, below, step = high, above, 4 * step
        high = min(most, low + step)
        above = used(high)
    turn = 0
    while high - low > max(1, low // coarseness):
        share = 0.5
        if turn % 3 < 2 and below < above < math.inf:
            share = (budget - below) / (above - below)
        middle = min(max(low + int(share * (high - low)) + turn % 2, low + 1), high - 1)
        value = used(middle)
        if value <= budget:
            low, below = middle, value
        else:
            high, above = middle, value
        turn += 1
    return low
