"""What SIFU's roll-back needs: the shared tensors every few rounds, and since when each user's data is in them.

``contributions.safetensors`` has, per user, the round of the first upload and its norm, and per round the number of
devices, the norm of their sum, and how far the server moved. ``checkpoint-NNNNNN.safetensors`` holds the shared tensors
after round N. Both go into a server's store folder, count into its bytes, and are purged by :func:`purge_checkpoints`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from fedrec.algorithms.base import Tensors
from fedrec.errors import ConfigError, DataError
from server.aggregation import RoundSum
from unlearning.forget import ForgetSet
from unlearning.purge import replace_file, wipe
from unlearning.strategies.base import StoreNeeds

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
_NAME = re.compile(r"checkpoint-(\d{6,})\.safetensors")
_FILE = "contributions.safetensors"


@dataclass
class Contributions:
    """``first_round`` int64[n_users], 0 for those who never took part; ``first_norm`` float64[n_users], the L2 norm of
    that upload. ``rounds`` float64[r, 4]: round, devices, norm of their summed uploads, and how far the shared tensors
    moved (NaN where the next round was not seen). ``rounds`` are ascending; one that is not there was not recorded."""

    folder: Path
    first_round: Int64
    first_norm: Float64
    rounds: Float64
    _before: Tensors | None = None

    @classmethod
    def open(cls, folder: Path, n_users: int) -> Contributions:
        """Those in ``folder``, or none yet. DataError: damaged, or of another number of users."""
        path = Path(folder) / _FILE
        if not path.exists():
            return cls(Path(folder), np.zeros(n_users, dtype=np.int64), np.zeros(n_users), np.zeros((0, 4)))
        try:
            found = load(path.read_bytes())
            made = cls(Path(folder), found["first_round"], found["first_norm"], found["rounds"])
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); restore it, or forget with unlearning=retrain"
            ) from None
        if made.first_round.size != n_users:
            raise DataError(
                f"{path}: it is of {made.first_round.size} users, the data have {n_users}; name its own run"
            )
        return made

    @property
    def unknown(self) -> Int64:
        """int64: the users who have not taken part yet; of theirs alone single uploads are looked at."""
        return np.flatnonzero(self.first_round == 0).astype(np.int64)

    def record(self, number: int, total: RoundSum, shared: Tensors, needs: StoreNeeds) -> None:
        """Take a round in; ``shared`` is the state before it. ConfigError: the checkpoints exceed ``max_bytes``."""
        if self._before is not None and self.rounds.size and self.rounds[-1, 0] == number - 1:
            self.rounds[-1, 3] = distance(shared, self._before)
        self._before = dict(shared)
        for part in total.views:
            squares = np.einsum("nw,nw->n", part["values"], part["values"], dtype=np.float64)
            owner = np.repeat(np.arange(part["users"].size), np.diff(part["indptr"]))
            users = part["users"].astype(np.int64)
            self.first_round[users] = number
            self.first_norm[users] = np.sqrt(np.bincount(owner, squares, minlength=users.size))
        # The decay of whole tensors is part of uploads, and only known as a sum over devices.
        decayed = {name: value + total.decay.get(name, 0.0) * shared[name] for name, value in total.sums.items()}
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in decayed.values()))
        slack = sum(abs(factor) * float(shared[name].double().norm()) for name, factor in total.decay.items())
        self.rounds = np.concatenate([self.rounds, [[number, total.devices, norm, math.nan]]])
        if slack:
            newcomers = self.first_round == number
            # No device's share of a decay, all of one sign, exceeds the sum of all.
            self.first_norm[newcomers] += slack
        if number > 1 and (number - 1) % needs.interval == 0:
            self._checkpoint(number - 1, shared, needs)
        self.save()

    def save(self) -> None:
        arrays = {"first_round": self.first_round, "first_norm": self.first_norm, "rounds": self.rounds}
        replace_file(self.folder / _FILE, save(arrays), sync=False)

    def _checkpoint(self, number: int, shared: Tensors, needs: StoreNeeds) -> None:
        content = save_tensors({name: value.contiguous() for name, value in shared.items()})
        there = sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())
        if there + len(content) > needs.max_bytes:
            raise ConfigError(
                f"update store {self.folder}: the checkpoint of round {number} would bring it to "
                f"{there + len(content)} bytes, max_bytes={needs.max_bytes}; write a larger interval than "
                f"{needs.interval}, or a larger max_bytes"
            )
        replace_file(self.folder / f"checkpoint-{number:06d}.safetensors", content, sync=False)


def checkpoints(folder: Path) -> list[int]:
    """The rounds after which the shared tensors were kept, ascending."""
    return sorted(int(match.group(1)) for path in Path(folder).iterdir() if (match := _NAME.fullmatch(path.name)))


def read_checkpoint(folder: Path, number: int) -> Tensors:
    """The shared tensors after round ``number``. DataError: missing or damaged."""
    path = Path(folder) / f"checkpoint-{number:06d}.safetensors"
    try:
        found: Tensors = load_tensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}); restore it, or forget with unlearning=retrain") from None
    return found


def since(contributions: Contributions, affected: Int64) -> int:
    """The first round that any of ``affected`` took part in, or may have: one that was not recorded counts."""
    mine = contributions.first_round[affected]
    seen = contributions.rounds[:, 0].astype(np.int64)
    gap = next((n for n, there in enumerate(seen.tolist(), 1) if n != there), seen.size + 1)
    return min(int(mine[mine > 0].min(initial=2**31)), gap)


def purge_checkpoints(folder: Path, forget: ForgetSet) -> list[int]:
    """Remove every checkpoint that the forgotten had a part in, and what is noted of their uploads.

    Returns the rounds whose checkpoints went. Nothing happens in a folder without contributions.
    """
    if not (Path(folder) / _FILE).exists():
        return []
    contributions = Contributions.open(folder, forget.pairs.n_users)
    affected = np.arange(forget.pairs.n_users) if forget.items.size else np.union1d(forget.affected, forget.users)
    first = since(contributions, affected)
    gone = [number for number in checkpoints(folder) if number >= first]
    for number in gone:
        wipe(Path(folder) / f"checkpoint-{number:06d}.safetensors")
    contributions.first_round[forget.users] = 0
    contributions.first_norm[affected] = math.nan
    # What follows was not recorded: whoever asks about it later is told that everybody may have taken part.
    contributions.rounds = contributions.rounds[contributions.rounds[:, 0] < first]
    contributions.save()
    return gone


def distance(first: Tensors, second: Tensors) -> float:
    """The L2 distance of two sets of shared tensors, all together."""
    squares = [float((first[name].double() - second[name].double()).square().sum()) for name in first]
    return math.sqrt(sum(squares))


def size(shared: Tensors) -> int:
    """How many numbers shared tensors hold."""
    return sum(int(torch.numel(value)) for value in shared.values())
