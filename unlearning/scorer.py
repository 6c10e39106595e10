"""How a model is looked at when forgetting is judged: by its scores, and by what it releases."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedrec.algorithms.base import Recommender, Tensors

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class Scorer(Protocol):
    """A recommender at rest, as its users and as an attacker meet it.

    ``shared`` are the released tensors, the item view among them. ``scores`` is what devices rank by; a deleted user's
    device scores as a new one does. −inf marks an item that cannot be recommended.
    """

    @property
    def algorithm(self) -> Recommender: ...

    @property
    def shared(self) -> Tensors: ...

    def scores(self, users: Int64) -> Float32:
        """float32[len(users), n_items]."""
