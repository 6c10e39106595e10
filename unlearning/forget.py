"""What is to be forgotten, and the data as it is without it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import numpy as np
import numpy.typing as npt

from fedrec.data.interactions import UserItems
from fedrec.data.split import Split

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ForgetSet:
    """Training interactions that must be forgotten, accounts that go with them, items that leave the catalogue.

    ``users`` and ``items`` are int64 codes, ascending: accounts to delete and items to withdraw. ``pairs`` holds, of
    all the federation's users, the items to forget (ascending per user): every training interaction of ``users`` and of
    ``items`` among them. A withdrawn item is neither a positive nor a negative any more, nor recommended.
    """

    users: Int64
    items: Int64
    pairs: UserItems

    @classmethod
    def of(cls, train: UserItems, users: npt.ArrayLike = (), items: npt.ArrayLike = (),
           pairs: tuple[npt.ArrayLike, npt.ArrayLike] = ((), ())) -> ForgetSet:  # fmt: skip
        """The forget set of users, items and single (user, item) ``pairs``, as far as ``train`` has them."""
        users = np.unique(np.asarray(users, dtype=np.int64))
        items = np.unique(np.asarray(items, dtype=np.int64))
        owner = train.users
        wanted = np.isin(owner, users) | np.isin(train.items, items)
        single = _codes(np.asarray(pairs[0], dtype=np.int64), np.asarray(pairs[1], dtype=np.int64))
        wanted |= np.isin(_codes(owner, train.items), single)
        return cls(users, items, UserItems.from_pairs(owner[wanted], train.items[wanted], train.n_users).sorted)

    @classmethod
    def nothing(cls, n_users: int) -> ForgetSet:
        none = np.zeros(0, dtype=np.int64)
        return cls(none, none, UserItems(np.zeros(n_users + 1, dtype=np.int64), np.zeros(0, dtype=np.int32)))

    @cached_property
    def affected(self) -> Int64:
        """int64, ascending: the users who have something to forget; only their devices ever see the forget set."""
        return np.flatnonzero(self.pairs.counts).astype(np.int64)

    @property
    def size(self) -> int:
        """The number of training interactions to forget."""
        return int(self.pairs.items.size)

    def __or__(self, other: ForgetSet) -> ForgetSet:
        """Both together (a pair that is in both counts once)."""
        owner = np.concatenate([self.pairs.users, other.pairs.users])
        item = np.concatenate([self.pairs.items, other.pairs.items])
        code = np.unique(_codes(owner, item))
        n_users = max(self.pairs.n_users, other.pairs.n_users)
        pairs = UserItems.from_pairs(code >> 32, (code & 0xFFFFFFFF).astype(np.int32), n_users)
        return ForgetSet(np.union1d(self.users, other.users), np.union1d(self.items, other.items), pairs)

    def remove_from(self, split: Split) -> Split:
        """``split`` as it is for a model that never had this data: its users and items keep their codes.

        Forgotten interactions leave the training set and may be drawn as negatives again, withdrawn items may not.
        Held-out interactions of deleted users and of withdrawn items go as well: there is nobody to recommend to, and
        nothing to recommend.
        """
        gone = _codes(self.pairs.users, self.pairs.items)

        def without_pairs(table: UserItems) -> UserItems:
            return _keep(table, ~np.isin(_codes(table.users, table.items), gone))

        def without_whole(table: UserItems) -> UserItems:
            return _keep(table, ~(np.isin(table.users, self.users) | np.isin(table.items, self.items)))

        exclude = without_whole(without_pairs(split.negatives_exclude))
        if self.items.size:
            n = split.n_users
            everybody = UserItems.from_pairs(
                np.repeat(np.arange(n), self.items.size), np.tile(self.items.astype(np.int32), n), n
            )
            exclude = exclude.union(everybody).sorted
        return replace(
            split,
            train=without_pairs(split.train),
            validation=without_whole(split.validation),
            test=without_whole(split.test),
            negatives_exclude=exclude,
        )


def union(sets: Iterable[ForgetSet], n_users: int) -> ForgetSet:
    """All of ``sets`` together."""
    return reduce(lambda first, second: first | second, sets, ForgetSet.nothing(n_users))


def _keep(table: UserItems, keep: npt.NDArray[np.bool_]) -> UserItems:
    return UserItems.from_pairs(table.users[keep], table.items[keep], table.n_users)


def _codes(users: npt.NDArray[np.int64], items: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> Int64:
    return (users << 32) | items.astype(np.int64)
