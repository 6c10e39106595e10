"""A run's privacy, from its configuration: what is refused, the plan, and what the summary says of it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clients.example_dp import check_example_dp
from clients.silo import check_silo
from fedrec.algorithms.base import GradientRecommender, Recommender, StatisticsRecommender
from fedrec.errors import ConfigError
from privacy.accountants import Release
from privacy.composition import Unit
from privacy.ledger import Ledger, Subject
from privacy.plan import Federation, PrivacyPlan, make_plan
from privacy.settings import PrivacySettings
from server.guard import Guard
from server.settings import FederationSettings


def read_settings(options: Mapping[str, Any], federation: FederationSettings) -> PrivacySettings | None:
    """The ``privacy`` section, or None without a mechanism.

    Raises:
        ConfigError: settings that do not go together, whatever the algorithm and the data.
    """
    settings = PrivacySettings.from_config(options)
    if settings.mode == "none":
        if federation.rounds == 0:
            raise ConfigError(
                "federation.rounds=0: write a whole number of at least 1; only a privacy budget can decide how many"
            )
        if federation.mode == "silo":
            raise ConfigError(
                "federation.mode=silo: silos train with DP-SGD; write privacy=example_dp (without noise: epsilon=inf)"
            )
        return None
    if federation.mean != "participants":
        raise ConfigError(
            "federation.mean=contributors: how many devices touched an item would be released without noise; write "
            "federation.mean=participants"
        )
    if federation.patience and not settings.noiseless:
        raise ConfigError(
            f"federation.patience={federation.patience}: stopping on validation data releases something of it; write "
            "federation.patience=0"
        )
    _check_rows(settings, federation)
    if settings.mode != "example_dp" and federation.mode == "silo":
        raise ConfigError(f"federation.mode=silo: privacy.mode={settings.mode} guards users; write privacy=example_dp")
    if federation.mode == "silo" and federation.sampler != "all":
        raise ConfigError(
            f"federation.sampler={federation.sampler}: every silo trains in every round, on samples of its "
            "interactions; write federation.sampler=all"
        )
    if settings.mode == "example_dp" and federation.mode == "devices" and settings.optimizer != "lazy":
        raise ConfigError(
            "privacy.optimizer=opacus: Opacus' optimizer runs in silos; write federation.mode=silo, or "
            "privacy.optimizer=lazy"
        )
    return settings


def _check_rows(settings: PrivacySettings, federation: FederationSettings) -> None:
    """Which rows a device uploads is its user's history: no noise on values hides it."""
    padded = settings.mode == "local_dp" and settings.row_set == "padded"
    if settings.row_set == "padded" and not settings.padded_rows:
        raise ConfigError("privacy.padded_rows=0: write how many rows every device sends, for example 400")
    if padded and federation.upload_codec != "touched":
        raise ConfigError(
            f"federation.upload_codec={federation.upload_codec}: padded row sets are sent as rows; write "
            "federation.upload_codec=touched"
        )
    hidden = settings.trust == "secure_aggregation" or padded or settings.noiseless
    if federation.upload_codec != "dense" and not hidden:
        raise ConfigError(
            f"federation.upload_codec={federation.upload_codec}: the rows that a device uploads are its user's "
            "history, and no noise on their values hides them; write federation.upload_codec=dense"
            + (", or privacy.trust=secure_aggregation" if settings.mode == "user_dp" else "")
            + (", or privacy.row_set=padded" if settings.mode == "local_dp" else "")
        )


def check_algorithm(settings: PrivacySettings, algorithm: Recommender, federation: FederationSettings) -> None:
    """ConfigError for an algorithm that the mechanism cannot cover, with the remedy."""
    if algorithm.needs_user_updates:
        raise ConfigError(
            f"privacy.mode={settings.mode}: {algorithm.name} shows the server every user's own update, which no noise "
            "on a sum covers; write algorithm=fedmf"
        )
    if isinstance(algorithm, StatisticsRecommender):
        if settings.mode != "user_dp":
            raise ConfigError(f"privacy.mode={settings.mode}: {algorithm.name} has no local training; privacy=user_dp")
        if algorithm.sensitivity is None:
            raise ConfigError(
                f"privacy.mode=user_dp: nothing bounds what one user adds to {algorithm.name}'s statistics; write "
                "algorithm=fedease_private"
            )
        if settings.adaptive_clipping:
            raise ConfigError("privacy.adaptive_clipping=true: a one-shot method does not clip; write false")
    if isinstance(algorithm, GradientRecommender) and settings.mode == "example_dp":
        if federation.mode == "silo":
            check_silo(algorithm, optimizer=settings.optimizer)
        else:
            check_example_dp(algorithm)
    decaying = [name for name, spec in algorithm.shared.items() if spec.per_item and spec.weight_decay]
    if settings.row_set == "padded" and decaying:
        raise ConfigError(
            f"algorithm.{decaying[0]}_weight_decay: decay changes every row, and a padded row set sends only some; "
            "write 0, or privacy.row_set=dense"
        )


