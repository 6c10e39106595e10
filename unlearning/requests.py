"""Unlearning requests: the script of who asks when to be forgotten, checked against the data before any training.

A request file is YAML, one list of entries; a configuration may hold the same list inline (``unlearning.requests``).
Every entry has

* ``id``: its name in reports and in the audit log; once in the file.
* ``kind``: ``user`` (the account and all its interactions), ``item`` (withdrawn from the catalogue: its interactions
  are forgotten, and it is not recommended any more), ``interaction`` (single ones), ``user_item`` (users and items
  together), or ``rejoin`` (users who were forgotten come back).
* whom it is about, either by ids as the data set has them, ``users: [7, 12]``, ``items: [50]``,
  ``pairs: [[7, 50], [7, 172]]`` (user, item), or by a selection: ``fraction: 0.05`` with a ``policy``:

  - ``random`` (the default), or ``core``: the most active users or most popular items, or ``edge``: the least active or
    popular ones that have training interactions. For interactions: half of those of core or edge users, from the most
    or least active user on, until there are enough.
  - ``sensitive``: users with ``attribute: {gender: F}`` (several attributes: all of them; ``[nurse, doctor]``: any of
    these), items of ``genre: Horror``, and for ``interaction`` those with such items, of such users, or both;
    ``fraction`` of them at random, all without one.

  The fraction is of the users, items or interactions in the training set as it stands when the request is due, with
  earlier requests honoured, so nothing is selected twice; it is rounded to a whole number. Random choice is addressed
  by (seed, id): it does not depend on the order of entries, and a larger fraction contains a smaller one.
* ``at_round``: it is due after this training round; after training when left out.
* ``received``: when it came (default: now). A date alone is its first second, a time without a zone is UTC.
* ``deadline``: by when it must be honoured (default: 30 days after ``received``). A date alone is its last second.
* ``reason``: free text for the report; it is kept, so it should name nobody.

A ``rejoin`` takes ``users``, or ``of: r1`` (those whom request r1 forgot), and ``share: 0.5`` if only the latest half
of their history comes back with them. Withdrawn items, and interactions that were forgotten singly, do not come back.

Requests are honoured in the order of their rounds, then of ``received``, then as written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fedrec.data.interactions import Int64, Interactions
from fedrec.data.split import Split
from fedrec.errors import ConfigError, DataError
from unlearning.forget import ForgetSet, union
from unlearning.requests_entry import Entry, parse_entries
from unlearning.requests_file import read_entries
from unlearning.requests_resolve import Done, Resolver
from unlearning.requests_text import count, selector
from unlearning.requests_values import hint
from unlearning.standing import Standing
from unlearning.strategies.base import Kind

BATCHING = ("sequential", "batched")
_NOBODY = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Request:
    """One request, resolved on the data as it stands when it is due.

    ``forget`` is what it adds to what is forgotten: nothing for a rejoin, whose users are ``returning`` (int64 codes,
    ascending; ``kind`` is ``user``). ``selector`` says what it is about without naming anybody.
    """

    id: str
    kind: Kind
    rejoin: bool
    forget: ForgetSet
    at_round: int | None
    received: datetime
    deadline: datetime
    reason: str
    selector: str
    returning: Int64 = field(default_factory=_NOBODY.copy)


@dataclass(frozen=True)
class Batch:
    """Requests that are honoured together, after training round ``round``.

    ``forget`` is all that they forget and ``returning`` who comes back (a rejoin is a batch of its own). ``before`` and
    ``after`` are the data without and with the batch honoured, ``forgotten`` is everything forgotten after it: users
    who came back are not in it, what they left behind is.
    """

    round: int
    requests: tuple[Request, ...]
    forget: ForgetSet
    returning: Int64
    before: Split
    after: Split
    forgotten: ForgetSet

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of what is forgotten; empty for a rejoin."""
        return frozenset(request.kind for request in self.requests if not request.rejoin)


