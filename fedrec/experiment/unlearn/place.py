"""Where one strategy's federation lives, and how its state changes hands: the old one or the new one, never half of it.

``current.json`` names the folder of the state that counts. A request is honoured on a copy; when that is finished the
name is replaced, in one step, and only then is the old state wiped. A crash leaves one of the two, and the audit log
has a request that was started and not finished.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from unlearning.purge import hash_tree, wipe
from unlearning.state import State


@dataclass
class Place:
    """``folder`` holds ``requests.jsonl``, ``current.json``, ``state-N/`` and, with a server store, ``store/``."""

    folder: Path
    number: int = 0

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def fresh(self) -> Path:
        """A folder for the next state (it does not exist yet)."""
        self.number += 1
        target = self.folder / f"state-{self.number}"
        shutil.rmtree(target, ignore_errors=True)
        return target

    def adopt(self, state: State) -> State:
        """Make ``state`` the one that counts, and wipe all others of this place."""
        target = self.fresh()
        if state.folder.parent == self.folder:
            os.replace(state.folder, target)
        else:
            state.copy_to(target)
        _sync(target)
        head = self.folder / "current.json.new"
        with head.open("w") as file:
            json.dump({"state": target.name, "round": state.round}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(head, self.folder / "current.json")
        for other in self.folder.glob("state-*"):
            if other != target:
                wipe(other)
        return State(target, state.server)

    @property
    def current(self) -> str | None:
        """The name of the folder that counts; None before there is one."""
        head = self.folder / "current.json"
        return str(json.loads(head.read_text())["state"]) if head.exists() else None

    def hashes(self, state: State) -> tuple[str, str, str | None]:
        """SHA-256 of data, checkpoint (server and devices), and update store."""
        data = hash_tree(state.devices, "data/*")
        model = hash_tree(state.folder, "server.safetensors", "devices/node-*/*.f32", "devices/node-*/*.f64")
        store = hash_tree(self.store) if self.store.is_dir() else None
        if store is None and any(state.devices.glob("node-*/history")):
            store = hash_tree(state.devices, "node-*/history/*")
        return data, model, store


def _sync(folder: Path) -> None:
    """Have the files on disk before their folder is named as the one that counts."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
