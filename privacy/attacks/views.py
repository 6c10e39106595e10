"""What an honest-but-curious server sees of one user: the attacks read this alone, never the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedrec.data.interactions import Float32, Int32


@dataclass(frozen=True)
class UserView:
    """One user's upload of a per-item tensor: ``rows`` int32[t] ascending (every row, when the upload is dense) and
    ``values`` float32[t, w], after whatever clipping and noise the device applied."""

    user: int
    round: int
    rows: Int32
    values: Float32

    def __post_init__(self) -> None:
        _check(self.rows, np.int32, 1, "UserView.rows")
        _check(self.values, np.float32, 2, "UserView.values")
        if self.values.shape[0] != self.rows.size:
            raise ValueError(f"UserView: {self.rows.size} rows, but values for {self.values.shape[0]}")
        if self.rows.size and (self.rows[0] < 0 or (np.diff(self.rows) <= 0).any()):
            raise ValueError("UserView.rows must ascend strictly from 0 or more")


def _check(array: npt.NDArray[Any], dtype: npt.DTypeLike, ndim: int, label: str) -> None:
    if array.dtype != dtype or array.ndim != ndim:
        raise TypeError(f"{label} needs {np.dtype(dtype)} and {ndim} axes, got {array.dtype}{list(array.shape)}")
