"""The seam between a re-ranker and the filter that asks it: questions without names, answers that may be refusals."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt

from fedrec.errors import ConfigError

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Catalogue:
    """What is publicly known of the items, by item code: a text (title and year) and, where the source has them,
    genres."""

    texts: tuple[str, ...]
    genres: tuple[tuple[str, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.genres is not None and len(self.genres) != len(self.texts):
            raise ValueError(f"{len(self.genres)} rows of genres for {len(self.texts)} item texts")


@dataclass(frozen=True)
class Question:
    """One device's list: int64 item codes of its retained history (oldest first, at least one) and of its candidates
    (best first). It does not say whose."""

    history: Int64
    candidates: Int64


@dataclass(frozen=True)
class Usage:
    """What answers cost: requests sent (retries included), tokens as the endpoint counted them, bytes sent."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    sent_bytes: int = 0

    def __add__(self, other: Usage) -> Usage:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Usage(*(mine + yours for mine, yours in pairs))


@dataclass(frozen=True)
class Answer:
    """``scores`` float64[candidates], higher is better; or None, and then ``cause`` says why in a few words."""

    scores: Float64 | None
    cause: str = ""
    usage: Usage = Usage()


class Ranking(Protocol):
    """A re-ranker that knows a catalogue."""

    @property
    def bytes_per_device(self) -> int:
        """What every device downloads, once, to be able to re-rank."""

    @property
    def notes(self) -> Sequence[str]:
        """Sentences for the audit log: which model answers, and what leaves the device."""

    def rank(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, in their order.

        Raises:
            ConfigError: no question can be answered with these settings (a wrong key, say).
        """


class Reranker(Protocol):
    """A re-ranker's settings."""

    def check(self, where: str) -> None:
        """ConfigError when it cannot work on this machine: before anything is trained. ``where`` is its key."""

    def prepare(self, catalogue: Catalogue, seed: int, where: str) -> Ranking:
        """Get to know a catalogue."""


T = TypeVar("T")


def from_settings(kind: type[T], options: Mapping[str, Any], where: str) -> T:
    """``kind``, a dataclass, of the keys of its configuration; unknown keys and bad values are ConfigErrors."""
    known = {f.name for f in dataclasses.fields(cast(Any, kind))}
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known)) or 'no settings'}"
            raise ConfigError(f"{where}.{key}: no such setting; {hint}")
    try:
        return kind(**options)
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from None


def whole_number(value: object, least: int) -> bool:
    """Whether ``value`` is an int of at least ``least``; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