def earlier_releases(settings: PrivacySettings, subject: Subject, unit: Unit) -> list[list[Release]]:
    """What the ledger that ``privacy.ledger`` continues has released of ``unit``.

    Raises:
        ConfigError: no ledger there, a broken chain, or one of other data.
    """
    if settings.ledger is None:
        return [[]]
    ledger = Ledger.read(Path(settings.ledger).expanduser())
    ledger.check_subject(subject)
    return ledger.spent(unit)


def plan_privacy(
    settings: PrivacySettings, algorithm: Recommender, federation: FederationSettings, *, n_interactions: int,
    n_nodes: int, subject: Subject,
) -> PrivacyPlan:  # fmt: skip
    """The plan of a run whose training data has ``n_interactions`` interactions. ConfigError names what must change."""
    spent = earlier_releases(settings, subject, "interaction" if settings.mode == "example_dp" else "user")
    shares = algorithm.budget_shares if isinstance(algorithm, StatisticsRecommender) else None
    facts = Federation(
        subject.users, n_interactions, federation.sampler, federation.fraction, federation.rounds, shares,
        n_nodes if federation.mode == "silo" else 0,
    )  # fmt: skip
    plan = make_plan(settings, facts, spent)
    if plan.silos:
        check_silo(
            algorithm, optimizer=settings.optimizer, expected_batch=plan.expected_batch,
            silo_users=-(-subject.users // plan.silos),
        )  # fmt: skip
    return plan


def device_settings(plan: PrivacyPlan, federation: FederationSettings, seed: int) -> dict[str, Any]:
    """What a workspace tells its nodes of the plan."""
    settings = plan.settings
    found: dict[str, Any] = {
        "mode": federation.mode,
        "noise_seed": settings.noise_seed,
        "padded_rows": settings.padded_rows if settings.row_set == "padded" else 0,
        "privacy_mu": plan.mu if math.isfinite(plan.mu) else None,
    }
    if settings.mode == "example_dp":
        found["local_dp"] = {
            "sample_rate": settings.sample_rate, "steps": settings.steps, "expected_batch": plan.expected_batch,
            "noise_multiplier": plan.noise_multiplier(1),
            "max_grad_norm": None if settings.epsilon == math.inf else settings.max_grad_norm,
            "optimizer": settings.optimizer,
            # Which interactions a step samples is as secret as the noise; the experiment's seed is not.
            "sampling_seed": secrets.randbits(63) if settings.noise_seed is None else seed,
        }  # fmt: skip
    return found


_COVERS = {
    "user_dp": "every view of the shared tensors that was released, in all rounds together",
    "local_dp": "everything that a user's device uploaded, in all rounds together",
    "example_dp": "every update that left a device (a silo), in all rounds together",
}
_NOT_COVERED = (
    "what the simulator itself writes (losses, metrics, timings, private vectors in devices/)",
    "the choice of hyperparameters on this data",
)


def privacy_summary(guard: Guard, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The ``privacy`` section of summary.json."""
    plan, ledger, trust = guard.plan, guard.ledger, guard.trust
    settings = plan.settings
    composed = ledger.finish().get(plan.unit, {})
    ratios = [line["signal_norm"] / line["noise_norm"] for line in lines if line.get("noise_norm")]
    private = plan.private and bool(composed.get("private", False))
    return {
        "mode": settings.mode,
        "unit": plan.unit,
        "epsilon": composed.get("epsilon"),
        "delta": plan.delta,
        "adjacency": plan.adjacency,
        "sampler": plan.sampler,
        "sample_rate": plan.sample_rate,
        "accountant": composed.get("accountant", plan.accountant),
        "note": composed.get("note"),
        "noise_multiplier": plan.accounted_multiplier(1),
        "noise_multipliers": list(plan.accounted),
        "max_grad_norm": settings.max_grad_norm,
        "releases": composed.get("releases", 0),
        "trust": trust,
        "private": private,
        "statement": _statement(plan, composed, trust),
        "covers": _COVERS[settings.mode] if private else None,
        "not_covered": list(_NOT_COVERED) + _row_set_caveat(settings),
        "signal_to_noise": sum(ratios) / len(ratios) if ratios else None,
        "row_set": settings.row_set if settings.mode == "local_dp" else None,
        "optimizer": settings.optimizer if settings.mode == "example_dp" else None,
    }


def _row_set_caveat(settings: PrivacySettings) -> list[str]:
    if settings.mode == "local_dp" and settings.row_set == "padded":
        return ["the set of uploaded rows, in which the own rows are hidden among decoys only"]
    return []


def _statement(plan: PrivacyPlan, composed: Mapping[str, Any], trust: str) -> str:
    """The guarantee in words, or why there is none."""
    if not composed:
        return "no differential privacy: no noise was added"
    text = f"{composed['statement'].rstrip('.')}. "
    if plan.unit == "interaction":
        text += "It protects single interactions and is no guarantee for a user. "
    return f"{text}Trusted: {trust}."
