"""The retrieval filter: what was forgotten has no say in a list, reaches no endpoint, and nothing fails in silence."""

from __future__ import annotations

import atexit
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.algorithms.base import Collected, Problem, Recommender, Tensors
from fedrec.algorithms.fedease import FedEASE
from fedrec.data.interactions import UserItems
from fedrec.data.split import Split
from fedrec.data.synthetic import SyntheticConfig, generate
from fedrec.errors import ConfigError, RunFailed
from fedrec.evaluation.baselines import popularity_scores
from fedrec.evaluation.protocols import Protocol, make_split
from server.settings import EvaluationSettings, FederationSettings, RunnerSettings
from tests.unlearning.chat_endpoint import ChatServer, Reply, by_length, chat_server, completion
from unlearning.federation import Federation
from unlearning.forget import ForgetSet
from unlearning.rerankers.filtered import fused
from unlearning.rerankers.texts import item_texts
from unlearning.scorer import Float32, Int64
from unlearning.state import State, stores
from unlearning.strategies.base import Cost, Forgotten, Kind, Setting, Task
from unlearning.strategies.retrieval_filter import RetrievalFilter

DATA = generate(SyntheticConfig(users=40, items=90, seed=4, mean_activity=20))
SPLIT = make_split(DATA, Protocol(), 0)
TEXTS, GENRES = item_texts(DATA) or ([], None)
EVERYBODY = np.arange(SPLIT.n_users)
BUSIEST = int(SPLIT.train.counts.argmax())  # nobody else has the same history
NOTHING = ForgetSet.nothing(SPLIT.n_users)


class Trained:
    """FedEASE trained on ``trained_on``, as its users meet it on the data of ``split``."""

    def __init__(self, trained_on: Split, split: Split) -> None:
        self._algorithm = FedEASE(Problem(split.n_users, split.n_items, 0), regularization=20.0)
        sums = self._algorithm.contribute({}, trained_on.train, 0)
        self._shared = self._algorithm.solve({}, Collected(sums, split.n_users))
        self._train = split.train

    @property
    def algorithm(self) -> Recommender:
        return self._algorithm

    @property
    def shared(self) -> Tensors:
        return self._shared

    def scores(self, users: Int64) -> Float32:
        return self._algorithm.score(self._shared, self._train.take(users)).numpy()


def federation(algorithm: dict[str, Any]) -> Federation:
    return Federation(
        algorithm_config=algorithm, protocol={"name": "clean"},
        settings={"seed": 3, "n_nodes": 1, "upload": {"kind": "touched"}, "download": {"kind": "dense"}},
        federation=FederationSettings(nodes=1), evaluation=EvaluationSettings(),
        runner=RunnerSettings("inline", workers=1), problem=Problem(SPLIT.n_users, SPLIT.n_items, 3),
        item_texts=TEXTS, genres=GENRES,
    )  # fmt: skip


EASE = federation({"_target_": "fedrec.algorithms.fedease.FedEASE", "regularization": 20.0})
MF = federation({"_target_": "fedrec.algorithms.fedmf.FedMF", "dim": 4})


@cache
def begun() -> State:
    """A state whose devices hold nothing private: FedEASE's before its round."""
    folder = tempfile.TemporaryDirectory(prefix="fedrec-test-")
    atexit.register(folder.cleanup)
    return EASE.begin(Path(folder.name) / "state", SPLIT)


def request(forget: ForgetSet, kind: Kind = "interaction", number: int = 1, **known: Any) -> Task:
    around = replace(EASE, **known)
    return Task(number, frozenset({kind}), begun(), SPLIT, forget.remove_from(SPLIT), forget, forget, around, seed=3)


def single_pairs(share: float = 0.1) -> ForgetSet:
    owner = SPLIT.train.users
    picked = np.random.default_rng(0).choice(owner.size, int(share * owner.size), replace=False)
    return ForgetSet.of(SPLIT.train, pairs=(owner[picked], SPLIT.train.items[picked]))


def recommended(made: Forgotten, after: Split, users: Int64 = EVERYBODY) -> Float32:
    assert made.recommend is not None
    return made.recommend(Trained(SPLIT, after)).scores(users)


def top(scores: Float32, count: int) -> Int64:
    return np.argsort(-scores, axis=-1, kind="stable")[..., :count]


# What it does, and does not


