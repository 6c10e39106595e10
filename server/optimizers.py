"""Server optimisers: the mean update of a round is a pseudo-gradient.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021. Pure functions on tensors:
``step(kind, …, x, delta, state) -> (x, state)``, Δ pointing *downhill*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedrec.errors import ConfigError

Kind = Literal["average", "momentum", "adam", "yogi"]
State = dict[str, Tensor]


@dataclass(frozen=True)
class ServerOptimizer:
    """Algorithm 2 of Reddi et al.: η ``learning_rate``, β₁, β₂, τ.

    ``bias_correction`` divides the moments by 1 − βᵗ as Adam does (Kingma & Ba 2015); the paper's FedAdam does not, and
    starts v at τ².
    """

    kind: Kind = "average"
    learning_rate: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    bias_correction: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("average", "momentum", "adam", "yogi"):
            raise ConfigError(f"federation.server_optimizer={self.kind}: write average, momentum, adam or yogi")
        if not 0.0 < self.learning_rate < math.inf:
            raise ConfigError(f"federation.server_learning_rate={self.learning_rate}: write a positive number")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"federation.server_{name}={value}: write a number of at least 0 and below 1")
        if not 0.0 < self.tau < math.inf:
            # A row that nobody touched divides by it.
            raise ConfigError(f"federation.server_tau={self.tau}: write a positive number")

    def step(self, x: Tensor, delta: Tensor, state: State) -> tuple[Tensor, State]:
        """The new tensor and the new state (empty before the first step)."""
        if self.kind == "average":
            return x + self.learning_rate * delta, state
        if self.kind == "momentum":
            velocity = self.beta1 * state["m"] + delta if state else delta
            return x + self.learning_rate * velocity, {"m": velocity}
        start = 0.0 if self.bias_correction else self.tau**2
        m = state.get("m", torch.zeros_like(x))
        v = state.get("v", torch.full_like(x, start))
        t = state.get("t", torch.zeros((), dtype=torch.float64)) + 1
        m = self.beta1 * m + (1 - self.beta1) * delta
        squared = delta.square()
        if self.kind == "adam":
            v = self.beta2 * v + (1 - self.beta2) * squared
        else:
            v = v - (1 - self.beta2) * squared * torch.sign(v - squared)
        m_hat, v_hat = m, v
        if self.bias_correction:
            m_hat, v_hat = m / (1 - self.beta1**t), v / (1 - self.beta2**t)
        return x + self.learning_rate * m_hat / (v_hat.sqrt() + self.tau), {"m": m, "v": v, "t": t}
