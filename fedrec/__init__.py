"""fedrec: a federated and privacy-preserving recommendation simulator whose numbers can be trusted.

From Python: ``fedrec.run("experiment=fedmf_ml100k", "seed=1")`` returns a typed :class:`RunResult`, ``fedrec.load_dataset("ml-100k")`` the
interactions. The command line is ``fedrec``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedrec.data import Interactions
    from fedrec.experiment.result import RunResult

__all__ = ["load_dataset", "run"]


def run(*overrides: str, quiet: bool = True) -> RunResult:
    """Run one experiment, as ``fedrec run OVERRIDES`` does, and return its result.

    Raises:
        fedrec.errors.ConfigError, fedrec.errors.DataError: nothing was written.
        fedrec.errors.RunFailed: too few devices succeeded.
    """
    from rich.console import Console

    from fedrec.experiment.config import load_config
    from fedrec.experiment.report import write_report
    from fedrec.experiment.run import run_experiment

    result = run_experiment(load_config(overrides), Console(quiet=quiet))
    write_report([result.run_dir], result.report)
    return result


def load_dataset(config: str, **overrides: Any) -> Interactions:
    """The interactions of a catalogue name, of ``"file"`` with ``path=…``, or of ``"synthetic"``."""
    from fedrec.data import load_dataset as load

    return load(config, **overrides)
