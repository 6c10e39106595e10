"""Public item features as a matrix: one column a genre."""

from __future__ import annotations

import numpy as np
import torch

from fedrec.data import Interactions


def item_features(data: Interactions) -> torch.Tensor | None:
    """float32[n_items, n_genres], 1 where an item has a genre (genres in alphabetical order); None without genres."""
    table = data.item_table
    if table is None or "genres" not in table.columns:
        return None
    lists = table["genres"].to_list()
    names = sorted({genre for genres in lists for genre in genres or []})
    column = {name: k for k, name in enumerate(names)}
    matrix = np.zeros((data.n_items, len(names)), dtype=np.float32)
    for row, genres in enumerate(lists):
        for genre in genres or []:
            matrix[row, column[genre]] = 1.0
    return torch.from_numpy(matrix)
