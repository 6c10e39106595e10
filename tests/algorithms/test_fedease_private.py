"""Private FedEASE: what a device uploads is bounded, whatever its history; what the server makes of it still ranks."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedrec.algorithms.base import Collected, Problem, Tensors
from fedrec.algorithms.fedease_private import PrivateFedEASE, item_weights, items_to_keep
from fedrec.data.interactions import UserItems
from fedrec.data.load import load_dataset
from fedrec.data.split import Split
from fedrec.data.synthetic import SyntheticConfig, generate
from fedrec.errors import ConfigError
from fedrec.evaluation import baselines
from fedrec.evaluation.protocols import Protocol, make_split
from fedrec.evaluation.ranking import Evaluator
from privacy.accountants import default_delta, gaussian_mu
from tests.conftest import WorkspaceFactory
from tests.server.federations import federate

Float64 = npt.NDArray[np.float64]
ITEMS = 12
DECAYS = st.sampled_from([0.2, 0.85, 0.999, 1.0])
# Any sequence of items at all: a device may also name an item twice.
HISTORIES = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=30), min_size=1, max_size=6)


def rows(histories: list[list[int]]) -> UserItems:
    users = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
    return UserItems.from_pairs(users, np.concatenate([np.asarray(h, np.int32) for h in histories]), len(histories))


def model(top_items: int = 7, n_items: int = ITEMS, **settings: Any) -> PrivateFedEASE:
    return PrivateFedEASE(Problem(6, n_items, 0), top_items=top_items, **settings)


def sums(algorithm: PrivateFedEASE, kept: list[int], histories: UserItems) -> tuple[Float64, Float64]:
    """Both rounds' sums."""
    shared = {"kept": torch.tensor(kept, dtype=torch.float32)}
    return (
        algorithm.contribute(shared, histories, 0)["popularity"].numpy(),
        algorithm.contribute(shared, histories, 1)["gram"].numpy(),
    )


def symmetric_noise(rng: np.random.Generator, size: int, deviation: float) -> Float64:
    draw = rng.normal(size=(size, size)) * deviation
    return np.asarray((draw + draw.T) / 2)


def fitted(algorithm: PrivateFedEASE, train: UserItems, rng: np.random.Generator) -> Tensors:
    """Both rounds, with the noise of the problem's whole budget."""
    shared = algorithm.initial_shared()
    for index in range(2):
        found = {name: value.double() for name, value in algorithm.contribute(shared, train, index).items()}
        deviation = 1.0 / (algorithm.problem.privacy_mu * math.sqrt(algorithm.budget_shares[index]))
        for name, spec in algorithm.statistics_in(index).items():
            size = spec.shape[0]
            noise = symmetric_noise(rng, size, deviation) if spec.symmetric else rng.normal(size=size) * deviation
            found[name] = found[name] + torch.from_numpy(noise)
        shared = algorithm.solve(shared, Collected(found, train.n_users, index, deviation))
    return shared


def hit_rate(algorithm: PrivateFedEASE, shared: Tensors, split: Split) -> float:
    """Test HR@10, clean protocol, full ranking."""
    evaluator = Evaluator(split, Protocol(sampled_negatives=0), 0)
    for start in range(0, split.n_users, 1024):
        users = np.arange(start, min(start + 1024, split.n_users))
        evaluator.add(users, algorithm.score(shared, split.train.take(users)).numpy())
    return evaluator.sums().metrics("test")["hr@10"]


# -- what leaves a device ---------------------------------------------------------------------------------------------


@given(HISTORIES, st.lists(st.integers(0, ITEMS - 1), max_size=60), st.permutations(range(ITEMS)), DECAYS)
def test_one_user_more_changes_a_sum_by_at_most_the_sensitivity(
    histories: list[list[int]], more: list[int], order: list[int], decay: float
) -> None:
    algorithm = model(decay=decay)
    without = sums(algorithm, order[:7], rows(histories))
    joined = sums(algorithm, order[:7], rows([*histories, more]))
    for before, after in zip(without, joined, strict=True):
        assert PrivateFedEASE.sensitivity is not None
        assert np.linalg.norm(after - before) <= PrivateFedEASE.sensitivity * (1.0 + 1e-6)


