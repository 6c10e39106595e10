"""Small data for request scripts: what is asked of whom can be read off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from fedrec.data.interactions import Interactions
from fedrec.data.split import Split
from fedrec.data.splits import leave_one_out
from unlearning.requests import Batch, plan_requests

NOW = datetime(2025, 6, 15, 12, tzinfo=UTC)


def histories(rows: Sequence[Sequence[int]], items: int) -> Interactions:
    """User ``u`` (id ``10 + u``) has ``rows[u]``, oldest first; item ``i`` has the id ``i{i}``."""
    return Interactions(
        name="sample",
        user=np.repeat(np.arange(len(rows)), [len(row) for row in rows]).astype(np.int32),
        item=np.array([item for row in rows for item in row], dtype=np.int32),
        user_ids=[str(10 + u) for u in range(len(rows))],
        item_ids=[f"i{i}" for i in range(items)],
        timestamp=np.concatenate([np.arange(len(row)) for row in rows]).astype(np.int64),
    )


#: Training items are all but the last two, of which the first validates and the second tests.
ROWS = [[0, 1, 2, 3, 4], [1, 0, 3, 2, 4], [5, 6, 0, 1, 2, 7, 3], [6, 5, 1, 4, 8], [7, 8, 9, 0, 5, 6], [9, 2, 8, 7, 1]]
DATA = histories(ROWS, items=10)
SPLIT = leave_one_out(DATA)


def plan(
    *entries: Mapping[str, Any], data: Interactions = DATA, split: Split = SPLIT, **options: Any
) -> tuple[Batch, ...]:
    """The plan of ``entries``, which get the ids r1, r2, … where they have none."""
    named = [{"id": f"r{n}", **entry} for n, entry in enumerate(entries, start=1)]
    return plan_requests(named, data, split, **{"rounds": 50, "seed": 0, "now": NOW, **options})


def pairs(table: Any) -> set[tuple[int, int]]:
    return set(zip(table.users.tolist(), table.items.tolist(), strict=True))


def same_split(first: Split, second: Split) -> bool:
    tables = ("train", "validation", "test", "negatives_exclude")
    return all(
        np.array_equal(getattr(first, name).indptr, getattr(second, name).indptr)
        and np.array_equal(getattr(first, name).items, getattr(second, name).items)
        for name in tables
    )
