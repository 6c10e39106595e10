"""One stored round of an update history: the arrays, their precision, the file.

A file is in safetensors format and carries the SHA-256 of itself in its metadata (computed with 64 zeros in its place).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from fedrec.errors import DataError

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
_UNSEALED = "0" * 64


@dataclass(frozen=True)
class Stored:
    users: Int64
    indptr: Int64
    rows: Int32
    values: npt.NDArray[np.floating[Any]]  # as stored
    norms: Float32
    exponent: int  # values are to be multiplied by 2^exponent

    @property
    def decoded(self) -> Float32:
        if self.exponent == 0:
            return self.values.astype(np.float32, copy=False)
        most = float(np.finfo(np.float32).max)
        wide = np.ldexp(self.values.astype(np.float64), self.exponent)
        return np.clip(wide, -most, most).astype(np.float32)

    def keep(self, users: npt.NDArray[np.bool_], rows: npt.NDArray[np.bool_], norms: Float32) -> Stored:
        """Without the devices and rows that are not kept (rows of devices that go, go)."""
        counts = np.diff(self.indptr)
        rows = rows & np.repeat(users, counts)
        owner = np.repeat(np.arange(self.users.size), counts)
        left = np.bincount(owner[rows], minlength=self.users.size)[users]
        indptr = np.concatenate([[0], np.cumsum(left)]).astype(np.int64)
        return Stored(self.users[users], indptr, self.rows[rows], self.values[rows], norms[users], self.exponent)


def check_arrays(users: Int64, indptr: Int64, rows: Int32, values: Float32) -> None:
    if values.ndim != 2 or rows.shape != values.shape[:1] or indptr.shape != (users.size + 1,):
        raise ValueError(
            f"update history: {users.size} users, indptr {indptr.shape}, rows {rows.shape}, {values.shape}"
        )
    if indptr[0] != 0 or indptr[-1] != rows.size or (np.diff(indptr) < 0).any():
        raise ValueError("update history: indptr does not go from 0 to the number of rows")
    if np.unique(users).size != users.size:
        raise ValueError("update history: a user occurs twice in one round")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if bad.size:
        user = users[np.searchsorted(indptr, bad[0], side="right") - 1]
        raise ValueError(f"update history: the update of user {user} is not finite")


def take(indptr: Int64, order: Int64) -> tuple[Int64, Int64]:
    """Positions of the rows of the users ``order``, and their pointers."""
    counts = np.diff(indptr)[order]
    new = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    within: Int64 = np.arange(new[-1]) - np.repeat(new[:-1], counts) + np.repeat(indptr[order], counts)
    return within, new


def largest_rows(squares: npt.NDArray[np.float64], owner: Int64, counts: Int64, top: float) -> npt.NDArray[np.bool_]:
    """Which rows are among the ⌈top · n⌉ largest of their device."""
    order = np.lexsort((-squares, owner))
    rank = np.arange(owner.size) - np.repeat(np.cumsum(counts) - counts, counts)
    limit = np.maximum(1, np.ceil(top * counts - 1e-9)).astype(np.int64)
    kept = np.zeros(owner.size, dtype=np.bool_)
    kept[order] = rank < np.repeat(limit, counts)
    return kept


def typed(stored: Stored, precision: str) -> Stored:
    """In the stored precision. float16 is scaled by a power of two, so that the largest value lies just below 2^15:
    nothing overflows, and small updates keep their 11 bits."""
    if precision == "float32":
        return stored
    largest = float(np.abs(stored.values).max(initial=0.0))
    exponent = math.frexp(largest)[1] - 15 if largest else 0
    scaled = np.ldexp(stored.values.astype(np.float64), -exponent).astype(np.float16)
    return Stored(stored.users, stored.indptr, stored.rows, scaled, stored.norms, exponent)


def encode(round_number: int, stored: Stored) -> bytes:
    arrays = {
        name: np.ascontiguousarray(getattr(stored, name)) for name in ("users", "indptr", "rows", "values", "norms")
    }
    metadata = {"round": str(round_number), "exponent": str(stored.exponent), "sha256": _UNSEALED}
    content: bytes = save(arrays, metadata=metadata)
    at = content.index(_UNSEALED.encode())
    return content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + 64 :]


def decode(path: Path, round_number: int, content: bytes) -> Stored:
    try:
        length = struct.unpack("<Q", content[:8])[0]
        metadata: Mapping[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
        at = content.index(metadata["sha256"].encode(), 8, 8 + length)
        blank = content[:at] + _UNSEALED.encode() + content[at + 64 :]
        if hashlib.sha256(blank).hexdigest() != metadata["sha256"] or metadata["round"] != str(round_number):
            raise damaged(path)
        arrays = load(content)
        return Stored(
            arrays["users"], arrays["indptr"], arrays["rows"], arrays["values"], arrays["norms"],
            int(metadata["exponent"]),
        )  # fmt: skip
    except DataError:
        raise
    except Exception:  # whatever a damaged header makes of itself
        raise damaged(path) from None


def damaged(path: Path) -> DataError:
    return DataError(
        f"{path}: damaged (its SHA-256 is not the one it carries); restore it, or forget with "
        "unlearning=retrain, which needs no history"
    )
