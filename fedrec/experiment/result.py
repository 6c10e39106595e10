"""What ``fedrec.run`` returns: the run's summary, typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class RunResult:
    """A finished run. ``summary`` is the whole of ``summary.json``; the fields are what is asked for most."""

    run_dir: Path
    status: str
    algorithm: str
    best_round: int
    rounds: int
    validation: Metrics
    test: Metrics
    baselines: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any]

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any], run_dir: Path) -> RunResult:
        names = ("status", "algorithm", "best_round", "rounds", "validation", "test", "baselines")
        return cls(run_dir=run_dir, summary=summary, **{name: summary[name] for name in names})

    @property
    def report(self) -> Path:
        """The HTML report (written by the command line, or by :func:`fedrec.experiment.report.write_report`)."""
        return self.run_dir / "report.html"

    def item_view(self) -> Mapping[str, torch.Tensor]:
        """The shared tensors of the best round."""
        tensors: Mapping[str, torch.Tensor] = load_file(self.run_dir / "checkpoint" / "best.safetensors")
        return tensors
