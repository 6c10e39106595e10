"""Fetches a data set into the cache: an official archive through pooch, or files out of a published package.

Everything is written and verified in a temporary folder beside its destination, which is then renamed into place:
what is in the cache is whole, and an interrupted or refused download leaves nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from fedrec.errors import DataError

Say = Callable[[str], None]


class SourceFailed(Exception):
    """This source cannot give the data set; the message is a clause for the list of what was tried."""


@dataclass(frozen=True)
class Archive:
    """An official zip file. ``checksum`` is pooch's (``md5:…``), None where the publisher replaces the file at times.

    ``members`` maps a path inside the zip to the file's name in the cache.
    """

    url: str
    checksum: str | None
    megabytes: float
    members: Mapping[str, str]


@dataclass(frozen=True)
class Wheel:
    """A package on the Python package index whose wheel carries the files; it is fetched, never installed."""

    requirement: str
    members: Mapping[str, str]


def cache_folder() -> Path:
    """``FEDREC_CACHE_DIR``, else ``$XDG_CACHE_HOME/fedrec``, else ``~/.cache/fedrec``."""
    if own := os.environ.get("FEDREC_CACHE_DIR"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedrec"


def fetch(source: Archive | Wheel, target: Path, checksums: Mapping[str, str], say: Say) -> None:
    """Makes the folder ``target`` hold the source's members, each with its SHA-256 where ``checksums`` lists one.

    Raises:
        SourceFailed: unreachable, a checksum that differs, a member that is missing.
        DataError: the cache folder cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            work = Path(temporary)
            archive = _download(source, work, say) if isinstance(source, Archive) else _pip_download(source, work, say)
            whole = work / "whole"
            whole.mkdir()
            _extract(archive, source.members, whole)
            for name, digest in checksums.items():
                if (whole / name).exists():
                    verify(whole / name, digest)
            _publish(whole, target)
    except OSError as error:
        raise DataError(
            f"{target.parent}: cannot be written ({error.strerror or error}); set FEDREC_CACHE_DIR to a folder that can"
        ) from None


def verify(path: Path, digest: str) -> None:
    """SourceFailed where the file's SHA-256 is not ``digest``."""
    found = sha256(path.read_bytes()).hexdigest()
    if found != digest:
        raise SourceFailed(f"{path.name} has SHA-256 {found}, expected {digest}: changed or damaged")


def _download(source: Archive, work: Path, say: Say) -> Path:
    import pooch
    import requests

    host = urlsplit(source.url).hostname
    if not _reachable(source.url):
        raise SourceFailed(f"{source.url}: {host} cannot be reached from here")
    say(f"fetching {source.url} ({source.megabytes:.1f} MB)")
    pooch.get_logger().setLevel(logging.ERROR)
    try:
        path = pooch.retrieve(
            source.url,
            source.checksum,
            fname="archive.zip",
            path=work,
            downloader=pooch.HTTPDownloader(progressbar=False, timeout=(5, 20)),
        )
    except requests.RequestException as error:
        reason = "no answer in time" if isinstance(error, requests.Timeout) else str(error)[:300]
        raise SourceFailed(f"{source.url}: {reason}") from None
    except ValueError:
        raise SourceFailed(f"{source.url}: the file's checksum is not the published {source.checksum}") from None
    return Path(path)


def _reachable(url: str, seconds: float = 4.0) -> bool:
    """Whether a connection opens in time. Asked first because looking a name up knows no time limit of its own."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    if urllib.request.getproxies().get(parts.scheme) and not urllib.request.proxy_bypass(parts.hostname):
        return True  # the proxy looks names up
    address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    opened = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=seconds).close()
        except OSError:
            return
        opened.set()

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(seconds)
    return opened.is_set()


def _pip_download(source: Wheel, work: Path, say: Say) -> Path:
    say(f"fetching the package {source.requirement} with pip (not installed)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--timeout=10", "--retries=1"]
    try:
        done = subprocess.run(
            [*command, f"--dest={work}", source.requirement], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        raise SourceFailed(f"pip download {source.requirement}: no answer within 120 s") from None
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise SourceFailed(f"pip download {source.requirement}: {lines[-1].strip() if lines else 'no wheel came'}")
    return wheels[0]


def _extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as zipped:
            for member, name in members.items():
                with zipped.open(member) as source, (folder / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    except KeyError as error:
        raise SourceFailed(f"{archive.name}: {str(error).strip(chr(34))}") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise SourceFailed(f"{archive.name}: not a readable zip file ({error})") from None


def _publish(whole: Path, target: Path) -> None:
    try:
        whole.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        for file in whole.iterdir():  # another process was first, or an older, incomplete folder stood there
            os.replace(file, target / file.name)
