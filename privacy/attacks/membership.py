"""Membership inference on the released item view: did this person take part in the training?

The attacker holds the released tensors and the person's history (or part of it), not the private tensors.

* :func:`by_fold_in`: fit a fresh user vector on one half of the history and see how well the other half is ranked.
  Training pulled the items of a member's history together, and the item view still knows. This is the attack that
  deleting a user's row does not stop.
* :func:`by_score`: fit on the whole history and see how well those same items are ranked, the score-based attack of
  Zhang et al., "Membership Inference Attacks Against Recommender Systems" (CCS 2021), in the spirit of the loss
  threshold of Yeom et al. (CSF 2018).

Scores of members (who trained) and non-members (held out of the data before training) go to :func:`membership_report`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedrec import random
from fedrec.algorithms.base import Recommender, Tensors
from fedrec.data.interactions import Int64, UserItems
from fedrec.errors import ConfigError, DataError
from privacy.attacks.fold_in import FoldIn, folded_scores
from privacy.attacks.roc import advantage, delong, tpr_at_fpr

Float64 = npt.NDArray[np.float64]


def by_fold_in(
    algorithm: Recommender, shared: Tensors, histories: UserItems, seed: int, settings: FoldIn | None = None
) -> Float64:
    """float64[users]: how well one half of a history predicts the other on the released tensors.

    The mean AUC of the tested items against all items outside the history, each half taking its turn; NaN for a
    history of fewer than two items. The halves are addressed by (``seed``, user) and keep the order in time.
    """
    halves = split_halves(histories, seed)
    found = [
        _ranked(algorithm, shared, given, rest, histories, seed, settings or FoldIn(), f"fold-in:{number}")
        for number, (given, rest) in enumerate([halves, halves[::-1]])
    ]
    return np.asarray((found[0] + found[1]) / 2.0)


def by_score(
    algorithm: Recommender, shared: Tensors, histories: UserItems, seed: int, settings: FoldIn | None = None
) -> Float64:
    """float64[users]: the mean AUC of a history's items against all others, after fitting to that very history; NaN
    for an empty one."""
    return _ranked(algorithm, shared, histories, histories, histories, seed, settings or FoldIn(), "fold-in:whole")


def split_halves(histories: UserItems, seed: int) -> tuple[UserItems, UserItems]:
    """Two random halves of every history, addressed by (``seed``, user), in the order of the whole; of an odd number
    of items the first half has one more."""
    keys = random.streams(random.stream(seed, "fold-in-halves"), np.arange(histories.n_users))
    longest = int(histories.counts.max(initial=0))
    words = random.bits(keys, longest)
    position = np.arange(histories.items.size) - histories.indptr[histories.users]
    # Ranks of one random word per item: exactly half of them are below the median.
    order = np.lexsort((words[histories.users, position], histories.users))
    first = np.zeros(histories.items.size, dtype=bool)
    first[order] = position < (histories.counts[histories.users] + 1) // 2
    halves = [
        UserItems.from_pairs(histories.users[half], histories.items[half], histories.n_users)
        for half in (first, ~first)
    ]
    return halves[0], halves[1]


def choose_nonmembers(n_users: int, share: float, seed: int) -> Int64:
    """int64, ascending: the users to hold out of the data before training, ``share`` of all, addressed by ``seed``.

    Raises:
        ConfigError: a share that leaves one of the two groups empty.
    """
    count = round(share * n_users)
    if not 0 < count < n_users:
        raise ConfigError(
            f"attack.holdout={share}: of {n_users} users it holds out {count}; write a share such as 0.2 that "
            "leaves both members and non-members"
        )
    return random.sample_without_replacement(random.stream(seed, "non-members"), n_users, count)


def membership_report(members: npt.NDArray[Any], nonmembers: npt.NDArray[Any]) -> dict[str, float]:
    """How well scores tell members from non-members; NaN scores (histories too short to test) are left out.

    Keys: ``members`` and ``nonmembers`` counted, ``auc`` with ``auc_low`` and ``auc_high`` (95 %, DeLong),
    ``advantage`` (max TPR − FPR), ``tpr_at_fpr_1pct``.

    Raises:
        DataError: no scores in one of the groups.
    """
    inside, outside = (np.asarray(s, dtype=np.float64)[~np.isnan(s)] for s in (members, nonmembers))
    if not inside.size or not outside.size:
        raise DataError(
            f"membership inference compares two groups, got {inside.size} members and {outside.size} non-members with "
            "a history of two items or more; hold out some users, for example attack.holdout=0.2"
        )
    area = delong(inside, outside)
    return {
        "members": float(inside.size),
        "nonmembers": float(outside.size),
        "auc": area.auc,
        "auc_low": area.low,
        "auc_high": area.high,
        "advantage": advantage(inside, outside),
        "tpr_at_fpr_1pct": tpr_at_fpr(inside, outside, 0.01),
    }


def _ranked(
    algorithm: Recommender, shared: Tensors, given: UserItems, tested: UserItems, histories: UserItems, seed: int,
    settings: FoldIn, purpose: str,
) -> Float64:  # fmt: skip
    exclude = histories.sorted
    out = np.full(histories.n_users, np.nan)
    for users, scores in folded_scores(algorithm, shared, given, exclude, seed, settings, purpose):
        for user, row in zip(users, scores, strict=True):
            wanted = tested.row(int(user))
            if not wanted.size or not given.row(int(user)).size:
                continue
            out[user] = _mean_rank(row, wanted, histories.row(int(user)))
    return out


def _mean_rank(scores: npt.NDArray[np.float32], wanted: npt.NDArray[np.int32], history: npt.NDArray[np.int32]) -> float:
    """Mean over ``wanted`` of the share of unseen items that score lower (ties one half)."""
    unseen = np.ones(scores.size, dtype=bool)
    unseen[history] = False
    others = np.sort(scores[unseen])
    if not others.size:
        return float("nan")
    low = np.searchsorted(others, scores[wanted], side="left")
    high = np.searchsorted(others, scores[wanted], side="right")
    return float((low + high).mean() / (2.0 * others.size))
