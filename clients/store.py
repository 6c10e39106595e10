"""A node's private state: one memory-mapped file per tensor, stamped with the round, safe against repeated tasks.

Workers are not pinned to nodes and may be killed, so the truth lies in files, and nothing else. Before a chunk of
devices is changed in place, its old values are appended to an undo journal of the round. A task that arrives again
for the same round first rolls the journal back, so that it starts from what the first one saw: a repeated or killed
task changes nothing twice.

A per-item private tensor D_u (FedRAP's personal view) is stored as D_u = s_u·(D_0 + Δ_u): D_0 is the common initial
value, which costs nothing to keep; Δ_u is zero (a hole in the file) where the user was never active; weight decay of
the rows that a round does not touch is one multiplication of s_u.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedrec import random
from fedrec.algorithms.base import Tensors, TensorSpec

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class StaleTask(RuntimeError):
    """A task of an earlier round reached a node whose devices are already further on."""


def _memmap(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A writable memory map of a file that is created full of zeros (holes) when missing."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not path.exists() or path.stat().st_size != size:
        with path.open("ab") as file:
            file.truncate(size)
    found = path.stat()
    return _map(str(path), found.st_dev, found.st_ino, np.dtype(dtype).str, shape)


@lru_cache(maxsize=16)
def _map(path: str, device: int, inode: int, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The map of one file. Kept between tasks, because touching every page anew costs a third of a round's training;
    the file stays the truth (the map is shared with every process), and the inode tells a new file of the same name."""
    if not int(np.prod(shape)):
        return np.zeros(shape, dtype=dtype)
    # A plain array over the map: compiled kernels and torch take no subclass.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r+", shape=shape))


