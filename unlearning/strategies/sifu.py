"""SIFU-style roll-back with noise (Fraboni, Van Waerebeke, Scaman, Vidal, Kameni, Lorenzi, "SIFU: Sequential Informed
Federated Unlearning for Efficient and Provable Client Unlearning in Federated Optimization", AISTATS 2024).

The server keeps checkpoints of the shared tensors, and since when each user's data is in them. To forget, it rolls back
to the last checkpoint c at which a bound Δ(c) on what the affected users changed is small enough for the noise, adds
N(0, σ²) to every shared coordinate, and trains the remaining rounds on the retained data, with fresh private vectors.

What is certified: the noisy shared tensors, and so all that is trained from them on the retained data, are
(ε, δ)-indistinguishable from what the same procedure (roll back to c, noise, train) gives on a federation that never
had the data, with the same addressed draws. Everything before c that could remember, other users' private vectors
above all, is thrown away, which is why they start fresh. ε is the exact curve of a Gaussian mechanism of sensitivity
Δ(c) and noise σ (:mod:`privacy.gaussian`). It is a statement on one request; several add up. It takes real numbers for
floating-point ones (rounds in which somebody is new are trained by another program, equal up to rounding), and says
nothing of earlier states that somebody copied.

The bound. SIFU sums up contributions, which bounds the distance of two runs where a round does not expand distances
(convex losses, small steps). Factorisation models are not convex, so it is not taken here; this holds for any loss:

* Δ(c) = 0 before the first affected user took part, in round j: both runs are the same, bit for bit.
* Round j itself starts from the same state, so that all others upload the same in both runs. With m participants of
  which f leave, uploads u_k and their sum S, plain averaging at rate η moves the two runs apart by at most
  η (m Σ ‖u_k‖ + f ‖S‖) / (m (m − f)), where whole users leave.
* After j the runs train from different states, and each round adds at most what this run moved (recorded) and the
  most that any run can move: for a server Adam of d coordinates its largest step, η √d (1 − β₁) / √(1 − β₂) ·
  √(Σ_{i<t} (β₁²/β₂)^i), bias corrections included, whatever was uploaded (by Cauchy and Schwarz). Averaging, momentum
  and Yogi have no such bound without clipping: ∞, and no checkpoint after j can be used.

These are honest and large: √d makes Adam's useless at any ε that means something. What is left is to roll back to just
before the affected users joined, or by one noisy round further. Where everybody takes part from round 1, that is
retraining from scratch, and the guarantee is then called exact. A withdrawn item changes what everybody draws: round 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from clients.protection import noise_generator
from fedrec.algorithms.base import GradientRecommender, Recommender, Tensors
from fedrec.errors import ConfigError
from privacy.gaussian import gaussian_epsilon
from server.optimizers import ServerOptimizer
from server.phase import ServerState
from unlearning.forget import ForgetSet
from unlearning.state import erase
from unlearning.stores.checkpoints import Contributions, checkpoints, read_checkpoint, since, size
from unlearning.stores.recording import ServerNeeds
from unlearning.stores.size import check_settings
from unlearning.strategies.base import Forgotten, Guarantee, Setting, StoreNeeds, Strategy, Task
from unlearning.strategies.replay import check_numbers, check_replay

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SIFU(Strategy):
    """Roll back as far as (ε, δ) asks for, noise, and the remaining rounds again.

    Attributes:
        interval: every so many rounds the shared tensors are kept.
        noise: σ, the standard deviation on every shared coordinate (FedMF's initial values have 0.1).
        epsilon, delta: what a request may cost at most.
    """

    name = "sifu"
    promise: ClassVar[str] = "certified"

    interval: int = 1
    noise: float = 0.01
    epsilon: float = 8.0
    delta: float = 1e-5
    max_bytes: int = StoreNeeds.max_bytes

    def __post_init__(self) -> None:
        check_settings(self.store)
        check_numbers(self.name, self, least={"epsilon": 0}, above_zero=("noise",))
        if not 0.0 < self.delta < 1.0:
            raise ConfigError(f"unlearning.strategies.sifu.delta={self.delta}: write a number between 0 and 1")
        if not math.isfinite(self.epsilon) or not math.isfinite(self.noise):
            raise ConfigError("unlearning.strategies.sifu: epsilon and noise must be finite: nothing else is certified")

    @property
    def store(self) -> StoreNeeds:
        return ServerNeeds("server", self.interval, max_bytes=self.max_bytes, checkpoints=True)

    def check(self, setting: Setting) -> None:
        """ConfigError for methods without local training, under secure aggregation and under privacy mechanisms."""
        check_replay(self.name, setting, sums_only=False)

    def forget(self, task: Task) -> Forgotten:
        assert task.history is not None
        federation, rounds = task.federation, task.state.round
        contributions = Contributions.open(task.history, task.forget.pairs.n_users)
        chosen, bound = self._choose(task, contributions)
        epsilon, folder = self._epsilon(bound), task.state.folder
        notes = []
        guarantee = Guarantee("exact")
        if task.joined is not None and task.joined.round >= chosen:
            # Kept with all devices' state: the affected had no part in any of it, and no vector has to start anew.
            state = task.joined.copy_to(folder.with_name(f"{folder.name}.joined"))
            chosen = state.round
            notes.append(f"rolled back to the join point, round {chosen}")
        elif chosen:
            state = federation.begin(folder.with_name(f"{folder.name}.again"), task.after)
            shared = read_checkpoint(task.history, chosen)
            if bound > 0.0:
                shared = self._noisy(shared, federation.settings.get("noise_seed"), task.number)
            state = state.at(ServerState(chosen, shared))
            guarantee = Guarantee("certified", epsilon, self.delta)
            noise = self.noise if bound else 0.0
            notes.append(f"rolled back to round {chosen}: sensitivity {bound:.3g}, noise {noise:g}")
        else:
            state = federation.begin(folder.with_name(f"{folder.name}.again"), task.after)
            notes.append("no checkpoint is within (ε, δ): rolled back to round 0, which is retraining")
        done = federation.train(state, task.after, rounds - chosen)
        trace = [{"phase": "train", "round": line["round"], "loss": line["loss"]} for line in done.lines]
        return Forgotten(erase(done.state, task.forget, federation.algorithm), done.cost, guarantee, trace, notes)

    def _epsilon(self, bound: float) -> float:
        return gaussian_epsilon(bound / self.noise, self.delta) if bound > 0.0 else 0.0

    def _choose(self, task: Task, contributions: Contributions) -> tuple[int, float]:
        """The last checkpoint within (ε, δ), and its bound; (0, 0) where there is none."""
        assert task.history is not None
        federation = task.federation
        for number in reversed([n for n in checkpoints(task.history) if n < task.state.round]):
            bound = sensitivity(
                contributions, task.forget, number, federation.algorithm, federation.federation.optimizer(),
                federation.federation.mean,
            )  # fmt: skip
            if self._epsilon(bound) <= self.epsilon:
                return number, bound
        return 0, 0.0

    def _noisy(self, shared: Tensors, noise_seed: Any, number: int) -> Tensors:
        generator = noise_generator(noise_seed, number)
        return {
            name: value + torch.from_numpy((self.noise * generator.standard_normal(value.shape)).astype(np.float32))
            for name, value in shared.items()
        }


def sensitivity(
    contributions: Contributions, forget: ForgetSet, number: int, algorithm: Recommender, optimizer: ServerOptimizer,
    mean: str,
) -> float:  # fmt: skip
    """Δ(``number``): how far the shared tensors after that round can be from those of a run without the forgotten data.

    L2, all shared tensors together; infinite where there is no bound.
    """
    everybody = np.arange(contributions.first_round.size, dtype=np.int64)
    affected = everybody if forget.items.size else np.union1d(forget.affected, forget.users).astype(np.int64)
    first = since(contributions, affected)
    if number < first:
        return 0.0
    moved = {int(row[0]): float(row[3]) for row in contributions.rounds}
    d = size({name: torch.empty(spec.shape, device="meta") for name, spec in algorithm.shared.items()})
    plain = type(algorithm).finish_round is GradientRecommender.finish_round

    def apart(t: int) -> float:  # one run's step and another's, from any two states
        step = moved.get(t, math.nan) + largest_step(optimizer, t) * math.sqrt(d)
        return step if plain and not math.isnan(step) else math.inf

    total = 0.0
    for t in range(first, number + 1):
        whole = bool(np.isin(affected, forget.users).all()) and not forget.items.size
        if t == first and plain and whole and optimizer.kind == "average" and mean == "participants":
            total += min(apart(t), first_step(contributions, affected, t, algorithm, optimizer.learning_rate))
        else:
            total += apart(t)
    return total


def first_step(contributions: Contributions, leaving: Int64, number: int, algorithm: Recommender, rate: float) -> float:
    """η (m Σ ‖u_k‖ + f ‖S‖) / (m (m − f)): how far one averaging step without ``leaving`` is from the one with them."""
    found = contributions.rounds[contributions.rounds[:, 0] == number]
    # The norms are of one per-item tensor's uploads.
    if not found.size or [spec.per_item for spec in algorithm.shared.values()] != [True]:
        return math.inf
    mine = leaving[contributions.first_round[leaving] == number]
    m, f, together = float(found[0, 1]), float(mine.size), float(found[0, 2])
    norms = float(contributions.first_norm[mine].sum())
    if m <= f or math.isnan(norms):
        return math.inf
    return rate * (m * norms + f * together) / (m * (m - f))


def largest_step(optimizer: ServerOptimizer, t: int) -> float:
    """The most that step ``t`` (from 1) of a server optimiser can move one coordinate, whatever it was given.

    Adam: |m| ≤ (1 − β₁) Σ β₁^i |g_i| and v ≥ (1 − β₂) Σ β₂^i g_i², so |m| / √v ≤ (1 − β₁) / √(1 − β₂) · √(Σ (β₁²/β₂)^i)
    by Cauchy and Schwarz. The others scale with what they are given: infinite.
    """
    if optimizer.kind != "adam" or optimizer.beta2 == 0.0:
        return math.inf
    beta1, beta2 = optimizer.beta1, optimizer.beta2
    ratio = beta1**2 / beta2
    series = float(t) if ratio == 1.0 else (1.0 - ratio**t) / (1.0 - ratio)
    step = (1.0 - beta1) / math.sqrt(1.0 - beta2) * math.sqrt(series)
    if optimizer.bias_correction:
        step *= math.sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
    return optimizer.learning_rate * step
