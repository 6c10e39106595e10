"""What of a retained history a re-ranker is shown: all of it, the latest items, or a quota per genre.

The quota is CRAGRU's "user preference-based" retrieval (arXiv 2511.05494): genres are represented in the shown items as
they are in the whole history. Largest remainders (Hamilton's method) make whole numbers of the shares.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, get_args

from unlearning.rerankers.base import Catalogue, Int64

Retrieve = Literal["quota", "recent", "all"]
RETRIEVE: tuple[str, ...] = get_args(Retrieve)
NO_GENRE = "(no genre)"


def retrieve(history: Int64, how: str, length: int, catalogue: Catalogue) -> Int64:
    """The items of ``history`` (int64 codes, oldest first) that are shown, oldest first; at most ``length`` of them
    unless ``how`` is ``all``. A ``quota`` needs ``catalogue.genres``."""
    if how == "all" or history.size <= length:
        return history
    if how == "recent":
        return history[history.size - length :]
    assert catalogue.genres is not None, "checked before"
    return history[_by_quota([catalogue.genres[item] or (NO_GENRE,) for item in history], length)]


def quotas(genres: Sequence[tuple[str, ...]], length: int) -> dict[str, int]:
    """How many of ``length`` places each genre gets; an item with several genres is shared between them equally."""
    share: defaultdict[str, float] = defaultdict(float)
    for names in genres:
        for name in names:
            share[name] += length / (len(genres) * len(names))
    whole = {name: math.floor(value + 1e-9) for name, value in share.items()}
    by_remainder = sorted(share, key=lambda name: (whole[name] - share[name], name))
    for name in by_remainder[: max(0, length - sum(whole.values()))]:
        whole[name] += 1
    return whole


def _by_quota(genres: Sequence[tuple[str, ...]], length: int) -> list[int]:
    """Positions, ascending: largest quota first, every genre's latest items that no other genre has taken."""
    places = quotas(genres, length)
    latest_first = range(len(genres) - 1, -1, -1)
    chosen: set[int] = set()
    for name in sorted(places, key=lambda genre: (-places[genre], genre)):
        of_genre = [at for at in latest_first if name in genres[at] and at not in chosen]
        chosen.update(of_genre[: places[name]])
    # Genres that share their items with others may not fill their places.
    chosen.update([at for at in latest_first if at not in chosen][: length - len(chosen)])
    return sorted(chosen)