def plan_requests(
    source: str | Path | Sequence[Mapping[str, Any]],
    data: Interactions,
    split: Split,
    *,
    rounds: int,
    seed: int,
    batching: str = "sequential",
    joined: Int64 | None = None,
    now: datetime | None = None,
) -> tuple[Batch, ...]:
    """The requests of a file, or of a list, in the order in which they are honoured.

    Args:
        source: a request file's path, or its entries.
        split: the run's training, validation and test data; ``data`` has the ids, genres and attributes.
        rounds: of the run.
        seed: addresses random selections.
        batching: ``batched`` honours requests that are due after the same round together, ``sequential`` one by one.
        joined: int64[n_users], the first round in which each user takes part; None: all in round 1.
        now: what received times and deadlines are held against, with a time zone; None: now.

    Raises:
        ConfigError: an entry, or the file, that cannot be read as a request.
        DataError: an entry that does not fit the data: unknown ids, nothing or everything forgotten, forgotten already,
            not joined yet, a user who returns without having been forgotten, a held-out or non-existing interaction, a
            genre or attribute that the data do not have.

        Both name the entry, the key, the value, and what to write instead.
    """
    if batching not in BATCHING:
        raise ConfigError(f"unlearning.batching={batching}: no such batching; {hint(batching, BATCHING)}")
    if now is not None and now.tzinfo is None:
        raise ValueError("now needs a time zone")
    if joined is None:
        joined = np.ones(data.n_users, dtype=np.int64)
    elif joined.shape != (data.n_users,):
        raise ValueError(f"joined has shape {joined.shape}, expected ({data.n_users},)")
    label, raw = read_entries(source)
    entries = parse_entries(label, raw, rounds=rounds, now=(now or datetime.now(UTC)).astimezone(UTC))

    def due(entry: Entry) -> int:
        return rounds if entry.at_round is None else entry.at_round

    resolver, standing, batches = Resolver(data, seed, joined), Standing(split), []
    ordered = sorted(entries, key=lambda entry: (due(entry), entry.received, entry.position))
    for together in _grouped(ordered, due, batching):
        before, requests = standing, []
        for entry in together:
            request, standing = _resolve(resolver, entry, standing, due(entry))
            requests.append(request)
        batches.append(
            Batch(
                round=due(together[0]),
                requests=tuple(requests),
                forget=union((request.forget for request in requests), split.n_users),
                returning=np.unique(np.concatenate([request.returning for request in requests])),
                before=before.split,
                after=standing.split,
                forgotten=standing.forgotten,
            )
        )
    return tuple(batches)


def describe(request: Request) -> str:
    """A line for logs. It names nobody: no raw ids, and not the reason, which is somebody's own words."""
    when = "after training" if request.at_round is None else f"after round {request.at_round}"
    times = f"received {request.received:%Y-%m-%d %H:%M} UTC, deadline {request.deadline:%Y-%m-%d %H:%M} UTC"
    if request.rejoin:
        return f"{request.id}: {request.selector} {when}; {times}"
    forget = request.forget
    sizes = [
        count(size, what)
        for size, what in ((forget.users.size, "user"), (forget.items.size, "item"), (forget.size, "interaction"))
        if size
    ]
    return f"{request.id}: forget {request.selector} ({', '.join(sizes)}) {when}; {times}"


def report_fields(request: Request) -> dict[str, str]:
    """What the report and the audit log say of a request, whatever the strategy. Times are ISO 8601."""
    return {
        "id": request.id,
        "kind": "rejoin" if request.rejoin else request.kind,
        "selector": request.selector,
        "reason": request.reason,
        "received": request.received.isoformat(timespec="seconds"),
        "deadline": request.deadline.isoformat(timespec="seconds"),
    }


def _grouped(ordered: Sequence[Entry], due: Callable[[Entry], int], batching: str) -> list[list[Entry]]:
    """Entries that make one batch. A rejoin stands alone, and so parts the requests before it from those after."""
    if batching == "sequential":
        return [[entry] for entry in ordered]
    groups = [list(group) for _, group in groupby(ordered, key=lambda entry: (due(entry), entry.rejoin))]
    return [part for group in groups for part in ([[one] for one in group] if group[0].rejoin else [group])]


def _resolve(resolver: Resolver, entry: Entry, standing: Standing, due: int) -> tuple[Request, Standing]:
    forget, returning = ForgetSet.nothing(standing.base.n_users), _NOBODY
    if entry.rejoin:
        returning = resolver.returning(entry, standing)
        after = standing.welcome(returning, entry.share)
    else:
        forget = resolver.forget_set(entry, standing, due)
        after = standing.forget(forget)
        _something_left(entry, after)
    resolver.done.append(Done(entry, due, forget, returning))
    request = Request(
        id=entry.id,
        kind=entry.forgets,
        rejoin=entry.rejoin,
        forget=forget,
        at_round=entry.at_round,
        received=entry.received,
        deadline=entry.deadline,
        reason=entry.reason,
        selector=selector(entry, returning.size),
        returning=returning,
    )
    return request, after


def _something_left(entry: Entry, standing: Standing) -> None:
    """DataError when nothing would be left to train on or to judge by."""
    split = standing.split
    items = np.unique(split.train.items).size
    left = None
    if items == 0:
        left = "everything is forgotten: no user with training interactions would be left"
    elif items < 2:
        left = "too much is forgotten: fewer than two items with training interactions would be left"
    for part, table in (("validation", split.validation), ("test", split.test)):
        if left is None and not (table.counts[split.train.counts > 0]).any():
            left = f"too much is forgotten: no user who is left has a held-out interaction for {part}"
    if left is not None:
        raise DataError(f"{entry.where}: {left}; forget fewer, here or in the requests before it")
