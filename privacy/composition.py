"""What the entries of a ledger add up to, unit by unit, and how to say it.

Entries of one unit compose. A ``group`` (a device, a silo) holds interactions that no other group holds, so one
interaction is touched by the entries of its own group and by those of no group: groups compose in parallel, and the
worst one counts. Units are never mixed: an epsilon for one interaction says next to nothing about a user.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from privacy.accountants import Epsilon, Release, epsilon
from privacy.calibration import cached_epsilon

Unit = Literal["user", "interaction"]
Kind = tuple[str, float, float, str, str]  #: sampler, sample rate, noise multiplier, adjacency, trust
Mechanism = tuple[float, float]  #: noise multiplier, sample rate


@dataclass
class Spending:
    """The releases about one unit: how many steps of each kind, in each group (None: they concern every group)."""

    groups: dict[str | None, Counter[Kind]] = field(default_factory=dict)

    def add(self, group: str | None, kind: Kind, steps: int) -> None:
        self.groups.setdefault(group, Counter())[kind] += steps

    def worst(self) -> list[list[Release]]:
        """The groups' releases, without those groups that went through no more than another one; never empty."""
        distinct = self._counts()
        kept = [one for one in distinct if not any(one is not other and one <= other for other in distinct)]
        return [_listed(one) for one in kept]

    def _counts(self) -> list[Counter[Mechanism]]:
        """How often an interaction (or user) of each group met each mechanism, equal groups once."""
        found: dict[frozenset[tuple[Mechanism, int]], Counter[Mechanism]] = {}
        named: list[str | None] = [group for group in self.groups if group is not None]
        for group in named or [None]:
            count: Counter[Mechanism] = Counter()
            for part in (None,) if group is None else (None, group):
                for (_, rate, sigma, _, _), steps in self.groups.get(part, Counter()).items():
                    count[sigma, rate] += steps
            found[frozenset(count.items())] = count
        return list(found.values())

    @property
    def count(self) -> int:
        """Releases (steps) that the group with the most of them went through."""
        return max(sum(one.steps for one in releases) for releases in self.worst())

    def composed(self, delta: float, accountant: str) -> Epsilon:
        """The epsilon of the worst group; sampled releases are looked up in, or enter, the calibration cache."""
        found = [cached_epsilon(releases, delta, accountant) for releases in self.worst()]
        return max(found, key=lambda one: one.value)

    def bounded(self, delta: float) -> Epsilon:
        """An upper bound at once: as if every release had concerned everybody, which needs no accountant."""
        everybody = [[Release(one.noise_multiplier, 1.0, one.steps) for one in group] for group in self.worst()]
        found = max((epsilon(releases, delta) for releases in everybody), key=lambda one: one.value)
        if not any(kind[1] < 1.0 for kinds in self.groups.values() for kind in kinds):
            return found
        note = "an upper bound that ignores sampling; the accountant's value follows when the run ends"
        return Epsilon(found.value, delta, "gaussian", found.note or note)

    def summary(self, unit: str, spent: Epsilon, fault: str | None) -> dict[str, Any]:
        """The composed result as the file and the reports show it. ``fault``: why there is no privacy at all."""
        kinds = [kind for counter in self.groups.values() for kind in counter]
        return {
            "epsilon": spent.value if math.isfinite(spent.value) else None,
            "delta": spent.delta,
            "accountant": spent.accountant,
            "note": spent.note,
            "private": fault is None,
            "releases": self.count,
            "trust": sorted({kind[4] for kind in kinds}),
            "statement": _statement(unit, spent, fault, self, kinds),
        }


def _statement(unit: str, spent: Epsilon, fault: str | None, spending: Spending, kinds: list[Kind]) -> str:
    if fault is not None or not math.isfinite(spent.value):
        return f"no differential privacy for one {unit}: {fault or spent.note}"
    named = len([group for group in spending.groups if group is not None])
    count = spending.count
    how = {"gaussian": "exact Gaussian composition", "prv": "PRV accountant", "rdp": "RDP accountant"}[spent.accountant]
    if spent.accountant == "gaussian" and any(kind[1] < 1.0 for kind in kinds):
        how = "an upper bound that ignores sampling"
    parts = [
        f"({_up(spent.value)}, {_up(spent.delta, 2)})-differential privacy for one {unit} ({_neighbours(kinds)})",
        _sampling(kinds),
        f"{count} release{'s' if count != 1 else ''}" + (f" in each of {named} disjoint groups" if named > 1 else ""),
        how,
    ]
    return ", ".join(parts)


def _neighbours(kinds: list[Kind]) -> str:
    """A release safe against replacing a unit is as safe against adding or removing it, not the other way round."""
    replace = all(kind[3].startswith("replace") for kind in kinds)
    return "replace" if replace else "add or remove"


def _sampling(kinds: list[Kind]) -> str:
    rates = sorted({kind[1] for kind in kinds if kind[1] < 1.0})
    if not rates:
        return "everyone in every release"
    shown = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    some = "" if all(kind[1] < 1.0 for kind in kinds) else " of some releases, everyone in the others"
    return f"Poisson sampling at {shown}{some}"


def _up(value: float, digits: int = 3) -> str:
    """Rounded to so many digits, upwards: what is printed must not be less than what was spent."""
    if value == 0.0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return f"{math.ceil(value / unit * (1.0 - 1e-12)) * unit:.{digits}g}"


def _listed(counts: Counter[Mechanism]) -> list[Release]:
    return [Release(sigma, rate, steps) for (sigma, rate), steps in counts.items()]
