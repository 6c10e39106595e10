"""What a secure sum still gives away: rows that a single participant touched arrive in it unchanged.

Secure aggregation (Bonawitz et al., CCS 2017) hides summands, not the absence of company. After one local step all rows
of a participant are multiples of the same vector p_u (see :mod:`privacy.attacks.interaction`), so the singleton rows of
one participant are collinear, and two rows of mixed company are not: their direction links them into a profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from fedrec.data.interactions import Int64, UserItems

_BLOCK = 1024  # rows whose cosines with all others are held at once


@dataclass(frozen=True)
class Singletons:
    """Rows that exactly one participant touched: ``items`` int64[s] ascending, ``owners`` int64[s] (positions of the
    participants)."""

    items: Int64
    owners: Int64
    touched: int  # distinct rows that anybody touched
    users: int  # participants who touched a row at all

    @property
    def row_share(self) -> float:
        """Share of the touched rows that are singletons."""
        return self.items.size / self.touched if self.touched else 0.0

    @property
    def user_share(self) -> float:
        """Share of the participants with at least one singleton row."""
        return np.unique(self.owners).size / self.users if self.users else 0.0


def singletons(row_sets: UserItems) -> Singletons:
    """The singleton rows of a round whose participants touched ``row_sets`` (a repeated item counts once)."""
    if not row_sets.items.size:
        return Singletons(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), 0, 0)
    pairs = np.unique(np.stack([row_sets.items.astype(np.int64), row_sets.users]), axis=1)
    items, first, count = np.unique(pairs[0], return_index=True, return_counts=True)
    alone = count == 1
    return Singletons(items[alone], pairs[1][first[alone]], items.size, np.unique(pairs[1]).size)


def link_rows(total: npt.NDArray[Any], tolerance: float = 1e-9) -> Int64:
    """int64[n_items]: rows of the sum that are collinear share a number from 0; −1 marks rows alone in their direction.

    Two rows are collinear when 1 − |cos| ≤ ``tolerance``; it is tight because two rows of the same two participants are
    nearly so early in training (all slopes are about ½). ``total`` float[n_items, w] needs w ≥ 2; the more, the fewer
    chance matches. Noise in the sum, several local steps or company on a row break the link.
    """
    if total.ndim != 2 or total.shape[1] < 2:
        raise ValueError(f"collinearity needs rows of two or more values, got shape {list(total.shape)}")
    labels = np.full(total.shape[0], -1, dtype=np.int64)
    live = np.flatnonzero(total.any(axis=1))
    rows = total[live].astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    near_a, near_b = [], []
    for start in range(0, live.size, _BLOCK):
        cosine = np.abs(rows[start : start + _BLOCK] @ rows.T)
        a, b = np.nonzero(1.0 - cosine <= tolerance)
        near_a.append(a + start)
        near_b.append(b)
    if not live.size:
        return labels
    a, b = np.concatenate(near_a), np.concatenate(near_b)
    _, component = connected_components(coo_matrix((np.ones(a.size), (a, b)), (live.size, live.size)), directed=False)
    number, inverse, size = np.unique(component, return_inverse=True, return_counts=True)
    names = np.full(number.size, -1, dtype=np.int64)
    names[size > 1] = np.arange((size > 1).sum())
    labels[live] = names[inverse]
    return labels


def link_report(labels: Int64, truth: Singletons) -> dict[str, float]:
    """How well ``link_rows`` found pairs of rows that belong to one participant.

    Keys: ``pairs`` linked; ``precision``, the share of them that are two singletons of one participant; ``recall``, the
    share of all such pairs that were linked. NaN where there is nothing to divide by.
    """
    owner = np.full(labels.size, -1, dtype=np.int64)
    owner[truth.items] = truth.owners
    linked = _pairs(labels[labels >= 0])
    right = _pairs((labels * (owner.max(initial=0) + 1) + owner)[(labels >= 0) & (owner >= 0)])
    wanted = _pairs(truth.owners)
    return {
        "pairs": float(linked),
        "precision": right / linked if linked else np.nan,
        "recall": right / wanted if wanted else np.nan,
    }


def _pairs(group: Int64) -> int:
    """Unordered pairs of equal entries."""
    count = np.unique(group, return_counts=True)[1].astype(np.int64)
    return int((count * (count - 1) // 2).sum())
