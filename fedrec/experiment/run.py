"""One experiment from its configuration to its run directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import save_file

from clients.workspace import Workspace
from fedrec.data.split import Split
from fedrec.errors import ConfigError, RunFailed
from fedrec.evaluation.protocols import Protocol
from fedrec.experiment.attacks import Scene, make_audit, make_watch, run_attacks
from fedrec.experiment.baselines import central_baselines, local_only
from fedrec.experiment.config import Config
from fedrec.experiment.interrupt import interruptible
from fedrec.experiment.plan import Plan
from fedrec.experiment.privacy import privacy_summary
from fedrec.experiment.progress import RunProgress
from fedrec.experiment.resources import ResourceMonitor
from fedrec.experiment.result import RunResult
from fedrec.experiment.summary import combine, summarise
from fedrec.experiment.workspace import client_settings, protocol_dict
from privacy.attacks.audit import CanaryAudit
from privacy.ledger import Ledger
from server.guard import Guard
from server.outcome import Outcome
from server.runners import run_federation
from server.watch import Watch


def run_experiment(
    config: Config, console: Console | None = None, *, run_dir: Path | None = None, exit_at_once: bool = False
) -> RunResult:
    """Run one experiment and write its run directory.

    ``config`` is a composed configuration (:func:`fedrec.experiment.config.load_config`). With ``protocol.tie_draws``
    above 1 the experiment repeats over that many orders of tied timestamps, in sub-directories; the result is the
    mean. The first Ctrl-C ends it after the round in progress, with the status ``interrupted``; the second at once, and
    with ``exit_at_once`` the whole process (:func:`fedrec.experiment.interrupt.interruptible`).

    Raises:
        ConfigError, DataError: nothing was written.
        RunFailed: it failed before the first round was over; nothing was written.
        KeyboardInterrupt: Ctrl-C before the first round (nothing was written), or twice.
    """
    console = console or Console(quiet=True)
    plan = Plan(config, say=lambda text: console.print(f"[dim]{text}[/dim]"))
    folder = run_dir or fresh_directory(Path(str(config["output_dir"])).expanduser(), plan.name)
    console.print(f"[bold]{plan.title}[/bold]  {plan.dataset_line}", highlight=False)
    for caveat in (*plan.protocol.caveats(), *plan.splits[0][1].warnings):
        console.print(f"[yellow]Note:[/yellow] {caveat}", highlight=False)
    with interruptible(console, folder, exit_at_once=exit_at_once) as interrupted:
        if len(plan.splits) == 1:
            summary = _run_one(plan, *plan.splits[0], folder, console, interrupted)
        else:
            parts = []
            for variant, split in plan.splits:
                if not interrupted.is_set():
                    place = folder / f"ties-{variant.tie_seed}"
                    parts.append(_run_one(plan, variant, split, place, console, interrupted))
            summary = combine(parts, folder, len(plan.splits))
            (folder / "config.yaml").write_text(OmegaConf.to_yaml(plan.config))
            write_json(folder / "summary.json", summary)
    return RunResult.from_summary(summary, folder)


def _run_one(
    plan: Plan, protocol: Protocol, split: Split, folder: Path, console: Console, interrupted: threading.Event
) -> dict[str, Any]:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise unwritable(folder, error.strerror) from None
    devices = folder / "devices"
    finished = False
    try:
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(plan.config))
        log = _open_log(folder / "run.log")
        with ResourceMonitor() as monitor:
            settings = _workspace(plan, protocol, split, devices)
            log.info("%s, seed %d; %s", plan.title, plan.seed, plan.dataset_line)
            baselines = central_baselines(plan.baselines, split, protocol, plan.seed)
            if interrupted.is_set():
                raise KeyboardInterrupt
            audit = make_audit(plan.attack, plan.privacy, plan.seed)
            guard = _guard(plan, folder, audit)
            watch = make_watch(plan.attack, plan.algorithm, split, plan.seed, plan.rounds)
            outcome = _federate(plan, Workspace.open(devices), folder, console, log, interrupted.is_set, guard, watch)
            finished = bool(outcome.rounds)
            if not finished:
                raise RunFailed(outcome.reason or f"{outcome.status} before the first round was over")
            if outcome.status in ("finished", "early_stopped") and not interrupted.is_set():
                baselines["local_only"] = local_only(
                    plan.baselines, plan.algorithm, split, plan.evaluation, devices.with_name("local-only"),
                    {"algorithm": plan.config["algorithm"], "protocol": protocol_dict(protocol), "settings": settings},
                    console, interrupted.is_set,
                )  # fmt: skip
                if interrupted.is_set():
                    outcome.status, outcome.reason = (
                        "interrupted",
                        "interrupted in the local-only baseline; all rounds are done",
                    )
            log.info("%s after %d rounds, best %d", outcome.status, len(outcome.rounds), outcome.best_round)
        private = privacy_summary(guard, outcome.rounds) if guard else None
        attacks = None
        if plan.attack.kinds and not interrupted.is_set():
            with console.status("attacks on what was released"):
                outsiders = plan.histories_outside[[variant for variant, _ in plan.splits].index(protocol)]
                scene = Scene(plan.algorithm, split, plan.data, outcome, outsiders, plan.seed, plan.privacy)
                attacks = run_attacks(plan.attack, scene, watch, audit, private["epsilon"] if private else None)
        summary = summarise(plan, protocol, split, outcome, baselines, monitor, folder, private, attacks)
        write_json(folder / "summary.json", summary)
        _save_checkpoint(folder / "checkpoint", outcome, summary)
        if outcome.best_per_user:
            _save_per_user(folder / "per_user.npz", outcome)
        return summary
    finally:
        _close_log()
        if not finished:
            _remove(folder, Path(str(plan.config["output_dir"])).expanduser())


def _guard(plan: Plan, folder: Path, audit: CanaryAudit | None) -> Guard | None:
    if plan.privacy is None:
        return None
    settings = plan.privacy.settings
    earlier = Path(settings.ledger).expanduser() if settings.ledger else None
    ledger = Ledger.start(folder / "ledger.json", plan.subject, plan.privacy.delta, settings.accountant, earlier)
    return Guard(plan.privacy, plan.algorithm, ledger, folder.name, plan.seed, audit)


def _federate(
    plan: Plan, workspace: Workspace, folder: Path, console: Console, log: logging.Logger, stop: Callable[[], bool],
    guard: Guard | None, watch: Watch | None,
) -> Outcome:  # fmt: skip
    total = plan.rounds
    with (
        (folder / "metrics.jsonl").open("w") as lines,
        RunProgress(total, plan.title, console, metric=plan.protocol.select_metric) as progress,
    ):

        def listen(line: dict[str, Any]) -> None:
            lines.write(json.dumps(jsonable(line)) + "\n")
            lines.flush()
            for failure in line.get("failures", []):
                log.warning("round %s: %s", line["round"], failure)
            progress.update(line)

        outcome = run_federation(workspace, plan.federation, plan.evaluation, plan.runner, listen, stop, guard, watch)
    if outcome.reason:
        log.error("%s: %s", outcome.status, outcome.reason)
    return outcome


def _workspace(plan: Plan, protocol: Protocol, split: Split, devices: Path) -> dict[str, Any]:
    federation, runner = plan.federation, plan.runner
    settings = client_settings(plan)
    features = plan.features.numpy() if plan.features is not None else None
    Workspace.create(devices, split, plan.config["algorithm"], protocol_dict(protocol), settings, features)
    server: dict[str, Any] = {
        "federation": asdict(federation), "evaluation": asdict(plan.evaluation), "workers": runner.worker_count,
    }  # fmt: skip
    if plan.privacy is not None:
        server |= {"privacy": plan.privacy.to_dict(), "subject": asdict(plan.subject)}
    (devices / "server.json").write_text(json.dumps(server, indent=1))
    return settings


def fresh_directory(root: Path, name: str) -> Path:
    """``root/name/timestamp``, not yet created; two runs in one second get different names."""
    there = (root / name).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise unwritable(root, f"{there} is not a folder that can be written to")
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder, number = root / name / stamp, 1
    while folder.exists():
        number += 1
        folder = root / name / f"{stamp}-{number}"
    return folder


def unwritable(folder: Path, reason: str | None) -> ConfigError:
    return ConfigError(f"output_dir: {folder} cannot be made ({reason}); choose another folder with output_dir=…")


def _remove(folder: Path, root: Path) -> None:
    """Nothing half-written stays behind: neither the run directory nor the empty folders that were made for it."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in (folder.parent, root):
        with contextlib.suppress(OSError):  # not empty: it holds other runs
            parent.rmdir()


