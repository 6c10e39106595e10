"""The synthetic generator keeps to its marginals, its sampling law, and its promise of the same rows in any chunks."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from torchmetrics.functional.classification import binary_auroc

from fedrec.data import synthetic
from fedrec.data.interactions import Interactions
from fedrec.data.synthetic import MOVIELENS_100K, SyntheticConfig, calibration, generate, stream
from fedrec.data.synthetic_calibration import attribute_auc, auc, genre_r2, gini, marginals, spectrum
from fedrec.data.synthetic_draws import _choose, _race
from fedrec.data.synthetic_items import GENRES, make_catalogue
from fedrec.data.synthetic_marginals import activity_at, activity_levels, popularity_targets
from fedrec.data.synthetic_taste import _alias_tables, _expected, make_taste
from fedrec.data.synthetic_users import make_users
from fedrec.errors import ConfigError
from fedrec.random import stream as key_of
from fedrec.random import streams

SMALL = SyntheticConfig(users=300, items=120, seed=5)


@cache
def movielens_sized(seed: int = 0) -> Interactions:
    return generate(SyntheticConfig(seed=seed))


@cache
def achieved() -> dict[str, float]:
    """Mean over two seeds, so that one draw's luck with the cluster centres does not decide."""
    found = [calibration(movielens_sized(seed)) for seed in (0, 1)]
    return {key: float(np.mean([f[key] for f in found])) for key in found[0]}


def binary(data: Interactions) -> csr_matrix:
    return csr_matrix((np.ones(len(data)), (data.user, data.item)), (data.n_users, data.n_items))


# One data set, however it is read


@settings(max_examples=15, deadline=None)
@given(
    users=st.integers(1, 1300),
    items=st.integers(10, 80),
    seed=st.integers(0, 2**63 - 1),
    chunk=st.integers(1, 2000),
)
def test_chunks_are_the_whole_whatever_their_size(users: int, items: int, seed: int, chunk: int) -> None:
    config = SyntheticConfig(users=users, items=items, seed=seed, clusters=5, factors=4)
    whole, chunks = generate(config), list(stream(config, max(chunk, users // 8)))
    assert sum(c.users.height for c in chunks) == users
    for name in ("user", "item", "timestamp"):
        np.testing.assert_array_equal(np.concatenate([getattr(c, name) for c in chunks]), getattr(whole, name))
    assert whole.user_table is not None
    assert pl.concat([c.users for c in chunks]).equals(whole.user_table)
    assert [c.first_user for c in chunks] == np.cumsum([0, *[c.users.height for c in chunks[:-1]]]).tolist()


def test_another_process_generates_the_same_bytes() -> None:
    code = "from fedrec.data.synthetic import *;print(generate(SyntheticConfig(users=300, items=120, seed=5)).sha256)"
    env = os.environ | {
        "PYTHONHASHSEED": "99",
        "OMP_NUM_THREADS": "2",
        "OPENBLAS_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert told.stdout.strip() == generate(SMALL).sha256


def test_every_option_but_the_size_changes_the_rows() -> None:
    reference = generate(SMALL).sha256
    other = {
        "seed": 6,
        "mean_activity": 50.0,
        "clusters": 7,
        "factors": 9,
        "beta": 1.0,
        "niche_strength": 0.1,
        "genre_strength": 0.1,
        "gender_strength": 0.1,
        "age_strength": 0.1,
        "blend": 0.1,
        "recency_strength": 0.1,
        "order_strength": 1.0,
    }
    hashes = {key: generate(replace(SMALL, **{key: value})).sha256 for key, value in other.items()}
    assert reference not in hashes.values()
    assert len(set(hashes.values())) == len(other)


def test_memory_does_not_grow_with_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedrec.data.synthetic_taste._PAIRS", 400_000)  # the fit's share is constant, too, but slow

    def peak(users: int) -> int:
        config = SyntheticConfig(users=users, items=2000, mean_activity=20)
        tracemalloc.start()
        for _ in stream(config, 250):
            pass
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(250)  # what is loaded once is not the stream's
    assert peak(8000) < 1.1 * peak(1000)


# Sizes


@pytest.mark.parametrize(("users", "items"), [(1, 10), (20, 30), (20, 10), (1025, 10), (50, 5000)])
def test_any_size_gives_valid_histories_that_leave_items_unseen(users: int, items: int) -> None:
    data = generate(SyntheticConfig(users=users, items=items))
    assert (data.n_users, data.n_items) == (users, items)
    counts = data.histories.counts
    assert counts.min() >= 3
    assert counts.max() < items
    assert data.item_table is not None
    assert data.user_table is not None
    assert data.item_table["title"].n_unique() == items
    assert data.item_table["genres"].list.len().min() == 1
    assert set(data.item_table["genres"].explode()) <= set(GENRES)
    assert data.item_table["year"].is_between(1922, 1998).all()
    assert set(data.user_table["gender"]) <= {"F", "M"}
    assert data.user_table["age"].is_between(7, 73).all()


def test_users_of_a_tiny_catalogue_still_differ_in_activity() -> None:
    counts = generate(SyntheticConfig(users=200, items=30)).histories.counts
    assert counts.min() >= 7
    assert counts.max() <= 0.44 * 30 + 1
    assert np.unique(counts).size >= 5


def test_relative_popularity_is_kept_at_another_size() -> None:
    data = generate(SyntheticConfig(users=2000, items=2400, mean_activity=80))
    found = marginals(data.histories.counts.astype(float), np.bincount(data.item, minlength=2400).astype(float))
    for key in ("popularity_gini", "share_top_1", "share_top_10", "share_top_20"):
        assert found[key] == pytest.approx(MOVIELENS_100K[key], rel=0.04), key
    assert found["activity_q50"] == pytest.approx(65 * 80 / 106.04, abs=1)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"users": 0}, "users"),
        ({"users": 2.5}, "users"),
        ({"users": True}, "users"),
        ({"items": 9}, "items"),
        ({"seed": -1}, "seed"),
        ({"clusters": 1}, "clusters"),
        ({"clusters": 1024, "items": 10**7}, "clusters"),
        ({"mean_activity": float("nan")}, "mean_activity"),
        ({"mean_activity": 2}, "mean_activity"),
        ({"beta": "strong"}, "beta"),
        ({"blend": 1.5}, "blend"),
        ({"usres": 5}, "usres"),
    ],
)
def test_a_bad_option_is_named_with_its_remedy(options: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset\.{key}.*write"):
        SyntheticConfig.from_mapping(options)


def test_a_data_set_larger_than_memory_is_refused_before_it_is_made() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.users=2000000000 .*GiB.*fewer users"):
        generate(SyntheticConfig(users=2_000_000_000))


def test_a_chunk_of_no_users_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="chunk_users=0"):
        stream(SMALL, 0)


