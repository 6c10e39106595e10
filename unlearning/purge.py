"""The proof of purge: after somebody was forgotten, no file of the run directory holds what was theirs.

What it proves: none of the byte strings of :mod:`unlearning.needles` lies in any file, archives unpacked, at the time
it was made. What it cannot: it knows no encryption, no image, no other packing of numbers than those it names, and no
file outside of the folder (a backup, a copy, the data set itself).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedrec.data.split import Split
from fedrec.errors import DataError
from unlearning.needle_scan import Needles
from unlearning.needles import of_vectors
from unlearning.needles_history import of_history
from unlearning.search import Finding, extents, files_below, search

__all__ = ["Finding", "Needles", "PurgeProof", "hash_tree", "planted", "purge_proof", "replace_file", "wipe"]

Float32 = npt.NDArray[np.float32]
_BLOCK = 2**16
_WORD = re.compile(rb"[A-Za-z0-9_]+")


@dataclass(frozen=True)
class PurgeProof:
    """What was searched for and where. ``undecided`` needles stand in data that stay as well, or say too little.

    ``listing`` is the SHA-256 of the searched files' names and sizes.
    """

    files: int
    bytes: int
    needles: int
    undecided: int
    findings: tuple[Finding, ...]
    listing: str

    @property
    def ok(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """For the audit log: counts, hashes and places, nothing of what was searched for."""
        first = [{"file": one.file[-200:], "offset": one.offset, "what": one.what} for one in self.findings[:20]]
        return {
            "ok": self.ok, "files": self.files, "bytes": self.bytes, "needles": self.needles,
            "undecided": self.undecided, "listing": self.listing, "findings": len(self.findings), "first": first,
        }  # fmt: skip


def purge_proof(
    folder: Path, before: Split, after: Split, *, vectors: Mapping[str, npt.ArrayLike] | None = None,
    public: Iterable[Float32] = (), raw_ids: Sequence[str] = (), stored: Sequence[Needles] = (),
) -> PurgeProof:  # fmt: skip
    """Search all files below ``folder`` for what ``before`` has and ``after`` has not.

    Args:
        vectors: by name, float32[n, width] of the forgotten users as they were: embeddings, rows of personal views that
            were not zero, undo copies of either.
        public: arrays that are nobody's own, such as initial values; what they share with ``vectors`` proves nothing.
        raw_ids: the data source's ids of forgotten users, searched as whole words of text files.
        stored: further needles, such as those of an update store from before it was purged.

    Raises:
        DataError: a file that cannot be read.
    """
    known = list(public)
    parts = [of_history(before, after), *(of_vectors(name, rows, known) for name, rows in (vectors or {}).items())]
    needles = Needles.together([*parts, *stored])
    found = search(folder, needles)
    named = {raw for raw in raw_ids if _unmistakable(raw)}
    findings = [*found.findings, *(_find_ids(folder, named) if named else ())]
    listing = hashlib.sha256(json.dumps(found.files).encode()).hexdigest()
    undecided = needles.undecided + len(set(raw_ids)) - len(named)
    return PurgeProof(len(found.files), found.bytes, len(needles) + len(named), undecided, tuple(findings), listing)


def planted(folder: Path, values: Mapping[str, bytes]) -> tuple[Finding, ...]:
    """Where below ``folder`` the given byte strings lie, each of at least 16 bytes: planted values, say."""
    return search(folder, Needles.together(Needles.of(name, [value]) for name, value in values.items())).findings


def _unmistakable(raw: str) -> bool:
    """Whether finding this word means finding the user. "7" is also a count, "adam" an optimizer."""
    return (len(raw) >= 6 and not raw.isdigit()) or len(raw) >= 9


def _find_ids(folder: Path, ids: set[str]) -> list[Finding]:
    """Whole words of text files that are one of ``ids``."""
    encoded = {raw.encode() for raw in ids}
    plain = {raw for raw in encoded if _WORD.fullmatch(raw)}
    odd = sorted(encoded - plain, key=len, reverse=True)
    pattern = re.compile(rb"(?<![A-Za-z0-9_])(?:" + b"|".join(map(re.escape, odd)) + rb")(?![A-Za-z0-9_])")
    findings = []
    for path in sorted(files_below(folder)):
        with path.open("rb") as file:
            if b"\0" in file.read(8192):
                continue
            file.seek(0)
            text = file.read()
        name = path.relative_to(folder).as_posix()
        places = [match.start() for match in _WORD.finditer(text) if match.group() in plain]
        places += [match.start() for match in pattern.finditer(text)] if odd else []
        findings += [Finding(name, place, "raw id of a user") for place in sorted(places)]
    return findings


# -- hashes -------------------------------------------------------------------------------------------------------


def hash_tree(folder: Path, *patterns: str) -> str:
    """SHA-256 over names and contents of the files below ``folder`` (those that match one of ``patterns``, if any are
    given; as ``fnmatch`` on the relative path).

    Blocks of zeros count by their place only, so that a sparse file is hashed by what it stores and equals a copy of it
    that stores the zeros.
    """
    total = hashlib.sha256()
    named = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    for name in sorted(named):
        if patterns and not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        path = named[name]
        try:
            total.update(json.dumps([name, path.stat().st_size, _hash_file(path)]).encode() + b"\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); make it readable") from None
    return total.hexdigest()


def _hash_file(path: Path) -> str:
    digest, done = hashlib.sha256(), 0
    zeros = bytes(_BLOCK)
    with path.open("rb", buffering=0) as file:
        for begin, end in extents(file):
            position = max(done, begin - begin % _BLOCK)
            file.seek(position)
            while position < end:
                block = file.read(_BLOCK)
                if not block:
                    break
                if block != zeros[: len(block)]:
                    digest.update(position.to_bytes(8, "little") + block)
                position += len(block)
            done = max(done, position)
    return digest.hexdigest()


# -- erasure ------------------------------------------------------------------------------------------------------


def wipe(path: Path) -> None:
    """Overwrite a file (or all files below a folder) with zeros, sync, then remove it. Missing: nothing happens.

    On a file system that copies on write or journals data (btrfs, ZFS, APFS), on flash memory that levels wear, and
    where there are snapshots or backups, the old blocks can outlive this: there only an encrypted disk whose key is
    destroyed helps. A link is removed, not what it names.

    Raises:
        DataError: it cannot be overwritten, or other names (hard links) show the same data.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        for inner in sorted(path.iterdir()):
            wipe(inner)
        path.rmdir()
        return
    if path.is_symlink():
        path.unlink()
        return
    try:
        with path.open("r+b", buffering=0) as file:
            if os.fstat(file.fileno()).st_nlink > 1:
                raise DataError(f"{path}: another name (a hard link) shows the same data; remove that one first")
            _overwrite(file)
        path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(
            f"{path}: cannot be erased ({error.strerror or error}); make it writable, then ask again"
        ) from None


def replace_file(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Put ``content`` in place of a file, whole or not at all; the old bytes are overwritten once the new ones stand.

    ``sync`` False leaves it to the system when the new bytes reach the disk.
    """
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    old = path.open("r+b", buffering=0) if path.exists() else None
    try:
        os.replace(temporary, path)
        if old is not None:
            _overwrite(old)
    finally:
        if old is not None:
            old.close()


def _overwrite(file: FileIO) -> None:
    zeros = bytes(2**20)
    for begin, end in list(extents(file)):
        file.seek(begin)
        for position in range(begin, end, len(zeros)):
            file.write(zeros[: end - position])
    os.fsync(file.fileno())
