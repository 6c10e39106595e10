"""Gold retrainings: what a model looks like that never had the data. Made once for all strategies, kept for next time.

A gold is the same federation with another seed, trained from scratch on what is retained, for as many rounds as the
model that is judged. Several processes make them, each with the inline runner: the result does not depend on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fedrec.data.split import Split
from fedrec.errors import DataError
from fedrec.experiment.summary import versions
from server.settings import RunnerSettings
from unlearning.federation import Federation
from unlearning.forget import ForgetSet
from unlearning.scorer import Scorer
from unlearning.state import State
from unlearning.strategies.base import Cost
from unlearning.verification import Measurement, Scene, measure
from unlearning.verification.ranks import rank_pairs
from unlearning.verification.relearn import Relearning, relearn_rounds, relearn_target
from unlearning.verification.scene import K

_KEEP_BYTES = 256 * 2**20  # a larger state is made again rather than kept


@dataclass(frozen=True)
class Gold:
    """One of them: its measurement, what it cost, forget Recall@20 per round of relearning, its seed."""

    seed: int
    measurement: Measurement
    cost: Cost
    curve: tuple[float, ...]
    cached: bool


@dataclass(frozen=True)
class GoldTask:
    """What a process needs to make one. ``keep`` is where its state is kept, None: nowhere."""

    federation: Federation
    scene: Scene
    forgotten: ForgetSet
    rounds: int
    relearn: int
    scratch: Path
    keep: Path | None


def make_golds(
    federation: Federation, scene: Scene, forgotten: ForgetSet, rounds: int, count: int, *, relearn: int,
    scratch: Path, cache: Path | None, workers: int, say: Callable[[str], None],
) -> list[Gold]:  # fmt: skip
    """``count`` golds for the data of ``scene.after``, ordered by seed.

    Raises:
        RunFailed: one of them could not be trained.
    """
    tasks = []
    for number in range(count):
        own = federation.with_seed(federation.seed + 1000 * (number + 1))
        own = dataclasses.replace(own, runner=_inline(own))
        keep = cache / _key(own, scene.after, rounds) if cache else None
        tasks.append(GoldTask(own, scene, forgotten, rounds, relearn, scratch / f"gold-{number}", keep))
    golds: list[Gold] = []
    if workers == 1 or count == 1:
        for task in tasks:
            say(f"gold {len(golds) + 1} of {count}")
            golds.append(make_gold(task))
        return golds
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, count), mp_context=context, initializer=_quiet) as pool:
        waiting = [pool.submit(make_gold, task) for task in tasks]
        for number, _ in enumerate(as_completed(waiting), 1):
            say(f"golds: {number} of {count} retrained")
        return [future.result() for future in waiting]


def _inline(federation: Federation) -> RunnerSettings:
    return dataclasses.replace(federation.runner, name="inline", workers=0, gpus_per_worker=0.0)


def make_gold(task: GoldTask) -> Gold:
    """Train it, or take the kept one; measure it in the scene; see how fast it learns what it never had."""
    shutil.rmtree(task.scratch, ignore_errors=True)
    kept = _kept(task)
    if kept is not None:
        state, cost = kept
    else:
        state = task.federation.begin(task.scratch, task.scene.after)
        done = task.federation.train(state, task.scene.after, task.rounds)
        state, cost = done.state, done.cost
        if task.keep is not None:
            _keep(task.keep, state, cost)
    found = measure(task.federation.scorer(state, task.scene.after, task.forgotten), task.scene)
    curve = relearn_curve(task.federation, state, task.scene, task.relearn)
    shutil.rmtree(task.scratch, ignore_errors=True)
    return Gold(task.federation.seed, found, cost, curve, kept is not None)


def relearn_curve(federation: Federation, state: State, scene: Scene, rounds: int) -> tuple[float, ...]:
    """Forget Recall@20 after 0, 1, … ``rounds`` rounds with the data given back. The state's folder is used up."""
    if not rounds or not scene.forget.size or scene.forget.items.size:
        return ()  # a withdrawn item is not given back
    # One round at a time, which would start Ray anew each time; the result does not depend on the runner.
    federation = dataclasses.replace(federation, runner=_inline(federation))
    state, curve = state.at(dataclasses.replace(state.server, moments={})), []
    for number in range(rounds + 1):
        curve.append(forget_recall(federation.scorer(state, scene.before), scene))
        if number < rounds:
            state = federation.train(state, scene.before, 1).state
    return tuple(curve)


def relearning(before: float, after: Sequence[float], golds: Sequence[Gold], level: float) -> Relearning | None:
    """How long the unlearned model and the golds took to learn it again; None where it was not measured.

    ``before`` is forget Recall@20 of the model that knew, ``level`` the golds'.
    """
    if not after or before <= level:
        return None
    # Half of the way back: the whole of it takes a run as long as the first one.
    return relearn_rounds(after, [gold.curve for gold in golds], relearn_target(before, level, share=0.5))


def _key(federation: Federation, after: Split, rounds: int) -> str:
    """All that a gold depends on."""
    digest = hashlib.sha256()
    said = {
        "algorithm": dict(federation.algorithm_config), "protocol": dict(federation.protocol),
        "settings": dict(federation.settings), "federation": asdict(federation.federation), "rounds": rounds,
        "versions": versions(), "chunk_rows": federation.runner.chunk_rows,
    }  # fmt: skip
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    for table in (after.train, after.negatives_exclude):
        digest.update(np.ascontiguousarray(table.indptr).tobytes() + np.ascontiguousarray(table.items).tobytes())
    if federation.joined is not None:
        digest.update(federation.joined.tobytes())
    if federation.problem.item_features is not None:
        digest.update(federation.problem.item_features.numpy().tobytes())
    return digest.hexdigest()[:32]


def _kept(task: GoldTask) -> tuple[State, Cost] | None:
    if task.keep is None or not (task.keep / "cost.json").exists():
        return None
    try:
        cost = Cost(**json.loads((task.keep / "cost.json").read_text()))
        return State.load(task.keep).copy_to(task.scratch), cost
    except (DataError, OSError, ValueError, TypeError):  # a damaged entry is made again
        shutil.rmtree(task.keep, ignore_errors=True)
        shutil.rmtree(task.scratch, ignore_errors=True)
        return None


def _keep(folder: Path, state: State, cost: Cost) -> None:
    size = sum(path.stat().st_blocks * 512 for path in state.folder.rglob("*") if path.is_file())
    if size > _KEEP_BYTES:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".gold-", dir=folder.parent))
    state.copy_to(temporary / "state")
    (temporary / "state" / "cost.json").write_text(json.dumps(asdict(cost)))
    with contextlib.suppress(OSError):  # another process was faster
        os.replace(temporary / "state", folder)
    shutil.rmtree(temporary, ignore_errors=True)


def _quiet() -> None:
    logging.getLogger("flwr").setLevel(logging.CRITICAL)


def forget_recall(scorer: Scorer, scene: Scene) -> float:
    """Mean Recall@20 of what the affected users had forgotten."""
    users = scene.forget.affected
    scores = scorer.scores(users)
    nothing = np.zeros(scene.before.n_items, dtype=bool)
    pairs = scene.forget.pairs.take(users)
    return float(np.mean(rank_pairs(scores, scores, scene.after.train.take(users), pairs, nothing, K)[0]))