@pytest.mark.parametrize("length", [1, 2, 50, 700])
def test_a_device_spends_all_but_a_hundredth_of_its_norm_at_most(length: int) -> None:
    history = rows([list(range(length))])
    popularity, gram = sums(model(700, 700, decay=0.9), list(range(700)), history)
    assert 0.99 < np.linalg.norm(gram) <= 1.0
    allowed = min(1.0, math.sqrt(length / 50))
    assert 0.99 * allowed < np.linalg.norm(popularity) <= allowed


@given(HISTORIES, st.data(), DECAYS)
def test_sums_are_bit_equal_in_float32_messages_however_users_are_spread_over_nodes(
    histories: list[list[int]], data: st.DataObject, decay: float
) -> None:
    algorithm, kept, whole = model(decay=decay), list(range(3, 10)), rows(histories)
    nodes = np.asarray(data.draw(st.lists(st.integers(0, 2), min_size=len(histories), max_size=len(histories))))
    parts = [sums(algorithm, kept, whole.take(np.flatnonzero(nodes == n))) for n in range(3)]
    for index, total in enumerate(sums(algorithm, kept, whole)):
        sent = np.sum([part[index].astype(np.float32) for part in parts], axis=0, dtype=np.float32)
        np.testing.assert_array_equal(sent, total)


@given(st.lists(st.permutations(range(ITEMS)), min_size=1, max_size=4), st.integers(0, ITEMS), DECAYS)
def test_the_kernel_is_the_decayed_normalised_gram_of_the_kept_items(
    orders: list[list[int]], length: int, decay: float
) -> None:
    histories, kept = [order[:length] for order in orders], [11, 2, 5, 7, 0]
    expected = np.zeros((5, 5))
    for history in histories:
        own = [item for item in history if item in kept]
        matrix = np.zeros((5, 5))
        for i, a in enumerate(own):
            for j, b in enumerate(own):
                matrix[kept.index(a), kept.index(b)] = decay ** abs(i - j)
        expected += matrix / max(float(np.linalg.norm(matrix)), 1e-300)
    found = sums(model(5, decay=decay), kept, rows(histories))[1]
    # Every device rounds its entries down to multiples of 2^-14.
    assert (found <= expected + 1e-9).all()
    assert (found > expected - len(histories) / 2**14 - 1e-9).all()
    assert (found == found.T).all()


def test_popularity_weighs_a_long_history_less_per_item() -> None:
    histories = [list(range(200)), [0, 1], [1]]
    found = sums(model(5, 300), list(range(5)), rows(histories))[0]
    expected = np.zeros(300)
    expected[:200] += 1 / math.sqrt(200)
    expected[0] += 1 / math.sqrt(50)
    expected[1] += 2 / math.sqrt(50)
    np.testing.assert_allclose(found, expected, atol=3 / 2**14)


def test_an_item_named_twice_counts_once_at_its_newest_place() -> None:
    kept = list(range(7))
    twice = sums(model(), kept, rows([[1, 4, 2, 1, 8, 4]]))
    once = sums(model(), kept, rows([[2, 1, 8, 4]]))
    for a, b in zip(twice, once, strict=True):
        assert (a == b).all()


def test_pairs_too_far_apart_to_matter_are_neither_sent_nor_counted() -> None:
    gram = sums(model(100, 100, decay=0.5), list(range(100)), rows([list(range(100))]))[1]
    assert gram[0, 9] > 0.0
    assert gram[0, 14] == 0.0  # 0.5^14 is what entries are rounded down to multiples of
    assert np.linalg.norm(gram) > 0.995


# -- what the server makes of it --------------------------------------------------------------------------------------


