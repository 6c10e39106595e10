"""``import fedrec`` is light, and gives notebooks what the command line gives terminals."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fedrec
from fedrec.errors import ConfigError
from fedrec.experiment.result import RunResult

SMALL = ("dataset=synthetic", "dataset.users=60", "dataset.items=120", "runner=inline", "federation.rounds=2")


def test_import_fedrec_brings_no_torch_and_no_flower() -> None:
    heavy = ("torch", "flwr", "ray", "numba", "hydra", "matplotlib")
    code = f"import sys, fedrec, fedrec.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_read_only_installation_without_a_home_keeps_its_kernels_in_a_private_folder(tmp_path: Path) -> None:
    code = """
import os
os.access = lambda path, mode: False  # as on a read-only file system, which stops root too
import fedrec
print(os.environ["NUMBA_CACHE_DIR"])
"""
    environment = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    environment |= {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    folder = Path(done.stdout.strip())
    assert folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)  # somebody else could have written here
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert Path(done.stdout.strip()) != folder


def test_run_returns_what_summary_json_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = fedrec.run(*SMALL, f"output_dir={tmp_path}", "evaluation.per_user=true")
    assert isinstance(result, RunResult)
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert result.summary == summary
    assert (result.status, result.algorithm, result.rounds) == ("finished", "fedmf", 2)
    assert result.test == summary["test"]
    assert set(result.baselines) == {"popularity", "ease", "local_only"}
    assert result.report.is_file()
    view = result.item_view()
    assert view["item"].shape == (120, 32)
    assert bool(torch.isfinite(view["item"]).all())
    with np.load(result.run_dir / "per_user.npz", allow_pickle=False) as per_user:
        assert all(len(values) for values in per_user.values())
    assert capsys.readouterr().out == ""


def test_run_raises_the_errors_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean federation\.rounds\?"):
        fedrec.run(*SMALL, f"output_dir={tmp_path}", "federation.round=2")
    assert not list(tmp_path.iterdir())


def test_load_dataset_takes_names_and_settings() -> None:
    data = fedrec.load_dataset("synthetic", users=50, items=40, seed=1)
    assert (data.n_users, data.n_items) == (50, 40)
