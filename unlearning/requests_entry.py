"""One entry of a request file, checked as far as it can be without the data. The format is in ``requests``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Any, Literal, cast

from fedrec.errors import ConfigError
from unlearning.requests_values import hint, id_list, is_list, moment, number, one_id, pair_list, share, shown
from unlearning.selection import POLICIES, Policy
from unlearning.strategies.base import KINDS, Kind

WrittenKind = Literal["user", "item", "interaction", "user_item", "rejoin"]
ANSWER_WITHIN = timedelta(days=30)  # GDPR article 12(3): one month

_COMMON = ("id", "kind", "at_round", "received", "deadline", "reason")
_FRACTION = ("fraction", "policy")
_KEYS: dict[str, tuple[str, ...]] = {  # ids first, then what a selection may use
    "user": ("users", *_FRACTION, "attribute"),
    "item": ("items", *_FRACTION, "genre"),
    "interaction": ("pairs", *_FRACTION, "genre", "attribute"),
    "user_item": ("users", "items", *_FRACTION, "genre", "attribute"),
    "rejoin": ("users", "of", "share"),
}
_EVERY = tuple(dict.fromkeys((*_COMMON, *(key for keys in _KEYS.values() for key in keys))))


@dataclass(frozen=True)
class Entry:
    """A request as written, times filled in. Ids are the data set's own, as text; ``at_round`` None: after training.

    ``where`` is what errors call it. ``fraction`` None: all of what a sensitive policy names. ``attribute`` has the
    accepted values of each attribute. ``of`` names the request whose users come back, ``share`` how much of their
    history comes with them.
    """

    where: str
    position: int
    id: str
    kind: WrittenKind
    users: tuple[str, ...] = ()
    items: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    policy: Policy | None = None
    fraction: float | None = None
    genre: str | None = None
    attribute: tuple[tuple[str, tuple[str, ...]], ...] = ()
    of: str | None = None
    share: float = 1.0
    at_round: int | None = None
    received: datetime = datetime.min
    deadline: datetime = datetime.max
    reason: str = ""

    @property
    def rejoin(self) -> bool:
        return self.kind == "rejoin"

    @property
    def forgets(self) -> Kind:
        """The kind of its subjects: users, for a rejoin."""
        return cast(Kind, "user" if self.rejoin else self.kind)


def parse_entries(label: str, raw: Sequence[Any], *, rounds: int, now: datetime) -> tuple[Entry, ...]:
    """The entries of a source called ``label``, in the order written.

    Raises:
        ConfigError: an unknown key, kind or policy (with the nearest known one), a missing or superfluous key, a value
            of the wrong type or out of range, an id used twice; the message names entry, key, value and remedy.
    """
    entries: list[Entry] = []
    for position, mapping in enumerate(raw, start=1):
        entry = _parse(f"{label}, entry {position}", position, mapping, rounds, now)
        for other in entries:
            if other.id == entry.id:
                raise ConfigError(
                    f"{entry.where}: the id is taken by entry {other.position}; give every request an id of its own"
                )
        entries.append(entry)
    return tuple(entries)


def _parse(where: str, position: int, mapping: Any, rounds: int, now: datetime) -> Entry:
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: must be a mapping with the keys id and kind, got {shown(mapping)}")
    given = {str(key): value for key, value in mapping.items() if value is not None}
    if "id" not in given:
        raise ConfigError(f"{where}: id is missing; give every request an id of its own, for example id: r{position}")
    name = one_id(where, "id", given["id"])
    if len(name) > 64 or not name.isprintable():
        raise ConfigError(f"{where}: id={shown(name)}: write 1 to 64 printable characters")
    where = f"{where} (id {name})"
    for key in given:
        if key not in _EVERY:
            raise ConfigError(f"{where}: {key}: no such key; {hint(key, _EVERY)}")
    kinds = (*KINDS, "rejoin")
    if "kind" not in given:
        raise ConfigError(f"{where}: kind is missing; write one of {', '.join(kinds)}")
    kind = given["kind"]
    if kind not in kinds:
        raise ConfigError(f"{where}: kind={shown(kind)}: no such kind; {hint(shown(kind), kinds)}")
    for key in given:
        if key not in _COMMON and key not in _KEYS[kind]:
            fitting = [other for other, keys in _KEYS.items() if key in keys]
            raise ConfigError(
                f"{where}: {key} does not belong to kind {kind}, which takes {', '.join(_KEYS[kind])}; "
                f"leave it out, or write kind: {' or '.join(fitting)}"
            )
    received, deadline = _times(where, given, now)
    subjects = _returning(where, given) if kind == "rejoin" else _subjects(where, given, kind)
    reason = given.get("reason", "")
    if not isinstance(reason, str):
        raise ConfigError(f"{where}: reason={shown(reason)}: write text, in quotes")
    return Entry(
        where=where,
        position=position,
        id=name,
        kind=kind,
        at_round=_at_round(where, given["at_round"], rounds) if "at_round" in given else None,
        received=received,
        deadline=deadline,
        reason=reason,
        **subjects,
    )


def _subjects(where: str, given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Whom and what it is about: ids, or a selection."""
    lists = [key for key in _KEYS[kind] if key in ("users", "items", "pairs")]
    selection = [key for key in (*_FRACTION, "genre", "attribute") if key in given]
    listed = [key for key in lists if key in given]
    wanted = " and ".join(lists)
    if listed and selection:
        raise ConfigError(
            f"{where}: {listed[0]} and {selection[0]} exclude each other; write ids, or a fraction with a policy"
        )
    if listed:
        if len(listed) < len(lists):
            missing = next(key for key in lists if key not in given)
            raise ConfigError(
                f"{where}: {missing} is missing; kind {kind} takes {wanted}, or write kind: {listed[0][:-1]}"
            )
        return {
            key: pair_list(where, given[key]) if key == "pairs" else id_list(where, key, given[key]) for key in lists
        }
    if not selection:
        raise ConfigError(f"{where}: forgets nothing; write {wanted}, or fraction with policy")
    policy = given.get("policy", "random")
    if policy not in POLICIES:
        raise ConfigError(f"{where}: policy={shown(policy)}: no such policy; {hint(shown(policy), POLICIES)}")
    named: dict[str, Any] = {"policy": policy}
    for key in ("genre", "attribute"):
        if key in given and policy != "sensitive":
            raise ConfigError(f"{where}: {key} belongs to policy: sensitive, not to {policy}; write policy: sensitive")
    if policy == "sensitive":
        named |= _sensitive(where, given, kind)
    elif "fraction" not in given:
        raise ConfigError(f"{where}: fraction is missing; write for example fraction: 0.05")
    if "fraction" in given:
        # All of what a sensitive policy names may be forgotten; all users, items or interactions may not.
        named["fraction"] = share(where, "fraction", given["fraction"], whole=policy == "sensitive")
    return named


