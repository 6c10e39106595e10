"""``attack=…``: which attacks a run mounts on itself, and what they find.

The mathematics is in ``privacy.attacks``, as pure functions on recorded views; here a run decides whom to watch, who is
kept out of the data as a non-member, and what the server can see at all under the run's privacy mode.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedrec import random
from fedrec.algorithms.base import Recommender
from fedrec.data import Interactions
from fedrec.data.filters import without_users
from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from fedrec.errors import ConfigError, DataError
from privacy.attacks.aggregate import link_report, link_rows, singletons
from privacy.attacks.attribute import age_labels, gender_labels, infer_attribute, row_features, score_features
from privacy.attacks.audit import CanaryAudit
from privacy.attacks.interaction import Guess, from_rows, report, sign_attack, without_decay
from privacy.attacks.membership import by_fold_in, by_score, choose_nonmembers, membership_report
from privacy.attacks.views import UserView
from privacy.plan import PrivacyPlan
from server.outcome import Outcome
from server.watch import Watch, Watched

Int64 = npt.NDArray[np.int64]
_NO_CLAIM = "the audit tests a claimed epsilon of a user, and this run claims none"
KINDS = ("interaction", "membership", "attribute", "audit")


@dataclass(frozen=True)
class AttackSettings:
    """Keys of ``configs/attack``."""

    kinds: tuple[str, ...] = ()
    users: int = 400
    rounds: tuple[int, ...] = (1, -1)
    holdout: float = 0.1
    holdout_seed: int = 0
    canaries: int = 200

    @classmethod
    def from_config(cls, options: Mapping[str, Any]) -> AttackSettings:
        """Settings from the group's keys; ConfigError for what is unknown or out of range."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise ConfigError(
                    f"attack.{key}: no such setting; "
                    + (f"did you mean attack.{near[0]}?" if near else f"there are {', '.join(known)}")
                )
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
        found = cls(**values)
        for kind in found.kinds:
            if kind not in KINDS:
                raise ConfigError(f"attack.kinds: {kind} is none of {', '.join(KINDS)}")
        if found.users < 1:
            raise ConfigError(f"attack.users={found.users}: write how many users' uploads are recorded, 1 or more")
        if not all(isinstance(number, int) and (number >= 1 or number == -1) for number in found.rounds):
            raise ConfigError(f"attack.rounds={list(found.rounds)}: write round numbers from 1, or -1 for the last")
        if not 0.0 < found.holdout < 1.0:
            raise ConfigError(f"attack.holdout={found.holdout}: write a share of the users between 0 and 1")
        if found.canaries < 8:
            raise ConfigError(f"attack.canaries={found.canaries}: so few coins refute nothing; write 100 or more")
        return found

    @property
    def watches(self) -> bool:
        """Whether uploads of single users are recorded."""
        return "interaction" in self.kinds or "attribute" in self.kinds


def hold_out(settings: AttackSettings, data: Interactions) -> tuple[Interactions, Int64]:
    """The data that is trained on, and the users that were kept out of it as non-members: the same for every seed."""
    if "membership" not in settings.kinds:
        return data, np.zeros(0, dtype=np.int64)
    users = choose_nonmembers(data.n_users, settings.holdout, settings.holdout_seed)
    kept = without_users(data, users)
    note = f"{users.size} of {data.n_users} users are held out of the data as non-members (attack=membership)"
    return dataclasses.replace(kept, notes=(*kept.notes, note)), users


def make_watch(settings: AttackSettings, algorithm: Recommender, split: Split, seed: int, rounds: int) -> Watch | None:
    """Whose uploads are recorded, and when; None when no attack needs them."""
    if not settings.watches:
        return None
    candidates = np.flatnonzero(split.train.counts > 0)
    key = random.stream(seed, "watched")
    chosen = candidates[random.sample_without_replacement(key, candidates.size, min(settings.users, candidates.size))]
    tensor = next((name for name, spec in algorithm.shared.items() if spec.per_item), None)
    return Watch(chosen, {number if number > 0 else rounds for number in settings.rounds}, tensor)


