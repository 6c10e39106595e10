"""Interaction inference: which items a user interacted with, guessed by an honest-but-curious server.

From one user's upload:

* :func:`from_rows`: the rows that an upload touches are its items and its negatives (the payload side channel; Chai et
  al., "Secure Federated Matrix Factorization", IEEE Intelligent Systems 2021).
* :func:`sign_attack`: under a pointwise loss the gradient of row i is (σ(s_i) − y_i)·w_i·p_u, so all rows are multiples
  of one unknown vector and the *sign* of the multiple is the label (gradient leakage in the sense of Zhu, Liu & Han,
  NeurIPS 2019; interaction-level membership as in Yuan et al., WWW 2023, here without any shadow training).

From the sum under secure aggregation: :mod:`privacy.attacks.aggregate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedrec.data.interactions import Float32, Int32
from privacy.attacks.roc import auc
from privacy.attacks.separation import best_f1, posterior
from privacy.attacks.views import UserView

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Guess:
    """An attack's answer on one upload: ``rows`` int32[t], the candidates; ``scores`` float64[t], how likely each is an
    interaction; ``items`` int32, those that the attack names."""

    user: int
    round: int
    rows: Int32
    scores: Float64
    items: Int32


def from_rows(view: UserView) -> Guess:
    """Name every row of the upload that is not zero. Against a dense, noisy upload that is the whole catalogue."""
    rows, _ = _live(view)
    return Guess(view.user, view.round, rows, np.ones(rows.size), rows)


def without_decay(values: Float32, rows: Int32, view: Float32 | None) -> Float32:
    """``values`` float32[t, w] less what weight decay alone did to them; rows that nothing else moved become zero.

    A server knows the view float32[n_items, w] that it sent, and so the multiple of it that every untouched row of a
    dense upload is: the median ratio. Noise of any size leaves nothing to recognise, and the values as they are.
    """
    if view is None or values.shape != view[rows].shape:
        return values
    sent = view[rows]
    usable = np.abs(sent) > 1e-6 * max(float(np.abs(sent).max(initial=0.0)), 1e-30)
    if not usable.any():
        return values
    decay = np.median(values[usable] / sent[usable])
    untouched = (np.abs(values - decay * sent) <= 1e-3 * abs(decay) * np.abs(sent) + 1e-9).all(axis=1)
    if untouched.mean() < 0.1:
        return values
    return np.where(untouched[:, None], np.float32(0.0), values - np.float32(decay) * sent).astype(np.float32)


def sign_attack(
    view: UserView, popularity: npt.NDArray[Any], typical: int | None = None, noise: float | None = None
) -> Guess:
    """Project the rows on their top singular vector; one side of zero are the interactions.

    Which side: the more popular one, for people interact with popular items and negatives are drawn uniformly. That cue
    is safe without noise; with noise it fails for some users late in training, when popular items stand out as
    negatives and vanish as interactions, and such a user's AUC falls below ½.

    Args:
        popularity: float[n_items], any public measure of it (counts of interactions, sales ranks turned round).
        typical: None names the whole side, right as long as every row carries a label: in sparse uploads, and in dense
            ones without noise. In a dense or padded upload under noise most rows carry none, so write a publicly known
            typical number of interactions: the rows are told from the noise by :mod:`privacy.attacks.separation`, which
            starts from that number. The scores, and so the AUC, do not depend on it.
        noise: standard deviation of the mechanism's noise on every value of the upload, a public number. None: 0, or
            where ``typical`` is given, 1.4826 times the median |projection| (most rows of such an upload are noise).
    """
    rows, values = _live(view)
    _, vectors = np.linalg.eigh(values.T @ values)
    projection = values @ vectors[:, -1]
    if noise is None:
        # A row of exact zeros says that there is no noise at all.
        noisy = typical is not None and 0 < rows.size == view.rows.size
        noise = float(1.4826 * np.median(np.abs(projection))) if noisy else 0.0
    projection *= _orientation(projection, np.log1p(np.asarray(popularity, dtype=np.float64))[rows], noise)
    if noise > 0.0 and typical is not None:
        chosen = best_f1(posterior(projection, noise, typical))
    else:
        chosen = np.flatnonzero(projection > 0.0)
    return Guess(view.user, view.round, rows, projection, rows[chosen])


def _orientation(projection: Float64, appeal: Float64, noise: float) -> float:
    """+1 when the positive side is the more popular, else −1; rows within 3 standard deviations of noise do not vote
    unless hardly any others exist."""
    up, down = projection > 3.0 * noise, projection < -3.0 * noise
    if noise > 0.0 and min(up.sum(), down.sum()) < 10:
        votes = np.clip(projection / noise, -3.0, 3.0)
        return 1.0 if votes @ (appeal - appeal.mean()) >= 0.0 else -1.0
    if not up.any() or not down.any():
        return 1.0 if up.any() else -1.0  # one label only: that of the interactions
    return 1.0 if appeal[up].mean() >= appeal[down].mean() else -1.0


def _live(view: UserView) -> tuple[Int32, Float64]:
    """The rows that are not zero: a dense upload without noise hides nothing."""
    live = view.values.any(axis=1)
    return view.rows[live], view.values[live].astype(np.float64)


def report(guesses: Sequence[Guess], truths: Sequence[npt.NDArray[Any]], n_items: int) -> dict[str, float]:
    """Means over the users of how well the guesses meet ``truths`` (one array of interactions per guess).

    Keys: ``users`` counted (those with an interaction); ``precision``, ``recall``, ``f1`` of the named items; ``auc``
    of the scores over the whole catalogue (items outside the upload come last); ``auc_rows`` over the upload's rows
    alone, NaN when all or none of them are interactions; ``random_precision``, ``random_recall``, ``random_f1``,
    the expectation for as many rows drawn blindly from the upload; ``catalogue_f1``, the same from the catalogue.
    """
    found = [_marks(g, np.unique(t), n_items) for g, t in zip(guesses, truths, strict=True) if len(t)]
    if not found:
        return {"users": 0.0}
    with np.errstate(invalid="ignore"):
        counted = {name: np.array([m[name] for m in found], dtype=np.float64) for name in found[0]}
    means = {name: float(v[~np.isnan(v)].mean()) if (~np.isnan(v)).any() else np.nan for name, v in counted.items()}
    return {"users": float(len(found)), **means}


def _marks(guess: Guess, truth: npt.NDArray[Any], n_items: int) -> dict[str, float]:
    hits = float(np.isin(guess.items, truth).sum())
    named, wanted, rows = guess.items.size, truth.size, guess.rows.size
    inside = np.isin(guess.rows, truth)
    catalogue = np.full(n_items, -np.inf)
    catalogue[guess.rows] = guess.scores
    label = np.zeros(n_items, dtype=bool)
    label[truth] = True
    # Hits of a blind draw without replacement are hypergeometric, and F1 is linear in them.
    blind = named * inside.sum() / rows if rows else 0.0
    return {
        "precision": hits / named if named else 0.0,
        "recall": hits / wanted,
        "f1": 2.0 * hits / (named + wanted),
        "auc": auc(catalogue[label], catalogue[~label]),
        "auc_rows": auc(guess.scores[inside], guess.scores[~inside]),
        "random_precision": float(blind / named) if named else 0.0,
        "random_recall": float(blind / wanted),
        "random_f1": float(2.0 * blind / (named + wanted)),
        "catalogue_f1": 2.0 * (named * wanted / n_items) / (named + wanted),
    }
