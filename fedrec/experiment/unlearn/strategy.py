"""One strategy through all requests: train up to each, honour it on a copy, judge it, change state, purge, record."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedrec.errors import RunFailed
from fedrec.evaluation.ranking import Evaluator
from fedrec.experiment.unlearn.evidence import Evidence, entry_of, purge_notes
from fedrec.experiment.unlearn.golds import Gold, relearn_curve, relearning
from fedrec.experiment.unlearn.place import Place
from fedrec.experiment.unlearn.setup import Setup
from fedrec.experiment.unlearn.shared import Shared, mean_cost
from fedrec.experiment.unlearn.stores import Store, open_store
from unlearning.audit import AuditLog
from unlearning.purge import Needles, PurgeProof, purge_proof, wipe
from unlearning.requests import Batch
from unlearning.scorer import Scorer
from unlearning.state import State, erase, stores
from unlearning.strategies import Cost, Forgotten, Guarantee, Strategy, Task
from unlearning.strategies.retrain import Retrain
from unlearning.verification import (
    Gate,
    Measurement,
    Scene,
    failed,
    forgetting_was_judged,
    judge,
    measure,
    measured,
    percentile_histograms,
)


@dataclass
class StrategyRun:
    """``folder`` is the strategy's own: its audit log, its state, its store."""

    name: str
    strategy: Strategy
    setup: Setup
    shared: Shared
    folder: Path
    log: AuditLog

    def __post_init__(self) -> None:
        self.place = Place(self.folder)
        self.evidence = Evidence(self.name, self.setup, self.log, self.place)
        self.store: Store = open_store(self.strategy.store, self.place.store, self.setup.rounds)
        self.federation = self.setup.federation
        self.recommend: Callable[[Scorer], Scorer] | None = (
            None  # a later request's takes the place of an earlier one's
        )
        self.stored = 0
        self.joined: State | None = None

    def run(self) -> dict[str, Any]:
        """All requests; the strategy's entry of ``summary.json``.

        Raises:
            RunFailed: training or a request failed; the audit log says which, and the old state stands.
        """
        began = time.perf_counter()
        state = self._begin()
        batches = []
        for number, batch in enumerate(self.setup.batches, 1):
            state = self._train(state, batch.round, batch)
            if batch.forget.size or batch.forget.users.size or batch.forget.items.size:
                state, entry = self._honour(number, batch, state)
                batches.append(entry)
            else:
                state = self._welcome(batch, state)
                batches.append(entry_of(batch, "passed", finished=datetime.now(UTC)))
        last = self.setup.batches[-1]
        state = self._train(state, self.setup.rounds, last)
        self.stored = max(self.stored, self.store.bytes(state))
        guarantees = {str(entry["guarantee"]) for entry in batches if entry.get("guarantee")}
        return {
            "guarantee": next(iter(guarantees)) if len(guarantees) == 1 else self.strategy.promise,
            "store": {"where": self.store.where, "bytes": self.stored, "bytes_left": self.store.bytes(state)},
            "seconds": time.perf_counter() - began,
            "failed_gates": sum(gate["passed"] is False for entry in batches for gate in entry.get("gates", ())),
            "test": self._test(state, last),
            "state": str((self.folder / (self.place.current or "")).resolve()),
            "batches": batches,
        }

    # -- training ---------------------------------------------------------------------------------------------------

    def _begin(self) -> State:
        first = self.setup.batches[0]
        if self.setup.source is not None:
            state = self.place.adopt(self.setup.source)
            self.federation.write(state.devices, first.before)
            return state
        if self.strategy.store is None:
            if self.shared.trained is None:
                self.shared.trained, self.shared.training = self._from_nothing(self.shared.scratch / "trained", first)
                self.shared.joined = self.joined
                self.shared.tell(f"trained {first.round} rounds: {self.shared.training.cpu_s:.1f} s of CPU")
            self.joined = self.shared.joined
            return self.place.adopt(self.shared.trained)
        return self.place.adopt(self._from_nothing(self.place.fresh(), first)[0])

    def _from_nothing(self, folder: Path, first: Batch) -> tuple[State, Cost]:
        """Training up to the first request, with the state before late users joined kept aside."""
        state, cost = self.federation.begin(folder, first.before), Cost()
        late = self.setup.settings.late_round
        if late and late <= first.round:
            done = self.federation.train(state, first.before, late - 1, **self._recorded(state, "training"))
            aside = self.folder / "joined"
            shutil.rmtree(aside, ignore_errors=True)
            self.joined, state, cost = done.state.copy_to(aside), done.state, done.cost
        more = first.round - state.round
        done = self.federation.train(state, first.before, more, **self._recorded(state, "training", first.round))
        return done.state, cost + done.cost

    def _train(self, state: State, until: int, batch: Batch) -> State:
        """On to round ``until`` with the data that the batch found."""
        if state.round >= until:
            return state
        split = batch.before if until == batch.round else batch.after
        done = self.federation.train(state, split, until - state.round, **self._recorded(state, "training", until))
        return done.state

    def _recorded(self, state: State, what: str, until: int | None = None) -> dict[str, Any]:
        def listen(line: dict[str, Any]) -> None:
            self.shared.say(f"{self.name}: {what}, round {line['round']} of {self.setup.rounds}")

        return {"listener": listen, **self.store.recording(self.federation)}

    # -- one request ------------------------------------------------------------------------------------------------

    def _honour(self, number: int, batch: Batch, state: State) -> tuple[State, dict[str, Any]]:
        setup, scene = self.setup, self._scene(batch)
        self.shared.say(f"{self.name}: {', '.join(request.id for request in batch.requests)}")
        before = measure(self._scorer(state, batch, before=True), scene)
        vectors = private_vectors(state, batch)
        self.stored = max(self.stored, self.store.bytes(state))
        stored = [history.needles(batch.forget.users) for history in self.store.histories(state)]
        self.evidence.started(batch, state)
        began = time.perf_counter()
        try:
            made = self.strategy.forget(self._task(number, batch, state))
            after = measure(self._scorer(made.state, batch, extra=made.recommend), scene)
            unlearned = time.perf_counter() - began
            golds = self.shared.golds_of(setup, number, batch, scene)
            again = self._relearn(made, batch, scene, before, golds)
            retraining = mean_cost([gold.cost for gold in golds])
            gates = judge(
                scene, before, after, [gold.measurement for gold in golds], made.cost, retraining,
                setup.settings.thresholds, again, made.guarantee,
            )  # fmt: skip
            judged = time.perf_counter() - began - unlearned
            fallback = None
            if failed(gates) and setup.settings.on_gate_fail == "error":
                names = ", ".join(gate.name for gate in failed(gates))
                raise RunFailed(f"{self.name}: {names} failed, and unlearning.on_gate_fail=error: the old state stands")
            if failed(gates) and setup.settings.on_gate_fail == "retrain" and not isinstance(self.strategy, Retrain):
                fallback, made, after, gates = self._fall_back(number, batch, state, scene, before, golds, made, gates)
        except BaseException as error:
            self.evidence.failed(batch, str(error) or type(error).__name__)
            for leftover in self.folder.glob("work*"):
                wipe(leftover)
            raise
        self.recommend = made.recommend
        state = self._commit(made, batch)
        proof = self._purge(batch, state, vectors, stored)
        notes = [*made.notes, *purge_notes(proof)]
        if not forgetting_was_judged(gates):
            notes.append("too little was forgotten, or held out, for any gate to tell whether it is: not judged")
        seconds = {"unlearn": unlearned, "judge": judged}
        self.evidence.finished(batch, state, made.guarantee, gates, seconds, proof, fallback, notes)
        entry = entry_of(
            batch, "failed" if failed(gates) or not proof.ok else "passed", finished=datetime.now(UTC),
            fallback=fallback, guarantee=str(made.guarantee), gates=gates, cost=made.cost, retraining=retraining,
            measured=measured(before, after, [gold.measurement for gold in golds]),
            percentiles=percentile_histograms(before, after, [gold.measurement for gold in golds]),
            trace=made.trace, notes=notes, purge=proof.to_dict(),
            relearn=None if again is None else asdict(again),
            gold_seeds=[gold.seed for gold in golds], golds_cached=sum(gold.cached for gold in golds),
        )  # fmt: skip
        ids = ", ".join(request.id for request in batch.requests)
        decided = [gate for gate in gates if gate.passed is not None]
        self.shared.tell(
            f"{self.name}, {ids}: {len(decided) - len(failed(gates))} of {len(decided)} gates passed, "
            f"{made.cost.cpu_s:.2g} s of CPU against {retraining.cpu_s:.3g}"
        )
        return state, entry

    def _task(self, number: int, batch: Batch, state: State) -> Task:
        work = self.folder / "work"
        for leftover in self.folder.glob("work*"):
            shutil.rmtree(leftover, ignore_errors=True)
        joined = self.joined
        if joined is not None and self.federation.joined is not None:
            late = self.federation.joined[batch.forget.affected] >= self.setup.settings.late_round
            joined = joined if bool(late.all()) else None
        return Task(
            number=number, kinds=batch.kinds, state=state.copy_to(work), before=batch.before, after=batch.after,
            forget=batch.forget, forgotten=batch.forgotten, federation=self.federation, seed=self.federation.seed,
            joined=joined, history=self.store.folder, say=self.shared.say,
        )  # fmt: skip

    def _fall_back(
        self, number: int, batch: Batch, state: State, scene: Scene, before: Measurement, golds: list[Gold],
        made: Forgotten, gates: list[Gate],
    ) -> tuple[str, Forgotten, Measurement, list[Gate]]:  # fmt: skip
        """Retraining takes the place of what failed; its cost comes on top."""
        again = Retrain().forget(self._task(number, batch, state))
        names = ", ".join(gate.name for gate in failed(gates))
        again.notes = [*made.notes, f"{self.name} failed {names}; retrained instead"]
        again.cost, again.trace = again.cost + made.cost, made.trace
        after = measure(self._scorer(again.state, batch), scene)
        found = judge(
            scene, before, after, [gold.measurement for gold in golds], again.cost, mean_cost([g.cost for g in golds]),
            self.setup.settings.thresholds, None, again.guarantee,
        )  # fmt: skip
        return "retrain", again, after, found

    def _relearn(
        self, made: Forgotten, batch: Batch, scene: Scene, before: Measurement, golds: list[Gold]
    ) -> Any:  # fmt: skip
        rounds = self.setup.settings.relearn_rounds
        if made.recommend is not None or not golds or not golds[0].curve:
            return None
        copy = made.state.copy_to(self.folder / "work-relearn")
        curve = relearn_curve(self.federation, copy, scene, rounds)
        shutil.rmtree(copy.folder, ignore_errors=True)
        level = float(np.mean([gold.measurement.values["forget_recall@20"] for gold in golds]))
        return relearning(before.values["forget_recall@20"], curve, golds, level)

    def _commit(self, made: Forgotten, batch: Batch) -> State:
        """The new state takes over: data without the forgotten, fresh devices for the deleted, purged store."""
        self.federation.write(made.state.devices, batch.after)
        state = erase(made.state, batch.forget, self.federation.algorithm)
        # Rounds of unlearning are not rounds of training: that goes on where it was.
        state = state.at(dataclasses.replace(state.server, round=batch.round))
        if self.store.where == "client":  # part of the state, so purged with it
            self.store.purge(state, batch.forget)
        state = self.place.adopt(state)
        if self.store.where == "server":
            self.store.purge(state, batch.forget)
        for leftover in self.folder.glob("work*"):
            wipe(leftover)
        if self.joined is not None:
            self.federation.write(self.joined.devices, batch.after)
            self.joined = erase(self.joined, batch.forget, self.federation.algorithm)
        return state

    def _purge(
        self, batch: Batch, state: State, vectors: dict[str, Any], stored: list[Needles]
    ) -> PurgeProof:  # fmt: skip
        ids = [str(self.setup.plan.data.user_ids[user]) for user in batch.forget.users]
        public = [value.numpy() for value in self.federation.algorithm.initial_shared().values()]
        for store in stores(state.devices, scratch=True):
            public += [value.numpy() for value in store.vectors(np.asarray(store.users, dtype=np.int64)).values()]
        return purge_proof(
            self.folder, batch.before, batch.after, vectors=vectors, public=public, raw_ids=ids, stored=stored
        )

    def _welcome(self, batch: Batch, state: State) -> State:
        """Users who come back bring their data; their devices start as new ones do."""
        self.evidence.started(batch, state)
        self.federation.write(state.devices, batch.after)
        self.evidence.finished(batch, state, Guarantee("exact"), [], {}, None, None, ["the users are back"])
        return state

    # -- looking ----------------------------------------------------------------------------------------------------

    def _scene(self, batch: Batch) -> Scene:
        return Scene(batch.kinds, batch.before, batch.after, batch.forget, self.federation.seed)

    def _scorer(
        self, state: State, batch: Batch, *, before: bool = False, extra: Callable[[Scorer], Scorer] | None = None
    ) -> Scorer:
        split = batch.before if before else batch.after
        found: Scorer = self.federation.scorer(state, split, None if before else batch.forgotten)
        wrap = extra or (self.recommend if before else None)
        return wrap(found) if wrap else found

    def _test(self, state: State, batch: Batch) -> dict[str, float]:
        """The last model's metrics on the test part, as the run's protocol ranks."""
        plan, split = self.setup.plan, batch.after
        evaluator = Evaluator(split, plan.protocol, self.federation.seed)
        scorer = self._scorer(state, batch, extra=self.recommend)
        users = np.flatnonzero(split.test.counts).astype(np.int64)
        block = max(1, 4_000_000 // split.n_items)
        for start in range(0, users.size, block):
            chunk = users[start : start + block]
            evaluator.add(chunk, np.ascontiguousarray(scorer.scores(chunk)))
        return dict(evaluator.sums().metrics("test"))


def private_vectors(state: State, batch: Batch) -> dict[str, Any]:
    """By tensor, what the devices of deleted users held: float32[n, width]."""
    found: dict[str, list[Any]] = {}
    for store in stores(state.devices, scratch=True):
        users = batch.forget.users[(batch.forget.users >= store.users.start) & (batch.forget.users < store.users.stop)]
        if not users.size:
            continue
        for name, value in store.vectors(users).items():
            if value[0].numel() >= 4:  # a single number is nobody's
                found.setdefault(name, []).append(value.reshape(len(users), -1).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}
