"""A one-run audit of user-level privacy: a lower bound on epsilon from planted canary devices.

Steinke, Nasr & Jagielski, "Privacy Auditing with One (1) Training Run" (NeurIPS 2023): m canaries are included by
independent fair coins, the auditor guesses some of the coins from the released output, and too many right guesses
refute (ε, δ)-DP. The canaries are worst-case devices with random directions, as in Andrew et al., "One-shot Empirical
Privacy Estimation for Federated Learning" (ICLR 2024). A bound above the claimed epsilon proves a fault; one below
proves nothing, and reaches about a third of the truth in practice: it cannot exceed :func:`epsilon_ceiling`, whatever
leaks.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import binom
from torch import Tensor

from fedrec import random
from fedrec.algorithms.base import Tensors, TensorSpec
from fedrec.errors import ConfigError

Int64 = npt.NDArray[np.int64]
#: Clips stacked updates, name → float32[B, *shape], to norm C each: the function that clips the users' updates.
Clip = Callable[[Tensors], Tensors]
_FRACTIONS = (0.125, 0.25, 0.4)  # of m, guessed on either side: few, some, most
_BLOCK = 2**24  # values of patterns in memory at once: 64 MiB


def p_value(m: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """An upper bound on P(at least ``correct`` of ``guesses`` coins are right) for any (ε, δ)-DP mechanism, m coins.

    Theorem 5.2: P[W ≥ v] ≤ P[W* ≥ v] + 2mδ·max_{1≤i≤m} P[v > W* ≥ v − i]/i, W* ~ Binomial(r, e^ε/(e^ε + 1)).
    """
    right = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    if not delta or not correct:
        return tail
    # Beyond i = v the probability is that of W* < v, all of it, and only the divisor grows.
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    return min(1.0, tail + 2.0 * m * delta * float((below / np.arange(1, correct + 1)).max()))


def epsilon_lower_bound(m: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest ε that ``correct`` right ones of ``guesses`` guesses about ``m`` fair coins refute at ``confidence``.

    Whoever claims (ε', δ)-DP for a smaller ε' is wrong, but for a probability of 1 − ``confidence``. 0 when nothing is
    refuted. The number of guesses must not have been chosen by looking at which ones are right.

    Raises:
        ValueError: not 0 ≤ correct ≤ guesses ≤ m, or δ or the confidence outside their ranges.
    """
    if not 0 <= correct <= guesses <= m:
        raise ValueError(f"an audit needs 0 ≤ correct ≤ guesses ≤ m, got {correct}, {guesses}, {m}")
    if not (0.0 <= delta < 1.0 and 0.0 < confidence < 1.0):
        raise ValueError(f"an audit needs 0 ≤ δ < 1 and 0 < confidence < 1, got {delta}, {confidence}")
    allowed = 1.0 - confidence
    # Refuting ε refutes all smaller ones, so any ε with a small p-value is a bound; with δ > 0 the p-value need not
    # be monotone, and the scan stops, to be on the safe side, where it first exceeds what is allowed.
    low, step = 0.0, 0.25
    if p_value(m, guesses, correct, 0.0, delta) > allowed:
        return 0.0
    while low < 700.0 and p_value(m, guesses, correct, low + step, delta) <= allowed:
        low += step
    high = low + step
    while high - low > 1e-6:
        middle = (low + high) / 2.0
        if p_value(m, guesses, correct, middle, delta) <= allowed:
            low = middle
        else:
            high = middle
    return low


def epsilon_ceiling(m: int, delta: float, confidence: float = 0.95) -> float:
    """The largest bound that :class:`CanaryAudit` with ``m`` canaries can report, every guess being right.

    A claimed epsilon above it cannot be refuted by so few canaries: plant more.
    """
    return max(_bound(m, 2 * k, 2 * k, delta, confidence) for k in _guesses_per_side(m))