def make_audit(settings: AttackSettings, plan: PrivacyPlan | None, seed: int) -> CanaryAudit | None:
    """The canaries of a one-run audit.

    Raises:
        ConfigError: no user-level mechanism that could be audited.
    """
    if "audit" not in settings.kinds:
        return None
    if plan is None or plan.settings.mode != "user_dp":
        if settings.kinds != ("audit",):
            return None  # one of several attacks: run_attacks says why it was left out
        raise ConfigError(f"attack.kinds=[audit]: {_NO_CLAIM}; write privacy=user_dp, or another attack")
    return CanaryAudit(settings.canaries, plan.sample_rate, plan.settings.noise_seed and seed)


@dataclass(frozen=True)
class Scene:
    """What the attacks of a finished run look at. ``outsiders`` are the histories of the users that were held out."""

    algorithm: Recommender
    split: Split
    data: Interactions
    outcome: Outcome
    outsiders: UserItems
    seed: int
    plan: PrivacyPlan | None


def run_attacks(
    settings: AttackSettings, scene: Scene, watch: Watch | None, audit: CanaryAudit | None, epsilon: float | None
) -> dict[str, Any]:
    """The ``attacks`` section of summary.json: one entry per kind, or why it cannot be mounted."""
    found: dict[str, Any] = {}
    if "interaction" in settings.kinds and watch is not None:
        found["interaction"] = [_interaction(scene, seen) for seen in watch.seen]
    if "membership" in settings.kinds:
        found["membership"] = _membership(scene)
    if "attribute" in settings.kinds and watch is not None:
        found["attribute"] = [_attribute(scene, seen) for seen in watch.seen]
    if "audit" in settings.kinds:
        found["audit"] = _audit(audit, scene.plan, epsilon)
    return found


def _audit(audit: CanaryAudit | None, plan: PrivacyPlan | None, epsilon: float | None) -> dict[str, Any]:
    if audit is None or plan is None:
        return {"skipped": _NO_CLAIM}
    if not audit.rounds:
        return {"skipped": "no round was released"}
    return _plain(audit.result(plan.delta, math.inf if epsilon is None else epsilon))


def _hidden(scene: Scene) -> bool:
    return scene.plan is not None and scene.plan.settings.trust == "secure_aggregation"


def upload_noise(plan: PrivacyPlan | None, algorithm: Recommender, round_number: int) -> float:
    """Standard deviation of the noise on each value of one device's upload of an item row: public, like all of a
    mechanism."""
    if plan is None or plan.settings.mode == "user_dp" or plan.settings.noiseless:
        return 0.0
    deviation = plan.noise_multiplier(round_number) * plan.sensitivity_factor * plan.settings.max_grad_norm
    if plan.settings.mode == "local_dp":
        return deviation
    spec = next(spec for spec in algorithm.shared.values() if spec.per_item)
    rates = np.array([spec.rate(round_number - 1, step) for step in range(plan.steps)])
    return float(np.sqrt((rates**2).sum())) * deviation / plan.expected_batch


def _views(seen: Watched) -> list[UserView]:
    whole = next((value.flatten(1).numpy() for value in seen.view.values() if value.ndim > 1), None)
    return [
        UserView(user, seen.round, rows.astype(np.int32), without_decay(values.astype(np.float32), rows, whole))
        for user, (rows, values) in sorted(seen.uploads.items())
    ]


def _guesses(scene: Scene, seen: Watched) -> dict[str, list[Guess]]:
    popularity = np.bincount(scene.split.train.items, minlength=scene.split.n_items)
    noise = upload_noise(scene.plan, scene.algorithm, seen.round)
    typical = max(1, round(float(scene.split.train.counts.mean()))) if noise else None
    views = [view for view in _views(seen) if view.rows.size]
    found = {"row_set": [from_rows(view) for view in views]}
    if views and views[0].values.shape[1] > 1:
        found["sign"] = [sign_attack(view, popularity, noise=noise, typical=typical) for view in views]
    return found


