"""Fixtures of the data room's tests: the real data sets where they are on this machine, and a local web server."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The folder of a real data set below ``FEDREC_DATA_DIR``; the test is skipped where it is not there."""
    given = os.environ.get("FEDREC_DATA_DIR")

    def folder(name: str) -> Path:
        if not given or not (Path(given) / name).is_dir():
            pytest.skip(f"needs {name} below FEDREC_DATA_DIR")
        return Path(given) / name

    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no data folder."""
    monkeypatch.delenv("FEDREC_DATA_DIR", raising=False)
    monkeypatch.setenv("FEDREC_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """(address, folder) of a web server on this machine that serves the folder."""
    folder = tmp_path / "web"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()
    thread.join()
