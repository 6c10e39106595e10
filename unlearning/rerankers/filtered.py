"""The scorer that recommends with a filter: stated candidates, re-ranked by the retained history."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from fedrec.algorithms.base import Recommender, Tensors
from fedrec.data.interactions import UserItems
from fedrec.errors import RunFailed
from unlearning.rerankers.base import Answer, Catalogue, Float64, Int64, Question, Ranking, Usage
from unlearning.rerankers.retrieval import retrieve
from unlearning.scorer import Scorer

Float32 = npt.NDArray[np.float32]
ASKED_AT_ONCE = 32


class Candidates(Protocol):
    """A candidate model: float32[len(users), n_items], the caller's own, higher is better; −inf: never recommended."""

    def __call__(self, scorer: Scorer, users: Int64) -> Float32: ...


def current_model(scorer: Scorer, users: Int64) -> Float32:
    """The model as it is, forgotten data in its weights included; before its mask of withdrawn items, if it has one."""
    raw = getattr(scorer, "raw_scores", scorer.scores)
    return np.array(raw(users), dtype=np.float32)


@dataclass(frozen=True)
class Popularity:
    """float32[n_items] interactions of the retained data, the same for everybody."""

    counts: Float32

    def __call__(self, scorer: Scorer, users: Int64) -> Float32:
        return np.tile(self.counts, (users.size, 1))


@dataclass(frozen=True)
class Filter:
    """What is retrieved, and who may be recommended what.

    ``retained`` are the training interactions left (oldest first); its rows are neither candidates nor, beyond
    ``history_length``, shown. ``withdrawn`` items are scored −inf. ``barred`` are a user's items that are no candidates
    either (one row a user). ``weight`` is the re-ranker's share in the order of the candidates, by mean
    position; the candidate model has the rest and breaks ties.
    """

    retained: UserItems
    withdrawn: Int64
    barred: UserItems
    catalogue: Catalogue
    candidates: Candidates
    count: int
    retrieve: str
    history_length: int
    weight: float


@dataclass
class Answers:
    """The lists that were asked for, and what came: one list is asked for once, and stays as it was answered.

    ``keep`` says what happens to a list that the re-ranker cannot rank: it keeps the candidate model's order and is
    counted, or everything stops.
    """

    ranking: Ranking
    keep: bool
    found: dict[tuple[bytes, bytes], Answer] = field(default_factory=dict)
    users: dict[int, str] = field(default_factory=dict)  # "" re-ranked, else why not
    usage: Usage = field(default_factory=Usage)

    def ask(self, users: Int64, questions: list[Question]) -> list[Float64 | None]:
        """Scores per question, None where the order is kept.

        Raises:
            RunFailed: a list could not be re-ranked, and orders are not to be kept.
        """
        keys = [(question.history.tobytes(), question.candidates.tobytes()) for question in questions]
        new = [at for at, key in enumerate(keys) if key not in self.found]
        for start in range(0, len(new), ASKED_AT_ONCE):
            part = new[start : start + ASKED_AT_ONCE]
            answers = self.ranking.rank([questions[at] for at in part])
            for at, answer in zip(part, answers, strict=True):
                self.found[keys[at]] = answer
                self.usage += answer.usage
            failed = [answer.cause for answer in answers if answer.scores is None]
            if failed and not self.keep:
                raise RunFailed(
                    f"retrieval_filter: {len(failed)} of {len(part)} users' lists could not be re-ranked ({failed[0]})"
                    f"; {len(new) - start - len(part)} more were not asked for. Mend that, or set on_error=keep to "
                    "give such users the candidate model's order and count them"
                )
        answered = [self.found[key] for key in keys]
        self.users.update({int(u): answer.cause for u, answer in zip(users, answered, strict=True)})
        return [answer.scores for answer in answered]

    @property
    def notes(self) -> list[str]:
        """What became of the users who were recommended something, in sentences without anybody's data."""
        causes = Counter(cause.partition("; it answered ")[0] for cause in self.users.values() if cause)
        ranked = len(self.users) - causes.total()
        said = [f"{ranked} users' lists were re-ranked, {causes.total()} kept the candidate model's order."]
        said += [f"Not re-ranked, {n} users: {cause}." for cause, n in causes.most_common(5)]
        used = self.usage
        if used.requests:
            said.append(
                f"{used.requests} requests, {used.sent_bytes} bytes of prompts; the endpoint counted "
                f"{used.prompt_tokens} prompt tokens and {used.completion_tokens} completion tokens."
            )
        return said


@dataclass(frozen=True)
class FilteredScorer:
    """``inner`` as its users meet it through the filter. What it releases, its item view included, is unchanged."""

    inner: Scorer
    filter: Filter
    answers: Answers

    @property
    def algorithm(self) -> Recommender:
        return self.inner.algorithm

    @property
    def shared(self) -> Tensors:
        return self.inner.shared

    @property
    def notes(self) -> list[str]:
        return self.answers.notes

    def scores(self, users: Int64) -> Float32:
        """float32[len(users), n_items]: whole numbers, one a place. Re-ranked candidates are above all other items,
        which keep the order (and the ties) of the candidate model; −inf marks withdrawn items. A user without retained
        history gets the candidate model's order alone.

        Raises:
            RunFailed: the candidate model has a score that is not a number, or a list could not be re-ranked.
        """
        placed = self.raw_scores(users)
        placed[:, self.filter.withdrawn] = -np.inf
        return placed

    def raw_scores(self, users: Int64) -> Float32:
        """The same without the mask: a withdrawn item is no candidate, and keeps the place that the candidate model
        gives it among the others."""
        rules = self.filter
        base = rules.candidates(self.inner, users)
        if np.isnan(base).any():
            user, item = np.argwhere(np.isnan(base))[0]
            raise RunFailed(f"retrieval_filter: the candidate model's score of user {users[user]}, item {item}, is NaN")
        open_ = np.isfinite(base)
        open_[:, rules.withdrawn] = False
        for row, user in enumerate(users):
            open_[row, rules.retained.row(user)] = False
            open_[row, rules.barred.row(user)] = False
        placed = np.where(np.isneginf(base), -np.inf, rankdata(base, method="dense", axis=1)).astype(np.float32)
        rows, asked = [], []
        for row, user in enumerate(users):
            history = rules.retained.row(user).astype(np.int64)
            if history.size == 0:  # a new user, as far as the filter knows
                self.answers.users.setdefault(int(user), "no retained history")
                continue
            best = np.argsort(-base[row], kind="stable")
            candidates = best[open_[row, best]][: rules.count].astype(np.int64)
            placed[row, candidates] = base.shape[1] + np.arange(candidates.size, 0, -1)
            if candidates.size < 2:
                self.answers.users.setdefault(int(user), "fewer than two candidates")
                continue
            rows.append(row)
            shown = retrieve(history, rules.retrieve, rules.history_length, rules.catalogue)
            asked.append(Question(shown, candidates))
        for row, question, scores in zip(rows, asked, self.answers.ask(users[rows], asked), strict=True):
            if scores is not None:
                order = fused(scores, rules.weight)
                placed[row, question.candidates[order]] = base.shape[1] + np.arange(order.size, 0, -1)
        return placed


def fused(scores: Float64, weight: float) -> Int64:
    """Positions, best first: by ``weight`` · place by ``scores`` + (1 − weight) · place in the given order (Borda's
    count of two rankings); equal scores share their mean place, and remaining ties go to the given order."""
    by_score = rankdata(-scores)
    mean = weight * by_score + (1.0 - weight) * np.arange(1, scores.size + 1)
    return np.argsort(mean, kind="stable").astype(np.int64)
