"""A request in words that name nobody: no ids, only how many, of which group, chosen how."""

from __future__ import annotations

from unlearning.requests_entry import Entry


def selector(entry: Entry, returning: int = 0) -> str:
    """``5 % of users, core``, ``3 users``, ``2 users and 1 item``, ``interactions with Horror items``."""
    if entry.rejoin:
        back = f"{count(returning, 'user')} {'comes' if returning == 1 else 'come'} back"
        return back if entry.share == 1.0 else f"{back} with the latest {percent(entry.share)} of their history"
    if entry.policy is None:
        listed = [(entry.users, "user"), (entry.items, "item"), (entry.pairs, "interaction")]
        return " and ".join(count(len(ids), what) for ids, what in listed if ids)
    part = "" if entry.fraction is None or entry.fraction == 1.0 else f"{percent(entry.fraction)} of "
    if entry.policy == "sensitive":
        return part + _group(entry)
    nouns = {"user": "users", "item": "items", "interaction": "interactions", "user_item": "users and of items"}
    return f"{part}{nouns[entry.kind]}, {entry.policy}"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def _group(entry: Entry) -> str:
    who = " and ".join(f"{name} {' or '.join(values)}" for name, values in entry.attribute)
    users, items = f"users with {who}", f"{entry.genre} items"
    if entry.kind == "user":
        return users
    if entry.kind == "item":
        return items
    if entry.kind == "user_item":
        return f"{users} and of {items}" if entry.fraction not in (None, 1.0) else f"{users} and {items}"
    words = "interactions"
    if entry.genre is not None:
        words += f" with {items}"
    return f"{words} of {users}" if entry.attribute else words