def test_without_noise_the_weights_are_eases_closed_form() -> None:
    x = np.random.default_rng(0).random((80, 20)) < 0.3
    gram = (x.T @ x.astype(np.float64)).astype(np.float64)
    expected = baselines.ease(gram, 0.4 * np.trace(gram) / 20)
    np.testing.assert_allclose(item_weights(gram, 0.0, 0.4), expected, atol=1e-10)


def test_a_spectrum_out_of_the_noise_is_solved_as_ease_solves_it() -> None:
    # One planted direction far above the edge: shrinking and the other directions hardly matter.
    rng = np.random.default_rng(1)
    direction = rng.normal(size=100)
    planted = np.outer(direction, direction) * 100.0
    edge, noise = math.sqrt(200.0) * 0.01, 0.01
    ridge = 2.0 * (edge + np.trace(planted) / 100)
    found = item_weights(planted + symmetric_noise(rng, 100, noise), noise, 2.0)
    np.testing.assert_allclose(found, baselines.ease(planted, ridge), atol=2e-4)


def test_noise_alone_gives_almost_no_weights() -> None:
    for seed in range(5):
        noise = symmetric_noise(np.random.default_rng(seed), 200, 3.0)
        # The largest eigenvalue of noise lies within O(m^(-2/3)) of the edge: a rank of one or two may stand out.
        assert np.linalg.matrix_rank(item_weights(noise, 3.0, 2.0, ease=False)) <= 3
        assert np.abs(item_weights(noise, 3.0, 2.0)).max() < 0.05
        assert np.abs(item_weights(noise + 90.0 * np.eye(200), 0.0, 0.5)).max() > 0.05  # undetected, it would stay


@pytest.mark.parametrize("ease", [True, False])
def test_planted_groups_of_items_are_found_through_the_noise(ease: bool) -> None:
    group = np.arange(90) % 3
    planted = np.where(group[:, None] == group, 6.0, 1.0)

    def right(matrix: Float64) -> float:
        """For how many items the largest weight is one of their own group."""
        matrix = matrix - np.diag(np.full(90, np.inf))
        return float(np.mean(group[matrix.argmax(axis=1)] == group))

    for seed in range(5):
        noisy = planted + symmetric_noise(np.random.default_rng(seed), 90, 8.0)
        assert right(noisy) < 0.92
        assert right(item_weights(noisy, 8.0, 2.0, ease=ease)) > 0.97


def test_what_stands_out_of_the_noise_is_shrunk_to_what_is_known_of_it() -> None:
    """A planted eigenvalue θ shows as θ + mσ²/(2θ) in directions of overlap 1 − mσ²/(2θ²): the best estimate is the
    product, θ − mσ²/(2θ) = 35 here, where the eigenvalue alone says 45 (Benaych-Georges & Nadakuditi 2011)."""
    direction = np.ones(400) / 20.0
    found = []
    for seed in range(5):
        gram = 40.0 * np.outer(direction, direction) + symmetric_noise(np.random.default_rng(seed), 400, 1.0)
        ridge = 2.0 * (math.sqrt(800.0) + max(np.trace(gram) / 400, 0.0))
        share = float(np.linalg.eigvalsh(item_weights(gram, 1.0, 2.0, ease=False))[-1])
        found.append(ridge * share / (1.0 - share))
    assert np.mean(found) == pytest.approx(35.0, rel=0.05)


def test_nobody_at_all_gives_no_weights() -> None:
    assert not item_weights(np.zeros((4, 4)), 0.0, 2.0).any()


def test_the_kept_items_are_those_of_the_largest_noisy_sums() -> None:
    algorithm = model(3)
    noisy = torch.tensor([0.1, -2.0, 5.0, 0.1, 3.0, 4.0] + [0.0] * 6)
    shared = algorithm.solve(algorithm.initial_shared(), Collected({"popularity": noisy}, 4, 0, 1.0))
    assert shared["kept"].tolist() == [2, 5, 4]
    assert {name: tuple(value.shape) for name, value in shared.items()} == {
        name: spec.shape for name, spec in algorithm.shared.items()
    }