def test_it_trains_nothing_and_promises_a_filter_only() -> None:
    task = request(single_pairs())
    made = RetrievalFilter().forget(task)
    assert str(made.guarantee) == "filter only"
    assert (made.cost.rounds, made.cost.upload_bytes, made.trace) == (0, 0.0, [])
    assert made.recommend is not None
    inner = Trained(SPLIT, task.after)
    assert made.recommend(inner).shared is inner.shared  # an attack on what is released finds what it found


def test_only_what_is_the_deleted_ones_own_changes(tmp_path: Path) -> None:
    trained = MF.train(MF.begin(tmp_path / "trained", SPLIT), SPLIT, 3).state
    forget = ForgetSet.of(SPLIT.train, users=[3, 9], items=[1, 5], pairs=([0], SPLIT.train.row(0)[:1]))
    task = replace(request(forget, "user_item"), federation=MF, state=trained.copy_to(tmp_path / "copy"))
    made = RetrievalFilter().forget(task)
    old, new = trained.server.shared["item"], made.state.server.shared["item"]
    assert (old != new).any(dim=1).nonzero().flatten().tolist() == [1, 5]
    (before,), (after,) = stores(trained.devices), stores(made.state.devices)
    change = (before.vectors(EVERYBODY)["user"] != after.vectors(EVERYBODY)["user"]).any(dim=1)
    assert change.nonzero().flatten().tolist() == [3, 9]


def test_the_candidate_model_is_stated() -> None:
    task = request(single_pairs())
    assert "was trained on the forgotten data" in RetrievalFilter().forget(task).notes[0]
    assert "of the retained data" in RetrievalFilter(candidate_model="popularity").forget(task).notes[0]


def test_devices_download_the_text_vectors_once() -> None:
    everyone = ForgetSet.of(SPLIT.train, users=[0, 1])
    vectors = SPLIT.n_items * 256 * 4
    assert RetrievalFilter().forget(request(everyone, "user")).cost.download_bytes == (SPLIT.n_users - 2) * vectors
    assert RetrievalFilter().forget(request(everyone, "user", number=2)).cost.download_bytes == 0


@pytest.mark.parametrize("retrieve", ["quota", "recent", "all"])
def test_lists_are_those_of_data_that_never_had_what_was_forgotten(retrieve: str) -> None:
    forget = single_pairs()
    task = request(forget)
    clean = replace(task, before=task.after, forget=NOTHING, forgotten=NOTHING)
    strategy = RetrievalFilter("popularity", 20, retrieve, forgotten_candidates="allow")
    filtered = recommended(strategy.forget(task), task.after)
    never = recommended(strategy.forget(clean), task.after)
    np.testing.assert_array_equal(filtered, never)
    before = recommended(strategy.forget(replace(clean, after=SPLIT)), SPLIT)
    assert (filtered != before).any()


def test_candidates_come_first_and_the_rest_keeps_its_order() -> None:
    task = request(single_pairs())
    scores = recommended(RetrievalFilter(candidates=15, forgotten_candidates="exclude").forget(task), task.after)
    base = Trained(SPLIT, task.after).scores(EVERYBODY)
    changed = 0
    for user in EVERYBODY:
        allowed = np.setdiff1d(np.arange(SPLIT.n_items), np.union1d(SPLIT.train.row(user), task.forget.pairs.row(user)))
        expected = allowed[np.argsort(-base[user, allowed], kind="stable")[:15]]
        assert set(top(scores[user], 15)) == set(expected)
        changed += top(scores[user], 15).tolist() != expected.tolist()
        rest = np.setdiff1d(np.arange(SPLIT.n_items), expected)
        assert np.unique(scores[user, expected]).size == 15
        order = np.sign(np.subtract.outer(base[user, rest], base[user, rest]))
        np.testing.assert_array_equal(np.sign(np.subtract.outer(scores[user, rest], scores[user, rest])), order)
    assert changed > 30


def test_a_list_does_not_depend_on_who_is_asked_with() -> None:
    task = request(single_pairs())
    strategy = RetrievalFilter(candidates=15)
    together = recommended(strategy.forget(task), task.after)
    order = np.random.default_rng(1).permutation(EVERYBODY)
    apart = strategy.forget(task)
    np.testing.assert_array_equal(together[order[:7]], recommended(apart, task.after, order[:7]))
    np.testing.assert_array_equal(together[order[7:]], recommended(apart, task.after, order[7:]))


