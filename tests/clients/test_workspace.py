"""What a run's nodes find on disk is what was put there, and every user has one node."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.workspace import Workspace
from fedrec.algorithms.wrapped import LocalOnly
from fedrec.data.split import Split
from fedrec.errors import ConfigError
from tests.conftest import WorkspaceFactory
from tests.server.federations import FEDEASE, FEDMF


def test_an_opened_workspace_holds_what_was_written(workspace: WorkspaceFactory, synthetic_split: Split) -> None:
    opened = workspace(FEDMF, 3, seed=9)
    for name in ("train", "validation", "test", "negatives_exclude"):
        for array in ("indptr", "items"):
            expected = getattr(getattr(synthetic_split, name), array)
            np.testing.assert_array_equal(getattr(getattr(opened.split, name), array), expected)
    assert (opened.settings.seed, opened.settings.n_nodes, opened.algorithm.name) == (9, 3, "fedmf")
    assert opened.algorithm.problem.n_items == synthetic_split.n_items


def test_nodes_cannot_write_into_the_split(workspace: WorkspaceFactory) -> None:
    split = workspace(FEDMF).split
    with pytest.raises(ValueError, match="read-only"):
        split.train.items[0] = 1


@given(nodes=st.integers(1, 60))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_user_has_exactly_one_node(workspace: WorkspaceFactory, nodes: int) -> None:
    space = workspace(FEDMF, nodes)
    hosted = [user for node in range(nodes) for user in space.users_of(node)]
    assert hosted == list(range(60))
    sizes = [len(space.users_of(node)) for node in range(nodes)]
    assert max(sizes) - min(sizes) <= 1


def test_a_workspace_that_was_written_again_is_read_again(workspace: WorkspaceFactory, synthetic_split: Split) -> None:
    space = workspace(FEDMF)
    assert Workspace.open(space.folder) is space
    os.utime(space.folder / "workspace.json", ns=(0, 0))  # written earlier than any clock's tick can confuse
    chosen = {"seed": 4, "n_nodes": 1, "upload": {"kind": "dense"}, "download": {"kind": "dense"}}
    Workspace.create(space.folder, synthetic_split, FEDMF, {"name": "clean"}, chosen)
    assert Workspace.open(space.folder).settings.seed == 4


def test_a_folder_without_a_workspace_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no workspace.json here"):
        Workspace.open(tmp_path)


def test_local_only_wraps_gradient_methods_and_refuses_others(workspace: WorkspaceFactory) -> None:
    assert isinstance(workspace(FEDMF, local_only=True).algorithm, LocalOnly)
    with pytest.raises(ConfigError, match="local-only is defined for gradient methods"):
        workspace(FEDEASE, local_only=True)
