"""The ServerApp of ``flwr run``: everything it needs is in the workspace that the run configuration names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from clients.app import app as client_app
from clients.workspace import Workspace
from fedrec.errors import ConfigError, RunFailed
from privacy.ledger import Ledger, Subject
from privacy.plan import Federation as FederationFacts
from privacy.plan import make_plan
from privacy.settings import PrivacySettings
from server.app import app
from server.inline import InlineGrid
from server.settings import EvaluationSettings, FederationSettings
from tests.conftest import WorkspaceFactory
from tests.server.federations import FEDMF, federate


def _prepare(space: Workspace, **federation: Any) -> None:
    settings = {"federation": FederationSettings(**federation), "evaluation": EvaluationSettings()}
    document = {**{group: asdict(value) for group, value in settings.items()}, "workers": 1}
    (space.folder / "server.json").write_text(json.dumps(document))


def _run(nodes: int, run_config: dict[str, Any]) -> None:
    app(InlineGrid(client_app, nodes), Context(1, 1, {}, RecordDict(), run_config))


def test_the_app_runs_a_prepared_workspace_and_writes_its_rounds(workspace: WorkspaceFactory) -> None:
    space = workspace(FEDMF, 3)
    _prepare(space, rounds=3)
    _run(3, {"workspace": str(space.folder)})
    lines = [json.loads(line) for line in (space.folder / "metrics.jsonl").read_text().splitlines()]
    expected = federate(workspace(FEDMF, 3), 3).rounds
    assert [line["round"] for line in lines] == [1, 2, 3]
    for ours, theirs in zip(lines, expected, strict=True):
        assert ours["validation"] == theirs["validation"]
        assert ours["loss"] == theirs["loss"]


def test_a_private_workspace_is_run_privately_and_recorded_in_a_ledger(workspace: WorkspaceFactory) -> None:
    plan = make_plan(PrivacySettings("user_dp", epsilon=3.0), FederationFacts(60, 1000, "all", 1.0, 2))
    space = workspace(FEDMF, 2, upload={"kind": "dense"}, privacy_mu=plan.mu)
    _prepare(space, rounds=2)
    document = json.loads((space.folder / "server.json").read_text())
    document |= {"privacy": plan.to_dict(), "subject": asdict(Subject("data", "0" * 64, 60, 1000))}
    (space.folder / "server.json").write_text(json.dumps(document))
    _run(2, {"workspace": str(space.folder)})
    ledger = Ledger.read(space.folder / "ledger.json")
    assert [entry.round for entry in ledger.entries] == [1, 2]
    assert ledger.composed()["user"].value == pytest.approx(3.0, rel=1e-6)


def test_a_run_without_a_workspace_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"workspace is missing; write --run-config 'workspace="):
        _run(1, {})


def test_a_folder_that_holds_no_workspace_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no workspace\.json here"):
        _run(1, {"workspace": str(tmp_path)})


def test_a_workspace_without_server_settings_is_one_clear_error(workspace: WorkspaceFactory) -> None:
    with pytest.raises(ConfigError, match=r"no server\.json here"):
        _run(1, {"workspace": str(workspace(FEDMF).folder)})


def test_a_failed_federation_fails_the_app_so_that_flower_sees_it(workspace: WorkspaceFactory) -> None:
    space = workspace(FEDMF, 2)
    _prepare(space, rounds=2, node_timeout=0.1)
    with pytest.raises(RunFailed, match="only 1 of 2 nodes registered"):
        _run(1, {"workspace": str(space.folder)})


@pytest.mark.parametrize("room", ["clients", "server"])
def test_flowers_telemetry_is_off_before_anything_of_flower_is_imported(room: str) -> None:
    """Flower reads the variable once, at its own import; a room's ``__init__`` runs before any of its modules."""
    code = f"import sys, {room}, os; print('flwr' in sys.modules, os.environ['FLWR_TELEMETRY_ENABLED'])"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FLWR_")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split() == ["False", "0"]
