"""Sums of metrics: what leaves a node instead of per-user values, and how nodes' sums become one result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedrec.data.interactions import Int64
from fedrec.errors import ConfigError
from fedrec.evaluation.metrics import METRICS, coverage
from fedrec.evaluation.protocols import Part, Protocol, Ranking

PARTS: tuple[Part, Part] = ("validation", "test")
RANKINGS: tuple[Ranking, Ranking] = ("full", "sampled")
HISTOGRAM_BINS = 20
HISTOGRAM_K = 10
_GRID = 2.0**32


def quantise(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values in [0, 1] rounded to multiples of 2^-32 (error ≤ 1.2e-10).

    Float64 sums of up to 2^21 such values are exact, hence bit-identical in any order and under any partition of the
    users over nodes, so that the choice of the best round cannot depend on the layout.
    """
    return np.rint(values * _GRID) / _GRID


@dataclass(frozen=True)
class EvaluationSums:
    """Sums over some users; ``a + b`` are the sums over both groups.

    Axes: part (validation, test), ranking (full, sampled), metric (HR, NDCG, recall, MRR), cut-off ``ks``.

    Attributes:
        users: int64[part, ranking], users that were ranked.
        totals: float64[part, ranking, metric, k], sums of per-user values.
        histogram: int64[part, 20], users by NDCG@10 of the primary ranking; bin b holds [b/20, (b+1)/20), the last
            one includes 1.
        recommended: int64[part, I], how often each item stood in a user's list of ``list_k``.
        popularity: float64[part], training-interaction counts of recommended items, summed; NaN if not asked for.
        ks: cut-offs. list_k: list length. primary: the primary ranking.
    """

    users: Int64
    totals: npt.NDArray[np.float64]
    histogram: Int64
    recommended: Int64
    popularity: npt.NDArray[np.float64]
    ks: tuple[int, ...]
    list_k: int
    primary: Ranking

    @classmethod
    def zero(cls, protocol: Protocol, n_items: int, *, with_popularity: bool = False) -> EvaluationSums:
        """Sums over no users."""
        return cls(
            users=np.zeros((2, 2), dtype=np.int64),
            totals=np.zeros((2, 2, len(METRICS), len(protocol.ks))),
            histogram=np.zeros((2, HISTOGRAM_BINS), dtype=np.int64),
            recommended=np.zeros((2, n_items), dtype=np.int64),
            popularity=np.full(2, 0.0 if with_popularity else np.nan),
            ks=protocol.ks,
            list_k=protocol.list_k,
            primary=protocol.ranking,
        )

    def __add__(self, other: EvaluationSums) -> EvaluationSums:
        """Sums over both groups of users, which must not overlap.

        Raises:
            ValueError: the two were made under different protocols or catalogues.
        """
        if self._shape() != other._shape():
            raise ValueError(f"evaluation sums of different protocols: {self._shape()} and {other._shape()}")
        return EvaluationSums(
            self.users + other.users,
            self.totals + other.totals,
            self.histogram + other.histogram,
            self.recommended + other.recommended,
            self.popularity + other.popularity,
            self.ks,
            self.list_k,
            self.primary,
        )

    def _shape(self) -> tuple[Any, ...]:
        return self.ks, self.list_k, self.primary, self.recommended.shape, bool(np.isnan(self.popularity[0]))

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Plain arrays for a message; ``from_arrays`` restores an equal value."""
        header = np.array([RANKINGS.index(self.primary), self.list_k, *self.ks], dtype=np.int64)
        return {
            "header": header,
            "users": self.users,
            "totals": self.totals,
            "histogram": self.histogram,
            "recommended": self.recommended,
            "popularity": self.popularity,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> EvaluationSums:
        """The inverse of ``to_arrays``.

        Raises:
            ValueError: a missing array, or one whose shape or numbers no evaluation can have produced.
        """
        missing = {"header", "users", "totals", "histogram", "recommended", "popularity"} - set(arrays)
        if missing:
            raise ValueError(f"evaluation sums lack {', '.join(sorted(missing))}")
        header = [int(x) for x in arrays["header"]]
        if len(header) < 3 or header[0] not in (0, 1):
            raise ValueError(f"evaluation sums have an unreadable header {header}")
        found = cls(
            users=np.asarray(arrays["users"], dtype=np.int64),
            totals=np.asarray(arrays["totals"], dtype=np.float64),
            histogram=np.asarray(arrays["histogram"], dtype=np.int64),
            recommended=np.asarray(arrays["recommended"], dtype=np.int64),
            popularity=np.asarray(arrays["popularity"], dtype=np.float64),
            ks=tuple(header[2:]),
            list_k=header[1],
            primary=RANKINGS[header[0]],
        )
        shapes = {
            "users": (2, 2),
            "totals": (2, 2, len(METRICS), len(found.ks)),
            "histogram": (2, HISTOGRAM_BINS),
            "recommended": (2, found.recommended.shape[-1] if found.recommended.ndim else 0),
            "popularity": (2,),
        }
        for name, shape in shapes.items():
            if getattr(found, name).shape != shape:
                raise ValueError(f"evaluation sums: {name} has shape {getattr(found, name).shape}, expected {shape}")
        if not np.isfinite(found.totals).all() or (found.totals > found.users[:, :, None, None] + 1e-6).any():
            raise ValueError("evaluation sums: a sum is not finite, or exceeds its number of users")
        return found

    def n_users(self, part: Part, ranking: Ranking | None = None) -> int:
        """Users ranked in ``part`` under ``ranking`` (the primary one by default)."""
        return int(self.users[PARTS.index(part), RANKINGS.index(ranking or self.primary)])

    def metrics(self, part: Part) -> dict[str, float]:
        """Means over users, keyed ``hr@10``, ``ndcg@10``, ``recall@20``, ``mrr@5`` … for the primary ranking, the other
        one's prefixed ``sampled_`` or ``full_``; ``coverage@k`` and ``popularity@k`` of the recommended lists.

        A ranking in which nobody was ranked has no entries, so no number stands for "none".
        """
        p = PARTS.index(part)
        result: dict[str, float] = {}
        secondary: Ranking = "sampled" if self.primary == "full" else "full"
        for ranking, prefix in ((self.primary, ""), (secondary, f"{secondary}_")):
            r = RANKINGS.index(ranking)
            if self.users[p, r] == 0:
                continue
            means = self.totals[p, r] / self.users[p, r]
            for m, metric in enumerate(METRICS):
                for i, k in enumerate(self.ks):
                    result[f"{prefix}{metric}@{k}"] = float(means[m, i])
        listed = int(self.recommended[p].sum())
        if listed:
            result[f"coverage@{self.list_k}"] = coverage(self.recommended[p])
            if not np.isnan(self.popularity[p]):
                result[f"popularity@{self.list_k}"] = float(self.popularity[p] / listed)
        return result

    def metric(self, part: Part, name: str) -> float:
        """One of ``metrics(part)``.

        Raises:
            ConfigError: it was not computed; the message names those that were.
        """
        values = self.metrics(part)
        if name not in values:
            raise ConfigError(f"metric {name!r} was not computed on {part}; there are: {', '.join(values) or 'none'}")
        return values[name]