# Marginals


@settings(max_examples=50, deadline=None)
@given(users=st.integers(1, 4000), seed=st.integers(0, 2**40), cuts=st.lists(st.integers(1, 3999), max_size=3))
def test_activity_levels_are_evenly_spaced_in_any_chunks(users: int, seed: int, cuts: list[int]) -> None:
    whole = activity_levels(seed, 0, users, users)
    edges = [0, *sorted({c for c in cuts if c < users}), users]
    parts = [activity_levels(seed, a, b - a, users) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    for start in range(0, users, 1024):
        block = np.sort(whole[start : start + 1024])
        np.testing.assert_allclose(block, (np.arange(block.size) + 0.5) / block.size)


@settings(max_examples=100, deadline=None)
@given(items=st.integers(10, 5000), share=st.floats(0.001, 0.9), most=st.floats(1, 1e6))
def test_popularity_targets_add_up_below_the_cap(items: int, share: float, most: float) -> None:
    targets = popularity_targets(items, share * items * most, most)
    assert targets.sum() == pytest.approx(share * items * most, rel=1e-6)
    assert targets.max() <= most
    assert targets.min() > 0
    assert (np.diff(targets) >= 0).all()


@settings(max_examples=100, deadline=None)
@given(items=st.integers(10, 10**6), mean=st.floats(3, 1e6))
def test_activity_grows_with_its_level_and_leaves_items_to_recommend(items: int, mean: float) -> None:
    activity = activity_at(np.linspace(0.001, 0.999, 50), mean, items)
    assert (np.diff(activity) >= 0).all()
    assert activity.min() >= 3
    assert activity.max() < items


@pytest.mark.parametrize(
    ("key", "tolerance"),
    [
        *[(f"activity_q{q}", 0.01) for q in (0, 5, 25, 50, 75, 90, 95, 99)],
        ("activity_q100", 0.05),
        ("activity_gini", 0.01),
        ("activity_log_mean", 0.005),
        ("activity_log_sd", 0.01),
        ("popularity_q25", 0.10),
        *[(f"popularity_q{q}", 0.03) for q in (50, 75, 90, 95, 99)],
        ("popularity_q100", 0.07),
        ("popularity_gini", 0.01),
        ("items_up_to_5", 0.04),
        ("share_top_1", 0.03),
        ("share_top_10", 0.01),
        ("share_top_20", 0.01),
        ("sigma_2", 0.03),
        *[(f"sigma_{k}", 0.17) for k in (3, 4, 5)],
        *[(f"sigma_{k}", 0.07) for k in (10, 20, 50)],
        ("span_days_median", 0.2),
        ("zero_gap_share", 0.03),
        ("order_popularity_correlation", 0.06),
        ("female_share", 0.08),
        ("gender_auc", 0.07),
        ("age_auc", 0.05),
        ("genre_r2_mean", 0.3),
        ("genre_r2_max", 0.3),
    ],
)
def test_movielens_100k_is_imitated(key: str, tolerance: float) -> None:
    assert achieved()[key] == pytest.approx(MOVIELENS_100K[key], rel=tolerance)


def test_timestamps_lie_in_movielens_period() -> None:
    stamp = movielens_sized().timestamp
    assert stamp is not None
    assert stamp.min() >= 874_724_710
    assert stamp.max() <= 893_286_638


# Signals are there, and only where the configuration puts them


def ease_hit_rates(data: Interactions) -> tuple[float, float]:
    """HR@10 (full ranking, last item held out) of popularity and of EASE (Steck 2019, eq. 8; regularisation 300)."""
    train = np.zeros((data.n_users, data.n_items))
    train[data.user, data.item] = 1
    last = data.histories.items[data.histories.indptr[1:] - 1]
    rows = np.arange(data.n_users)
    train[rows, last] = 0
    inverse = np.linalg.inv(train.T @ train + 300 * np.eye(data.n_items))
    model = -inverse / np.diag(inverse)
    np.fill_diagonal(model, 0)

    def hit_rate(score: np.ndarray) -> float:
        score = np.where(train > 0, -np.inf, score)
        return float(((score >= score[rows, last][:, None]).sum(axis=1) <= 10).mean())

    return hit_rate(np.tile(train.sum(axis=0), (data.n_users, 1))), hit_rate(train @ model)


def test_taste_can_be_learned_about_as_well_as_on_movielens() -> None:
    popularity, ease = ease_hit_rates(movielens_sized())  # ML-100K: .086, .139
    assert 0.04 < popularity < 0.10
    assert 0.11 < ease < 0.18
    assert ease > 1.5 * popularity


def test_without_taste_only_popularity_is_left() -> None:
    data = generate(SyntheticConfig(beta=0.0, recency_strength=0.0))
    popularity, ease = ease_hit_rates(data)
    assert ease < 1.15 * popularity
    counts = np.bincount(data.item, minlength=data.n_items).astype(float)
    found, _, _ = spectrum(binary(data), data.histories.counts.astype(float), counts, most=2)
    assert found["sigma_2"] < 0.30  # noise of 943 × 1,682 with 100,000 ones
    assert gini(counts) == pytest.approx(MOVIELENS_100K["popularity_gini"], rel=0.02)


def test_without_attribute_strengths_items_do_not_tell_gender_or_age() -> None:
    data = generate(SyntheticConfig(gender_strength=0.0, age_strength=0.0))
    table = data.user_table
    assert table is not None
    matrix = binary(data)
    assert attribute_auc(matrix, (table["gender"] == "F").to_numpy()) == pytest.approx(0.5, abs=0.06)
    assert attribute_auc(matrix, (table["age"] >= 35).to_numpy()) == pytest.approx(0.5, abs=0.06)


def test_without_genre_strength_genres_do_not_tell_taste() -> None:
    data = generate(SyntheticConfig(genre_strength=0.0, recency_strength=0.0))
    counts = np.bincount(data.item, minlength=data.n_items).astype(float)
    _, factors, items = spectrum(binary(data), data.histories.counts.astype(float), counts, most=11)
    frequent = counts[items] >= 20
    genres = make_catalogue(SyntheticConfig(genre_strength=0.0)).genres.astype(float)
    assert genre_r2(genres[items][frequent], factors[frequent]).max() < 0.06


def test_light_users_keep_to_new_releases() -> None:
    data = movielens_sized()
    assert data.item_table is not None
    new = (data.item_table["year"] >= 1997).to_numpy()
    counts = data.histories.counts
    share = np.bincount(data.user, weights=new[data.item]) / counts
    order = np.argsort(counts)
    light, heavy = share[order[:236]].mean(), share[order[-236:]].mean()
    assert light > 3 * heavy  # ML-100K: .52 and .10


# The sampling law


@st.composite
def weight_tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    items = draw(st.integers(1, 40))
    cuts = draw(st.lists(st.integers(0, items), max_size=4))
    weight = draw(st.lists(st.floats(1e-6, 1.0), min_size=2 * items, max_size=2 * items))
    table = np.array(weight, dtype=np.float32).reshape(2, items)
    return table / table.sum(axis=1, keepdims=True), np.array([0, *sorted(cuts), items], dtype=np.int64)


@settings(max_examples=100, deadline=None)
@given(weight_tables())
def test_alias_tables_hold_exactly_the_weights(tables: tuple[np.ndarray, np.ndarray]) -> None:
    weight, starts = tables
    accept, alias = _alias_tables(weight, starts)
    for c in range(2):
        for lo, hi in pairwise(starts):
            held = np.zeros(weight.shape[1])
            for i in range(lo, hi):
                assert lo <= alias[c, i] < hi
                held[i] += accept[c, i]
                held[alias[c, i]] += 1 - accept[c, i]
            if hi > lo:
                share = weight[c, lo:hi] / weight[c, lo:hi].sum(dtype=np.float64)
                np.testing.assert_allclose(held[lo:hi] / (hi - lo), share, atol=2e-6)


def _one_kind_of_user(n: int, take: int) -> tuple[np.ndarray, np.ndarray, object]:
    """How often each item is taken by rejection and by the race, among ``n`` users who all want the same."""
    config = SyntheticConfig(users=n, items=160, seed=3, clusters=3)
    taste = make_taste(config, make_catalogue(config))
    keys = streams(key_of(1, "test"), np.arange(n))
    era = np.tile([0.5, 1.0, 2.0, 1.0, 0.3], (n, 1))
    clusters, blend = np.tile([2, 0], (n, 1)).astype(np.int64), np.tile([0.7, 0.3], (n, 1))
    indptr = np.arange(n + 1, dtype=np.int64) * take
    chosen = _choose(
        keys, indptr, clusters, blend, era, taste.weight, taste.mass, taste.starts, taste.accept, taste.alias
    )
    raced = np.empty((n, take), dtype=np.int32)
    for u in range(n):
        _race(keys[u], raced[u], taste.weight, taste.starts, clusters[u], blend[u], era[u])
    rows = chosen.reshape(n, take)
    assert all(np.unique(row).size == take for row in rows)
    expected = _expected(taste.weight, taste.starts, np.full(n, take), clusters, blend, era, np.zeros(n))
    return np.bincount(chosen, minlength=160), np.bincount(raced.ravel(), minlength=160), expected


def test_rejection_from_alias_tables_has_the_law_of_the_race() -> None:
    n, take = 6000, 20
    rejected, raced, _ = _one_kind_of_user(n, take)
    share = (rejected + raced) / (2 * n)
    z = (rejected - raced) / np.sqrt(np.maximum(2 * n * share * (1 - share), 1e-9))
    seen = share * n > 10
    assert seen.sum() > 80
    assert np.abs(z[seen]).max() < 4.5
    assert z[seen].std() == pytest.approx(1.0, abs=0.25)


def test_inclusion_probabilities_are_those_popularity_is_fitted_with() -> None:
    n, take = 6000, 20
    rejected, _, expected = _one_kind_of_user(n, take)
    assert np.asarray(expected).sum() == pytest.approx(n * take, rel=0.02)
    error = np.abs(rejected - expected) / n
    assert error.max() < 0.03
    assert error.mean() < 0.004


def test_fitted_popularity_is_what_all_users_together_choose() -> None:
    config = SyntheticConfig()
    wanted = np.exp(make_taste(config, make_catalogue(config)).log_popularity) * config.users
    got = np.bincount(movielens_sized().item, minlength=config.items)
    groups = np.array_split(np.argsort(wanted), 10)
    for group in groups:
        assert got[group].sum() == pytest.approx(wanted[group].sum(), rel=0.06)
    assert np.corrcoef(wanted, got)[0, 1] > 0.99


def test_attributes_and_clusters_are_dependent() -> None:
    users = make_users(SyntheticConfig(users=5000), 0, 5000)
    by_cluster = [users.female[users.clusters[:, 0] == c].mean() for c in range(24)]
    assert max(by_cluster) > 0.6
    assert min(by_cluster) < 0.1
    np.testing.assert_allclose(users.blend.sum(axis=1), 1)
    assert (users.clusters[:, 0] != users.clusters[:, 1]).all()


# The yardstick itself


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=60).filter(sum))
def test_gini_is_half_the_relative_mean_difference(counts: list[int]) -> None:
    x = np.array(counts, dtype=float)
    assert gini(x) == pytest.approx(np.abs(x[:, None] - x).mean() / (2 * x.mean()), abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=4).filter(lambda r: len({a for a, _ in r}) == 2))
