"""The sparse item view on the wire: codecs, and the exact number of bytes that a device sends.

A device's update of one shared tensor is a set of rows and their values, plus one scalar: the weight decay of all
rows it did not touch. What the codec leaves out is zero on the other side.

==========  ==========================================================================  ========
codec       arrays (n rows in the view, t of them sent, each of width w)                 lossless
==========  ==========================================================================  ========
dense       ``dense`` [n, w]                                                             yes
touched     ``rows`` int32[t], ``values`` [t, w]                                         yes
nonzero     ``index`` int32[k] (flat), ``values`` [k]: entries that are not zero         yes
topk        as nonzero, the ``fraction``·n·w entries of largest magnitude of a device    no
==========  ==========================================================================  ========

Values are float32, or float16 with ``precision="float16"`` (lossy). The set of rows is itself information about the
user; see docs/traffic.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrec.errors import ConfigError

Arrays = dict[str, npt.NDArray[Any]]
Kind = Literal["dense", "touched", "nonzero", "topk"]


@dataclass(frozen=True)
class Codec:
    """How one device encodes its update of a per-item tensor."""

    kind: Kind = "touched"
    precision: Literal["float32", "float16"] = "float32"
    fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "touched", "nonzero", "topk"):
            raise ConfigError(f"codec {self.kind!r}: write dense, touched, nonzero or topk")
        if self.precision not in ("float32", "float16"):
            raise ConfigError(f"precision {self.precision!r}: write float32 or float16")
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(f"top_fraction={self.fraction}: write a share of the view's entries in (0, 1]")

    @property
    def value_bytes(self) -> int:
        return 4 if self.precision == "float32" else 2

    def top_k(self, n_rows: int, width: int) -> int:
        """Entries that a ``topk`` device keeps."""
        return max(1, round(self.fraction * n_rows * width))

    def lossy(self, values: Tensor, n_rows: int) -> Tensor:
        """What the server will read of ``values`` float32[B, T, w] of B devices (rows beyond a device's own are
        zero)."""
        if self.kind == "topk":
            flat = values.flatten(1)
            k = min(self.top_k(n_rows, values.shape[2]), flat.shape[1])
            # A stable choice among equal magnitudes, so that any layout of cohorts keeps the same entries.
            kept = torch.argsort(flat.abs(), dim=1, descending=True, stable=True)[:, :k]
            values = torch.zeros_like(flat).scatter_(1, kept, flat.gather(1, kept)).view_as(values)
        if self.precision == "float16":
            values = values.half().float()
        return values

    def device_bytes(self, n_rows: int, width: int, touched: Tensor, nonzero: Tensor, decay: bool) -> Tensor:
        """int64[B]: bytes of the encoded update, from rows touched and entries not zero per device."""
        scalar = 4 if decay else 0
        if self.kind == "dense":
            return torch.full_like(touched, n_rows * width * self.value_bytes + scalar)
        if self.kind == "touched":
            return touched * (4 + width * self.value_bytes) + scalar
        return nonzero * (4 + self.value_bytes) + scalar

    def encode(self, rows: npt.NDArray[np.int32], values: npt.NDArray[np.float32], n_rows: int) -> Arrays:
        """The arrays of one update: ``rows`` int32[t] ascending, ``values`` float32[t, w]."""
        typed = values.astype(np.float16 if self.precision == "float16" else np.float32)
        if self.kind == "dense":
            dense = np.zeros((n_rows, values.shape[1]), dtype=typed.dtype)
            dense[rows] = typed
            return {"dense": dense}
        if self.kind == "touched":
            return {"rows": rows.astype(np.int32), "values": typed}
        row, column = np.nonzero(typed)
        index = rows[row].astype(np.int64) * values.shape[1] + column
        if n_rows * values.shape[1] >= 2**31:
            raise ConfigError("codec nonzero/topk: the item view has more than 2^31 entries; use codec=touched")
        return {"index": index.astype(np.int32), "values": typed[row, column]}


def decode(arrays: Mapping[str, npt.NDArray[Any]], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The dense float32 tensor of ``shape`` that any codec's arrays stand for. ValueError on malformed arrays.

    Whether the values are finite is the caller's to check: a device's NaN is well-formed.
    """
    out = np.zeros((shape[0], int(np.prod(shape[1:]))), dtype=np.float32)
    for name, array in arrays.items():
        wanted = np.integer if name in ("rows", "index") else np.floating
        if not np.issubdtype(array.dtype, wanted):
            raise ValueError(f"{name} has type {array.dtype}")
    if "dense" in arrays:
        if arrays["dense"].shape != out.shape:
            raise ValueError(f"dense view of shape {arrays['dense'].shape}, expected {out.shape}")
        out[:] = arrays["dense"]
    elif "rows" in arrays and "values" in arrays:
        rows, values = arrays["rows"], arrays["values"]
        if rows.ndim != 1 or values.shape != (rows.size, out.shape[1]):
            raise ValueError(f"{rows.size} rows with values of shape {values.shape}, expected width {out.shape[1]}")
        if rows.size and (rows.min() < 0 or rows.max() >= shape[0] or np.unique(rows).size != rows.size):
            raise ValueError(f"row numbers outside 0…{shape[0] - 1}, or repeated")
        out[rows] = values
    elif "index" in arrays and "values" in arrays:
        index, values = arrays["index"], arrays["values"]
        if index.ndim != 1 or values.shape != index.shape:
            raise ValueError(f"{index.size} indices with values of shape {values.shape}")
        if index.size and (index.min() < 0 or index.max() >= out.size or np.unique(index).size != index.size):
            raise ValueError(f"entry indices outside 0…{out.size - 1}, or repeated")
        out.ravel()[index] = values
    else:
        raise ValueError(f"no codec sends the arrays {', '.join(sorted(arrays)) or 'that are missing'}")
    return out.reshape(shape)


def pack_symmetric(matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The upper triangle of a symmetric matrix, row by row: float32[n(n+1)/2]."""
    return matrix[np.triu_indices(matrix.shape[0])]


def unpack_symmetric(packed: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.float32]:
    """The symmetric float32[n, n] matrix of :func:`pack_symmetric`'s triangle."""
    if packed.shape != (n * (n + 1) // 2,):
        raise ValueError(f"packed triangle of {packed.shape}, expected {n * (n + 1) // 2} values")
    matrix = np.zeros((n, n), dtype=np.float32)
    upper = np.triu_indices(n)
    matrix[upper] = packed
    matrix.T[upper] = packed
    return matrix
