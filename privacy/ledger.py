"""``ledger.json``: every noisy release of a run, written before it leaves, and what all of them together guarantee.

Entries form a chain: each carries the SHA-256 of its own content and of the entry before it, the first one that of the
data's description, and a seal over the whole file. So a lost, edited or reordered entry is found; it is a check against
accidents and careless edits, not a signature: who rewrites the whole file can make another consistent one.

A follow-up run on the same data names the earlier ledger and continues its chain, so that composition covers both.
After a crash the entries of a round that is repeated stay: both noises may have been seen.

Not covered, because no device or server outside a simulation would see it: what the simulator itself writes for its
user (losses, metrics on validation and test items, choosing the best round or any setting by them, private state in
``devices/``, recorded views for attacks), and the data's public description: numbers of users, items, interactions.
Row sets of sparse uploads, message sizes and timing are no noisy releases either and appear nowhere here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedrec.errors import ConfigError
from privacy.accountants import Epsilon, Release, check_accountant, check_delta
from privacy.composition import Spending
from privacy.ledger_file import Entry, Subject, digest, ledger_file, parse, render, subject_hash, typed

__all__ = ["Entry", "Ledger", "Subject"]

SYSTEM_NOISE = "operating system"


class Ledger:
    """The ledger of one run directory. Every :meth:`record` is on disk, whole, when it returns."""

    def __init__(self, path: Path, subject: Subject, delta: float, accountant: str) -> None:
        check_accountant(accountant)
        check_delta(delta)
        self.path, self.subject, self.delta, self.accountant = path, subject, delta, accountant
        self.entries: list[Entry] = []
        self._lines: list[str] = []
        self._spending: dict[str, Spending] = {}
        self._known: dict[str, tuple[int, Epsilon]] = {}
        self._faults: dict[str, str] = {}

    @classmethod
    def start(
        cls, path: Path, subject: Subject, delta: float, accountant: str = "auto", previous: Path | None = None
    ) -> Ledger:
        """A new ledger in ``path`` (``…/ledger.json``, or the run directory), with the entries of ``previous``.

        Raises:
            ConfigError: there is one already; ``previous`` is no ledger, has a broken chain, or is of other data.
        """
        path = ledger_file(path)
        if path.exists():
            raise ConfigError(
                f"privacy.ledger: {path} holds the releases of an earlier run; continue that run, or choose another "
                "run directory and write privacy.ledger=<the earlier run directory>"
            )
        earlier = None if previous is None else cls.read(previous)
        if earlier is not None:
            earlier.check_subject(subject)
            subject = earlier.subject  # the chain starts at its hash, so it keeps the name that the data had first
        ledger = cls(path, subject, delta, accountant)
        for entry in earlier.entries if earlier else ():
            ledger._append(entry)
        ledger.finish()
        return ledger

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """The ledger of a file or run directory, to look at, or to resume its run. ConfigError unless it is whole."""
        path = ledger_file(path)
        document = parse(path)
        ledger = cls(path, document.subject, document.delta, document.accountant)
        for entry in document.entries:
            ledger._append(entry)
        return ledger

    def check_subject(self, subject: Subject) -> None:
        """ConfigError unless the ledger is of these data: the same interactions, under whatever name."""
        if self.subject.sha256 != subject.sha256:
            raise ConfigError(
                f"privacy.ledger={self.path}: it is of {_describe(self.subject)}, this run trains on "
                f"{_describe(subject)}; use the dataset settings of that run, or write privacy.ledger=null to start a "
                "ledger of its own for these data"
            )

    def record(
        self,
        *,
        run: str,
        round: int,
        unit: str,
        what: Sequence[str],
        sampler: str,
        sample_rate: float,
        noise_multiplier: float,
        max_grad_norm: float | None,
        steps: int = 1,
        trust: str = "server",
        survivors: int | None = None,
        group: str | None = None,
        noise_seed: int | None = None,
        adjacency: str | None = None,
        mechanism: str = "gaussian",
    ) -> Entry:
        """Append one release and write the file; call it *before* the release leaves the party that adds the noise.

        ``what`` names the tensors or statistics that the noise covers; ``noise_seed`` None is the operating system's;
        ``adjacency`` defaults to "add/remove one <unit>", and the noise multiplier is relative to the sensitivity to
        that change. ``max_grad_norm`` None: not clipped (nothing private was claimed).

        Raises:
            ConfigError: a release that no accountant here covers.
        """
        clipped = max_grad_norm is not None and math.isfinite(max_grad_norm)
        content: dict[str, Any] = {
            "index": len(self.entries), "run": run, "round": int(round), "unit": unit,
            "adjacency": adjacency or f"add/remove one {unit}", "mechanism": mechanism, "what": list(what),
            "sampler": sampler, "sample_rate": float(sample_rate), "noise_multiplier": float(noise_multiplier),
            "max_grad_norm": float(max_grad_norm) if max_grad_norm is not None and clipped else None,
            "steps": int(steps), "trust": trust, "survivors": None if survivors is None else int(survivors),
            "group": group, "accountant": self.accountant,
            "noise_seed": SYSTEM_NOISE if noise_seed is None else f"fixed: {noise_seed} (not private)",
            "previous": self._head,
        }  # fmt: skip
        typed(Entry, {**content, "hash": ""}).check()  # before it is hashed: JSON knows no infinity
        entry = typed(Entry, {**content, "hash": digest(content)})
        self._append(entry)
        self._write(final=False)
        return entry

    def composed(self) -> dict[str, Epsilon]:
        """What all entries spend, per unit. Seconds at most, where releases are sampled; then remembered on disk."""
        return {unit: self._composed(unit) for unit in self._spending}

    def finish(self) -> dict[str, Any]:
        """Write the accountant's results into the file, in place of the quick bounds, and return them per unit.

        Keys of each: epsilon (None: infinite), delta, accountant, note, private, releases, trust, statement.
        """
        return self._write(final=True)

    def spent(self, unit: str) -> list[list[Release]]:
        """The releases so far about a unit, for ``affordable_steps``: one list for each group that may be the worst."""
        return self._spending[unit].worst() if unit in self._spending else [[]]

    @property
    def private(self) -> bool:
        """Whether every release had noise, and noise that nobody can repeat."""
        return not self._faults

    @property
    def _head(self) -> str:
        return self.entries[-1].hash if self.entries else subject_hash(self.subject)

    def _append(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._lines.append(json.dumps(asdict(entry), allow_nan=False))
        kind = (entry.sampler, entry.sample_rate, entry.noise_multiplier, entry.adjacency, entry.trust)
        self._spending.setdefault(entry.unit, Spending()).add(entry.group, kind, entry.steps)
        if entry.noise_multiplier == 0.0:
            self._faults.setdefault(entry.unit, f"entry {entry.index} was released without noise")
        elif entry.noise_seed != SYSTEM_NOISE:
            self._faults.setdefault(
                entry.unit, f"anyone can repeat the noise of entry {entry.index}, its seed is fixed"
            )

    def _composed(self, unit: str) -> Epsilon:
        count, found = self._known.get(unit, (-1, None))
        if found is None or count != len(self.entries):
            found = self._spending[unit].composed(self.delta, self.accountant)
            self._known[unit] = len(self.entries), found
        return found

    def _summary(self, unit: str, final: bool) -> dict[str, Any]:
        spending = self._spending[unit]
        found = self._composed(unit) if final else spending.bounded(self.delta)
        return spending.summary(unit, found, self._faults.get(unit))

    def _write(self, final: bool) -> dict[str, Any]:
        composed = {unit: self._summary(unit, final) for unit in self._spending}
        text = render(self.subject, self.delta, self.accountant, self.private, composed, self._lines, self._head)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.part")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.path)
        return composed


def _describe(subject: Subject) -> str:
    return (
        f"{subject.name} ({subject.users} users, {subject.interactions} interactions, SHA-256 {subject.sha256[:12]}…)"
    )
