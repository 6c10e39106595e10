"""Synthetic users: attributes, activity, the clusters they blend, and how much they keep to new releases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.special import ndtri

from fedrec.data.synthetic_config import SyntheticConfig
from fedrec.data.synthetic_items import ERA_APPEAL
from fedrec.data.synthetic_marginals import activity_at, activity_levels
from fedrec.random import U64, permutation, stream, streams, uniform

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

OCCUPATIONS = {
    "student": 196,
    "other": 105,
    "educator": 95,
    "administrator": 79,
    "engineer": 67,
    "programmer": 66,
    "librarian": 51,
    "writer": 45,
    "executive": 32,
    "scientist": 31,
    "artist": 28,
    "technician": 27,
    "marketing": 26,
    "entertainment": 18,
    "healthcare": 16,
    "retired": 14,
    "lawyer": 12,
    "salesman": 12,
    "none": 9,
    "homemaker": 7,
    "doctor": 7,
}
# Log-weight of an occupation per standard deviation of age; the others do not depend on it.
_OCCUPATION_AGE = {"student": -2.5, "none": -1.0, "entertainment": -0.5, "educator": 0.7, "retired": 3.0, "doctor": 0.5}
_FEMALE = 0.29
_AGE_LEVELS = np.array([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
_AGES = np.array([7, 18, 25, 31, 43, 56, 73], dtype=np.float64)


@dataclass(frozen=True)
class Users:
    """Users of one chunk. ``female`` bool[n]; ``age`` and ``occupation`` int64[n]; ``activity`` int64[n] interactions;
    ``clusters`` int64[n, 2] and their weights ``blend`` float64[n, 2] (rows sum to 1); ``era`` float64[n, 5]: the
    factor by which a user's weight for the items of each era is multiplied; ``keys`` uint64[n]."""

    female: npt.NDArray[np.bool_]
    age: Int64
    occupation: Int64
    activity: Int64
    clusters: Int64
    blend: Float64
    era: Float64
    keys: U64

    def table(self) -> pl.DataFrame:
        """One row per user: ``gender`` (F or M), ``age`` (years, int64), ``occupation`` (str)."""
        names = np.array(list(OCCUPATIONS))
        return pl.DataFrame(
            {
                "gender": np.where(self.female, "F", "M").tolist(),
                "age": self.age,
                "occupation": names[self.occupation].tolist(),
            }
        )


def cluster_tilts(config: SyntheticConfig) -> Float64:
    """How strongly gender and age draw users to each cluster: float64[2, clusters], standard normal quantiles in an
    order of their own for each attribute, so that every seed has the same spread."""
    spread = ndtri((np.arange(config.clusters) + 0.5) / config.clusters)
    return np.stack([spread[permutation(stream(config.seed, "synthetic/tilts", a), config.clusters)] for a in (0, 1)])


def make_users(config: SyntheticConfig, first: int, count: int) -> Users:
    """Users ``first … first+count-1`` of ``config``. Each depends on the seed and its own number only."""
    keys = streams(stream(config.seed, "synthetic/users"), np.arange(first, first + count))
    draws = uniform(keys, 5 + config.clusters)
    female = draws[:, 0] < _FEMALE
    age = np.rint(np.interp(draws[:, 1], _AGE_LEVELS, _AGES)).astype(np.int64)
    age_z = (age - 33) / 12

    slopes = np.array([_OCCUPATION_AGE.get(name, 0.0) for name in OCCUPATIONS])
    weight = np.array(list(OCCUPATIONS.values())) * np.exp(np.clip(age_z, -2, 3)[:, None] * slopes)
    share = np.cumsum(weight, axis=1) / weight.sum(axis=1, keepdims=True)
    occupation = np.minimum((draws[:, 2, None] > share).sum(axis=1), len(OCCUPATIONS) - 1)

    levels = activity_levels(config.seed, first, count, config.users)
    activity = activity_at(levels, config.mean_activity, config.items)

    gender_tilt, age_tilt = cluster_tilts(config)
    gender_z = np.where(female, 1 - _FEMALE, -_FEMALE) / np.sqrt(_FEMALE * (1 - _FEMALE))
    score = (
        config.gender_strength * gender_z[:, None] * gender_tilt
        + config.age_strength * age_z[:, None] * age_tilt
        - np.log(-np.log(draws[:, 5:]))
    )
    clusters = np.argsort(-score, axis=1, kind="stable")[:, :2]
    second = draws[:, 3] * config.blend

    # Light users keep to new releases (correlation of appetite with activity on MovieLens-100K: about -0.6).
    appetite = config.recency_strength * (-0.75 * ndtri(levels) + 0.66 * ndtri(draws[:, 4]))
    return Users(
        female,
        age,
        occupation,
        activity,
        clusters,
        np.stack([1 - second, second], axis=1),
        np.exp(appetite[:, None] * ERA_APPEAL),
        keys,
    )
