"""What the gates ask for. Any threshold may be null: the number is then reported and never fails."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from unlearning.strategies.base import Kind
from unlearning.verification.scene import FromConfig, require_number


@dataclass(frozen=True)
class Thresholds(FromConfig):
    """Limits relative to the golds: models retrained without the data, with other seeds.

    Attributes:
        forget_recall_sds: forget Recall@20 ≤ gold mean + so many standard deviations.
        retain_recall, retain_ndcg, bystander_ndcg: at least this share of gold.
        mia_auc, fold_in_auc: |AUC − gold| at most.
        fold_in_percentile: |mean percentile after folding in − gold| at most, judged where the deleted users have
            too few held-out items for the AUC.
        percentile_pairs, percentile_items: |mean percentile − gold| at most, of forgotten pairs and withdrawn items.
        time_interaction, time_user, time_user_item, time_item: CPU seconds as a share of retraining.
        traffic: bytes as a share of retraining.
        distance: distance to the golds at most so many times the distance between golds.
        relearn_share: rounds to relearn what was forgotten, at least this share of gold's.
        seed_sds: no limit is tighter than so many standard deviations of the golds' own seed noise, for a retrained
            model has to pass; 0 takes every limit as it is written.
        min_pairs: with fewer forgotten interactions forget Recall@20 may exceed its limit by one of them.
    """

    forget_recall_sds: float | None = 2.0
    retain_recall: float | None = 0.97
    retain_ndcg: float | None = 0.96
    mia_auc: float | None = 0.02
    fold_in_auc: float | None = 0.03
    fold_in_percentile: float | None = 0.02
    percentile_pairs: float | None = 0.10
    percentile_items: float | None = 0.05
    bystander_ndcg: float | None = 0.95
    time_interaction: float | None = 0.15
    time_user: float | None = 0.30
    time_user_item: float | None = 0.30
    time_item: float | None = 0.01
    traffic: float | None = None
    distance: float | None = None
    relearn_share: float | None = 0.5
    seed_sds: float = 2.0
    min_pairs: int = 50

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None or field.name in ("seed_sds", "min_pairs"):
                require_number(field.name, value, 0.0)

    def time(self, kinds: Iterable[Kind]) -> float | None:
        """The share of retraining's time that a batch of these kinds may take: the most generous of them."""
        shares = {
            "interaction": self.time_interaction,
            "user": self.time_user,
            "user_item": self.time_user_item,
            "item": self.time_item,
        }
        asked = [shares[kind] for kind in kinds]
        known = [share for share in asked if share is not None]
        return max(known) if known and len(known) == len(asked) else None