def test_auc_agrees_with_torchmetrics(rows: list[tuple[bool, int]]) -> None:
    label, score = np.array([a for a, _ in rows]), np.array([b for _, b in rows], dtype=float)
    oracle = binary_auroc(torch.tensor(score / 20), torch.tensor(label.astype(int)))
    assert auc(label, score) == pytest.approx(float(oracle), abs=1e-6)


def test_singular_values_agree_with_a_dense_decomposition() -> None:
    data = generate(SMALL)
    dense = np.zeros((data.n_users, data.n_items))
    dense[data.user, data.item] = 1
    dense = dense[:, dense.sum(axis=0) > 0]
    scaled = dense / np.sqrt(dense.sum(axis=1, keepdims=True)) / np.sqrt(dense.sum(axis=0))
    values = np.linalg.svd(scaled, compute_uv=False)
    found = calibration(data)
    assert values[0] == pytest.approx(1)
    for k in (2, 3, 4, 5, 10, 20, 50):
        assert found[f"sigma_{k}"] == pytest.approx(values[k - 1], abs=1e-8)


def test_genre_r2_is_one_for_a_factor_of_genres_and_none_for_noise() -> None:
    rng = np.random.default_rng(0)
    genres = (rng.random((2000, 6)) < 0.3).astype(float)
    r2 = genre_r2(genres, np.column_stack([genres @ rng.normal(size=6), rng.normal(size=2000)]))
    assert r2[0] > 0.999
    assert abs(r2[1]) < 0.02