@dataclass
class CanaryAudit:
    """m canary devices of a federation, what they upload, and what the releases say about who of them took part.

    Each canary is included by a fair coin. In every round an included one is sampled with probability ``rate``, as any
    user is, and uploads the same ±1 pattern over all shared tensors, of L2 norm ``excess``·C: far above the clipping
    norm, so that a federation that forgets to clip is caught. The auditor sees what is released, never who was sampled:
    that secret is what amplification by sampling counts on.

    Attributes:
        canaries: m. They are devices on top of the users, half of whom take part.
        rate: the users' Poisson rate q in (0, 1]; 1 for everybody.
        seed: addresses coins, patterns and sampling; None draws one from the operating system.
        excess: norm of an unclipped canary in units of C, above 1.
    """

    canaries: int = 100
    rate: float = 1.0
    seed: int | None = None
    excess: float = 10.0
    scores: npt.NDArray[np.float64] = field(init=False)  # float64[m]
    rounds: int = field(default=0, init=False)
    _kept: tuple[object, Tensors] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.canaries < 8:
            raise ConfigError(f"attack.canaries={self.canaries}: fewer than 8 coins refute nothing; write 100 or more")
        if not 0.0 < self.rate <= 1.0:
            raise ConfigError(f"attack: canaries are sampled as users are, at a rate in (0, 1], not {self.rate}")
        if not 1.0 < self.excess < math.inf:
            raise ConfigError(f"attack.excess={self.excess}: write a factor above 1, so that clipping is tested too")
        if self.seed is None:
            self.seed = secrets.randbits(63)
        self.scores = np.zeros(self.canaries)

    @property
    def included(self) -> npt.NDArray[np.bool_]:
        """bool[m], the coins. The auditor's answers are marked with them and must not depend on them."""
        keys = random.streams(self._key("audit-coins"), np.arange(self.canaries))
        return np.asarray(random.bits(keys, 1)[:, 0] >> np.uint64(63) == 1)

    def sampled(self, round_number: int) -> Int64:
        """int64, ascending: the included canaries that upload in round ``round_number``."""
        words = random.uniform(random.streams(self._key("audit-sample", round_number), np.arange(self.canaries)), 1)
        return np.flatnonzero(self.included & (words[:, 0] < self.rate))

    def contribution(
        self, specs: Mapping[str, TensorSpec], round_number: int, clip: Clip, max_grad_norm: float
    ) -> tuple[Tensors, int]:
        """What to add to the users' sum in round ``round_number``, before the noise, and of how many canaries.

        Args:
            specs: the tensors that a device uploads in this round (shared ones, or statistics).
            clip: the very function that clips the users' updates; canaries arrive unclipped.
            max_grad_norm: C, now.

        Returns:
            name → float32[*shape] sums (zeros when no canary was sampled) and the number of sampled canaries.
        """
        total = {name: torch.zeros(spec.shape) for name, spec in specs.items()}
        members = self.sampled(round_number)
        for block in self._blocks(specs, members):
            directions = self.directions(specs, block)
            upload = {name: value * (self.excess * max_grad_norm) for name, value in directions.items()}
            for name, value in clip(upload).items():
                total[name] += value.sum(0)
        return total, int(members.size)

    def observe(
        self, noisy_sum: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], max_grad_norm: float,
        noise_multiplier: float = 1.0, others: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Take note of a round's release: every canary's score grows by ⟨sum, direction⟩/(C·σ²).

        The weights make the score the log-likelihood ratio's statistic when C or σ vary between rounds; with σ = 0 they
        are 1/C. ``others`` float32[*shape], the users' own clipped sum, may be taken off first: differential privacy
        holds against an adversary who knows everybody else's data, and such an auditor is the sharper one.
        """
        rest = dict(noisy_sum) if others is None else {name: value - others[name] for name, value in noisy_sum.items()}
        weight = 1.0 / (max_grad_norm * (noise_multiplier**2 or 1.0))
        for block in self._blocks(specs, np.arange(self.canaries)):
            for name, value in self.directions(specs, block).items():
                product = value.reshape(block.size, -1) @ rest[name].flatten().float()
                self.scores[block] += weight * product.double().numpy()
        self.rounds += 1

    def directions(self, specs: Mapping[str, TensorSpec], canaries: Int64) -> Tensors:
        """The unit vectors of some canaries over all tensors together, name → float32[B, *shape], every value ± the
        same. Read them only: they may be kept for the next round.

        A symmetric tensor gets a symmetric pattern, so that its Frobenius norm is its share like any other's. Patterns
        of large statistics are recomputed from their address at every use: m of them would not fit in memory.
        """
        layout = tuple((name, spec.shape, spec.symmetric) for name, spec in sorted(specs.items()))
        if self.canaries * _size(specs) > _BLOCK:
            return self._patterns(specs, canaries)
        if self._kept is None or self._kept[0] != layout:
            self._kept = (layout, self._patterns(specs, np.arange(self.canaries)))
        everybody = self._kept[1]
        if canaries.size == self.canaries:
            return everybody
        at = torch.from_numpy(canaries)
        return {name: value[at] for name, value in everybody.items()}

    def _patterns(self, specs: Mapping[str, TensorSpec], canaries: Int64) -> Tensors:
        out: Tensors = {}
        for name, spec in specs.items():
            count = math.prod(spec.shape)
            words = random.bits(random.streams(self._key(f"audit-direction:{name}"), canaries), -(-count // 64))
            signs = np.unpackbits(words.astype("<u8").view(np.uint8), axis=1, count=count)
            value = torch.from_numpy(signs.astype(np.float32)).mul_(2.0).sub_(1.0).reshape(len(canaries), *spec.shape)
            if spec.symmetric:
                value = value.triu() + value.triu(1).mT
            out[name] = value.div_(math.sqrt(_size(specs)))
        return out

    def _blocks(self, specs: Mapping[str, TensorSpec], canaries: Int64) -> Iterator[Int64]:
        """Canaries, as many at a time as fit into the memory for patterns."""
        step = max(1, _BLOCK // max(_size(specs), 1))
        for start in range(0, canaries.size, step):
            yield canaries[start : start + step]

    def result(self, delta: float, claimed_epsilon: float, confidence: float = 0.95) -> dict[str, Any]:
        """The verdict. The k highest scores are guessed to be in, the k lowest out, the others not guessed.

        k takes three values fixed beforehand (m/8, m/4, .4m), and each of the three bounds is computed at a confidence
        of 1 − (1 − ``confidence``)/3 (Bonferroni), so that the best of them may be reported.

        Keys: ``epsilon_lower_bound``, ``claimed_epsilon``, ``violated`` (the bound exceeds the claim), ``delta``,
        ``confidence``, ``canaries``, ``included``, ``guesses`` and ``correct`` of the reported bound, ``ceiling``,
        ``rounds``.

        Raises:
            ValueError: no round was observed.
        """
        if not self.rounds:
            raise ValueError("the audit has observed no round")
        included = self.included
        order = np.argsort(self.scores, kind="stable")
        m = self.canaries
        best: tuple[float, int, int] = (-1.0, 0, 0)
        for k in _guesses_per_side(m):
            correct = int(included[order[m - k :]].sum() + (~included[order[:k]]).sum())
            best = max(best, (_bound(m, 2 * k, correct, delta, confidence), 2 * k, correct))
        bound, guesses, correct = best
        return {
            "epsilon_lower_bound": bound,
            "claimed_epsilon": claimed_epsilon,
            "violated": bound > claimed_epsilon,
            "delta": delta,
            "confidence": confidence,
            "canaries": m,
            "included": int(included.sum()),
            "guesses": guesses,
            "correct": correct,
            "ceiling": epsilon_ceiling(m, delta, confidence),
            "rounds": self.rounds,
        }

    def _key(self, purpose: str, *address: int) -> np.uint64:
        assert self.seed is not None  # drawn when it was not given
        return random.stream(self.seed, purpose, *address)


def _size(specs: Mapping[str, TensorSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())


def _guesses_per_side(m: int) -> tuple[int, ...]:
    return tuple(max(1, round(share * m)) for share in _FRACTIONS)


def _bound(m: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    return epsilon_lower_bound(m, guesses, correct, delta, 1.0 - (1.0 - confidence) / len(_FRACTIONS))
