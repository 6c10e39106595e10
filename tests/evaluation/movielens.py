"""MovieLens-100K for the tests that check published numbers; skipped without ``FEDREC_DATA_DIR``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from fedrec.data.interactions import Interactions


def movielens_100k() -> Interactions:
    """The data set straight from ``ml-100k/ml-100k.inter``, so that these numbers do not depend on the readers."""
    path = Path(os.environ.get("FEDREC_DATA_DIR", "")) / "ml-100k" / "ml-100k.inter"
    if "FEDREC_DATA_DIR" not in os.environ or not path.exists():
        pytest.skip("FEDREC_DATA_DIR has no ml-100k/ml-100k.inter")
    frame = pl.read_csv(path, separator="\t", new_columns=["user", "item", "rating", "time"])
    users, user = np.unique(frame["user"].to_numpy(), return_inverse=True)
    items, item = np.unique(frame["item"].to_numpy(), return_inverse=True)
    time = frame["time"].to_numpy().astype(np.int64)
    order = np.lexsort((np.arange(time.size), time, user))
    return Interactions(
        name="ml-100k",
        user=user[order].astype(np.int32),
        item=item[order].astype(np.int32),
        user_ids=[str(u) for u in users],
        item_ids=[str(i) for i in items],
        timestamp=time[order],
    )