def _sensitive(where: str, given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    needed = {"user": ("attribute",), "item": ("genre",), "user_item": ("attribute", "genre"), "interaction": ()}[kind]
    for key in needed:
        if key not in given:
            example = "genre: Horror" if key == "genre" else "attribute: {gender: F}"
            raise ConfigError(f"{where}: {key} is missing; policy sensitive of kind {kind} needs it: {example}")
    if "genre" not in given and "attribute" not in given:
        raise ConfigError(
            f"{where}: policy=sensitive needs what is sensitive; write genre: Horror or attribute: {{gender: F}}"
        )
    named: dict[str, Any] = {}
    if "genre" in given:
        named["genre"] = one_id(where, "genre", given["genre"])
    if "attribute" in given:
        attribute = given["attribute"]
        if not isinstance(attribute, Mapping) or not attribute:
            raise ConfigError(
                f"{where}: attribute={shown(attribute)}: write a name and a value, attribute: {{gender: F}}"
            )
        named["attribute"] = tuple(
            (str(key), id_list(where, f"attribute.{key}", value if is_list(value) else [value]))
            for key, value in attribute.items()
        )
    return named


def _returning(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if ("users" in given) == ("of" in given):
        raise ConfigError(
            f"{where}: write who comes back, either users: [ids] or of: the id of the request that forgot them"
        )
    named: dict[str, Any] = {"share": share(where, "share", given.get("share", 1.0), whole=True)}
    if "of" in given:
        return named | {"of": one_id(where, "of", given["of"])}
    return named | {"users": id_list(where, "users", given["users"])}


def _times(where: str, given: Mapping[str, Any], now: datetime) -> tuple[datetime, datetime]:
    received = moment(where, "received", given["received"], time.min) if "received" in given else now
    if received > now:
        raise ConfigError(
            f"{where}: received={given['received']} lies in the future (now is {now:%Y-%m-%d %H:%M %Z}, and times "
            "without a zone are UTC); leave it out for now"
        )
    if "deadline" not in given:
        deadline, text = received + ANSWER_WITHIN, f"{ANSWER_WITHIN.days} days after received={given.get('received')}"
    else:
        deadline, text = moment(where, "deadline", given["deadline"], time(23, 59, 59)), str(given["deadline"])
    if deadline < received:
        raise ConfigError(
            f"{where}: deadline={text} is before received={given.get('received', now)}; write a later deadline"
        )
    if deadline < now:
        raise ConfigError(
            f"{where}: deadline={text} is in the past (now is {now:%Y-%m-%d %H:%M %Z}); write a later deadline, or "
            f"leave received and deadline out ({ANSWER_WITHIN.days} days from now)"
        )
    return received, deadline


def _at_round(where: str, value: Any, rounds: int) -> int:
    count = number(value, int)
    if count is None:
        raise ConfigError(
            f"{where}: at_round={shown(value)}: write a whole number of rounds, or leave it out (after training)"
        )
    if not 1 <= count <= rounds:
        raise ConfigError(
            f"{where}: at_round={value}: the run has rounds 1 to {rounds}; write one of these, leave it out (after "
            "training), or raise federation.rounds"
        )
    return int(count)
