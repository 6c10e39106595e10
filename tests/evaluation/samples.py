"""Small splits with scores that tie often, for the evaluation tests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from fedrec.data.interactions import UserItems
from fedrec.data.split import Split

Scores = npt.NDArray[np.float32]


def random_split(rng: np.random.Generator, n_users: int, n_items: int, *, held_out: int | None = None) -> Split:
    """Disjoint rows; without ``held_out``, between no and many held-out items a part."""
    rows: list[list[list[int]]] = [[], [], []]
    for _ in range(n_users):
        order = rng.permutation(n_items)
        sizes = [int(rng.integers(1, n_items // 2))]
        sizes += [held_out] * 2 if held_out is not None else rng.integers(0, n_items // 4 + 1, 2).tolist()
        start = 0
        for part, size in enumerate(sizes):
            rows[part].append(order[start : start + size].tolist())
            start += size
    tables = [
        UserItems(
            np.cumsum([0, *(len(r) for r in part)]).astype(np.int64),
            np.array([i for r in part for i in r], dtype=np.int32),
        )
        for part in rows
    ]
    return Split("sample", n_items, tables[0], tables[1], tables[2], tables[0].sorted)


@st.composite
def ranked_splits(draw: st.DrawFn) -> tuple[Split, Scores]:
    """A split and scores from few distinct values (infinities included), so that ties are the rule."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    split = random_split(rng, draw(st.integers(1, 12)), draw(st.integers(4, 40)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    scores = rng.integers(0, levels, (split.n_users, split.n_items)).astype(np.float32)
    if draw(st.booleans()):
        scores[rng.random(scores.shape) < 0.2] = -np.inf
        scores[rng.random(scores.shape) < 0.05] = np.inf
    return split, scores
