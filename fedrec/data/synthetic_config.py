"""What a synthetic data set is made from: sizes, seed and the strengths of its signals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedrec.errors import ConfigError

MOVIELENS_ITEMS = 1682
MOVIELENS_MEAN_ACTIVITY = 106.04


@dataclass(frozen=True)
class SyntheticConfig:
    """Parameters of the synthetic generator; the defaults imitate MovieLens-100K.

    Sizes: ``users`` (1 or more), ``items`` (10 or more). ``seed``: every number follows from it.

    ``mean_activity``: interactions a user has on average; MovieLens-100K's activity quantiles are scaled by it, and
    compressed where the catalogue is small. ``clusters``: groups of taste. ``factors``: dimensions of the item factors.
    ``beta``: standard deviation, over items, of a cluster's log-weight for an item (0: popularity only).
    ``niche_strength`` in [0, 1]: how much stronger than that for rare items, and weaker for popular ones.
    ``genre_strength`` in [0, 1]: share of an item factor's variance that its genres explain. ``gender_strength``,
    ``age_strength``: how far each tilts the choice of a cluster (logits per standard deviation). ``blend`` in [0, 1]:
    the weight of a user's second cluster is uniform below it. ``recency_strength``: how much more than active users
    light users keep to new releases. ``order_strength``: tendency to meet popular items first.

    Raises ``ConfigError``, naming the key and the remedy, for a value that cannot be generated from.
    """

    users: int = 943
    items: int = MOVIELENS_ITEMS
    seed: int = 0
    mean_activity: float = MOVIELENS_MEAN_ACTIVITY
    clusters: int = 24
    factors: int = 32
    beta: float = 3.7
    niche_strength: float = 0.9
    genre_strength: float = 0.6
    gender_strength: float = 0.8
    age_strength: float = 1.5
    blend: float = 0.6
    recency_strength: float = 2.1
    order_strength: float = 0.25

    def __post_init__(self) -> None:
        for key, low, high in (
            ("users", 1, 2**31 - 1),
            ("items", 10, 2**31 - 1),
            ("seed", 0, 2**63 - 1),
            ("clusters", 2, 1024),
            ("factors", 1, 1024),
        ):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"dataset.{key}={value!r}: write a whole number from {low} to {high}")
        for key, lowest, highest in (
            ("mean_activity", 3.0, 1e6),
            ("beta", 0.0, 10.0),
            ("niche_strength", 0.0, 1.0),
            ("genre_strength", 0.0, 1.0),
            ("gender_strength", 0.0, 10.0),
            ("age_strength", 0.0, 10.0),
            ("blend", 0.0, 1.0),
            ("recency_strength", 0.0, 10.0),
            ("order_strength", 0.0, 10.0),
        ):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not lowest <= value <= highest:
                raise ConfigError(f"dataset.{key}={value!r}: write a number from {lowest:g} to {highest:g}")
        table_bytes = 24 * self.clusters * self.items
        if table_bytes > 4 * 2**30:
            raise ConfigError(
                f"dataset.clusters={self.clusters} × dataset.items={self.items} needs tables of "
                f"{table_bytes / 2**30:.1f} GiB; write fewer clusters or items (4 GiB at most)"
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> SyntheticConfig:
        """The configuration in ``options`` (the keys of ``configs/dataset/synthetic.yaml`` without ``name``).

        Raises ``ConfigError`` for a key that does not exist.
        """
        known = [f.name for f in fields(cls)]
        for key in options:
            if key not in known:
                raise ConfigError(f"dataset.{key}: the synthetic generator has no such key; write one of {known}")
        return cls(**options)
