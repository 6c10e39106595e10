"""The update history of one strategy's training, on the server or on the devices: kept, counted, purged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearning.federation import Federation
from unlearning.forget import ForgetSet
from unlearning.state import State
from unlearning.stores.checkpoints import purge_checkpoints
from unlearning.stores.history import UpdateHistory
from unlearning.stores.recording import ServerNeeds, ServerRecording, device_histories, options_of
from unlearning.strategies import StoreNeeds


@dataclass(frozen=True)
class Store:
    """``needs`` None: there is none. ``folder`` is the server's."""

    needs: StoreNeeds | None
    folder: Path | None
    rounds: int

    @property
    def where(self) -> str:
        return self.needs.where if self.needs else "none"

    def recording(self, federation: Federation) -> dict[str, Any]:
        """What :meth:`unlearning.federation.Federation.train` is given so that it records."""
        if self.needs is None:
            return {}
        if self.folder is None:
            return {"recorder": options_of(self.needs)}
        return {"watch": ServerRecording(UpdateHistory(self.folder, self.needs, rounds=self.rounds), federation)}

    def histories(self, state: State) -> list[UpdateHistory]:
        """All of them: the server's, or each node's."""
        if self.needs is None:
            return []
        if self.folder is not None:
            return [UpdateHistory(self.folder, self.needs)]
        return device_histories(state.devices, self.needs)

    def bytes(self, state: State) -> int:
        """What is stored now, all files counted."""
        folders = [history.folder for history in self.histories(state)]
        return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())

    def purge(self, state: State, forget: ForgetSet) -> None:
        """Drop what forgotten users left, and every update that was made from a forgotten interaction."""
        for history in self.histories(state):
            history.purge(forget.users, forget.pairs, purge_affected=True)
            history.verify_absent(forget.affected)
        if isinstance(self.needs, ServerNeeds) and self.needs.checkpoints and self.folder is not None:
            purge_checkpoints(self.folder, forget)


def open_store(needs: StoreNeeds | None, folder: Path, rounds: int) -> Store:
    """The store that a strategy asks for."""
    return Store(needs, folder if needs and needs.where == "server" else None, rounds)
