"""Refuses work that would not fit the memory, before allocating it."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from fedrec.errors import DataError

_GROUP = Path("/sys/fs/cgroup")
_BEGINNING = 2**18  # bytes


def available_memory() -> int:
    """Bytes that this process can still use: the machine's, or its container's where that is less."""
    available = _machine()
    try:
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        return max(0, min(available, limit - used + int(stat.get("inactive_file", 0))))
    except (OSError, ValueError):  # no container limit ("max"), or none of this kind
        return available


def _machine() -> int:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        import psutil  # what it would read on Linux is read above, without the import

        return int(psutil.virtual_memory().available)


def estimate_text(path: Path) -> int:
    """Bytes needed at the peak of reading a text file of interactions, plain or gzip, into ``Interactions``.

    The text itself, the parsed columns and about 200 bytes a row for codes, sort order and checks. Line length and
    compression are those of the file's beginning.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        stored = head = file.read(_BEGINNING)
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(stored)
        except zlib.error:  # damaged: whoever reads it says so
            return 0
        size = size * len(head) // len(stored)
    rows = size * head.count(b"\n") // max(1, len(head))
    return 3 * size + 200 * rows


def check_fits(needed: int, what: os.PathLike[str] | str) -> None:
    """DataError with the estimate and the remedy where ``needed`` bytes are not there."""
    there = available_memory()
    if needed > there:
        raise DataError(
            f"{os.fspath(what)}: reading it needs about {needed / 1e9:,.1f} GB of memory and {there / 1e9:,.1f} GB are "
            "free; keep fewer rows or columns in the file, or use a machine with more memory"
        )
