"""What an unlearning strategy is: the seam between a strategy's file and the rooms that run and judge it.

A strategy gets a :class:`Task`: the federation's state (its own copy, which it may change in place), the data before
and after, and a :class:`~unlearning.federation.Federation` that runs federated rounds on either. It returns what came
of it and what it cost. It never judges itself: the gates of ``unlearning.verification`` do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from fedrec.algorithms.base import Recommender
from fedrec.data.split import Split
from fedrec.errors import ConfigError
from unlearning.forget import ForgetSet
from unlearning.scorer import Scorer

if TYPE_CHECKING:
    from unlearning.federation import Federation
    from unlearning.state import State

Kind = Literal["user", "item", "interaction", "user_item"]
KINDS: tuple[Kind, ...] = ("user", "item", "interaction", "user_item")


@dataclass(frozen=True)
class Guarantee:
    """What a strategy promises. ``certified`` needs an (ε, δ), and nothing else may carry one."""

    kind: Literal["exact", "approximate", "certified", "filter"]
    epsilon: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        bounds = (self.epsilon, self.delta)
        if (self.kind == "certified") != all(bound is not None for bound in bounds):
            raise ValueError(f"guarantee {self.kind} with (ε, δ) = {bounds}: certified means an (ε, δ), and only that")

    def __str__(self) -> str:
        if self.kind == "certified":
            return f"certified (ε = {self.epsilon:.3g}, δ = {self.delta:.2g})"
        return "filter only" if self.kind == "filter" else self.kind


@dataclass(frozen=True)
class StoreNeeds:
    """The update history that a strategy needs from training; ``where`` is ``server`` or ``client`` (the devices)."""

    where: Literal["server", "client"]
    interval: int = 1  # every so many rounds
    top: float = 1.0  # share of a device's rows that are kept, largest norms first
    precision: Literal["float32", "float16"] = "float32"
    max_bytes: int = 2 * 2**30


@dataclass(frozen=True)
class Cost:
    """CPU seconds of all processes, wall seconds, federated rounds, device traffic in bytes (all devices together)."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    rounds: int = 0
    upload_bytes: float = 0.0
    download_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(mine + yours for mine, yours in pairs))


@dataclass
class Spent:
    """CPU seconds of this process and wall seconds, known when the block is over."""

    cpu_s: float = 0.0
    wall_s: float = 0.0


@contextlib.contextmanager
def timed() -> Iterator[Spent]:
    """Measure a block of work that runs no federated rounds."""
    spent, cpu, wall = Spent(), time.process_time(), time.perf_counter()
    yield spent
    spent.cpu_s, spent.wall_s = time.process_time() - cpu, time.perf_counter() - wall


@dataclass(frozen=True)
class Task:
    """One request, or a batch of them, to be honoured.

    ``before`` is the split as it was (earlier requests honoured already), ``after`` without this request's data too.
    ``forget`` is what this request adds, ``forgotten`` everything forgotten so far, this included. ``joined`` is the
    state before any affected user took part, where training kept one; ``history`` the folder of the server's update
    store, where the strategy asked for one. A new state may stand in any folder beside ``state.folder``.
    """

    number: int  # of the request in the run, from 1: addresses random draws
    kinds: frozenset[Kind]
    state: State
    before: Split
    after: Split
    forget: ForgetSet
    forgotten: ForgetSet
    federation: Federation
    seed: int
    joined: State | None = None
    history: Path | None = None
    say: Callable[[str], None] = lambda text: None


@dataclass
class Forgotten:
    """What a strategy made: the new state, its cost, what happened on the way.

    ``recommend`` wraps the model's scorer where the strategy acts at recommendation time; ``trace`` has one entry per
    unlearning round (for the report), ``notes`` are sentences for the audit log and the report.
    """

    state: State
    cost: Cost
    guarantee: Guarantee
    trace: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recommend: Callable[[Scorer], Scorer] | None = None


@dataclass(frozen=True)
class Setting:
    """What is known of the run before it starts, for a strategy to refuse what it cannot do."""

    algorithm: Recommender
    rounds: int
    interactions: int  # in the training set
    users: int
    secure_aggregation: bool  # the server sees sums only
    privacy: str | None  # the mechanism's mode, None without one
    optimizer: str  # the server's


class Strategy(ABC):
    """One way of forgetting. Implementations are frozen dataclasses whose fields are their settings."""

    name: ClassVar[str]
    supports: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    #: What it promises at best; a request's own :attr:`Forgotten.guarantee` may be numbered.
    promise: ClassVar[str]

    @property
    def store(self) -> StoreNeeds | None:
        """The update history that training must keep for it; None: none."""
        return None

    def check(self, setting: Setting) -> None:  # noqa: B027 (most have nothing to refuse)
        """ConfigError for a run in which this strategy cannot work, with the reason and the remedy."""

    def check_texts(self, texts: Sequence[str] | None, genres: Sequence[Sequence[str]] | None) -> None:  # noqa: B027
        """ConfigError where the strategy needs more of items than the data set tells (one text and genres an item)."""

    @abstractmethod
    def forget(self, task: Task) -> Forgotten:
        """Honour one request. Raises RunFailed when it cannot; the caller keeps the old state then."""

    @classmethod
    def from_config(cls, options: Mapping[str, Any]) -> Self:
        """An instance from the keys of its configuration; unknown keys and bad values are ConfigErrors."""
        known = {f.name for f in dataclasses.fields(cast(Any, cls))}
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known)) or 'none'}"
                raise ConfigError(f"unlearning.strategies.{cls.name}.{key}: no such setting; {hint}")
        make: Any = cls
        try:
            made: Self = make(**options)
        except TypeError as error:
            raise ConfigError(f"unlearning.strategies.{cls.name}: {error}") from None
        return made