# -- the local query --------------------------------------------------------------------------------------------------


def _ready(algorithm: PrivateFedEASE) -> Tensors:
    """Five kept items with weights."""
    rng = np.random.default_rng(3)
    return {
        "popularity": torch.tensor([(5.0 * item) % ITEMS for item in range(ITEMS)]),
        "kept": torch.tensor([6.0, 0.0, 3.0, 9.0, 1.0]),
        "weights": torch.from_numpy(rng.normal(size=(5, 5)).astype(np.float32)),
    }


@pytest.mark.parametrize("recency", [0.0, 2.0])
def test_a_query_weighs_kept_items_by_their_age_among_them(recency: float) -> None:
    algorithm = model(5, recency=recency)
    shared, kept = _ready(algorithm), [6, 0, 3, 9, 1]
    scores = algorithm.score(shared, rows([[9, 4, 6, 2], [1]])).numpy()
    older = math.exp(-1 / recency) if recency else 1.0
    weights = shared["weights"].numpy()
    np.testing.assert_allclose(scores[0, kept], older * weights[3] + weights[0], rtol=1e-5)
    np.testing.assert_allclose(scores[1, kept], weights[4], rtol=1e-5)


def test_items_that_were_not_kept_rank_below_all_kept_ones_by_noisy_popularity() -> None:
    algorithm = model(5)
    scores = algorithm.score(_ready(algorithm), rows([[9, 4, 6, 2], [1], [2, 4]])).numpy()
    kept, rest = [6, 0, 3, 9, 1], [7, 2, 4, 11, 8, 10, 5]
    for row in scores:
        assert row[rest].max() < row[kept].min()
        assert (np.diff(row[rest]) < 0).all()


