"""The ``privacy`` group, checked once, before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedrec.errors import ConfigError

Mode = Literal["none", "user_dp", "local_dp", "example_dp"]


@dataclass(frozen=True)
class PrivacySettings:
    """Keys of ``configs/privacy``. Of ``epsilon``, ``noise_multiplier`` and ``federation.rounds`` two are given.

    ``epsilon`` may be infinite: neither clipping nor noise. ``delta`` None is N^-1.1, N the number of units (users, or
    a device's interactions under ``example_dp``). ``noise_multiplier`` is the noise's standard deviation divided by the
    sensitivity ``max_grad_norm`` (C). ``budget`` is the epsilon that this run and the ``ledger`` it continues may spend
    together. ``noise_seed`` makes noise repeatable, and the result not private.
    """

    mode: Mode = "none"
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    accountant: Literal["auto", "prv", "rdp"] = "auto"
    budget: float | None = None
    ledger: str | None = None
    noise_seed: int | None = None
    # user_dp
    trust: Literal["server", "secure_aggregation"] = "server"
    min_survivors: int = 0  # secure aggregation: the noise shares of so many devices suffice; 0: .8 of those expected
    adaptive_clipping: bool = False
    clip_quantile: float = 0.5
    clip_learning_rate: float = 0.2
    clip_count_noise: float = 0.0  # of the released count of unclipped devices; 0: a twentieth of those expected
    # local_dp
    row_set: Literal["dense", "padded"] = "dense"
    padded_rows: int = 0
    # example_dp, on devices (federation.mode=devices) and in silos (federation.mode=silo)
    sample_rate: float = 0.1  # Poisson rate of an interaction in a local step
    steps: int = 10  # local steps a round
    optimizer: Literal["lazy", "opacus"] = "lazy"

    @classmethod
    def from_config(cls, options: Mapping[str, Any]) -> PrivacySettings:
        """Settings from the group's keys. ConfigError for unknown keys and values that no guarantee can use."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key, value in options.items():
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                hint = f"did you mean privacy.{near[0]}?" if near else f"there are {', '.join(fields)}"
                raise ConfigError(f"privacy.{key}: no such setting; {hint}")
            if not _fits(value, str(fields[key].type)):
                raise ConfigError(f"privacy.{key}={value!r}: expected {fields[key].type}")
        return cls(**{key: _typed(value, str(fields[key].type)) for key, value in options.items()})

    def __post_init__(self) -> None:
        _one_of(self, "mode", "none", "user_dp", "local_dp", "example_dp")
        _one_of(self, "accountant", "auto", "prv", "rdp")
        _one_of(self, "trust", "server", "secure_aggregation")
        _one_of(self, "row_set", "dense", "padded")
        check_optimizer(self.optimizer)
        for name in ("epsilon", "budget"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ConfigError(f"privacy.{name}={value}: write a positive number, for example privacy.{name}=4")
        if self.delta is not None and not 0.0 < self.delta < 1.0:
            raise ConfigError(f"privacy.delta={self.delta}: write a number between 0 and 1 over the number of users")
        if self.noise_multiplier is not None and not 0.0 <= self.noise_multiplier < math.inf:
            raise ConfigError(f"privacy.noise_multiplier={self.noise_multiplier}: write 0 (no noise) or more")
        if self.epsilon == math.inf and self.noise_multiplier:
            raise ConfigError(
                f"privacy.noise_multiplier={self.noise_multiplier}: privacy.epsilon=inf asks for no noise; leave one "
                "out"
            )
        if not 0.0 < self.max_grad_norm < math.inf:
            raise ConfigError(f"privacy.max_grad_norm={self.max_grad_norm}: the clipping norm is a positive number")
        if not 0.0 < self.clip_quantile < 1.0:
            raise ConfigError(f"privacy.clip_quantile={self.clip_quantile}: write a share between 0 and 1")
        if not 0.0 < self.clip_learning_rate < math.inf:
            raise ConfigError(f"privacy.clip_learning_rate={self.clip_learning_rate}: write a positive number")
        if not 0.0 <= self.clip_count_noise < math.inf:
            raise ConfigError(f"privacy.clip_count_noise={self.clip_count_noise}: write 0 (chosen for you) or more")
        if not 0.0 < self.sample_rate <= 1.0:
            raise ConfigError(f"privacy.sample_rate={self.sample_rate}: write a Poisson rate in (0, 1]")
        for name, least in (("min_survivors", 0), ("padded_rows", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"privacy.{name}={getattr(self, name)}: write a whole number, {least} or more")
        if self.noise_seed is not None and self.noise_seed < 0:
            raise ConfigError(f"privacy.noise_seed={self.noise_seed}: write a whole number, 0 or more, or null")
        if self.mode != "none" and self.epsilon is None and self.noise_multiplier is None:
            raise ConfigError(
                "privacy: nothing says how much noise; write privacy.epsilon=4 or privacy.noise_multiplier=1.1"
            )

    @property
    def noiseless(self) -> bool:
        """Whether no noise was asked for; such a result is not private."""
        return self.epsilon == math.inf or self.noise_multiplier == 0.0


def check_optimizer(name: str) -> None:
    """ConfigError for a local DP-SGD optimizer that would be wrong, with the reason."""
    if name in ("lazy", "opacus"):
        return
    reason = "lazy noise holds for plain SGD; momentum or Adam belong on the server, federation.server_optimizer"
    if name == "ghost":
        reason = "ghost clipping counts padding rows in the norm, and fails on empty batches and on tables used twice"
    raise ConfigError(f"privacy.optimizer={name}: {reason}; write lazy or opacus")


def _one_of(settings: PrivacySettings, name: str, *allowed: str) -> None:
    if getattr(settings, name) not in allowed:
        raise ConfigError(f"privacy.{name}={getattr(settings, name)}: write {' or '.join(allowed)}")


def _fits(value: Any, kind: str) -> bool:
    if value is None:
        return "None" in kind
    if kind.startswith("bool"):
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind.startswith("float"):
        return isinstance(value, (int, float)) and not math.isnan(value)
    return isinstance(value, int) if kind.startswith("int") else isinstance(value, str)


def _typed(value: Any, kind: str) -> Any:
    return float(value) if kind.startswith("float") and value is not None else value