def test_withdrawn_items_are_recommended_to_nobody() -> None:
    forget = ForgetSet.of(SPLIT.train, items=top(popularity_scores(SPLIT), 3))
    for model in ("current", "popularity"):
        task = request(forget, "item")
        made = RetrievalFilter(model, candidates=20).forget(task)
        scores = recommended(made, task.after)
        assert np.isneginf(scores[:, forget.items]).all()
        assert made.recommend is not None
        scorer: Any = made.recommend(Trained(SPLIT, task.after))
        raw = scorer.raw_scores(EVERYBODY)  # what the percentile gate looks at
        np.testing.assert_array_equal(np.delete(raw, forget.items, axis=1), np.delete(scores, forget.items, axis=1))
        assert not np.isin(top(raw, 20), forget.items).any()  # never a candidate
        if model == "current":  # but among the others where the model has them
            base = Trained(SPLIT, task.after).scores(EVERYBODY)[0]
            others = np.setdiff1d(np.arange(SPLIT.n_items), top(raw[0], 20))
            assert top(raw[0, others], 5).tolist() == top(base[others], 5).tolist()


@pytest.mark.parametrize("model", ["current", "popularity"])
def test_deleted_users_are_recommended_what_a_new_user_is(model: str) -> None:
    forget = ForgetSet.of(SPLIT.train, users=[3, 9])
    task = request(forget, "user")
    made = RetrievalFilter(model, candidates=20).forget(task)
    assert made.recommend is not None
    scorer: Any = made.recommend(Trained(SPLIT, task.after))
    scores = scorer.scores(EVERYBODY)
    np.testing.assert_array_equal(scores[3], scores[9])
    fresh = {
        "current": FedEASE(Problem(1, SPLIT.n_items, 0)).score(
            Trained(SPLIT, SPLIT).shared, UserItems(np.zeros(2, np.int64), np.zeros(0, np.int32))
        )[0],
        "popularity": torch.from_numpy(popularity_scores(task.after)),
    }[model].numpy()
    order = np.sign(np.subtract.outer(fresh, fresh))
    np.testing.assert_array_equal(np.sign(np.subtract.outer(scores[3], scores[3])), order)
    assert "Not re-ranked, 2 users: no retained history." in scorer.notes
    assert scorer.notes[0] == "38 users' lists were re-ranked, 2 kept the candidate model's order."


def test_forgotten_items_are_no_candidates_of_theirs_unless_allowed() -> None:
    forget = single_pairs()
    task = request(forget)
    shares = {}
    for rule in ("exclude", "allow", "auto"):  # nothing leaves the device: auto allows
        scores = recommended(RetrievalFilter(candidates=20, forgotten_candidates=rule).forget(task), task.after)
        found = [np.isin(forget.pairs.row(user), top(scores[user], 20)) for user in forget.affected]
        shares[rule] = np.concatenate(found).mean()
    assert shares["exclude"] == 0.0
    assert shares["auto"] == shares["allow"] > 0.1  # the current model remembers them


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.floats(0.01, 1))
@settings(max_examples=60)
def test_fusion_is_between_both_orders(values: list[int], weight: float) -> None:
    scores = np.array(values, dtype=float)
    order = fused(scores, weight)
    assert sorted(order) == list(range(len(values)))
    place = np.argsort(order)
    better = np.flatnonzero(scores[:, None] >= scores[None, :])
    first, second = np.divmod(better, len(values))
    both = first < second  # before it in the given order, and scored no worse
    assert (place[first[both]] < place[second[both]]).all()
    if weight == 1:
        np.testing.assert_array_equal(order, np.argsort(-scores, kind="stable"))


# With a chat endpoint


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as state:
        yield state


def chatting(server: ChatServer, on_error: str = "raise", **options: Any) -> RetrievalFilter:
    chat = {"base_url": server.url, "model": "small", "timeout": 5.0, "retries": 0, "backoff": 0.0}
    return RetrievalFilter(reranker="chat", chat=chat, on_error=on_error, **{"candidates": 12} | options)


def test_the_endpoints_order_is_recommended(server: ChatServer) -> None:
    task = request(single_pairs())
    scores = recommended(chatting(server).forget(task), task.after)
    for user in EVERYBODY:
        lengths = [len(TEXTS[item]) for item in top(scores[user], 12)]
        assert lengths == sorted(lengths)


