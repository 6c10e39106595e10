"""Forgetting at recommendation time: the training-free, retrieval-augmented idea of CRAGRU (arXiv 2511.05494).

No training: deleted accounts become fresh devices and withdrawn items lose their row, and otherwise the model stays as
it is. Every recommendation is made of two stated parts. A *candidate model* proposes
``candidates`` items: the current model, which has seen the forgotten data, or the popularity of the retained data,
which has not. A *re-ranker* orders them by the retained history, from which the forgotten data is gone. A user without
any history left gets the candidate model's list as a new user does.

What it is not: the released tensors still hold what they learned, so attacks on them (fold-in, membership by the item
view) find what they found before. Its guarantee says "filter only", and the gates show the rest.

Three faults of the published method are not repeated: candidates silently taken from the full-data model, silent
fall-back to the old ranking when the re-ranker fails, and one interaction kept of every deleted user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError, RunFailed
from fedrec.evaluation.baselines import popularity_scores
from unlearning.rerankers import build
from unlearning.rerankers.base import Catalogue, Question, Ranking, Reranker, whole_number
from unlearning.rerankers.filtered import Answers, Candidates, Filter, FilteredScorer, Popularity, current_model
from unlearning.rerankers.retrieval import RETRIEVE
from unlearning.rerankers.texts import catalogue
from unlearning.state import erase
from unlearning.strategies.base import Cost, Forgotten, Guarantee, Setting, Strategy, Task, timed

WHERE = "unlearning.strategies.retrieval_filter"
CHOICES: Mapping[str, tuple[str, ...]] = {
    "candidate_model": ("current", "popularity"),
    "retrieve": RETRIEVE,
    "forgotten_candidates": ("auto", "exclude", "allow"),
    "on_error": ("raise", "keep"),
}
SOURCE = {
    "current": "Candidates come from the current model, which was trained on the forgotten data and still holds it.",
    "popularity": "Candidates are the most popular items of the retained data; the trained model proposes nothing.",
}


@dataclass(frozen=True)
class RetrievalFilter(Strategy):
    """Filter, candidates, re-ranker.

    Attributes:
        candidate_model: ``current`` or ``popularity`` (of the retained data).
        candidates: how many are re-ranked.
        retrieve: what of the retained history is shown: a ``quota`` per genre, the ``recent`` ones, or ``all``.
        history_length: how many of them, at most (not with ``all``).
        reranker: ``sentences`` or ``chat``; ``sentences`` and ``chat`` hold the settings of each.
        weight: the re-ranker's share in the order of the candidates; 1, as published, leaves nothing of the candidate
            model's order, 0.5 counts both alike.
        forgotten_candidates: ``exclude`` keeps a user's forgotten items from being re-ranked for that user, so that no
            re-ranker ever sees them, and needs the list of them kept for as long as the filter works; ``allow`` keeps
            no list, and they are candidates like any item the user never had. ``auto`` allows them where nothing leaves
            the device, and excludes them with ``chat``.
        on_error: what happens when a list cannot be re-ranked: ``raise``, or ``keep`` the candidate model's order and
            count it.
    """

    name: ClassVar[str] = "retrieval_filter"
    promise: ClassVar[str] = "filter"

    candidate_model: str = "current"
    candidates: int = 50
    retrieve: str = "quota"
    history_length: int = 20
    reranker: str = "sentences"
    weight: float = 1.0
    forgotten_candidates: str = "auto"
    on_error: str = "raise"
    sentences: Mapping[str, Any] = field(default_factory=dict)
    chat: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{WHERE}.{name}={getattr(self, name)!r} is unknown; write one of {', '.join(allowed)}"
                )
        for name, least in (("candidates", 2), ("history_length", 1)):
            if not whole_number(getattr(self, name), least):
                raise ConfigError(f"{WHERE}.{name}={getattr(self, name)!r}: write a whole number, {least} or more")
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        if not number or not 0 < self.weight <= 1:
            raise ConfigError(f"{WHERE}.weight={self.weight!r}: write a number above 0, and 1 at most")
        for name in ("sentences", "chat"):
            if not isinstance(getattr(self, name), Mapping | None):
                raise ConfigError(f"{WHERE}.{name}={getattr(self, name)!r}: write its settings as key: value lines")
        assert self._reranker  # nested settings are checked now

    @cached_property
    def _reranker(self) -> Reranker:
        return build(self.reranker, {"sentences": self.sentences, "chat": self.chat}, WHERE)

    def check(self, setting: Setting) -> None:
        self._reranker.check(WHERE)

    def check_texts(self, texts: Sequence[str] | None, genres: Sequence[Sequence[str]] | None) -> None:
        self.catalogue(texts, genres)

    def catalogue(self, texts: Sequence[str] | None, genres: Sequence[Sequence[str]] | None) -> Catalogue:
        """The items as the re-ranker will know them; ConfigError when the data set does not tell enough."""
        items = catalogue(texts, genres, WHERE)
        if self.retrieve == "quota" and items.genres is None:
            raise ConfigError(f"{WHERE}.retrieve=quota needs genres, and this data set has none; write retrieve=recent")
        return items

    def forget(self, task: Task) -> Forgotten:
        """Nothing is trained; the re-ranker learns the catalogue and answers one question about nobody."""
        with timed() as spent:
            ranking, rules, notes = self._rules(task)
            state = erase(task.state, task.forget, task.federation.algorithm)
        answers = Answers(ranking, self.on_error == "keep")
        # Every device needs the text vectors once; later requests find them there.
        devices = int(np.count_nonzero(task.after.train.counts)) if task.number == 1 else 0
        cost = Cost(spent.cpu_s, spent.wall_s, download_bytes=float(devices * ranking.bytes_per_device))
        return Forgotten(
            state, cost, Guarantee("filter"), notes=notes,
            recommend=lambda scorer: FilteredScorer(scorer, rules, answers),
        )  # fmt: skip

    def _rules(self, task: Task) -> tuple[Ranking, Filter, list[str]]:
        """The re-ranker, tried out, what it is asked about, and what there is to say of both."""
        items = self.catalogue(task.federation.item_texts, task.federation.genres)
        if len(items.texts) != task.after.n_items:
            raise ConfigError(f"{WHERE}: {len(items.texts)} item texts for {task.after.n_items} items")
        ranking = self._reranker.prepare(items, task.seed, WHERE)
        popularity = popularity_scores(task.after)
        gone, barred = task.forgotten.items, task.forgotten.pairs.sorted
        notes = [SOURCE[self.candidate_model], *ranking.notes, *self._probe(ranking, popularity, gone)]
        exclude = self.forgotten_candidates == "exclude" or (
            self.forgotten_candidates == "auto" and self.reranker == "chat"
        )
        if exclude:
            notes.append("To keep forgotten items out of their users' re-ranked lists, devices keep the list of them.")
        else:
            notes.append("A user's forgotten items may be candidates for that user, like any item never had.")
            barred = UserItems(np.zeros(task.after.n_users + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
        model: Candidates = current_model if self.candidate_model == "current" else Popularity(popularity)
        shown = (self.retrieve, self.history_length)
        rules = Filter(task.after.train, gone, barred, items, model, self.candidates, *shown, self.weight)
        return ranking, rules, notes

    def _probe(self, ranking: Ranking, popularity: np.ndarray[Any, Any], gone: np.ndarray[Any, Any]) -> list[str]:
        """Ask about nobody's taste (the most popular retained items), so that what cannot answer is found out now."""
        best = np.argsort(-popularity, kind="stable").astype(np.int64)
        best = best[~np.isin(best, gone)][:8]
        if best.size < 3:
            return []
        (answer,) = ranking.rank([Question(best[:1], best[1:])])
        if answer.scores is not None:
            return []
        if self.on_error == "raise":
            raise RunFailed(f"retrieval_filter: the re-ranker {self.reranker} does not answer: {answer.cause}")
        return [
            f"The re-ranker {self.reranker} left a trial unanswered: {answer.cause.partition('; it answered ')[0]}."
        ]