def test_too_little_data_leaves_properties_out_rather_than_failing() -> None:
    found = calibration(generate(SyntheticConfig(users=1, items=10)))
    assert found["activity_q50"] == 3
    assert math.isnan(found["gender_auc"])
    assert "sigma_2" not in found
    assert "genre_r2_mean" not in found


def movielens(folder: Path) -> Interactions:
    def table(kind: str) -> pl.DataFrame:
        frame = pl.read_csv(folder / f"ml-100k.{kind}", separator="\t", quote_char=None, infer_schema=False)
        return frame.rename({c: c.split(":")[0] for c in frame.columns})

    rows = table("inter").cast({"user_id": pl.Int32, "item_id": pl.Int32, "timestamp": pl.Int64})
    rows = rows.sort("user_id", "timestamp", maintain_order=True)
    users = table("user").cast({"user_id": pl.Int32, "age": pl.Int64}).sort("user_id")
    items = table("item").cast({"item_id": pl.Int32}).sort("item_id")
    return Interactions(
        name="ml-100k",
        user=rows["user_id"].to_numpy() - 1,
        item=rows["item_id"].to_numpy() - 1,
        user_ids=[str(u) for u in users["user_id"]],
        item_ids=[str(i) for i in items["item_id"]],
        timestamp=rows["timestamp"].to_numpy(),
        user_table=users.select("gender", "age"),
        item_table=items.select(genres=pl.col("class").str.split(" ")),
    )


def test_the_targets_are_movielens_100ks(real_data: Callable[[str], Path]) -> None:
    data = movielens(real_data("ml-100k"))
    assert ease_hit_rates(data) == pytest.approx((0.0859, 0.1389), abs=1e-4)  # quoted in docs/synthetic.md
    measured = calibration(data)
    assert measured.keys() == MOVIELENS_100K.keys()
    for key, target in MOVIELENS_100K.items():
        assert measured[key] == pytest.approx(target, abs=6e-4), key


def test_public_names_exist() -> None:
    assert all(hasattr(synthetic, name) for name in synthetic.__all__)