@pytest.mark.parametrize("candidate_model", ["current", "popularity"])
@pytest.mark.parametrize("retrieve", ["quota", "recent", "all"])
def test_no_prompt_ever_shows_a_forgotten_title(server: ChatServer, candidate_model: str, retrieve: str) -> None:
    forget = single_pairs(0.05)
    task = request(forget)
    made = chatting(server, candidate_model=candidate_model, retrieve=retrieve).forget(task)
    assert len(set(TEXTS)) == len(TEXTS)
    checked = 0
    for user in forget.affected:
        server.raw.clear()
        server.bodies.clear()
        recommended(made, task.after, np.array([user]))
        sent = b"\n".join(server.raw) + b"\n".join(json.dumps(q, ensure_ascii=False).encode() for q in server.questions)
        assert len(server.raw) == 1
        retained = set(task.after.train.row(user).tolist())
        assert set(server.questions[0]["liked"]) <= {TEXTS[item] for item in retained}
        for item in forget.pairs.row(user):
            assert TEXTS[item].encode() not in sent
            checked += 1
    assert checked == forget.size


def test_withdrawn_titles_and_deleted_users_reach_no_endpoint(server: ChatServer) -> None:
    items = ForgetSet.of(SPLIT.train, items=top(popularity_scores(SPLIT), 3))
    users = ForgetSet.of(SPLIT.train, users=[3, 9])
    task = request(items | users, "user_item")
    recommended(chatting(server).forget(task), task.after)
    assert len(server.raw) == 1 + SPLIT.n_users - 2  # the trial, and everybody who has a history
    for item in items.items:
        assert not [raw for raw in server.raw if json.dumps(TEXTS[item])[1:-1].encode() in raw]
    for question in server.questions:
        liked = {TEXTS.index(title) for title in question["liked"]}
        assert any(liked <= set(task.after.train.row(user).tolist()) for user in EVERYBODY if user not in (3, 9))


def test_a_request_tells_titles_and_no_ids(server: ChatServer) -> None:
    task = request(single_pairs())
    recommended(chatting(server).forget(task), task.after)
    for body, question in zip(server.bodies, server.questions, strict=True):
        assert set(body) == {"model", "messages", "temperature", "seed", "max_tokens", "response_format"}
        assert set(question) == {"liked", "candidates"}
        assert set(question["liked"]) | set(question["candidates"].values()) <= set(TEXTS)
        assert list(question["candidates"]) == [str(k) for k in range(1, len(question["candidates"]) + 1)]


def test_the_trial_asks_about_nobody(server: ChatServer) -> None:
    task = request(single_pairs())
    chatting(server).forget(task)
    (question,) = server.questions
    popular = [TEXTS[item] for item in top(popularity_scores(task.after), 8)]
    assert question["liked"] == popular[:1]
    assert sorted(question["candidates"].values()) == sorted(popular[1:], key=str.casefold)


def test_one_list_is_asked_for_once(server: ChatServer) -> None:
    task = request(single_pairs())
    made = chatting(server).forget(task)
    first = recommended(made, task.after)
    asked = len(server.raw)
    np.testing.assert_array_equal(first, recommended(made, task.after))
    assert len(server.raw) == asked == 1 + SPLIT.n_users


def unwilling(server: ChatServer, user: int, task: Task) -> None:
    """The endpoint refuses to rank for this user, whose history it knows."""
    history = {TEXTS[item] for item in task.after.train.row(user)}

    def answer(question: dict[str, Any]) -> Reply:
        return completion("I would rather not.") if set(question["liked"]) == history else by_length(question)

    server.answer = answer


def test_a_list_that_is_not_re_ranked_stops_everything(server: ChatServer) -> None:
    task = request(single_pairs())
    made = chatting(server, retrieve="all").forget(task)
    unwilling(server, BUSIEST, task)
    with pytest.raises(RunFailed, match=r"1 of 32 users' lists .*not JSON.*8 more were not asked for.*on_error=keep"):
        recommended(made, task.after, np.roll(EVERYBODY, -BUSIEST))
    assert len(server.raw) == 33


