"""The two membership attacks on what was forgotten: on the devices' scores, and on the released item view.

The first is the score threshold of Yeom et al. (CSF 2018), per pair and centred per user. The second folds a deleted
user in anew (``privacy.attacks.fold_in``): whoever holds half of the deleted history learns from the item view whether
the other half was trained on too. Deleting the user's row stops the first and not the second.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedrec import random
from fedrec.data.interactions import UserItems
from privacy.attacks.fold_in import folded_scores
from privacy.attacks.membership import split_halves
from unlearning.scorer import Scorer
from unlearning.verification.areas import Evidence, Group, evidence
from unlearning.verification.ranks import percentile
from unlearning.verification.scene import Scene

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


def centred(scores: Float32, table: UserItems, users: Int64) -> Group:
    """The scores of the rows of ``table`` (of ``scores``' rows, in its order), less the mean of the user's finite ones;
    ``users`` int64[B] are the rows' codes."""
    known = np.isfinite(scores)
    mean = np.where(known, scores, 0.0).sum(axis=1, dtype=np.float64) / np.maximum(known.sum(axis=1), 1)
    centre = mean[table.users]
    return Group(scores[table.users, table.items] - centre, users[table.users], table.items.astype(np.int64))


def held_out(scene: Scene) -> UserItems:
    """Validation and test items that no model was trained on, those of withdrawn items left out."""
    return without(scene.before.validation.union(scene.before.test), scene.forget.items)


def without(table: UserItems, items: Int64) -> UserItems:
    """``table`` less ``items``."""
    if not items.size:
        return table
    keep = ~np.isin(table.items, items)
    return UserItems.from_pairs(table.users[keep], table.items[keep], table.n_users)


class FoldedIn(NamedTuple):
    """``evidence`` of the tested halves against held-out items; ``percentiles`` float64 of every tested pair among the
    items that its user never touched, ``users`` int64 (positions among the deleted) whose pairs they are."""

    evidence: Evidence
    percentiles: Float64
    users: Int64


def fold_in(scorer: Scorer, scene: Scene) -> FoldedIn:
    """Fold every deleted user in on one half of the deleted history and test the other, each half in turn.

    Held-out items are never drawn as negatives, just as the tested half is not: a model that never saw either cannot
    tell them apart. Of many deleted users an addressed sample is folded in.
    """
    users, most = scene.forget.users, scene.settings.fold_in_users
    if users.size > most:
        key = random.stream(scene.seed, "fold-in-users")
        users = users[random.sample_without_replacement(key, users.size, most)]
    histories = without(scene.before.train.take(users), scene.forget.items)
    unseen = held_out(scene).take(users)
    withdrawn = np.isin(np.arange(scene.before.n_items), scene.forget.items)
    touched = histories.union(unseen).sorted
    halves = split_halves(histories, scene.seed)
    folds: list[tuple[Group, Group]] = []
    places: list[Float64] = []
    for number, (given, tested) in enumerate((halves, halves[::-1])):
        tested = _rows_with(tested, given)
        controls = _rows_with(unseen, given)
        positive = Group(np.full(tested.items.size, np.nan), tested.users, tested.items.astype(np.int64))
        negative = Group(np.full(controls.items.size, np.nan), controls.users, controls.items.astype(np.int64))
        place = np.full(tested.items.size, np.nan)
        parts = folded_scores(
            scorer.algorithm, scorer.shared, given, touched, scene.seed, scene.settings.fold_in, f"unlearning-{number}"
        )
        for at, scores in parts:
            for group, table in ((positive, tested), (negative, controls)):
                group.scores[_positions(table, at)] = centred(scores, table.take(at), at).scores
            for b, user in enumerate(at):
                free = ~withdrawn
                free[touched.row(int(user))] = False
                rows = slice(tested.indptr[user], tested.indptr[user + 1])
                place[rows] = percentile(np.sort(scores[b, free]), scores[b, tested.row(int(user))])
        folds.append((positive, negative))
        places.append(place)
    return FoldedIn(evidence(folds), np.concatenate(places), np.concatenate([positive.users for positive, _ in folds]))


def _rows_with(table: UserItems, given: UserItems) -> UserItems:
    """``table``, emptied for users who have nothing in ``given``: there is nothing to fold them in on."""
    keep = given.counts[table.users] > 0
    return UserItems.from_pairs(table.users[keep], table.items[keep], table.n_users)


def _positions(table: UserItems, users: Int64) -> Int64:
    """Where the entries of ``table.take(users)`` stand in ``table.items``."""
    rows = [np.arange(table.indptr[user], table.indptr[user + 1]) for user in users]
    return np.concatenate([np.zeros(0, dtype=np.int64), *rows])
