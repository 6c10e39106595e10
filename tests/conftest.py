"""Shared by all rooms: a small data set with real structure, and the workspace of a run on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from clients.workspace import Workspace
from fedrec.data.split import Split
from fedrec.data.synthetic import SyntheticConfig, generate
from fedrec.evaluation.protocols import Protocol, make_split

WorkspaceFactory = Callable[..., Workspace]

# Machines are noisy, and the first example of a kernel compiles it: nothing here is timed.
settings.register_profile("fedrec", deadline=None)
settings.load_profile("fedrec")


@pytest.fixture(scope="session")
def synthetic_split() -> Split:
    """60 users, 120 items, 2 to 40 training items a user, one item each for validation and test."""
    return make_split(generate(SyntheticConfig(users=60, items=120, seed=1, mean_activity=20)), Protocol(), 0)


@pytest.fixture(scope="session")
def few_users() -> Split:
    """16 users, 60 items: small enough for one node, and one message, a device."""
    return make_split(generate(SyntheticConfig(users=16, items=60, seed=2, mean_activity=12)), Protocol(), 0)


@pytest.fixture
def workspace(tmp_path: Path, synthetic_split: Split) -> WorkspaceFactory:
    """``workspace(algorithm, nodes=1, split=None, **settings)`` makes a new workspace, of one node unless told."""
    made = 0

    def make(
        algorithm: Mapping[str, Any],
        nodes: int = 1,
        split: Split | None = None,
        protocol: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Workspace:
        nonlocal made
        made += 1
        chosen = {
            "seed": 3,
            "n_nodes": nodes,
            "upload": {"kind": "touched"},
            "download": {"kind": "dense"},
            **settings,
        }
        folder = tmp_path / f"workspace-{made}"
        Workspace.create(folder, split or synthetic_split, algorithm, protocol or {"name": "clean"}, chosen)
        return Workspace.open(folder)

    return make
