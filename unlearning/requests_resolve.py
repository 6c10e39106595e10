"""From an entry to codes: whom and what a request is about, on the data as it stands when it is due."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fedrec.data.interactions import Int64, Interactions
from fedrec.errors import DataError
from unlearning.forget import ForgetSet
from unlearning.requests_entry import Entry
from unlearning.requests_text import count
from unlearning.selection import choose, choose_interactions, items_of_genre, selection_key, users_with
from unlearning.standing import Standing, has_pairs, pair_codes

_NEAREST_AMONG = 20_000  # ids that a nearest one is looked for among: difflib takes a second for these


@dataclass(frozen=True)
class Done:
    """A request that came before: its entry, the round after which it is due, whom it forgot or brought back."""

    entry: Entry
    round: int
    forget: ForgetSet
    returning: Int64

    def __str__(self) -> str:
        return f"entry {self.entry.position} (id {self.entry.id}), due after round {self.round}"


@dataclass(frozen=True)
class Resolver:
    """Looks ids up in ``data`` and selects among what is left of it. ``joined`` int64[n_users]: first round of each."""

    data: Interactions
    seed: int
    joined: Int64
    done: list[Done] = field(default_factory=list)

    @cached_property
    def _users(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.data.user_ids)}

    @cached_property
    def _items(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.data.item_ids)}

    def forget_set(self, entry: Entry, standing: Standing, due: int) -> ForgetSet:
        """What a forgetting entry adds to what is forgotten. DataError: see ``requests.plan_requests``."""
        train = standing.split.train
        if entry.policy is not None:
            found = self._selected(entry, standing, due)
        elif entry.kind == "interaction":
            found = ForgetSet.of(train, pairs=self._listed_pairs(entry, standing, due))
        else:
            users = self._listed_users(entry, standing, due)
            found = ForgetSet.of(train, users, self._listed_items(entry, standing))
        if found.size == 0:
            raise DataError(
                f"{entry.where}: the forget set is empty: no training interaction is left of {_described(entry)} after "
                f"round {due}; delete the entry, or place it before the requests that forgot them"
            )
        return found

    def returning(self, entry: Entry, standing: Standing) -> Int64:
        """int64, ascending: the users whom a rejoin brings back. DataError: one of them is not away."""
        if entry.of is not None:
            source = next((done for done in self.done if done.entry.id == entry.of), None)
            if source is None:
                known = [done.entry.id for done in self.done if done.forget.users.size]
                near = difflib.get_close_matches(entry.of, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"before it come {', '.join(known) or 'none'}"
                raise DataError(f"{entry.where}: of={entry.of}: no request of that id is due before it; {hint}")
            users = np.intersect1d(source.forget.users, standing.users)
            if users.size == 0:
                raise DataError(
                    f"{entry.where}: of={entry.of}: no user whom {source} forgot is still away; delete the entry"
                )
        else:
            codes = [self._user(entry, name) for name in entry.users]
            for name, code in zip(entry.users, codes, strict=True):
                if code not in standing.users:
                    raise DataError(
                        f"{entry.where}: users: {name} is not away: no earlier request forgot this user; place it "
                        "after the request that does (by at_round, then received), or delete it"
                    )
            users = np.unique(np.asarray(codes, dtype=np.int64))
        if not standing.welcome(users, entry.share).split.train.take(users).items.size:
            raise DataError(
                f"{entry.where}: nothing is left of these users' history to come back with; delete the entry"
            )
        return users

    def _selected(self, entry: Entry, standing: Standing, due: int) -> ForgetSet:
        assert entry.policy is not None
        train = standing.split.train
        fraction = 1.0 if entry.fraction is None else entry.fraction
        of_users = self.joined <= due
        if entry.attribute:
            of_users = of_users & users_with(self.data, entry.attribute, entry.where)
        of_items = np.ones(self.data.n_items, dtype=bool)
        if entry.genre is not None:
            of_items = items_of_genre(self.data, entry.genre, entry.where)

        def key(purpose: str) -> np.uint64:
            return selection_key(self.seed, purpose, entry.id)

        if entry.kind == "interaction":
            eligible = of_users[train.users] & of_items[train.items]
            pairs = choose_interactions(train, entry.policy, fraction, key("interactions"), eligible)
            self._enough(entry, fraction, pairs[0].size, int(eligible.sum()), "interactions", due)
            return ForgetSet.of(train, pairs=pairs)
        chosen: dict[str, Int64] = {}
        popularity = np.bincount(train.items, minlength=of_items.size).astype(np.int64)
        for what, counts in (("users", train.counts * of_users), ("items", popularity * of_items)):
            if entry.kind in (what[:-1], "user_item"):
                chosen[what] = choose(counts, entry.policy, fraction, key(what))
                self._enough(entry, fraction, chosen[what].size, int((counts > 0).sum()), what, due)
        return ForgetSet.of(train, **chosen)  # type: ignore[arg-type]

    def _enough(self, entry: Entry, fraction: float, chosen: int, eligible: int, what: str, due: int) -> None:
        if chosen:
            return
        if not eligible:
            raise DataError(
                f"{entry.where}: the forget set is empty: none of the {what} that it may choose from has training "
                f"interactions after round {due}; delete the entry, or change what it forgets"
            )
        raise DataError(
            f"{entry.where}: the forget set is empty: fraction={fraction:g} of {eligible} {what} is less than half of "
            f"one; write {0.5 / eligible:.2g} or more"
        )

    def _listed_users(self, entry: Entry, standing: Standing, due: int) -> Int64:
        codes = [self._user(entry, name) for name in entry.users]
        for name, code in zip(entry.users, codes, strict=True):
            self._present(entry, standing, name, code, due)
        return np.asarray(codes, dtype=np.int64)

    def _listed_items(self, entry: Entry, standing: Standing) -> Int64:
        codes = [self._item(entry, name) for name in entry.items]
        for name, code in zip(entry.items, codes, strict=True):
            if code in standing.items:
                raise DataError(
                    f"{entry.where}: items: {name} was withdrawn already by {self._who(item=code)}; delete one"
                )
        return np.asarray(codes, dtype=np.int64)

    def _listed_pairs(self, entry: Entry, standing: Standing, due: int) -> tuple[Int64, Int64]:
        users = np.asarray([self._user(entry, user) for user, _ in entry.pairs], dtype=np.int64)
        items = np.asarray([self._item(entry, item) for _, item in entry.pairs], dtype=np.int64)
        codes = pair_codes(users, items)
        there = has_pairs(standing.split.train, codes)
        for (name, item_name), user, item, code, present in zip(
            entry.pairs, users.tolist(), items.tolist(), codes, there, strict=True
        ):
            place = f"{entry.where}: pairs: [{name}, {item_name}]"
            self._present(entry, standing, name, user, due, place)
            if present:
                continue
            if has_pairs(standing.base.train, code[None])[0]:
                raise DataError(
                    f"{place} was forgotten already by {self._who(item=item, pair=code)}; delete one of them"
                )
            raise DataError(f"{place}: {self._why_not_trained(standing, user, item, code[None])}")
        return users, items

    def _why_not_trained(self, standing: Standing, user: int, item: int, code: Int64) -> str:
        for part, table in (("validation", standing.base.validation), ("test", standing.base.test)):
            if has_pairs(table, code)[0]:
                return (
                    f"this interaction is held out for {part}, so nothing was trained on it and there is nothing to "
                    "forget; delete the pair, or forget the user or the item"
                )
        if item in self.data.histories.row(user):
            return "this interaction is not used by the protocol's split: nothing was trained on it; delete the pair"
        return f"the user has no interaction with this item in {self.data.name}; correct the pair or delete it"

    def _present(self, entry: Entry, standing: Standing, name: str, code: int, due: int, place: str = "") -> None:
        """DataError unless the user has joined and was not forgotten."""
        place = place or f"{entry.where}: users: {name}"
        if code in standing.users:
            raise DataError(
                f"{place}: user {name} was forgotten already by {self._who(user=code)}; delete one of the two, or "
                "bring the user back in between with kind: rejoin"
            )
        if self.joined[code] > due:
            raise DataError(
                f"{place}: user {name} joins in round {self.joined[code]}, and the request is due after round {due}; "
                f"write at_round: {self.joined[code]} or later"
            )

    def _who(self, user: int | None = None, item: int | None = None, pair: np.int64 | None = None) -> str:
        """The latest request that forgot this user, this item or this pair."""
        for done in reversed(self.done):
            pairs = done.forget.pairs
            if (
                (user is not None and user in done.forget.users)
                or (item is not None and item in done.forget.items)
                or (pair is not None and has_pairs(pairs, np.asarray([pair]))[0])
            ):
                return str(done)
        raise AssertionError("what is forgotten was forgotten by a request")

    def _user(self, entry: Entry, name: str) -> int:
        return self._code(entry, "user", name, self._users)

    def _item(self, entry: Entry, name: str) -> int:
        return self._code(entry, "item", name, self._items)

    def _code(self, entry: Entry, what: str, name: str, codes: dict[str, int]) -> int:
        if name in codes:
            return codes[name]
        near = difflib.get_close_matches(name, _alike(name, codes), n=1)
        hint = f"did you mean {near[0]}?" if near else f"ids look like {next(iter(codes))}"
        raise DataError(f"{entry.where}: {what} {name} is not in {self.data.name} ({len(codes)} {what}s); {hint}")


def _described(entry: Entry) -> str:
    return " and ".join(count(len(ids), what) for what, ids in (("user", entry.users), ("item", entry.items)) if ids)


def _alike(name: str, known: Iterable[str]) -> Sequence[str]:
    """Ids of nearly the same length, as many as can be compared in a moment."""
    near = (one for one in known if abs(len(one) - len(name)) <= 1)
    return [one for one, _ in zip(near, range(_NEAREST_AMONG), strict=False)]
