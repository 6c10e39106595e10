"""Looking at one model: every number that the gates compare, in one pass over the users' scores."""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from fedrec.data.interactions import UserItems
from fedrec.errors import RunFailed
from fedrec.evaluation.protocols import Protocol as EvaluationProtocol
from fedrec.evaluation.ranking import Evaluator
from unlearning.scorer import Scorer
from unlearning.verification.areas import Group, evidence
from unlearning.verification.attacks import centred, fold_in, held_out
from unlearning.verification.distance import Predictions, standardise
from unlearning.verification.ranks import rank_items, rank_pairs, top_items
from unlearning.verification.scene import K, Mean, Measurement, Scene

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_RANKING = EvaluationProtocol(ks=(K,), select_metric=f"ndcg@{K}", sampled_negatives=0)


@runtime_checkable
class MaskingScorer(Protocol):
    """A :class:`~unlearning.scorer.Scorer` that masks withdrawn items may also say what it would score without the
    mask; percentiles of withdrawn items and membership inference look there."""

    def raw_scores(self, users: Int64) -> Float32:
        """float32[len(users), n_items], without −inf for withdrawn items."""


@runtime_checkable
class FreshScorer(Protocol):
    """A :class:`~unlearning.scorer.Scorer` that can draw the devices of deleted users anew.

    A new device starts from a random vector, and what a single one ranks says little: with some draws of each, the
    chance of the draw averages out of what is said of deleted users.
    """

    @property
    def newcomers(self) -> Int64:
        """int64, ascending: the users whose devices are new ones."""

    def fresh_scores(self, users: Int64, draw: int) -> Float32:
        """float32[len(users), n_items] of newcomers, without the mask, as devices of the ``draw``-th draw score."""


def measure(scorer: Scorer, scene: Scene) -> Measurement:
    """What ``scorer`` shows in ``scene``.

    Values (NaN where there is nothing to measure):

    * ``retain_recall@20``, ``retain_ndcg@20``: of users who stay, their test items ranked as the clean protocol does;
    * ``forget_recall@20``: mean over the affected users of the recall of what they had forgotten (``ranks``);
    * ``mia_auc``: forgotten pairs against the same users' held-out items, by centred score;
    * ``fold_in_auc`` and ``fold_in_percentile``: of deleted users (``attacks.fold_in``);
    * ``percentile``: mean over the forgotten pairs; where only items leave, over withdrawn items and retained users;
      ``percentile_items``: the latter, wherever items leave;
    * ``bystander_ndcg@20``: of ``scene.bystanders``.

    Raises:
        RunFailed: a score is not a number.
    """
    looked = _look(scorer, scene)
    deleted = fold_in(scorer, scene)
    attacks = {"mia_auc": evidence(looked.attacked), "fold_in_auc": deleted.evidence}
    pairs = Mean.of(looked.percentiles, looked.owners)
    items = Mean.of(looked.item_percentiles)
    means = {
        f"retain_recall@{K}": Mean.of(looked.recall),
        f"retain_ndcg@{K}": Mean.of(looked.ndcg),
        f"forget_recall@{K}": Mean.of(looked.forget_recall),
        "fold_in_percentile": Mean.of(deleted.percentiles, deleted.users),
        "percentile": pairs if pairs.values.size else items,
        "percentile_items": items,
        f"bystander_ndcg@{K}": Mean.of(looked.ndcg[np.isin(looked.ranked, scene.bystanders)]),
    }
    values = {name: mean.value for name, mean in means.items()} | {name: found.auc for name, found in attacks.items()}
    percentiles = looked.percentiles if pairs.values.size else looked.item_percentiles
    return Measurement(values, percentiles, means, attacks, Predictions(looked.compared, looked.top))


class _Looked(NamedTuple):
    """What one pass over the users finds. ``ranked`` int64: the users of ``recall`` and ``ndcg``; ``owners`` int64:
    those of ``percentiles``; ``attacked``: forgotten and unseen pairs, by draw of new devices."""

    ranked: Int64
    recall: Float64
    ndcg: Float64
    forget_recall: Float64
    percentiles: Float64
    owners: Int64
    item_percentiles: Float64
    attacked: list[tuple[Group, Group]]
    compared: npt.NDArray[np.float16]
    top: npt.NDArray[np.int32]


