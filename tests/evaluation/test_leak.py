"""The leak, without any model: a scorer that only remembers which items it was told are negative.

It learns nothing from any other user and nothing about taste. Where training negatives avoid the held-out items, the
only items it was never told are negative are, in the end, the held-out ones, so it finds them.
"""

from __future__ import annotations

import numpy as np
import pytest

from fedrec.data.interactions import Interactions
from fedrec.data.negatives import sample_negatives
from fedrec.data.split import Split
from fedrec.evaluation.protocols import Protocol, make_split
from fedrec.evaluation.ranking import Evaluator
from fedrec.random import stream, streams, uniform
from tests.evaluation.movielens import movielens_100k

CLEAN = Protocol()
PAPER = Protocol(
    name="paper",
    ties="first_row",
    negatives_exclude="all",
    ranking="sampled",
    share_sampled_negatives=True,
    select_on="test",
)


def hit_rate_of_forgetting_nothing(split: Split, protocol: Protocol, rounds: int) -> float:
    """Test HR@10 with 99 sampled negatives, scores = −(times drawn as a negative), 4 a positive a round.

    Counts tie often, and the pessimistic rule would count every tie as a miss, so ties are broken at random here.
    """
    users, draws = np.arange(split.n_users), split.train.counts * 4
    counts = np.zeros((split.n_users, split.n_items), dtype=np.float32)
    owner = np.repeat(users, draws)
    for r in range(rounds):
        keys = streams(stream(0, "negatives", r), users)
        drawn = sample_negatives(split.negatives_exclude, users, draws, split.n_items, keys, distinct=4)
        counts += np.bincount(owner * split.n_items + drawn, minlength=counts.size).reshape(counts.shape)
    evaluator = Evaluator(split, protocol, 0)
    jitter = uniform(streams(stream(0, "jitter"), users), split.n_items) / 2
    evaluator.add(users, (jitter - counts).astype(np.float32))
    found = evaluator.sums().metrics("test")
    return found["hr@10" if protocol.ranking == "sampled" else "sampled_hr@10"]


@pytest.fixture(scope="module")
def ml_100k() -> Interactions:
    return movielens_100k()


@pytest.mark.parametrize(("rounds", "known"), [(10, 0.599), (50, 0.985)])
def test_a_scorer_that_learns_nothing_finds_the_test_item_under_paper(
    ml_100k: Interactions, rounds: int, known: float
) -> None:
    # Golden: an independent implementation of this scorer reached .599 and .985 after 10 and 50 rounds.
    assert hit_rate_of_forgetting_nothing(make_split(ml_100k, PAPER, 0), PAPER, rounds) == pytest.approx(
        known, abs=0.05
    )


def test_a_scorer_that_learns_nothing_is_random_under_clean(ml_100k: Interactions) -> None:
    found = hit_rate_of_forgetting_nothing(make_split(ml_100k, CLEAN, 0), CLEAN, 50)
    assert found == pytest.approx(0.10, abs=0.04)  # four binomial standard errors of 943 users at .10


def test_the_leak_needs_no_particular_data() -> None:
    rng = np.random.default_rng(0)
    n_users, n_items, length = 300, 300, 20
    data = Interactions(
        name="uniform",
        user=np.repeat(np.arange(n_users), length).astype(np.int32),
        item=np.concatenate([rng.permutation(n_items)[:length] for _ in range(n_users)]).astype(np.int32),
        user_ids=[str(u) for u in range(n_users)],
        item_ids=[str(i) for i in range(n_items)],
        timestamp=np.tile(np.arange(length), n_users),
    )
    clean, paper = (hit_rate_of_forgetting_nothing(make_split(data, p, 0), p, 60) for p in (CLEAN, PAPER))
    assert clean < 0.2
    assert paper > 0.98
