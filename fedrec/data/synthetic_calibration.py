"""Properties of a data set that a generator should reproduce: skew, spectrum, sessions, what attributes reveal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix, diags
from scipy.sparse.linalg import svds
from scipy.stats import rankdata

from fedrec.data.interactions import Interactions
from fedrec.random import permutation, stream

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

_SINGULAR_VALUES = (2, 3, 4, 5, 10, 20, 50)
_ADULT_AGE = 35
_RIDGE = 200.0  # penalty of the attribute ridge; close to the best for both attributes on MovieLens-100K
_MOST_USERS = 2000  # users (evenly spaced) whose attributes are predicted; the rest would cost cubic time
_MOST_ORDERED = 20_000  # users (evenly spaced) whose order is correlated with popularity
_GENRE_FACTORS = 10
_GENRE_LEAST = 20  # interactions an item needs for its factors to be more than noise
_FOLDS = 5


# calibration() of the real data set, measured.
MOVIELENS_100K: Mapping[str, float] = {
    "activity_q0": 20.0,
    "activity_q5": 21.0,
    "activity_q25": 33.0,
    "activity_q50": 65.0,
    "activity_q75": 148.0,
    "activity_q90": 244.4,
    "activity_q95": 310.6,
    "activity_q99": 442.54,
    "activity_q100": 737.0,
    "activity_gini": 0.4719,
    "activity_log_mean": 4.2742,
    "activity_log_sd": 0.8779,
    "popularity_q5": 1.0,
    "popularity_q25": 6.0,
    "popularity_q50": 27.0,
    "popularity_q75": 80.0,
    "popularity_q90": 169.0,
    "popularity_q95": 229.85,
    "popularity_q99": 369.09,
    "popularity_q100": 583.0,
    "popularity_gini": 0.629,
    "items_up_to_5": 384.0,
    "items_without_interactions": 0.0,
    "share_top_1": 0.0726,
    "share_top_10": 0.427,
    "share_top_20": 0.6462,
    "sigma_2": 0.6465,
    "sigma_3": 0.4936,
    "sigma_4": 0.4556,
    "sigma_5": 0.3969,
    "sigma_10": 0.3088,
    "sigma_20": 0.253,
    "sigma_50": 0.1964,
    "span_days_median": 0.0343,
    "span_days_q75": 8.5636,
    "zero_gap_share": 0.5104,
    "tied_last_share": 0.4401,
    "order_popularity_correlation": -0.2217,
    "female_share": 0.2895,
    "gender_auc": 0.7716,
    "age_auc": 0.8673,
    "genre_r2_mean": 0.1348,
    "genre_r2_max": 0.3862,
}


def gini(counts: npt.ArrayLike) -> float:
    """Gini coefficient of non-negative counts: 0 all equal, towards 1 all in one."""
    x = np.sort(np.asarray(counts, dtype=np.float64))
    return float((2 * np.arange(1, x.size + 1) - x.size - 1) @ x / (x.size * x.sum()))


def auc(label: Bool, score: Float64) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted half."""
    positive = int(label.sum())
    ranks = rankdata(score)
    return float((ranks[label].sum() - positive * (positive + 1) / 2) / (positive * (label.size - positive)))


def _fold(purpose: str, n: int) -> Int64:
    return permutation(stream(0, purpose), n) % _FOLDS


def attribute_auc(matrix: csr_matrix, label: Bool) -> float:
    """AUC of a 5-fold cross-validated ridge from a user's items to an attribute; NaN with under 5 of either class.

    ``matrix`` is binary [users, items], ``label`` bool[users]. Solved in the dual, [users, users].
    """
    if min(int(label.sum()), int((~label).sum())) < _FOLDS:
        return float("nan")
    gram = (matrix @ matrix.T).toarray()
    target = label.astype(np.float64)
    fold, score = _fold("calibration/users", label.size), np.zeros(label.size)
    for k in range(_FOLDS):
        train, test = fold != k, fold == k
        mean = target[train].mean()
        dual = np.linalg.solve(gram[np.ix_(train, train)] + _RIDGE * np.eye(int(train.sum())), target[train] - mean)
        score[test] = gram[np.ix_(test, train)] @ dual + mean
    return auc(label, score)


def genre_r2(genres: Float64, factors: Float64) -> Float64:
    """Cross-validated R² (5 folds, ridge 1) of each item factor from the genres: float64[factors.shape[1]].

    ``genres`` float64[items, genres] of 0 and 1; ``factors`` float64[items, k], standardised here.
    """
    design = np.column_stack([genres, np.ones(len(genres))])
    target = (factors - factors.mean(axis=0)) / np.maximum(factors.std(axis=0), 1e-12)
    fold, residual = _fold("calibration/items", len(genres)), np.zeros_like(target)
    for k in range(_FOLDS):
        train, test = fold != k, fold == k
        gram = design[train].T @ design[train] + np.eye(design.shape[1])
        residual[test] = target[test] - design[test] @ np.linalg.solve(gram, design[train].T @ target[train])
    result: Float64 = 1 - (residual**2).mean(axis=0) / np.maximum(target.var(axis=0), 1e-12)
    return result


def _binary(interactions: Interactions) -> csr_matrix:
    shape = (interactions.n_users, interactions.n_items)
    return csr_matrix((np.ones(len(interactions)), (interactions.user, interactions.item)), shape)