def _look(scorer: Scorer, scene: Scene) -> _Looked:
    forget, n_items = scene.forget, scene.before.n_items
    withdrawn = np.isin(np.arange(n_items), forget.items)
    evaluator = Evaluator(scene.after, _RANKING, scene.seed, per_user=True)
    controls = _of_users(held_out(scene), forget.affected)
    recalls, places, owners = [np.zeros(0)], [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    item_total = np.zeros(int(withdrawn.sum()))
    new = np.intersect1d(scorer.newcomers, forget.users) if isinstance(scorer, FreshScorer) else np.zeros(0, np.int64)
    draws = scene.settings.fresh_draws if new.size else 1
    attacked: list[list[tuple[Group, Group]]] = [[] for _ in range(draws)]
    scores = [np.zeros((0, int((~withdrawn).sum())), dtype=np.float16)]
    lists = [np.zeros((0, K), dtype=np.int32)]
    block = max(1, scene.settings.chunk_values // n_items)
    for start in range(0, scene.users.size, block):
        users = scene.users[start : start + block]
        shown, raw = _scores(scorer, users, n_items)
        touched = np.flatnonzero(np.isin(users, forget.affected))
        if touched.size:
            who = users[touched]
            mine = raw[touched]
            theirs = mine if raw is shown else shown[touched]
            pairs, retained, unseen = forget.pairs.take(who), scene.after.train.take(who), controls.take(who)
            found, percentiles = rank_pairs(theirs, mine, retained, pairs, withdrawn, K)
            fresh = np.flatnonzero(np.isin(who, new))
            for draw in range(draws):
                if fresh.size:
                    assert isinstance(scorer, FreshScorer)
                    mine = mine.copy()
                    mine[fresh] = scorer.fresh_scores(who[fresh], draw)
                    part = mine[fresh]
                    hidden = np.where(withdrawn, np.float32(-np.inf), part)
                    again = rank_pairs(hidden, part, retained.take(fresh), pairs.take(fresh), withdrawn, K)
                    for place, b in enumerate(fresh):
                        # The mean over the draws, as it grows.
                        share = 1.0 / (draw + 1)
                        found[b] = (1.0 - share) * found[b] + share * again[0][place]
                        percentiles[b] = (1.0 - share) * percentiles[b] + share * again[1][place]
                attacked[draw].append((centred(mine, pairs, who), centred(mine, unseen, who)))
            recalls.append(found)
            places.extend(percentiles)
            owners.extend(np.full(place.size, user) for place, user in zip(percentiles, who, strict=True))
        staying = np.isin(users, scene.staying)
        if withdrawn.any():
            item_total += rank_items(raw[staying], withdrawn)
        sampled = np.isin(users, scene.compared)
        scores.append(standardise(shown[sampled][:, ~withdrawn]))
        lists.append(top_items(shown[sampled], scene.after.train.take(users[sampled]), K))
        tested = staying & (scene.after.test.counts[users] > 0)
        evaluator.add(users[tested], np.ascontiguousarray(shown[tested]))
    ranked = evaluator.per_user()
    nobody = np.zeros(0)
    return _Looked(
        ranked=cast(Int64, ranked["user"]),
        recall=ranked.get(f"test/recall@{K}", nobody).astype(np.float64),
        ndcg=ranked.get(f"test/ndcg@{K}", nobody).astype(np.float64),
        forget_recall=np.concatenate(recalls),
        percentiles=np.concatenate(places),
        owners=np.concatenate(owners),
        item_percentiles=item_total / scene.staying.size if scene.staying.size else np.full(item_total.size, np.nan),
        attacked=[(_join([f for f, _ in fold]), _join([u for _, u in fold])) for fold in attacked],
        compared=np.concatenate(scores),
        top=np.concatenate(lists),
    )


def _scores(scorer: Scorer, users: Int64, n_items: int) -> tuple[Float32, Float32]:
    """What devices rank by, and the same unmasked: one array where the scorer masks nothing."""
    shown = scorer.scores(users)
    raw = scorer.raw_scores(users) if isinstance(scorer, MaskingScorer) else shown
    for scores in (shown, raw):
        if scores.shape != (users.size, n_items):
            raise ValueError(f"a scorer gave scores of shape {scores.shape}, expected {(users.size, n_items)}")
        wrong = np.isnan(scores)
        if wrong.any():
            row, item = np.argwhere(wrong)[0]
            raise RunFailed(
                f"the score of item {item} for user {users[row]} is not a number: unlearning diverged; lower the "
                "strategy's learning rate"
            )
    return shown, raw


def _of_users(table: UserItems, users: Int64) -> UserItems:
    keep = np.isin(table.users, users)
    return UserItems.from_pairs(table.users[keep], table.items[keep], table.n_users)


def _join(groups: list[Group]) -> Group:
    nobody = np.zeros(0, dtype=np.int64)
    scores, users, items = zip(Group(np.zeros(0), nobody, nobody), *groups, strict=True)
    return Group(np.concatenate(scores), np.concatenate(users), np.concatenate(items))
