"""Finds many byte strings in the files below a folder, in one pass over what is really on disk.

Holes of sparse files are skipped. Archives (.npz, zip) and gzip files are searched by their content.
"""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from fedrec.errors import DataError
from unlearning.needle_scan import Needles, Scanner

_CHUNK = 4 * 2**20


@dataclass(frozen=True)
class Finding:
    """``file`` (relative; ``archive.npz!member`` inside one) holds what must not be there, from byte ``offset``."""

    file: str
    offset: int
    what: str


@dataclass(frozen=True)
class Searched:
    """What was searched: relative file names with sizes, bytes read (holes not counted), what was found."""

    files: tuple[tuple[str, int], ...]
    bytes: int
    findings: tuple[Finding, ...]


def search(folder: Path, needles: Needles, most: int = 1000) -> Searched:
    """All places below ``folder`` where a needle lies, the first ``most`` of them. DataError: a file is unreadable."""
    table = Scanner(needles)
    files: list[tuple[str, int]] = []
    findings: list[Finding] = []
    total = 0
    for path in sorted(files_below(folder)):
        name = path.relative_to(folder).as_posix()
        try:
            files.append((name, path.stat().st_size))
            read, found = _search_file(path, name, table)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror or error}), so that nobody can say what is in it; make it "
                "readable, or remove it"
            ) from None
        total += read
        findings += found[: most - len(findings)]
    return Searched(tuple(files), total, tuple(findings))


def _search_file(path: Path, name: str, table: Scanner) -> tuple[int, list[Finding]]:
    """Bytes read and findings. What says it is an archive and cannot be unpacked is searched as it lies."""

    def scan(parts: Iterator[tuple[str, Iterator[Block]]]) -> tuple[int, list[Finding]]:
        total = 0
        found: list[Finding] = []
        for member, blocks in parts:
            for begin, fresh, block in blocks:
                total += fresh
                place = f"{name}!{member}" if member else name
                found += [Finding(place, begin + at, kind) for at, kind in table.find(block, fresh)]
        return total, found

    with path.open("rb", buffering=0) as file:  # positions are asked of the system, past any buffer
        magic = file.read(4)
        if magic == b"PK\x03\x04" or magic[:2] == b"\x1f\x8b":
            try:
                return scan(_members(path, table.longest) if magic[:2] == b"PK" else _gzip(path, table.longest))
            except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError, NotImplementedError):
                pass
        return scan(iter([("", _raw(file, table.longest))]))


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below ``folder``; links to folders are not followed."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if path.is_file():
                yield path


def extents(file: FileIO) -> Iterator[tuple[int, int]]:
    """(begin, end) of the stretches of a file that hold data; what lies between them are holes, and reads as zeros.

    It moves the position of the file, which must be unbuffered.
    """
    size = os.fstat(file.fileno()).st_size
    if not hasattr(os, "SEEK_DATA"):
        yield 0, size
        return
    end = 0
    while end < size:
        try:
            begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
        except OSError:  # a hole to the end
            return
        end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
        yield begin, end


Block = tuple[int, int, bytes]  # where it begins, how many of its bytes no earlier block had as its own, the bytes


def _members(path: Path, longest: int) -> Iterator[tuple[str, Iterator[Block]]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as stream:
                yield member, _stream(stream, longest)


def _gzip(path: Path, longest: int) -> Iterator[tuple[str, Iterator[Block]]]:
    with gzip.open(path) as stream:
        yield "", _stream(stream, longest)


def _stream(stream: Any, longest: int) -> Iterator[Block]:
    """A stream as blocks that overlap by ``longest`` − 1 bytes."""
    begin, block = 0, stream.read(_CHUNK)
    while block:
        ahead = stream.read(_CHUNK)
        yield begin, len(block), block + ahead[: longest - 1]
        begin, block = begin + len(block), ahead


def _raw(file: FileIO, longest: int) -> Iterator[Block]:
    """Data only, and so much of the holes beside it that a needle with zeros at its ends is found."""
    done = 0
    for first, last in extents(file):
        begin = max(done, first - longest)
        while begin < last:
            fresh = min(_CHUNK, last - begin)
            file.seek(begin)
            yield begin, fresh, file.read(fresh + longest - 1)
            begin += fresh
        done = last
