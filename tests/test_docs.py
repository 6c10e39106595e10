"""The documentation's code runs: what a reader copies must work."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest

import fedrec

_ROOT = Path(__file__).parent.parent
_IMPORTS = """
from __future__ import annotations
from dataclasses import dataclass
from torch.nn.functional import binary_cross_entropy_with_logits
from fedrec.algorithms.base import GradientRecommender, LocalTraining, Problem, TensorSpec, dot
"""


def test_the_example_of_an_algorithm_in_the_guide_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (_ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert code is not None
    module = types.ModuleType("guide_example")
    monkeypatch.setitem(sys.modules, "guide_example", module)
    exec(compile(_IMPORTS + code.group(1), "docs/extending.md", "exec"), module.__dict__)
    result = fedrec.run(
        "dataset=synthetic",
        "dataset.users=60",
        "dataset.items=120",
        "runner=inline",
        "algorithm=custom",
        "algorithm._target_=guide_example.BiasedMF",
        "+algorithm.rate=20.0",
        "federation.rounds=6",
        "federation.nodes=2",
        "baselines.local_only_rounds=2",
        f"output_dir={tmp_path}",
    )
    losses = [line["loss"] for line in _lines(result.run_dir)]
    assert losses[-1] < losses[0]
    assert result.algorithm == "biased_mf"


def test_the_example_of_a_strategy_in_the_guide_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", (_ROOT / "docs" / "extending.md").read_text(), re.DOTALL)[1]
    module = types.ModuleType("guide_strategy")
    monkeypatch.setitem(sys.modules, "guide_strategy", module)
    monkeypatch.setenv("FEDREC_AUDIT_KEY", str(tmp_path / "audit.key"))
    imports = """
from dataclasses import dataclass
from unlearning.state import erase
from unlearning.strategies import Forgotten, Guarantee, Strategy
"""
    exec(compile(imports + code, "docs/extending.md", "exec"), module.__dict__)
    result = fedrec.unlearn(
        "dataset=synthetic",
        "dataset.users=60",
        "dataset.items=120",
        "runner=inline",
        "federation.rounds=4",
        "+unlearning.strategies.polish={_target_: guide_strategy.Polish, rounds: 2}",
        "unlearning.requests=[{id: r, kind: user, fraction: 0.1}]",
        "unlearning.golds=1",
        "unlearning.gold_workers=1",
        "unlearning.gold_cache=false",
        "unlearning.relearn_rounds=0",
        f"output_dir={tmp_path}",
    )
    (batch,) = result.summary["unlearning"]["strategies"]["polish"]["batches"]
    assert batch["cost"]["rounds"] == 2


def _lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
