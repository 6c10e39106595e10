"""Recording what the server sees of single users, for the attacks of ``privacy.attacks``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedrec.algorithms.base import Tensors
from server.aggregation import RoundSum

Int64 = npt.NDArray[np.int64]


@dataclass
class Watched:
    """One round as an honest-but-curious server sees it, and the truth that only the simulator knows.

    ``uploads``: user → (rows int32[t], values float32[t, w]) of the users under watch; ``row_sets``: user → the rows
    that it touched, of all participants; ``view`` is the shared state that the devices trained on,
    ``total`` float32[n_items, w] the (noisy) sum of the first per-item tensor.
    """

    round: int
    uploads: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]
    row_sets: dict[int, npt.NDArray[np.int32]]
    view: Tensors
    total: npt.NDArray[np.float32] | None = None


@dataclass
class Watch:
    """Which users' uploads are recorded in which rounds, and what was recorded."""

    targets: Int64
    rounds: Collection[int]
    tensor: str | None = None  # the per-item tensor whose sum is kept
    seen: list[Watched] = field(default_factory=list)

    def users(self, number: int) -> Int64:
        """The users whose uploads of round ``number`` are recorded."""
        return self.targets if number in self.rounds else self.targets[:0]

    def record(self, number: int, total: RoundSum, shared: Tensors) -> None:
        """Keep what ``total``, as it was released, brought of single users; ``shared`` is what they trained on."""
        if number not in self.rounds:
            return
        uploads = {
            user: (part["rows"][low:high], part["values"][low:high])
            for part in total.views
            for user, low, high in _blocks(part)
        }
        row_sets = {user: part["rows"][low:high] for part in total.row_sets for user, low, high in _blocks(part)}
        noisy = total.sums[self.tensor].flatten(1).numpy() if self.tensor in total.sums else None
        self.seen.append(Watched(number, uploads, row_sets, dict(shared), noisy))


def _blocks(part: dict[str, npt.NDArray[Any]]) -> list[tuple[int, int, int]]:
    pointers = part["indptr"].tolist()
    return list(zip(part["users"].tolist(), pointers[:-1], pointers[1:], strict=True))
