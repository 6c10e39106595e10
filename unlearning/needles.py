"""What to look for, to show that a user is gone: byte strings that only that user's data can have put into a file.

A vector (user embedding, a row of a personal view, an update): its float32 and its float16 form in pieces of 16 bytes,
and its numbers written out as text. A piece that also stands in data that stay, or that has hardly anything in it,
would prove nothing: it is left out and counted as undecided. Histories: :mod:`unlearning.needles_history`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from unlearning.needle_scan import SHORTEST, Needles

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
UInt64 = npt.NDArray[np.uint64]
_MANY = 4096  # vectors; of more, only the beginnings are looked for


def of_vectors(kind: str, vectors: npt.ArrayLike, public: Iterable[Float32] = ()) -> Needles:
    """Needles for the vectors of forgotten users, float32[n, width].

    ``public`` are arrays whose pieces are nobody's own (initial values, say). Pieces that two of the vectors share are
    undecided too: what two users have in common is not either's. Of more than 4,096 vectors (the rows of personal
    views) only each one's first piece is looked for, and no text.
    """
    rows = np.ascontiguousarray(vectors, dtype="<f4")
    rows = rows.reshape(rows.shape[0], -1) if rows.ndim > 1 else rows.reshape(1, -1)
    many = rows.shape[0] > _MANY
    known = [np.ascontiguousarray(array, dtype="<f4").reshape(array.shape[0], -1) for array in public if array.size]
    parts = []
    for form, itemsize in (("<f4", 4), ("<f2", 2)):
        with np.errstate(over="ignore"):
            pieces, poor = _pieces(rows.astype(form), SHORTEST // itemsize, first=many)
            stay = [_pieces(array.astype(form), SHORTEST // itemsize)[0] for array in known]
        own = _unshared(pieces, np.concatenate(stay) if stay else pieces[:0])
        parts.append(Needles.equal(kind, pieces[own], poor + int((~own).sum())))
    return Needles.together(parts if many else [*parts, _of_text(kind, rows, known)])


def _pieces(rows: npt.NDArray[np.floating[Any]], per: int, first: bool = False) -> tuple[UInt8, int]:
    """Stretches of ``per`` neighbours, side by side, with at least three different values that are not zero (and of
    what is left at the end of a row, the row's last ``per``); uint8[n, 16], and how many had too little in them."""
    width = rows.shape[1]
    if width < per:
        return np.zeros((0, SHORTEST), np.uint8), rows.shape[0]
    begins = sorted({*range(0, width - per + 1, per), width - per})
    cut = np.stack([rows[:, b : b + per] for b in begins[: 1 if first else None]], axis=1).reshape(-1, per)
    ordered = np.sort(cut, axis=1)
    different = (np.diff(ordered, axis=1) != 0).sum(axis=1) + 1 - (cut == 0).any(axis=1)
    rich = (different >= 3) & np.isfinite(cut).all(axis=1)
    found = np.ascontiguousarray(cut[rich])
    return found.view(np.uint8).reshape(-1, SHORTEST), int((~rich).sum())


def _unshared(pieces: UInt8, known: UInt8) -> npt.NDArray[np.bool_]:
    mine, theirs = fingerprint(pieces), fingerprint(known)
    _, which, often = np.unique(mine, return_inverse=True, return_counts=True)
    own: npt.NDArray[np.bool_] = (often[which] == 1) & ~np.isin(mine, theirs)
    return own


def fingerprint(pieces: UInt8) -> UInt64:
    """64 bits of a piece of any length that is a multiple of 8, uint64[n]."""
    words = np.ascontiguousarray(pieces).view("<u8").reshape(pieces.shape[0], pieces.shape[1] // 8).astype(np.uint64)
    mixed = np.zeros(words.shape[0], dtype=np.uint64)
    for column in words.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def _of_text(kind: str, rows: Float32, known: list[Float32]) -> Needles:
    """The first three different numbers of a vector, as JSON and as NumPy's float32 would write them."""
    nobodys = {tuple(row[:3].tolist()) for array in known for row in array}
    strings: dict[bytes, int] = {}
    for row in rows:
        values = row[:3]
        if np.isfinite(values).all() and np.unique(values[values != 0]).size == 3:
            for numbers in ([json.dumps(float(v)) for v in values], [str(v) for v in values]):
                for mark in (", ", ",", " "):
                    text = mark.join(numbers).encode()
                    strings[text] = 2 if tuple(values.tolist()) in nobodys else strings.get(text, 0) + 1
    return Needles.of(kind, sorted(text for text, often in strings.items() if often == 1 and len(text) >= 24))
