"""What an honest-but-curious server sees of a round, and apart from it, what really happened.

The attacks read views alone; the truth only marks their answers, so it lives in a type and a file of its own. Files are
safetensors: tensors and strings, nothing that runs when it is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedrec.data.interactions import Float32, Int32, Int64, UserItems
from fedrec.errors import DataError


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


@dataclass(frozen=True)
class RoundView:
    """A round under secure aggregation: the (noisy) sum of all uploads, float32[n_items, w], and of how many."""

    round: int
    devices: int
    total: Float32

    def __post_init__(self) -> None:
        _check(self.total, np.float32, 2, "RoundView.total")


@dataclass(frozen=True)
class RoundTruth:
    """What a round's participants really did. ``users`` int64[B]; per participant ``rows``, the items whose rows the
    upload touched, and ``positives``, the items that the user interacted with (both ascending)."""

    round: int
    users: Int64
    rows: UserItems
    positives: UserItems

    def __post_init__(self) -> None:
        if not self.users.size == self.rows.n_users == self.positives.n_users:
            raise ValueError(
                f"RoundTruth: {self.users.size} users, rows of {self.rows.n_users}, positives of "
                f"{self.positives.n_users}"
            )

    def positives_of(self, user: int) -> Int32:
        """int32: the items of one participant. KeyError when the user did not take part."""
        at = np.flatnonzero(self.users == user)
        if not at.size:
            raise KeyError(f"user {user} did not take part in round {self.round}")
        return self.positives.row(int(at[0]))


def save_user_views(path: Path, views: Sequence[UserView]) -> None:
    """Write uploads of one tensor (equal widths) to ``path``, atomically. ValueError for an empty list."""
    if not views:
        raise ValueError("no views to save")
    _save(
        path,
        "user views",
        {
            "user": np.array([v.user for v in views], dtype=np.int64),
            "round": np.array([v.round for v in views], dtype=np.int64),
            "count": np.array([v.rows.size for v in views], dtype=np.int64),
            "rows": np.concatenate([v.rows for v in views]),
            "values": np.concatenate([v.values for v in views]),
        },
    )


def load_user_views(path: Path) -> list[UserView]:
    """The views that ``save_user_views`` wrote. DataError when the file is not one of these."""
    found = _load(path, "user views")
    ends = np.cumsum(found["count"])
    return [
        UserView(int(user), int(number), found["rows"][end - count : end], found["values"][end - count : end])
        for user, number, count, end in zip(found["user"], found["round"], found["count"], ends, strict=True)
    ]


def save_rounds(path: Path, views: Sequence[RoundView]) -> None:
    """Write round views to ``path``, atomically. ValueError for an empty list."""
    if not views:
        raise ValueError("no views to save")
    _save(
        path,
        "round views",
        {
            "round": np.array([v.round for v in views], dtype=np.int64),
            "devices": np.array([v.devices for v in views], dtype=np.int64),
            "total": np.stack([v.total for v in views]),
        },
    )


def load_rounds(path: Path) -> list[RoundView]:
    """The views that ``save_rounds`` wrote. DataError when the file is not one of these."""
    found = _load(path, "round views")
    return [
        RoundView(int(number), int(devices), total)
        for number, devices, total in zip(found["round"], found["devices"], found["total"], strict=True)
    ]


def save_truth(path: Path, rounds: Sequence[RoundTruth]) -> None:
    """Write the truth of some rounds to ``path``, atomically. ValueError for an empty list."""
    if not rounds:
        raise ValueError("no truth to save")
    _save(
        path,
        "truth",
        {
            "round": np.array([r.round for r in rounds], dtype=np.int64),
            "participants": np.array([r.users.size for r in rounds], dtype=np.int64),
            "users": np.concatenate([r.users for r in rounds]),
            **_ragged("rows", [r.rows for r in rounds]),
            **_ragged("positives", [r.positives for r in rounds]),
        },
    )


def load_truth(path: Path) -> list[RoundTruth]:
    """What ``save_truth`` wrote. DataError when the file is not one of these."""
    found = _load(path, "truth")
    rounds, end = [], 0
    rows, positives = (UserItems(_pointers(found[f"{name}.counts"]), found[name]) for name in ("rows", "positives"))
    for number, size in zip(found["round"], found["participants"], strict=True):
        members = np.arange(end, end + size)
        rounds.append(RoundTruth(int(number), found["users"][members], rows.take(members), positives.take(members)))
        end += int(size)
    return rounds


def _ragged(name: str, tables: Sequence[UserItems]) -> dict[str, npt.NDArray[Any]]:
    return {
        name: np.concatenate([t.items for t in tables]),
        f"{name}.counts": np.concatenate([t.counts for t in tables]),
    }


def _pointers(counts: Int64) -> Int64:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])


def _check(array: npt.NDArray[Any], dtype: npt.DTypeLike, ndim: int, label: str) -> None:
    if array.dtype != dtype or array.ndim != ndim:
        raise TypeError(f"{label} needs {np.dtype(dtype)} and {ndim} axes, got {array.dtype}{list(array.shape)}")


def _save(path: Path, kind: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    temporary = path.with_name(path.name + ".new")
    save_file(
        {name: np.ascontiguousarray(value) for name, value in arrays.items()},
        temporary,
        metadata={"fedrec": json.dumps({"kind": kind, "schema": 1})},
    )
    os.replace(temporary, path)


def _load(path: Path, kind: str) -> dict[str, npt.NDArray[Any]]:
    remedy = "record it again with attack=… in a new run"
    try:
        with safe_open(path, framework="numpy") as file:
            said = json.loads((file.metadata() or {}).get("fedrec", "{}"))
            if said != {"kind": kind, "schema": 1}:
                raise DataError(f"{path}: expected {kind} (schema 1), found {said or 'no label of fedrec'}; {remedy}")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; {remedy}") from None
    except SafetensorError as error:
        raise DataError(f"{path}: not a complete safetensors file ({error}); {remedy}") from None
