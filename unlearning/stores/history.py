"""The update history that FedEraser (on the server) and FRU (on the devices) replay.

One file a stored round: of every device that took part the rows of its update with the largest norms (FRU's top-α), and
the norm of the whole update. A history of updates is itself personal data: it is counted in bytes, bounded, and what a
user left in it can be purged. Sources: FedEraser (Liu et al., IWQoS 2021), FRU (Yuan et al., WSDM 2023).

Files (:mod:`unlearning.stores.round_file`) carry their SHA-256 and are replaced whole or not at all.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError, DataError
from unlearning.needle_scan import SHORTEST, Needles
from unlearning.purge import replace_file, wipe
from unlearning.stores.round_file import Stored, check_arrays, damaged, decode, encode, largest_rows, take, typed
from unlearning.stores.size import check_settings, estimate, remedy, size_text
from unlearning.strategies.base import StoreNeeds

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
_NAME = re.compile(r"round-(\d{6,})\.safetensors")


class Updates(NamedTuple):
    """One stored round: ``users`` int64[k] ascending; rows of user k are ``indptr[k]:indptr[k + 1]`` of ``rows``
    int32[n] and ``values`` float32[n, width]."""

    users: Int64
    indptr: Int64
    rows: Int32
    values: Float32


class UpdateHistory:
    """The update history in one folder, of one shared tensor. One process writes to it at a time.

    ``rounds`` is how many rounds the run plans, for the message where the space does not suffice.
    """

    def __init__(self, folder: Path, needs: StoreNeeds, *, rounds: int | None = None) -> None:
        """Opens the history in ``folder``, made if missing.

        Raises:
            ConfigError: settings out of range; a history there that was made with other settings.
        """
        check_settings(needs)
        self.folder, self.needs, self._planned = Path(folder), needs, rounds
        self._seen = (0, 0, 0)  # rounds, devices and rows (before top-α) that were added, to foresee the rest
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.new"):  # of a crash: it was never part of the history
            wipe(leftover)
        self._check_kind()

    # -- writing --------------------------------------------------------------------------------------------------

    def wants(self, round_number: int) -> bool:
        """Whether round ``round_number`` (from 1) is one of those that are stored: the first and every interval-th."""
        return (round_number - 1) % self.needs.interval == 0

    def add(self, round_number: int, users: Int64, indptr: Int64, rows: Int32, values: Float32) -> bool:
        """Store a round's updates (as :class:`Updates`, users in any order); False if it is not one to keep.

        A round that is there already is replaced. Of each device the ⌈top · n⌉ rows of largest norm stay, the earlier
        row among equals.

        Raises:
            ValueError: arrays that do not fit together, a user twice, values that are not finite.
            ConfigError: it would exceed ``max_bytes``; nothing is written.
        """
        if not self.wants(round_number):
            return False
        users, indptr = np.asarray(users, dtype=np.int64), np.asarray(indptr, dtype=np.int64)
        rows, values = np.asarray(rows, dtype=np.int32), np.asarray(values, dtype=np.float32)
        check_arrays(users, indptr, rows, values)
        order = np.argsort(users, kind="stable")
        if not np.array_equal(order, np.arange(users.size)):
            within, indptr = take(indptr, order)
            users, rows, values = users[order], rows[within], values[within]
        squares = np.einsum("nw,nw->n", values, values, dtype=np.float64)
        owner = np.repeat(np.arange(users.size), np.diff(indptr))
        lengths = np.sqrt(np.bincount(owner, squares, minlength=users.size))
        norms = np.minimum(lengths, np.finfo(np.float32).max).astype(np.float32)
        stored, rows_before = Stored(users, indptr, rows, values, norms, 0), rows.size
        if self.needs.top < 1.0:
            kept = largest_rows(squares, owner, np.diff(indptr), self.needs.top)
            stored = stored.keep(np.ones(users.size, dtype=np.bool_), kept, norms)
        self._seen = (self._seen[0] + 1, self._seen[1] + users.size, self._seen[2] + rows_before)
        content = encode(round_number, typed(stored, self.needs.precision))
        path = self._path(round_number)
        there = self.bytes - (path.stat().st_size if path.exists() else 0)
        if there + len(content) > self.needs.max_bytes:
            raise self._too_large(round_number, there, len(content), values.shape[1])
        replace_file(path, content, sync=False)  # a file that a power cut damages says so
        return True

    def purge(self, users: npt.ArrayLike, pairs: UserItems | None = None, *, purge_affected: bool = False) -> int:
        """Forget: all updates of ``users``, and of each user the rows of the items that ``pairs`` lists for them.

        An update was made from all of a device's interactions at once. With ``purge_affected`` whoever has a pair to
        forget loses the whole updates, and not just the forgotten items' rows. Norms lose the dropped rows' share.
        Files are rewritten one after the other; after a crash the same call finishes what is left.

        Returns the number of updates that were dropped or shortened. DataError: a damaged file.
        """
        whole = np.unique(np.asarray(users, dtype=np.int64))
        single = np.zeros(0, dtype=np.int64)
        if pairs is not None:
            if purge_affected:
                whole = np.union1d(whole, np.flatnonzero(pairs.counts))
            single = np.unique((pairs.users << 32) | pairs.items.astype(np.int64))
        changed = 0
        for number in self.rounds:
            stored = self._load(number)
            owner = np.repeat(np.arange(stored.users.size), np.diff(stored.indptr))
            stays = ~np.isin(stored.users, whole)
            kept = ~np.isin((stored.users[owner] << 32) | stored.rows, single) & stays[owner]
            touched = ~stays
            touched[owner[~kept]] = True
            if not touched.any():
                continue
            lost = np.einsum("nw,nw->n", stored.decoded, stored.decoded, dtype=np.float64) * ~kept
            squares = stored.norms.astype(np.float64) ** 2 - np.bincount(owner, lost, minlength=stored.users.size)
            norms = np.where(touched, np.sqrt(np.maximum(squares, 0.0)), stored.norms).astype(np.float32)
            replace_file(self._path(number), encode(number, stored.keep(stays, kept, norms)))
            changed += int(touched.sum())
        return changed

    def erase(self) -> None:
        """Overwrite and remove the whole history."""
        wipe(self.folder)

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def rounds(self) -> list[int]:
        """The stored rounds, ascending. DataError where one between the first and the last is missing."""
        found = sorted(int(match.group(1)) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))
        if found:
            missing = sorted({n for n in range(found[0], found[-1]) if self.wants(n)} - set(found))
            if missing:
                raise DataError(
                    f"{self._path(missing[0])}: missing, while earlier and later rounds are there; restore it, or "
                    "forget with unlearning=retrain, which needs no history"
                )
        return found

    @property
    def bytes(self) -> int:
        """What the history takes on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    def read(self, round_number: int) -> Updates:
        """A stored round. DataError: it is not there, or damaged."""
        stored = self._load(round_number)
        return Updates(stored.users, stored.indptr, stored.rows, stored.decoded)

    def user(self, round_number: int, user: int) -> tuple[Int32, Float32]:
        """Rows int32[n] and values float32[n, width] of one user's update, both empty where they took no part."""
        stored = self._load(round_number)
        at = np.flatnonzero(stored.users == user)
        span = slice(*stored.indptr[at[0] : at[0] + 2]) if at.size else slice(0, 0)
        return stored.rows[span], stored.decoded[span]

    def norms(self, round_number: int) -> tuple[Int64, Float32]:
        """Users int64[k] and the L2 norms float32[k] of their whole updates, before top-α."""
        stored = self._load(round_number)
        return stored.users, stored.norms

    def bytes_per_user(self, n_users: int) -> Int64:
        """int64[n_users]: what each device's part takes, all rounds together, without file headers."""
        total = np.zeros(n_users, dtype=np.int64)
        for number in self.rounds:
            stored = self._load(number)
            width = 4 + stored.values.shape[1] * stored.values.itemsize
            total[stored.users] += np.diff(stored.indptr) * width + 20  # its number, pointer and norm
        return total

    def present(self, users: npt.ArrayLike, pairs: UserItems | None = None) -> Int64:
        """Those of ``users``, and of the users with ``pairs`` whose rows are there, that the history still holds."""
        asked = np.asarray(users, dtype=np.int64)
        single = np.zeros(0, dtype=np.int64)
        if pairs is not None:
            single = (pairs.users << 32) | pairs.items.astype(np.int64)
        found = [np.zeros(0, dtype=np.int64)]
        for number in self.rounds:
            stored = self._load(number)
            owner = np.repeat(stored.users, np.diff(stored.indptr))
            found += [np.intersect1d(stored.users, asked), owner[np.isin((owner << 32) | stored.rows, single)]]
        return np.unique(np.concatenate(found))

    def verify_absent(self, users: npt.ArrayLike, pairs: UserItems | None = None) -> None:
        """DataError where the history holds an update of ``users`` or a row of ``pairs``, or a file is damaged."""
        if (left := self.present(users, pairs)).size:
            raise DataError(
                f"{self.folder}: {left.size} users are still in the update history after they were purged from it; "
                "ask again, or remove the folder and forget with unlearning=retrain"
            )

    def needles(self, users: npt.ArrayLike) -> Needles:
        """What :func:`unlearning.purge.purge_proof` looks for after these users were purged: the beginnings of their
        updates' rows, as they are stored. Ask *before* the purge."""
        wanted = np.asarray(users, dtype=np.int64)
        parts = []
        for number in self.rounds:
            stored = self._load(number)
            mine = np.isin(np.repeat(stored.users, np.diff(stored.indptr)), wanted)
            values = np.ascontiguousarray(stored.values).view(np.uint8)
            if values.shape[1] >= SHORTEST:
                first, own = values[:, :SHORTEST], stored.values[:, : SHORTEST // stored.values.itemsize]
                # Three values that are not zero, and not the same bytes as another device's: clipping can make such.
                rich = mine & ((own != 0).sum(axis=1) >= 3)
                unique = ~np.isin(_sixteen(first[rich]), _sixteen(first[~mine]))
                parts.append(Needles.equal("stored update", first[rich][unique], int((~unique).sum())))
        return Needles.together(parts)

    # -- files ----------------------------------------------------------------------------------------------------

    def _path(self, round_number: int) -> Path:
        return self.folder / f"round-{round_number:06d}.safetensors"

    def _check_kind(self) -> None:
        path = self.folder / "history.json"
        wanted = {"interval": self.needs.interval, "top": self.needs.top, "precision": self.needs.precision}
        if not path.exists():
            replace_file(path, json.dumps(wanted).encode())
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError):
            raise damaged(path) from None
        if found != wanted:
            raise ConfigError(
                f"{path}: this update history was made with {found}, and now {wanted} is asked for; use the settings "
                "of that run, or another run directory"
            )

    def _load(self, round_number: int) -> Stored:
        path = self._path(round_number)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: round {round_number} cannot be read ({error.strerror or error}); the history has the first "
                f"and every {self.needs.interval}. round, as far as training went"
            ) from None
        return decode(path, round_number, content)

    def _too_large(self, round_number: int, there: int, more: int, width: int) -> ConfigError:
        seen, devices, rows = self._seen
        shape: dict[str, Any] = {"devices": devices / seen, "mean_rows": rows / max(devices, 1), "width": width}
        rounds = max(self._planned or 0, round_number)
        needed = size_text(max(estimate(self.needs, rounds=rounds, **shape), there + more))
        return ConfigError(
            f"update store {self.folder}: round {round_number} would bring it to {size_text(there + more)}, "
            f"max_bytes={self.needs.max_bytes} allows {size_text(self.needs.max_bytes)}; {rounds} rounds need about "
            f"{needed}: {remedy(self.needs, rounds=rounds, **shape)}"
        )


def _sixteen(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(rows).view("V16").ravel()