def test_a_list_is_kept_only_when_told_to_and_is_counted(server: ChatServer) -> None:
    task = request(single_pairs())
    made = chatting(server, "keep", retrieve="all").forget(task)
    willing = recommended(made, task.after)
    again = chatting(server, "keep", retrieve="all").forget(task)
    unwilling(server, BUSIEST, task)
    assert again.recommend is not None
    scorer: Any = again.recommend(Trained(SPLIT, task.after))
    scores = scorer.scores(EVERYBODY)
    others = np.delete(EVERYBODY, BUSIEST)
    np.testing.assert_array_equal(scores[others], willing[others])
    base = Trained(SPLIT, task.after).scores(EVERYBODY)[BUSIEST]
    kept = top(scores[BUSIEST], 12)
    assert (np.diff(base[kept]) <= 0).all()  # the candidate model's order
    assert scorer.notes[:2] == [
        "39 users' lists were re-ranked, 1 kept the candidate model's order.",
        "Not re-ranked, 1 users: the answer is not JSON (Expecting value).",
    ]
    assert "40 requests" in scorer.notes[2]
    assert "440 prompt tokens and 280 completion tokens" in scorer.notes[2]


def test_an_endpoint_that_does_not_answer_fails_the_request_at_once(server: ChatServer) -> None:
    server.answer = lambda question: Reply({"error": {"message": "out of order"}}, 500)
    with pytest.raises(RunFailed, match=r"the re-ranker chat does not answer: HTTP 500.*out of order"):
        chatting(server).forget(request(single_pairs()))
    notes = chatting(server, "keep").forget(request(single_pairs())).notes
    assert any("left a trial unanswered: HTTP 500" in note for note in notes)


def test_what_leaves_the_device_is_said(server: ChatServer) -> None:
    notes = chatting(server).forget(request(single_pairs())).notes
    assert any("was shown the titles of users' retained histories" in note and "127.0.0.1" in note for note in notes)


# What is refused


def test_scores_that_are_not_numbers_are_not_ranked() -> None:
    task = request(single_pairs())
    made = RetrievalFilter().forget(task)
    broken = Trained(SPLIT, task.after)
    broken.shared["weights"][:, 7] = float("nan")
    assert made.recommend is not None
    with pytest.raises(RunFailed, match=r"user 0, item 7, is NaN"):
        made.recommend(broken).scores(EVERYBODY)


def test_data_without_texts_or_genres_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"retrieval_filter: .*no titles.*dataset=ml-100k"):
        RetrievalFilter().forget(request(single_pairs(), item_texts=None))
    with pytest.raises(ConfigError, match=r"retrieve=quota needs genres.*retrieve=recent"):
        RetrievalFilter().forget(request(single_pairs(), genres=None))
    assert RetrievalFilter(retrieve="recent").forget(request(single_pairs(), genres=None)).cost != Cost()
    with pytest.raises(ConfigError, match="3 item texts for 90 items"):
        RetrievalFilter(retrieve="recent").forget(request(single_pairs(), item_texts=TEXTS[:3], genres=None))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"candidate_model": "best"}, "candidate_model='best' is unknown; write one of current, popularity"),
        ({"retrieve": "some"}, "retrieve='some' is unknown; write one of quota, recent, all"),
        ({"on_error": "ignore"}, "on_error='ignore' is unknown; write one of raise, keep"),
        ({"forgotten_candidates": True}, "forgotten_candidates=True is unknown"),
        ({"candidates": 1}, "candidates=1: write a whole number, 2 or more"),
        ({"history_length": 0}, "history_length=0: write a whole number"),
        ({"weight": 0}, "weight=0: write a number above 0"),
        ({"weight": float("nan")}, "weight=nan: write a number above 0"),
        ({"reranker": "bm25"}, "reranker='bm25' is unknown; write one of sentences, chat"),
        ({"chat": {"url": "x"}}, r"retrieval_filter\.chat\.url: no such setting"),
        ({"chat": "x"}, "chat='x': write its settings"),
        ({"candidate": 5}, "candidate: no such setting; did you mean candidates"),
    ],
)
def test_bad_settings_are_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RetrievalFilter.from_config(options)


def test_a_chat_without_a_key_is_refused_before_training() -> None:
    setting = Setting(
        algorithm=FedEASE(Problem(40, 90, 0)), rounds=1, interactions=SPLIT.train.items.size, users=40,
        secure_aggregation=True, privacy=None, optimizer="average",
    )  # fmt: skip
    RetrievalFilter().check(setting)
    chat = {"base_url": "https://host/v1", "model": "m", "api_key_env": "FEDREC_NO_SUCH_KEY"}
    with pytest.raises(ConfigError, match=r"chat\.api_key_env=FEDREC_NO_SUCH_KEY: .*holds no key"):
        RetrievalFilter(reranker="chat", chat=chat).check(setting)
