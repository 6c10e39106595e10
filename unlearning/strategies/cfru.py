"""CFRU ("Certified Unlearning for Federated Recommendation", ACM TOIS 2024, doi 10.1145/3706419): the forgotten users'
stored contributions are subtracted, by the server alone. It adds no noise, so there is no (ε, δ): approximate.

With M_t the model that round t trained on, M_k,t what user k made of it, and g_k = M_t − M_k,t, of which the server
stores the ``top`` rows by norm, the correction u starts at 0 and goes through the stored rounds,

    u ← u (1 − α Σ_kept p_k) + Σ_removed p_k g_k,          and at last        M + θ u

p_k is a device's weight in the mean (one over the participants). The first factor (``damping``) is how the kept users'
later training would have pulled the change back. No device does anything, and no device's private vector changes.

Ours: g_k is multiplied elementwise by what the server optimiser made of a unit of upload in that round
(:class:`unlearning.stores.recording.Gains`; averaging: by its learning rate), for with a server Adam uploads are not
what the model moved by; and a stored round stands for the ``interval`` rounds up to the next one.

For single interactions the affected users' stored rows of those items are subtracted. That is part of what they left:
the interactions moved the users' vectors too, and through them every other row. Items alone are refused: what there
is to subtract lies in their own rows, which are deleted anyway.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from fedrec.errors import ConfigError
from unlearning.forget import ForgetSet
from unlearning.state import erase
from unlearning.stores.history import UpdateHistory, Updates
from unlearning.stores.recording import Gains, ServerNeeds, recorded_tensor
from unlearning.stores.size import check_settings
from unlearning.strategies.base import (
    Cost,
    Forgotten,
    Guarantee,
    Kind,
    Setting,
    StoreNeeds,
    Strategy,
    Task,
    timed,
)
from unlearning.strategies.replay import check_numbers, check_replay, stored_rounds

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CFRU(Strategy):
    """Stored contributions taken back.

    Attributes:
        interval: every so many rounds are stored. top: of each upload, the share of rows. precision: of stored rows.
        damping: α, per stored round. strength: θ.
    """

    name = "cfru"
    supports: ClassVar[frozenset[Kind]] = frozenset({"user", "user_item", "interaction"})
    promise: ClassVar[str] = "approximate"

    interval: int = 5
    top: float = 0.2
    precision: Literal["float32", "float16"] = "float16"
    damping: float = 0.5
    strength: float = 1.0
    max_bytes: int = StoreNeeds.max_bytes

    def __post_init__(self) -> None:
        check_settings(self.store)
        check_numbers(self.name, self, least={"damping": 0}, above_zero=("strength",))
        if self.damping > 1.0:
            raise ConfigError(f"unlearning.strategies.cfru.damping={self.damping}: write a number from 0 to 1")

    @property
    def store(self) -> StoreNeeds:
        return ServerNeeds("server", self.interval, self.top, self.precision, self.max_bytes, gains=True)

    def check(self, setting: Setting) -> None:
        """ConfigError for methods without local training, under secure aggregation and under privacy mechanisms."""
        check_replay(self.name, setting, sums_only=False)
        if len(setting.algorithm.shared) > 1:
            raise ConfigError(
                f"unlearning.strategies.cfru: {setting.algorithm.name} shares "
                f"{', '.join(setting.algorithm.shared)}, but the history holds one item view; write unlearning=retrain"
            )

    def forget(self, task: Task) -> Forgotten:
        assert task.history is not None
        algorithm = task.federation.algorithm
        with timed() as spent:
            history, gains = UpdateHistory(task.history, self.store), Gains(task.history)
            rounds = stored_rounds(task, history.rounds, self.name)
            name = recorded_tensor(algorithm)
            shared = task.state.server.shared[name]
            change = torch.zeros(shared.shape[0], shared[0].numel())
            for number in rounds:
                updates = history.read(number)
                gain = gains.read(number)
                removed, users = contributions(updates, task.forget, change)
                weight = self.interval / max(gain.devices, 1)
                kept = 1.0 - users / max(gain.devices, 1)
                change *= 1.0 - self.damping * kept
                change -= weight * gain.gain.flatten(1) * removed
            server = task.state.server
            moved = shared + self.strength * change.view_as(shared)
            state = task.state.at(dataclasses.replace(server, shared={**server.shared, name: moved}))
            state = erase(state, task.forget, algorithm)
        cost = Cost(cpu_s=spent.cpu_s, wall_s=spent.wall_s)
        share = self.strength * float(change.norm() / shared.norm().clamp_min(1e-30))
        notes = [f"subtracted {len(rounds)} stored rounds: the item view moved by {share:.1%} of its norm"]
        return Forgotten(state, cost, Guarantee("approximate"), notes=notes)


def contributions(updates: Updates, forget: ForgetSet, like: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Σ over the forgotten of their stored uploads, float32 of ``like``'s shape, and how many users leave.

    Deleted users' whole uploads; of other affected users the rows of the items that they forget.
    """
    owner = np.repeat(updates.users, np.diff(updates.indptr))
    forgotten = (forget.pairs.users << 32) | forget.pairs.items.astype(np.int64)
    mine = np.isin(owner, forget.users) | np.isin((owner << 32) | updates.rows, forgotten)
    total = torch.zeros_like(like)
    total.index_add_(0, torch.from_numpy(updates.rows[mine].astype(np.int64)), torch.from_numpy(updates.values[mine]))
    return total, int(np.isin(updates.users, forget.users).sum())
