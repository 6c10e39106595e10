"""What an item is called: the public texts that a re-ranker compares."""

from __future__ import annotations

from collections.abc import Sequence

from fedrec.data.interactions import Interactions
from fedrec.errors import ConfigError
from unlearning.rerankers.base import Catalogue

UNTITLED = "untitled"


def item_texts(data: Interactions) -> tuple[list[str], list[list[str]] | None] | None:
    """A text per item code, "Title (year)" as far as known, and its genres; None when the data set has no titles.

    A single item without a title is called "untitled"; the second part is None when no item has genres.
    """
    table = data.item_table
    if table is None or "title" not in table.columns or table["title"].null_count() == table.height:
        return None
    titles = [str(title or "").strip() or UNTITLED for title in table["title"].to_list()]
    years = table["year"].to_list() if "year" in table.columns else [None] * len(titles)
    texts = [title if year is None else f"{title} ({year})" for title, year in zip(titles, years, strict=True)]
    genres = [list(row or []) for row in table["genres"].to_list()] if "genres" in table.columns else None
    return texts, genres if genres and any(genres) else None


def catalogue(texts: Sequence[str] | None, genres: Sequence[Sequence[str]] | None, where: str) -> Catalogue:
    """The catalogue of a data set whose items have texts.

    Raises:
        ConfigError: they have none; ``where`` names the strategy.
    """
    if texts is None:
        raise ConfigError(
            f"{where}: it compares item texts, and this data set has no titles; take one that has "
            "(dataset=ml-100k, say), give dataset=file an item table with a column title, or choose another strategy"
        )
    return Catalogue(tuple(texts), None if genres is None else tuple(tuple(row) for row in genres))