def _interaction(scene: Scene, seen: Watched) -> dict[str, Any]:
    result: dict[str, Any] = {"round": seen.round}
    if not _hidden(scene):
        for name, guesses in _guesses(scene, seen).items() if seen.uploads else ():
            truths = [scene.split.train.row(guess.user) for guess in guesses]
            result[name] = report(guesses, truths, scene.split.n_items)
        if not seen.uploads:
            result["skipped"] = "this round's uploads have no row of an item"
    else:
        result["hidden"] = "secure aggregation: the server sees no single upload"
    if _hidden(scene) and seen.row_sets:
        rows = _ragged([seen.row_sets[user] for user in sorted(seen.row_sets)])
        alone = singletons(rows)
        result["singletons"] = {
            "participants": len(seen.row_sets), "row_share": alone.row_share, "user_share": alone.user_share,
            # Every row of a noisy sum carries noise: which rows were touched, and by how many, cannot be seen.
            "visible": scene.plan is None or scene.plan.settings.noiseless,
        }  # fmt: skip
        total = seen.total
        if total is not None and total.shape[1] > 1:
            result["linked"] = link_report(link_rows(total), alone)
    return _plain(result)


def _ragged(rows: Sequence[npt.NDArray[np.int32]]) -> UserItems:
    pointers = np.concatenate([[0], np.cumsum([row.size for row in rows])]).astype(np.int64)
    return UserItems(pointers, np.concatenate(rows).astype(np.int32))


def _membership(scene: Scene) -> dict[str, Any]:
    shared = scene.outcome.best_shared or scene.outcome.final_shared
    members = scene.split.train
    wanted = max(5 * scene.outsiders.n_users, 200)
    if members.n_users > wanted:
        key = random.stream(scene.seed, "attacked members")
        members = members.take(random.sample_without_replacement(key, members.n_users, wanted))
    found: dict[str, Any] = {}
    for name, score in (("fold_in", by_fold_in), ("score", by_score)):
        inside = score(scene.algorithm, shared, members, scene.seed)
        # The same purpose, another address: members and outsiders must not share initial vectors.
        outside = score(scene.algorithm, shared, scene.outsiders, scene.seed + 1)
        found[name] = membership_report(inside, outside)
    return _plain(found)


def _attribute(scene: Scene, seen: Watched) -> dict[str, Any]:
    result: dict[str, Any] = {"round": seen.round}
    if _hidden(scene):
        return result | {"hidden": "secure aggregation: the server sees no single upload"}
    guesses = _guesses(scene, seen)
    best = guesses.get("sign", guesses["row_set"])
    if not best:
        return result | {"skipped": "no upload was recorded"}
    users = np.asarray([guess.user for guess in best])
    if not upload_noise(scene.plan, scene.algorithm, seen.round):
        features = row_features(_ragged([guess.items for guess in best]), scene.split.n_items)
    else:
        features = score_features(best, scene.split.n_items)
    labels: dict[str, Callable[[Any], Any]] = {"gender": gender_labels, "age_35": age_labels}
    for name, read in labels.items():
        try:
            known, label = read(scene.data.user_table)
            here = known[users]
            found = infer_attribute(features[here], label[users][here], scene.seed)
        except DataError as error:
            result[name] = {"skipped": str(error)}
        else:
            result[name] = {
                "auc": found.area.auc, "auc_low": found.area.low, "auc_high": found.area.high, "users": found.users,
                "positives": found.positives,
            }  # fmt: skip
    return _plain(result)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Python's own numbers, for JSON."""
    return {
        key: _plain(inner) if isinstance(inner, Mapping) else inner.item() if isinstance(inner, np.generic) else inner
        for key, inner in value.items()
    }