def marginals(activity: Float64, popularity: Float64) -> dict[str, float]:
    """Quantiles and skew of interactions per user, float64[users], and per item, float64[items]."""
    found = {f"activity_q{q}": float(np.percentile(activity, q)) for q in (0, 5, 25, 50, 75, 90, 95, 99, 100)}
    found["activity_gini"] = gini(activity)
    logs = np.log(activity[activity > 0])
    found["activity_log_mean"], found["activity_log_sd"] = float(logs.mean()), float(logs.std())
    found |= {f"popularity_q{q}": float(np.percentile(popularity, q)) for q in (5, 25, 50, 75, 90, 95, 99, 100)}
    found["popularity_gini"] = gini(popularity)
    found["items_up_to_5"] = float((popularity <= 5).sum())
    found["items_without_interactions"] = float((popularity == 0).sum())
    descending = np.sort(popularity)[::-1]
    for percent in (1, 10, 20):
        top = max(1, popularity.size * percent // 100)
        found[f"share_top_{percent}"] = float(descending[:top].sum() / descending.sum())
    return found


def spectrum(
    matrix: csr_matrix, activity: Float64, popularity: Float64, most: int = 51
) -> tuple[dict[str, float], Float64, Int64]:
    """The first ``most`` singular values of D_u^-½ A D_i^-½ (the first is 1); right factors 2 … 11 divided by
    √popularity, float64[items, 10 or fewer]; and the codes of those items, the ones with interactions."""
    users, items = activity > 0, popularity > 0
    factors = np.zeros((int(items.sum()), 0))
    rank = min(most, min(int(users.sum()), int(items.sum())) - 1)
    if rank < 1:
        return {}, factors, np.flatnonzero(items)
    matrix = matrix[users][:, items]
    normalised = diags(activity[users] ** -0.5) @ matrix @ diags(popularity[items] ** -0.5)
    start = np.sqrt(popularity[items] if normalised.shape[0] >= normalised.shape[1] else activity[users])
    _, values, right = svds(normalised.tocsc(), rank, v0=start + 0.1 * np.cos(np.arange(start.size)))
    order = np.argsort(-values)
    found = {f"sigma_{k}": float(values[order[k - 1]]) for k in _SINGULAR_VALUES if k <= rank}
    factors = right[order[1 : 1 + _GENRE_FACTORS]].T / np.sqrt(popularity[items])[:, None]
    return found, factors, np.flatnonzero(items)


def _time(interactions: Interactions, popularity: Float64) -> dict[str, float]:
    stamp, user = interactions.timestamp, interactions.user
    if stamp is None:
        return {}
    indptr = interactions.histories.indptr
    rows = np.flatnonzero(np.diff(indptr) > 0)
    span = stamp[indptr[rows + 1] - 1] - stamp[indptr[rows]]
    gap = np.diff(stamp)[np.diff(user) == 0]
    log_popularity = np.log(popularity[interactions.item])
    correlations = []
    for u in rows[:: max(1, rows.size // _MOST_ORDERED)]:
        window = log_popularity[indptr[u] : indptr[u + 1]]
        if window.size > 2 and window.std() > 0:
            correlations.append(np.corrcoef(np.arange(window.size), window)[0, 1])
    return {
        "span_days_median": float(np.median(span)) / 86400,
        "span_days_q75": float(np.percentile(span, 75)) / 86400,
        "zero_gap_share": float((gap == 0).mean()) if gap.size else float("nan"),
        "tied_last_share": float((_last_gap(stamp, indptr, rows) == 0).mean()),
        "order_popularity_correlation": float(np.mean(correlations)) if correlations else float("nan"),
    }


def _last_gap(stamp: Int64, indptr: Int64, rows: Int64) -> Int64:
    """Time between the last two interactions of the users ``rows`` that have two: int64."""
    rows = rows[indptr[rows + 1] - indptr[rows] > 1]
    return stamp[indptr[rows + 1] - 1] - stamp[indptr[rows + 1] - 2]


def calibration(interactions: Interactions) -> Mapping[str, float]:
    """Every property of docs/synthetic.md that the data allow, by name; timestamps must be in seconds.

    Quantiles of interactions per user and item, Gini coefficients, share of the top items, degree-normalised
    singular values, time, cross-validated ridge AUC of gender (F) and age (35 or more) from a user's items (on at
    most 2,000 users), and R² of the item factors 2 … 11 from the genres (items with 20 interactions or more). A
    property that the data are too small for is left out or NaN.
    """
    matrix = _binary(interactions)
    activity = np.asarray(matrix.sum(axis=1)).ravel()
    popularity = np.asarray(matrix.sum(axis=0)).ravel()
    found = marginals(activity, popularity)
    values, factors, items = spectrum(matrix, activity, popularity)
    found |= values
    found |= _time(interactions, popularity)

    users = interactions.user_table
    if users is not None:
        rows = np.unique(np.linspace(0, users.height - 1, min(users.height, _MOST_USERS)).astype(np.int64))
        if "gender" in users.columns:
            female = (users["gender"] == "F").to_numpy()
            found["female_share"] = float(female.mean())
            found["gender_auc"] = attribute_auc(matrix[rows], female[rows])
        if "age" in users.columns:
            found["age_auc"] = attribute_auc(matrix[rows], users["age"].to_numpy()[rows] >= _ADULT_AGE)
    table = interactions.item_table
    if table is not None and "genres" in table.columns:
        frequent = popularity[items] >= _GENRE_LEAST
        if frequent.sum() >= 2 * _FOLDS and factors.shape[1]:
            lists = [set(g) for g in table["genres"].to_list()]
            names = sorted(set().union(*lists))
            flags = np.array([[n in g for n in names] for g in lists], dtype=np.float64)
            r2 = genre_r2(flags[items][frequent], factors[frequent])
            found |= {"genre_r2_mean": float(r2.mean()), "genre_r2_max": float(r2.max())}
    return found
