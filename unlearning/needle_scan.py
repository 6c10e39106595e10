"""A set of byte strings, and the kernel that finds all of them in one pass over a block of bytes.

Every needle has at least 16 bytes. The first 16 of each make a 64-bit key; a bit table of the keys decides for almost
every position of a block that nothing begins there, a binary search among the keys and a comparison of all bytes settle
the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit, uint64

SHORTEST = 16  # bytes of a needle
_MOST = 4096  # findings of one block
UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Needles:
    """Byte strings to look for: needle ``k`` is ``data[start[k]:start[k + 1]]``, of the kind ``kinds[kind[k]]``.

    ``undecided`` counts those that were left out because finding them would prove nothing.
    """

    data: UInt8
    start: Int64
    kind: npt.NDArray[np.int32]
    kinds: tuple[str, ...]
    undecided: int = 0

    @classmethod
    def none(cls, undecided: int = 0) -> Needles:
        return cls(np.zeros(0, np.uint8), np.zeros(1, np.int64), np.zeros(0, np.int32), (), undecided)

    @classmethod
    def equal(cls, kind: str, rows: UInt8, undecided: int = 0) -> Needles:
        """Needles of one kind and length, uint8[n, length ≥ 16]."""
        if not rows.size:
            return cls.none(undecided)
        start = np.arange(rows.shape[0] + 1, dtype=np.int64) * rows.shape[1]
        return cls._checked(
            cls(np.ascontiguousarray(rows).ravel(), start, np.zeros(rows.shape[0], np.int32), (kind,), undecided)
        )

    @classmethod
    def of(cls, kind: str, strings: Sequence[bytes], undecided: int = 0) -> Needles:
        """Needles of one kind, of any length from 16 bytes."""
        if not strings:
            return cls.none(undecided)
        start = np.concatenate([[0], np.cumsum([len(one) for one in strings])]).astype(np.int64)
        data = np.array(np.frombuffer(b"".join(strings), dtype=np.uint8))
        return cls._checked(cls(data, start, np.zeros(len(strings), np.int32), (kind,), undecided))

    @classmethod
    def together(cls, parts: Iterable[Needles]) -> Needles:
        """All of ``parts``."""
        all_parts = list(parts)
        starts, kinds, offset = [np.zeros(1, np.int64)], [np.zeros(0, np.int32)], 0
        names: list[str] = []
        for part in all_parts:
            starts.append(part.start[1:] + offset)
            kinds.append((part.kind + len(names)).astype(np.int32))
            names += part.kinds
            offset += part.data.size
        data = np.concatenate([np.zeros(0, np.uint8), *(part.data for part in all_parts)])
        undecided = sum(part.undecided for part in all_parts)
        return cls(data, np.concatenate(starts), np.concatenate(kinds), tuple(names), undecided)

    @classmethod
    def _checked(cls, made: Needles) -> Needles:
        if int(np.diff(made.start).min()) < SHORTEST:
            raise ValueError(f"a needle has at least {SHORTEST} bytes")
        if not made.data[made.start[:-1, None] + np.arange(SHORTEST)].any(axis=1).all():
            raise ValueError("a needle that begins with 16 zeros is in every file")
        return made

    def __len__(self) -> int:
        return self.kind.size


class Scanner:
    """The needles as the kernel wants them: ordered by key, and the bit table."""

    def __init__(self, needles: Needles) -> None:
        self.needles = needles
        sizes = np.diff(needles.start)
        self.longest = int(sizes.max(initial=SHORTEST))
        at = needles.start[:-1, None] + np.arange(SHORTEST)
        words = (
            np.ascontiguousarray(needles.data[at]).view("<u8").reshape(-1, 2)
            if len(needles)
            else np.zeros((0, 2), "<u8")
        )
        keys = _keys(words[:, 0].astype(np.uint64), words[:, 1].astype(np.uint64))
        self.order = np.argsort(keys, kind="stable")
        self.keys = keys[self.order]
        self.begin, self.size = needles.start[:-1][self.order], sizes[self.order]
        self.shift = 64 - min(26, max(12, int(np.ceil(np.log2(max(1, 32 * len(needles)))))))
        used = np.zeros(1 << (64 - self.shift), dtype=np.bool_)
        used[(self.keys >> np.uint64(self.shift)).astype(np.int64)] = True
        self.bits = np.packbits(used, bitorder="little")

    def find(self, block: bytes, fresh: int) -> list[tuple[int, str]]:
        """Offsets and kinds of the needles that begin in the first ``fresh`` bytes."""
        if not len(self.needles) or len(block) < SHORTEST:
            return []
        place, which = np.empty(_MOST, np.int64), np.empty(_MOST, np.int64)
        found = _scan(
            np.frombuffer(block, np.uint8), fresh, self.bits, np.uint64(self.shift), self.keys, self.begin, self.size,
            self.needles.data, place, which,
        )  # fmt: skip
        kinds = self.needles.kind[self.order[which[:found]]]
        return [(int(at), self.needles.kinds[kind]) for at, kind in zip(place[:found], kinds, strict=True)]


@njit(uint64(uint64, uint64), cache=True, inline="always")
def _key(low: np.uint64, high: np.uint64) -> np.uint64:
    mixed = (low ^ (high * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)


@njit(cache=True)
def _keys(low: npt.NDArray[np.uint64], high: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    out = np.empty(low.size, dtype=np.uint64)
    for i in range(low.size):
        out[i] = _key(low[i], high[i])
    return out


@njit(cache=True)
def _scan(
    block: UInt8, fresh: int, bits: UInt8, shift: np.uint64, keys: npt.NDArray[np.uint64],
    begin: Int64, size: Int64, data: UInt8, place: Int64, which: Int64,
) -> int:  # fmt: skip
    """Needles that begin in the first ``fresh`` bytes: offsets and positions in key order, up to ``place.size``."""
    eight, top = np.uint64(8), np.uint64(56)
    low, high = np.uint64(0), np.uint64(0)
    for i in range(8):
        low = (low >> eight) | (np.uint64(block[i]) << top)
    for i in range(8, 16):
        high = (high >> eight) | (np.uint64(block[i]) << top)
    found = 0
    last = min(fresh, block.size - 15)
    for i in range(last):
        if i:
            low = (low >> eight) | (np.uint64(block[i + 7]) << top)
            high = (high >> eight) | (np.uint64(block[i + 15]) << top)
        if low == 0 and high == 0:
            continue
        key = _key(low, high)
        bit = np.int64(key >> shift)
        if not (bits[bit >> 3] >> np.uint8(bit & 7)) & 1:
            continue
        k = np.searchsorted(keys, key)
        while k < keys.size and keys[k] == key:
            length = size[k]
            same = i + length <= block.size
            j = 0
            while same and j < length:
                same = block[i + j] == data[begin[k] + j]
                j += 1
            if same and found < place.size:
                place[found], which[found] = i, k
                found += 1
            k += 1
    return found
