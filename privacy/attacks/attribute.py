"""Attribute inference: gender or age group of a user from what the server sees of that user.

Weinsberg, Bhagat, Ioannidis & Taft, "BlurMe: inferring and obfuscating user gender based on ratings" (RecSys 2012)
infer gender from the item lists that a recommender keeps; here the features come from an upload. The attacker is
assumed to know the attribute of some users (an auxiliary set) and learns a ridge classifier from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from fedrec import random
from fedrec.data.interactions import Float32, UserItems
from fedrec.errors import DataError
from privacy.attacks.interaction import Guess
from privacy.attacks.roc import Area, delong

Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
_PENALTIES = 10.0 ** np.arange(-2.0, 2.5, 0.5)  # times the mean eigenvalue, so that no feature's unit matters


@dataclass(frozen=True)
class AttributeInference:
    """``area``: AUC over all users, each scored by a classifier that never saw them; ``scores`` float64[users];
    ``positives`` and ``users`` count the labels."""

    area: Area
    scores: Float64
    positives: int
    users: int


def row_features(row_sets: UserItems, n_items: int) -> Float32:
    """float32[users, n_items]: the indicator of a user's uploaded rows, scaled to a Euclidean norm of 1 per user."""
    features = np.zeros((row_sets.n_users, n_items), dtype=np.float32)
    features[row_sets.users, row_sets.items] = (1.0 / np.sqrt(np.maximum(row_sets.counts, 1)))[row_sets.users]
    return features


def score_features(guesses: Sequence[Guess], n_items: int) -> Float32:
    """float32[users, n_items]: the sign attack's scores, scaled to a Euclidean norm of 1 per user; 0 elsewhere."""
    features = np.zeros((len(guesses), n_items), dtype=np.float32)
    for row, guess in zip(features, guesses, strict=True):
        row[guess.rows] = guess.scores / max(float(np.linalg.norm(guess.scores)), 1e-30)
    return features


def gender_labels(user_table: pl.DataFrame | None) -> tuple[Bool, Bool]:
    """(known, female), bool[users] each. DataError when the data set has no column ``gender``."""
    column = _column(user_table, "gender")
    first = column.str.to_uppercase().str.slice(0, 1)
    return first.is_in(["F", "M"]).fill_null(False).to_numpy(), (first == "F").fill_null(False).to_numpy()


def age_labels(user_table: pl.DataFrame | None, threshold: int = 35) -> tuple[Bool, Bool]:
    """(known, age ≥ threshold), bool[users] each. DataError when the data set has no numeric column ``age``."""
    column = _column(user_table, "age")
    if not column.dtype.is_numeric():
        raise DataError(
            f"user table: column age is {column.dtype}, not a number; map it to years or to codes of groups"
        )
    return column.is_not_null().to_numpy(), (column >= threshold).fill_null(False).to_numpy()


def infer_attribute(features: npt.NDArray[Any], labels: Bool, seed: int, folds: int = 10) -> AttributeInference:
    """Cross-validated ridge classification (labels ±1, balanced): out-of-fold scores and their AUC.

    Args:
        features: float[users, D]; centred on each training part, in whatever unit.
        labels: bool[users].
        seed: addresses the permutation that deals users, stratified by label, into ``folds``.

    The penalty is chosen inside each training part by its leave-one-out error (Golub, Heath & Wahba 1979; closed form).
    Scores are standardised per fold, since every fold's classifier has its own scale.

    Raises:
        DataError: fewer than ``folds`` users with, or without, the attribute.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=bool)
    users, positives = y.size, int(y.sum())
    if min(positives, users - positives) < folds:
        raise DataError(
            f"attribute inference: {positives} of {users} users have the attribute; cross-validation in {folds} folds "
            "needs that many with and without it, write fewer folds or take a larger data set"
        )
    order = random.permutation(random.stream(seed, "attribute-folds"), users)
    order = order[np.argsort(y[order], kind="stable")]
    fold = np.empty(users, dtype=np.int64)
    fold[order] = np.arange(users) % folds
    kernel = x @ x.T
    scores = np.empty(users)
    for k in range(folds):
        test = fold == k
        found = _ridge_scores(kernel, y, ~test, test)
        scores[test] = (found - found.mean()) / max(float(found.std()), 1e-30)
    return AttributeInference(delong(scores[y], scores[~y]), scores, positives, users)


def _ridge_scores(kernel: Float64, y: Bool, train: Bool, test: Bool) -> Float64:
    """Scores of the test users by kernel ridge regression, the penalty chosen by leave-one-out on the training ones."""
    inner = kernel[np.ix_(train, train)]
    outer = kernel[np.ix_(test, train)]
    mean = inner.mean(axis=0)
    inner = inner - mean - mean[:, None] + mean.mean()  # the kernel of features centred on the training users
    outer = outer - outer.mean(axis=1, keepdims=True) - mean + mean.mean()
    share = y[train].mean()
    target = np.where(y[train], 1.0 / share, -1.0 / (1.0 - share))  # both groups weigh the same; mean 0
    values, vectors = np.linalg.eigh(inner)
    values = np.maximum(values, 0.0)
    rotated = vectors.T @ target
    best, chosen = np.inf, np.zeros_like(target)
    for penalty in _PENALTIES * max(float(values.mean()), 1e-30):
        weight = 1.0 / (values + penalty)
        dual = vectors @ (weight * rotated)
        left_out = dual / (vectors**2 @ weight)  # residuals as if each user had been left out
        error = float((left_out**2).mean())
        if error < best:
            best, chosen = error, dual
    return np.asarray(outer @ chosen)


def _column(user_table: pl.DataFrame | None, name: str) -> pl.Series:
    if user_table is None or name not in user_table.columns:
        there = ", ".join(user_table.columns) if user_table is not None else "no user table"
        raise DataError(
            f"attack=attribute needs a column {name} for every user, the data set has {there}; name it in "
            f"dataset.users.columns.{name}, or choose another attack"
        )
    return user_table[name]
