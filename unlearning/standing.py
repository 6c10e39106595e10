"""What has been forgotten so far: the sum of the requests honoured, from which the data at any moment follows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from unlearning.forget import ForgetSet

Int64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Standing:
    """The users and items that are gone from ``base``, and the single interactions that are.

    ``users``, ``items`` int64 codes, ascending. ``singled`` are interactions that were forgotten for their own sake:
    they stay away when their user comes back. ``left`` are those that a user who came back left behind. Both are
    :func:`pair_codes`, ascending.
    """

    base: Split
    users: Int64 = field(default_factory=_NONE.copy)
    items: Int64 = field(default_factory=_NONE.copy)
    singled: Int64 = field(default_factory=_NONE.copy)
    left: Int64 = field(default_factory=_NONE.copy)

    def forget(self, forget: ForgetSet) -> Standing:
        """After ``forget``: its users and items are gone whole, and its other pairs singly."""
        user, item = forget.pairs.users, forget.pairs.items
        single = ~(np.isin(user, forget.users) | np.isin(item, forget.items))
        return replace(
            self,
            users=np.union1d(self.users, forget.users),
            items=np.union1d(self.items, forget.items),
            singled=np.union1d(self.singled, pair_codes(user[single], item[single])),
        )

    def welcome(self, users: Int64, share: float = 1.0) -> Standing:
        """After ``users`` came back with the latest ``share`` of the history that may still be trained on.

        Withdrawn items stay withdrawn and singly forgotten interactions stay forgotten, so neither is part of that
        history. Its length is rounded up.
        """
        train = self.base.train
        user, codes = train.users, pair_codes(train.users, train.items)
        usable = np.isin(user, users) & ~np.isin(train.items, self.items) & ~np.isin(codes, self.singled)
        at = np.flatnonzero(usable)  # oldest first, per user
        counts = np.bincount(user[at], minlength=train.n_users)
        place = np.arange(at.size) - np.repeat(np.cumsum(counts) - counts, counts)
        keep = np.ceil(share * counts - 1e-9).astype(np.int64)
        older = at[place < (counts - keep)[user[at]]]
        of_others = self.left[~np.isin(self.left >> 32, users)]
        return replace(self, users=np.setdiff1d(self.users, users), left=np.union1d(of_others, codes[older]))

    @cached_property
    def forgotten(self) -> ForgetSet:
        """All of it as one forget set."""
        codes = np.union1d(self.singled, self.left)
        return ForgetSet.of(self.base.train, self.users, self.items, (codes >> 32, codes & 0xFFFFFFFF))

    @cached_property
    def split(self) -> Split:
        """The data as it stands, for a model that never had any of it."""
        nothing = not (self.users.size or self.items.size or self.singled.size or self.left.size)
        return self.base if nothing else self.forgotten.remove_from(self.base)


def pair_codes(users: npt.NDArray[np.integer], items: npt.NDArray[np.integer]) -> Int64:
    """int64: one number a (user, item) pair."""
    return (users.astype(np.int64) << 32) | items.astype(np.int64)


def has_pairs(table: UserItems, codes: Int64) -> Mask:
    """bool[len(codes)]: which pairs are in ``table``."""
    found: Mask = np.isin(codes, pair_codes(table.users, table.items))
    return found
