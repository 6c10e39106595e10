"""A run's guarantee, and what attacks found, in sentences: for the terminal, and for the report's first lines.

Nothing is concluded that ``summary.json`` does not say; a run without a mechanism is said to have none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedrec.experiment.console import number, part


def is_private(summary: Mapping[str, Any]) -> bool:
    """Whether the run says that its result is private: noise everywhere, and noise that nobody can repeat."""
    return part(summary, "privacy").get("private") is True


def guarantee(summary: Mapping[str, Any]) -> str:
    """The guarantee, whom it trusts, what it does not cover; empty for a run without a privacy mechanism."""
    said = part(summary, "privacy")
    if not said:
        return ""
    text = sentence(str(said.get("statement") or "what is guaranteed was not recorded"))
    if not is_private(summary):
        return text
    if said.get("unit") == "interaction" and "user" not in text:
        text += " It is not a guarantee for a user."
    left_out = [str(one) for one in _listed(said.get("not_covered"))]
    return f"{text} Not covered: {'; '.join(left_out)}." if left_out else text


def sentence(text: str) -> str:
    """``text`` with a capital first letter and one full stop."""
    stripped = text.strip().rstrip(".")
    return f"{stripped[:1].upper()}{stripped[1:]}." if stripped else ""


def what_the_server_saw(summary: Mapping[str, Any]) -> str:
    """What an honest-but-curious server had before it, from the run's privacy mode and trust."""
    said = part(summary, "privacy")
    mode, trust = said.get("mode"), str(said.get("trust", ""))
    if not said:
        return "No privacy mechanism: the server saw every device's own upload, as the codec encodes it."
    if mode == "user_dp" and "secure" in trust:
        return "Secure aggregation (simulated): the server saw sums over devices and no single upload."
    if not is_private(summary):
        return "Nothing is guaranteed: the server saw every device's own upload, as the codec encodes it."
    if mode == "user_dp":
        return (
            "The server saw every device's own upload: it is trusted here, and the guarantee is about what leaves it. "
            "privacy.trust=secure_aggregation or privacy=local_dp hide single uploads from it."
        )
    if mode == "local_dp":
        return "The server saw every device's own upload, clipped and noised on the device."
    if mode == "example_dp":
        return (
            "The server saw every device's own update, trained with DP-SGD: single interactions are protected in it, "
            "a user's whole history is not."
        )
    return ""


def areas(summary: Mapping[str, Any]) -> list[tuple[str, float, tuple[float, float] | None]]:
    """(attack, AUC, its 95 % interval where known) of all attacks that have one, of the last recorded round."""
    attacks = part(summary, "attacks")
    found: list[tuple[str, float, tuple[float, float] | None]] = []
    for name, label in (("sign", "items, sign attack"), ("row_set", "items, row set")):
        _add(found, label, part(last(attacks.get("interaction")), name))
    for name, label in (("fold_in", "membership, fold-in"), ("score", "membership, score")):
        _add(found, label, part(attacks, "membership", name))
    for name, label in (("gender", "gender"), ("age_35", "age 35 or over")):
        _add(found, label, part(last(attacks.get("attribute")), name))
    return found


def _add(found: list[tuple[str, float, tuple[float, float] | None]], label: str, entry: Mapping[str, Any]) -> None:
    area, low, high = (number(entry.get(key)) for key in ("auc", "auc_low", "auc_high"))
    if area is not None and math.isfinite(area):
        found.append((label, area, None if low is None or high is None else (low, high)))


def last(found: object) -> Mapping[str, Any]:
    """The entry of the last recorded round."""
    entries = _listed(found)
    return entries[-1] if entries and isinstance(entries[-1], Mapping) else {}


def _listed(value: object) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else []


def attack_line(summary: Mapping[str, Any]) -> str:
    """All attacks of a run in one sentence; empty where none was mounted."""
    attacks = part(summary, "attacks")
    if not attacks:
        return ""
    parts = [f"{label} {area:.2f}" for label, area, _ in areas(summary)]
    text = f"AUC {', '.join(parts)} (0.5 is guessing)" if parts else ""
    singletons = part(last(attacks.get("interaction")), "singletons")
    share = number(singletons.get("row_share"))
    if share is not None:
        text += f"{'; ' if text else ''}rows that a single device touched: {100 * share:.1f} %"
    bound, claimed = audit_bounds(summary)
    if bound is not None:
        said = "none is claimed" if claimed is None else f"claimed {claimed:.3g}"
        text += f"{'; ' if text else ''}audit: epsilon is at least {bound:.2f}, {said}"
        text += ": REFUTED, a fault" if part(attacks, "audit").get("violated") else ""
    return sentence(text)


def audit_bounds(summary: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The audit's lower bound on ε and the claimed ε (None: infinite, or no audit)."""
    audit = part(summary, "attacks", "audit")
    claimed = number(audit.get("claimed_epsilon"))
    return number(audit.get("epsilon_lower_bound")), claimed if claimed is not None and math.isfinite(claimed) else None
