"""Where the forgotten stands in the rankings: Recall@k of pairs, percentiles of pairs and of withdrawn items."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedrec.data.interactions import UserItems

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def rank_pairs(
    shown: Float32, raw: Float32, retained: UserItems, forgotten: UserItems, withdrawn: Bool, k: int
) -> tuple[Float64, list[Float64]]:
    """Recall@k and percentiles of the forgotten pairs of B users.

    Candidates are all items outside a user's *retained* training items, held-out ones too. As in
    ``fedrec.evaluation.metrics``: recall is hits / forgotten items, ties are lost; an item scored −inf is no hit. A
    percentile is the share of the candidates outside the forget set that score lower (ties one half).

    Args:
        shown: float32[B, I], what devices rank by. raw: float32[B, I], the same before masking.
        retained, forgotten: rows of these users. withdrawn: bool[I], items that leave the catalogue: they are in no
            percentile.

    Returns:
        (float64[B], NaN for users with nothing to forget; per user the float64 percentiles of its pairs that are not of
        withdrawn items).
    """
    free = np.ones(shown.shape, dtype=bool)
    for table in (retained, forgotten):
        free[table.users, table.items] = False
    recalls = np.full(len(shown), np.nan)
    percentiles: list[Float64] = []
    for b in range(len(shown)):
        wanted = forgotten.row(b)
        if not wanted.size:
            percentiles.append(np.zeros(0))
            continue
        others = np.sort(shown[b, free[b]])
        mine = np.sort(shown[b, wanted])[::-1]
        ranks = 1 + others.size - np.searchsorted(others, mine, side="left") + np.arange(mine.size)
        recalls[b] = ((ranks <= k) & (mine > -np.inf)).sum() / mine.size
        kept = wanted[~withdrawn[wanted]]
        if raw is not shown or kept.size < wanted.size or withdrawn.any():
            others = np.sort(raw[b, free[b] & ~withdrawn])
        percentiles.append(percentile(others, raw[b, kept]))
    return recalls, percentiles


def rank_items(raw: Float32, withdrawn: Bool) -> Float64:
    """float64[withdrawn]: the sum over B users of the percentile of every withdrawn item among all others of the
    catalogue, by ``raw`` float32[B, I]."""
    total = np.zeros(int(withdrawn.sum()))
    others = np.sort(raw[:, ~withdrawn], axis=1)
    for row, wanted in zip(others, raw[:, withdrawn], strict=True):
        total += percentile(row, wanted)
    return total


def percentile(others: Float32, wanted: Float32) -> Float64:
    """float64[wanted]: the share of ``others`` (ascending) that are lower, ties one half; NaN without others."""
    if not others.size:
        return np.full(wanted.size, np.nan)
    low = np.searchsorted(others, wanted, side="left")
    high = np.searchsorted(others, wanted, side="right")
    return np.asarray((low + high) / (2.0 * others.size))


def top_items(shown: Float32, seen: UserItems, k: int) -> npt.NDArray[np.int32]:
    """int32[B, k]: the highest-scoring items outside ``seen``, best first; −1 where fewer can be recommended."""
    scores = shown.copy()
    scores[seen.users, seen.items] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.where(np.take_along_axis(scores, order, axis=1) > -np.inf, order, -1).astype(np.int32)
    return np.pad(found, ((0, 0), (0, k - found.shape[1])), constant_values=-1)