def jsonable(value: Any) -> Any:
    """JSON has no NaN; a number that is not finite is written as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: jsonable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [jsonable(inner) for inner in value]
    return value


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(jsonable(dict(document)), indent=1) + "\n")
    os.replace(temporary, path)


def _save_checkpoint(folder: Path, outcome: Outcome, summary: Mapping[str, Any]) -> None:
    """The item view of the best round, and the server's state after the last one, each with a checksum beside it."""
    shared = outcome.best_shared or outcome.final_shared
    if not shared:
        return
    folder.mkdir()
    if outcome.final_state is not None:
        outcome.final_state.save(folder)
    path = folder / "best.safetensors"
    save_file({name: value.contiguous() for name, value in shared.items()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(
        folder / "best.json",
        {"round": outcome.best_round, "algorithm": summary["algorithm"], "sha256": digest},
    )


def _save_per_user(path: Path, outcome: Outcome) -> None:
    names = outcome.best_per_user[0].keys()
    arrays: dict[str, Any] = {name: np.concatenate([part[name] for part in outcome.best_per_user]) for name in names}
    np.savez_compressed(path, **arrays)


_LOGGER = logging.getLogger("fedrec.run")


def _open_log(path: Path) -> logging.Logger:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False
    _LOGGER.addHandler(handler)
    return _LOGGER


def _close_log() -> None:
    for handler in list(_LOGGER.handlers):
        handler.close()
        _LOGGER.removeHandler(handler)
