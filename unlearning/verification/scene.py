"""What a judgement looks at, and what one model shows there."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self, cast

import numpy as np
import numpy.typing as npt

from fedrec import random
from fedrec.data.split import Split
from fedrec.errors import ConfigError
from privacy.attacks.fold_in import FoldIn
from unlearning.forget import ForgetSet
from unlearning.strategies.base import Kind
from unlearning.verification.areas import Evidence
from unlearning.verification.bystanders import choose_bystanders
from unlearning.verification.distance import Predictions

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

K = 20  # of every recall, NDCG and list


class FromConfig:
    """Frozen dataclasses of plain settings, read from a configuration section."""

    @classmethod
    def from_config(cls, options: Mapping[str, Any], section: str) -> Self:
        """An instance from ``options``, the keys under ``section``.

        Raises:
            ConfigError: an unknown key (the nearest known one is named), or a value of the wrong kind or size.
        """
        known = {f.name for f in dataclasses.fields(cast(Any, cls))}
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {section}.{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
                raise ConfigError(f"{section}.{key} is unknown; {hint}")
        make: Any = cls
        try:
            made: Self = make(**options)
        except ConfigError as error:
            raise ConfigError(f"{section}.{error}") from None
        return made


def require_number(name: str, value: object, low: float, high: float = float("inf")) -> None:
    """ConfigError unless ``value`` is a number in [``low``, ``high``]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= cast(float, value) <= high:
        span = f"from {low:g} to {high:g}" if high < float("inf") else f"of at least {low:g}"
        raise ConfigError(f"{name}={value!r}: write a number {span}")


@dataclass(frozen=True)
class MeasureSettings(FromConfig):
    """How closely models are looked at. None of it depends on the model.

    ``distance_users`` retained users stand for all in the distance between predictions, ``fold_in_users`` deleted ones
    are folded in (``fold_in``: how); ``bystander_share`` of the retained users are called bystanders, and
    the new devices of deleted users are drawn ``fresh_draws`` times.
    """

    distance_users: int = 500
    fold_in_users: int = 500
    bystander_share: float = 0.1
    fresh_draws: int = 10
    fold_in: FoldIn = field(default_factory=FoldIn)
    chunk_values: int = 4_000_000  # at most so many scores at once

    def __post_init__(self) -> None:
        for name in ("distance_users", "fold_in_users", "chunk_values"):
            require_number(name, getattr(self, name), 1)
        require_number("bystander_share", self.bystander_share, 0.0, 1.0)
        if isinstance(self.fold_in, Mapping):
            try:
                object.__setattr__(self, "fold_in", FoldIn(**self.fold_in))
            except TypeError:
                raise ConfigError(f"fold_in={dict(self.fold_in)}: it has steps, learning_rate and negatives") from None


@dataclass(frozen=True)
class Scene:
    """One request, or a batch, as the judges see it: the same for the model before, the model after and every gold.

    ``before`` and ``after`` are the data without and with the request honoured, ``forget`` the difference. ``seed`` is
    the experiment's: it addresses the samples and the attacker's draws, so that all models meet the same ones.
    """

    kinds: frozenset[Kind]
    before: Split
    after: Split
    forget: ForgetSet
    seed: int
    settings: MeasureSettings = field(default_factory=MeasureSettings)

    @cached_property
    def staying(self) -> Int64:
        """int64, ascending: users with data who are not deleted."""
        alive = (self.before.train.counts > 0) | (self.after.test.counts > 0)
        alive[self.forget.users] = False
        return np.flatnonzero(alive).astype(np.int64)

    @cached_property
    def users(self) -> Int64:
        """int64, ascending: everybody whose scores matter, the deleted included."""
        return np.union1d(self.staying, self.forget.affected)

    @cached_property
    def only_items(self) -> bool:
        """Every forgotten interaction is one of a withdrawn item."""
        return bool(self.forget.items.size) and bool(np.isin(self.forget.pairs.items, self.forget.items).all())

    @cached_property
    def bystanders(self) -> Int64:
        """int64, ascending: retained users for whom the request may have changed most without their asking."""
        share = self.settings.bystander_share
        return choose_bystanders(self.before.train, self.before.n_items, self.forget, self.staying, share, self.seed)

    @cached_property
    def compared(self) -> Int64:
        """int64, ascending: the retained users whose predictions are compared between models (a bounded sample)."""
        most = min(self.settings.distance_users, max(20, 8_000_000 // self.before.n_items))
        if self.staying.size <= most:
            return self.staying
        key = random.stream(self.seed, "distance-users")
        return self.staying[random.sample_without_replacement(key, self.staying.size, most)]


class Mean(NamedTuple):
    """A weighted mean over units (users, or withdrawn items): ``values`` float64[u], ``weights`` float64[u] that sum to
    1. The units are the same for every model in a scene, so their values can be compared one by one."""

    values: Float64
    weights: Float64

    @classmethod
    def of(cls, values: Float64, owners: npt.NDArray[Any] | None = None) -> Mean:
        """Of plain values (NaN ones left out); with ``owners``, the unit of every value, their means by unit."""
        known = ~np.isnan(values)
        values = values[known].astype(np.float64)
        if owners is None:
            return cls(values, np.full(values.size, 1.0 / max(values.size, 1)))
        _, unit, counts = np.unique(owners[known], return_inverse=True, return_counts=True)
        sums = np.bincount(unit, weights=values, minlength=counts.size)
        return cls(sums / np.maximum(counts, 1), counts / max(values.size, 1))

    @property
    def value(self) -> float:
        return float(self.values @ self.weights) if self.values.size else float("nan")


@dataclass(frozen=True)
class Measurement:
    """What one model shows in a scene.

    Attributes:
        values: named numbers, NaN where there was nothing to measure (``measure`` lists them).
        percentiles: float64 of every forgotten pair (or, where only items leave, of every withdrawn item, its mean over
            the retained users): 0 bottom, 1 top of the ranking.
        means: the values that are means over users or items, unit by unit.
        evidence: the values that are AUCs of membership attacks, with what the attacks saw.
        predictions: of ``scene.compared``.
    """

    values: dict[str, float]
    percentiles: Float64
    means: dict[str, Mean]
    evidence: dict[str, Evidence]
    predictions: Predictions