def test_a_user_without_kept_items_and_everybody_after_round_one_get_the_noisy_popularity() -> None:
    algorithm = model(5)
    shared = _ready(algorithm)
    by_popularity = [9, 6, 1, 3, 0, 7, 2, 4, 11, 8, 10, 5]
    assert np.argsort(-algorithm.score(shared, rows([[2, 4], []])).numpy()[0]).tolist() == by_popularity
    shared["weights"] = torch.zeros(5, 5)
    for row in algorithm.score(shared, rows([[9, 6], []])).numpy():
        assert np.argsort(-row).tolist() == by_popularity


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"popularity_share": 1.0}, "algorithm.popularity_share=1.0: write a share"),
        ({"popularity_share": -0.1}, "algorithm.popularity_share=-0.1"),
        ({"top_items": -1}, "algorithm.top_items=-1: write how many items"),
        ({"top_items": 2.5}, "algorithm.top_items=2.5"),
        ({"top_items": 13}, "algorithm.top_items=13: the catalogue has 12 items"),
        ({"decay": 0.0}, "algorithm.decay=0.0: write 1"),
        ({"decay": 1.1}, "algorithm.decay=1.1"),
        ({"decay": math.nan}, "algorithm.decay=nan"),
        ({"recency": -1.0}, "algorithm.recency=-1.0: write 0"),
        ({"recency": math.inf}, "algorithm.recency=inf"),
        ({"regularization": 0.0}, "algorithm.regularization=0.0: write a positive"),
        ({"solver": "svd"}, "algorithm.solver='svd': write ease or low_rank"),
        ({"decays": 0.9}, "algorithm.decays: fedease_private has no such setting; did you mean algorithm.decay"),
    ],
)
def test_a_bad_setting_is_named_with_its_remedy(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PrivateFedEASE.from_config(settings, Problem(6, ITEMS, 0))


@given(st.floats(0.01, 20.0), st.integers(1, 10**6), st.integers(1, 10**5))
def test_the_rule_keeps_more_items_the_more_they_can_be_told_from_noise(mu: float, n_users: int, n_items: int) -> None:
    m = items_to_keep(mu, n_users, n_items)
    assert 1 <= m <= n_items
    assert m <= items_to_keep(2 * mu, n_users, n_items) <= items_to_keep(math.inf, n_users, n_items) == n_items
    assert m <= items_to_keep(mu, 2 * n_users, n_items)


@pytest.mark.parametrize(("mu", "share"), [(0.3, 0.1), (0.7, 0.1), (1.0, 0.05), (math.inf, 0.05)])
def test_a_small_budget_spends_more_of_itself_on_popularity(mu: float, share: float) -> None:
    algorithm = PrivateFedEASE(Problem(6, ITEMS, 0, privacy_mu=mu))
    assert algorithm.budget_shares == (share, 1.0 - share)
    assert PrivateFedEASE(Problem(6, ITEMS, 0, privacy_mu=mu), popularity_share=0.3).budget_shares == (0.3, 0.7)


def test_a_round_asks_for_one_statistic() -> None:
    algorithm = model()
    assert list(algorithm.statistics_in(0)) == ["popularity"]
    assert list(algorithm.statistics_in(1)) == ["gram"]
    assert len(algorithm.budget_shares) == algorithm.max_rounds == 2


# -- how well it recommends -------------------------------------------------------------------------------------------


def test_without_noise_and_with_all_items_it_beats_popularity_clearly() -> None:
    split = make_split(generate(SyntheticConfig(users=600, items=300, seed=4, mean_activity=40)), Protocol(), 0)
    algorithm = PrivateFedEASE(Problem(split.n_users, split.n_items, 0))
    assert algorithm.kept_items == 300
    found = hit_rate(algorithm, fitted(algorithm, split.train, np.random.default_rng(0)), split)
    popularity = baselines.evaluate_popularity(split, Protocol(), 0).metrics("test")["hr@10"]
    assert found > 1.4 * popularity


def test_a_federation_of_two_rounds_is_its_central_form_on_any_number_of_nodes(
    workspace: WorkspaceFactory, synthetic_split: Split
) -> None:
    config = {"_target_": "fedrec.algorithms.fedease_private.PrivateFedEASE", "top_items": 80}
    problem = Problem(synthetic_split.n_users, synthetic_split.n_items, 0)
    central = fitted(PrivateFedEASE(problem, top_items=80), synthetic_split.train, np.random.default_rng(0))
    for nodes in (1, 4):
        outcome = federate(workspace(config, nodes=nodes), rounds=9)
        assert len(outcome.rounds) == 2
        assert outcome.final_shared["kept"].tolist() == central["kept"].tolist()
        for name in ("popularity", "weights"):
            torch.testing.assert_close(outcome.final_shared[name], central[name], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif("FEDREC_DATA_DIR" not in os.environ, reason="needs MovieLens in FEDREC_DATA_DIR")
@pytest.mark.parametrize(
    ("name", "epsilon", "settings", "least"),
    [
        ("ml-100k", 8, {}, 0.12),
        ("ml-1m", 1, {}, 0.085),
        ("ml-1m", 4, {}, 0.125),
        ("ml-1m", 8, {}, 0.145),
        ("ml-1m", 8, {"decay": 1.0, "recency": 0.0}, 0.07),
    ],
)
def test_on_movielens_it_reaches_its_numbers(name: str, epsilon: int, settings: dict[str, Any], least: float) -> None:
    """Test HR@10, mean of three noise seeds; popularity has .084 on ML-100K and .039 on ML-1M, central EASE .141 and
    .097."""
    split = _movielens(name)
    mu = gaussian_mu(epsilon, default_delta(split.n_users))
    algorithm = PrivateFedEASE(Problem(split.n_users, split.n_items, 0, privacy_mu=mu), **settings)
    found = [
        hit_rate(algorithm, fitted(algorithm, split.train, np.random.default_rng(seed)), split) for seed in range(3)
    ]
    assert np.mean(found) >= least


_SPLITS: dict[str, Split] = {}


def _movielens(name: str) -> Split:
    if name not in _SPLITS:
        _SPLITS[name] = make_split(load_dataset(name), Protocol(), 0)
    return _SPLITS[name]