def _scratch_map(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A copy-on-write map of a file that exists: changes stay in this process's memory."""
    return (
        np.asarray(np.memmap(path, dtype=dtype, mode="c", shape=shape))
        if int(np.prod(shape))
        else np.zeros(shape, dtype)
    )


@dataclass(frozen=True)
class TableWrite:
    """Rows of a per-item tensor to store: positions int64[n], stored values before and after float32[n, width], and
    log s of the B users afterwards, float64[B]."""

    place: Int64
    old: Float32
    new: Float32
    log_scale: npt.NDArray[np.float64]


class DeviceStore:
    """The private tensors of the users ``users`` (a contiguous range), in ``folder``."""

    def __init__(
        self, folder: Path, specs: Mapping[str, TensorSpec], users: range, seed: int, *, scratch: bool = False
    ) -> None:
        """``scratch`` opens a private copy-on-write view of the files: what is written to it reaches no file."""
        folder.mkdir(parents=True, exist_ok=True)
        memmap = _scratch_map if scratch else _memmap
        self.folder, self.specs, self.users, self.seed = folder, specs, users, seed
        n = len(users)
        self._stamp = memmap(folder / "round.i32", np.int32, (n,))
        self._maps: dict[str, npt.NDArray[Any]] = {}
        self._scale: dict[str, npt.NDArray[Any]] = {}
        self._base: dict[str, Tensor] = {}
        for name, spec in specs.items():
            if spec.per_item:
                rows, width = spec.shape[0], int(np.prod(spec.shape[1:]))
                self._maps[name] = memmap(folder / f"{name}.f32", np.float32, (n * rows, width))
                # A file of zeros must mean "scale 1", so that a fresh file needs no writing: log s is stored.
                self._scale[name] = memmap(folder / f"{name}.logscale.f64", np.float64, (n,))
            else:
                self._maps[name] = memmap(folder / f"{name}.f32", np.float32, (n, int(np.prod(spec.shape))))

    def base(self, name: str) -> Tensor:
        """D_0, the common initial value of a per-item tensor, float32[rows, width]."""
        if name not in self._base:
            self._base[name] = self.specs[name].initial(self._key(name)).reshape(self.specs[name].shape[0], -1)
        return self._base[name]

    def _key(self, name: str) -> np.uint64:
        return random.stream(self.seed, f"init:{name}")

    def local(self, users: npt.ArrayLike) -> Int64:
        """Positions of ``users`` in this store."""
        return np.asarray(users, dtype=np.int64) - self.users.start

    def _initial(self, name: str, users: Int64) -> Tensor:
        spec = self.specs[name]
        if spec.common:
            return spec.initial(self._key(name)).expand(len(users), *spec.shape)
        return spec.initial_many(random.streams(self._key(name), users))

    def vectors(self, users: Int64) -> Tensors:
        """The tensors that are not per item, [B, *shape] each."""
        at = self.local(users)
        fresh = np.flatnonzero(self._stamp[at] == 0)
        out = {}
        for name, spec in self.specs.items():
            if spec.per_item:
                continue
            values = torch.from_numpy(np.array(self._maps[name][at])).reshape(len(at), *spec.shape)
            if fresh.size:
                values[torch.from_numpy(fresh)] = self._initial(name, users[fresh])
            out[name] = values
        return out

    def rows(self, name: str, users: Int64, rows: Tensor) -> Tensor:
        """Rows ``rows`` int64[B, T] of a per-item tensor of B users: float32[B, T, *shape[1:]]."""
        spec = self.specs[name]
        at = self.local(users)
        flat = torch.from_numpy(self._maps[name])
        index = (torch.from_numpy(at).unsqueeze(1) * spec.shape[0] + rows).flatten()
        delta = flat.index_select(0, index)
        delta += self.base(name).index_select(0, rows.flatten())
        delta = delta.view(*rows.shape, -1)
        delta *= self.scale(name, at).view(-1, 1, 1)
        return delta.view(*rows.shape, *spec.shape[1:])

    def whole(self, name: str, users: Int64) -> Tensor:
        """A per-item tensor of B users in full: float32[B, *shape]."""
        spec = self.specs[name]
        at = self.local(users)
        stored = self._maps[name].reshape(len(self.users), -1)
        contiguous = at.size and at[-1] - at[0] + 1 == at.size and bool((np.diff(at) == 1).all())
        delta = torch.from_numpy(stored[at[0] : at[-1] + 1] if contiguous else stored[at])
        full = delta + self.base(name).flatten()
        full *= self.scale(name, at).unsqueeze(1)
        return full.view(len(at), *spec.shape)

    def scale(self, name: str, at: Int64) -> Tensor:
        return torch.from_numpy(np.exp(self._scale[name][at])).float()

    # -- writing -------------------------------------------------------------------------------------------------

    @property
    def _journal(self) -> Path:
        return self.folder / "undo.journal"

    @property
    def _previous(self) -> Path:
        return self.folder / "undo.previous"

    def before(self, round_number: int) -> DeviceStore:
        """The state that devices had before round ``round_number``, which must be the last one or the last but one."""
        past = DeviceStore(self.folder, self.specs, self.users, self.seed, scratch=True)
        for journal in (self._journal, self._previous):
            if journal.exists():
                with journal.open("rb") as file:
                    if int.from_bytes(file.read(8), "little") == round_number:
                        past._roll_back(file)
        return past

    def begin(self, round_number: int) -> None:
        """Open round ``round_number`` (from 1). Rolls back what an earlier task of the same round has written.

        The journal of the round before is kept until the next one, for :meth:`before`.
        """
        if self._journal.exists():
            with self._journal.open("rb") as file:
                head = file.read(8)
                journalled = int.from_bytes(head, "little") if len(head) == 8 else 0
                if journalled > round_number:
                    raise StaleTask(
                        f"round {round_number} arrived after round {journalled}; its reply is not wanted any more"
                    )
                if journalled == round_number:
                    self._roll_back(file)
                else:
                    os.replace(self._journal, self._previous)
        temporary = self._journal.with_suffix(".new")
        temporary.write_bytes(round_number.to_bytes(8, "little"))
        os.replace(temporary, self._journal)
        self._round = round_number

    def write(
        self, users: Int64, vectors: Tensors, owner: Tensor, row: Tensor, values: Tensors, decay: Mapping[str, Tensor]
    ) -> None:
        """Store the state of B users after local training.

        ``vectors[name]`` [B, *shape]. Of a per-item tensor, the rows ``row`` int64[n] of the users at positions
        ``owner`` int64[n] (0…B-1) become ``values[name]`` float32[n, width]; all other rows of user b are multiplied by
        ``decay[name][b]`` (float64[B]).
        """
        at = self.local(users)
        tables = {}
        for name, value in values.items():
            log_scale = self._scale[name][at] + np.log(decay[name].numpy())
            scale = torch.from_numpy(np.exp(log_scale)).float()
            place = torch.from_numpy(at)[owner] * self.specs[name].shape[0] + row
            offset = value / scale[owner].unsqueeze(1) - self.base(name).index_select(0, row)
            old = torch.from_numpy(self._maps[name]).index_select(0, place)
            tables[name] = TableWrite(place.numpy(), old.numpy(), offset.numpy(), log_scale)
        width = {name: int(np.prod(self.specs[name].shape)) for name in vectors}
        self.commit(users, {n: value.reshape(len(at), width[n]).numpy() for n, value in vectors.items()}, tables)

    def table(self, name: str) -> tuple[Float32, Float32, npt.NDArray[np.float64]]:
        """A per-item tensor as it is stored, to read: D_0 [rows, width], Δ [users * rows, width], log s [users]."""
        return self.base(name).numpy(), self._maps[name], self._scale[name]

    def commit(self, users: Int64, vectors: Mapping[str, Float32], tables: Mapping[str, TableWrite]) -> None:
        """Journal the old state of B users, then store the new one: ``vectors[name]`` float32[B, size], and table
        rows."""
        at = self.local(users)
        names = [name for name, spec in self.specs.items() if not spec.per_item]
        tensors = [name for name, spec in self.specs.items() if spec.per_item]
        undo: list[npt.NDArray[Any]] = [at, self._stamp[at], *[self._maps[name][at] for name in names]]
        for name in tensors:
            undo += [self._scale[name][at], tables[name].place, tables[name].old]
        with self._journal.open("ab") as file:
            for array in undo:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        # The entry is whole in the kernel's page cache from here on; a killed process cannot lose it.
        for name in names:
            self._maps[name][at] = vectors[name]
        for name in tensors:
            self._scale[name][at] = tables[name].log_scale
            place, new = torch.from_numpy(tables[name].place), torch.from_numpy(tables[name].new)
            torch.from_numpy(self._maps[name]).index_copy_(0, place, new)
        self._stamp[at] = self._round

    def reset(self, users: Int64, owners: Int64, rows: Int64, everywhere: Int64) -> None:
        """Back to the initial value: all of ``users``; of per-item tensors, rows ``rows[k]`` of user ``owners[k]``
        and rows ``everywhere`` of every user. Not journalled: there is no way back."""
        at, pairs = self.local(users), self.local(owners)
        for name, spec in self.specs.items():
            values = self._maps[name]
            if not spec.per_item:
                values[at] = 0.0
                continue
            table = values.reshape(len(self.users), spec.shape[0], -1)
            table[at] = 0.0
            table[pairs, rows] = 0.0
            self._scale[name][at] = 0.0
            for row in everywhere.tolist():
                # A hole in the file stays one.
                table[np.flatnonzero(table[:, row].any(1)), row] = 0.0
        self._stamp[at] = 0

    def _roll_back(self, file: Any) -> None:
        names = [name for name, spec in self.specs.items() if not spec.per_item]
        tables = [name for name, spec in self.specs.items() if spec.per_item]
        while True:
            try:
                entry = [
                    np.lib.format.read_array(file, allow_pickle=False) for _ in range(2 + len(names) + 3 * len(tables))
                ]
            except (ValueError, EOFError):
                return  # the end, or an entry cut short by a kill: its devices were not changed yet
            at = entry[0]
            self._stamp[at] = entry[1]
            for name, old in zip(names, entry[2 : 2 + len(names)], strict=True):
                self._maps[name][at] = old
            for k, name in enumerate(tables):
                scale, place, old = entry[2 + len(names) + 3 * k : 5 + len(names) + 3 * k]
                self._scale[name][at] = scale
                self._maps[name][place] = old
