"""The key under which an audit log names its subjects: 32 random bytes in the user's data directory.

Identifiers of users come from small, enumerable sets, so that a plain hash of one would be undone by trying them all.
Without the key nobody can; whoever holds it can find a person's lines. It never lies in a run directory: what is
published with a run must not undo its own pseudonyms.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path

from fedrec.errors import ConfigError

_SIZE = 32
VARIABLE = "FEDREC_AUDIT_KEY"


def default_key_path() -> Path:
    """The file that ``FEDREC_AUDIT_KEY`` names, else ``$XDG_DATA_HOME/fedrec/audit.key``, else the one below
    ``~/.local/share``."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "fedrec" / "audit.key"


def audit_key(path: Path | None = None, *, run_dir: Path | None = None) -> bytes:
    """The 32 bytes of the key file ``path`` (default: :func:`default_key_path`), made on first use with mode 0600.

    Raises:
        ConfigError: it lies in ``run_dir``; cannot be made or read; others may read it; it is not 32 bytes.
    """
    path = default_key_path() if path is None else Path(path).expanduser()
    if run_dir is not None and path.resolve().is_relative_to(Path(run_dir).resolve()):
        raise ConfigError(
            f"audit key {path}: it would lie in the run directory and undo the pseudonyms of its log; "
            f"let {VARIABLE} name a file elsewhere"
        )
    with suppress(FileExistsError):
        if not path.exists():
            _make(path)
    try:
        mode = path.stat().st_mode
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"audit key {path}: cannot be read ({error.strerror or error}); make it readable to you alone, or let "
            f"{VARIABLE} name another file"
        ) from None
    if os.name == "posix" and mode & 0o077:
        raise ConfigError(
            f"audit key {path}: others on this machine may read it (mode {mode & 0o777:04o}); chmod 600 {path}"
        )
    if len(key) != _SIZE:
        raise ConfigError(
            f"audit key {path}: {len(key)} bytes, a key has {_SIZE}; restore it from your copy (logs written with it "
            f"cannot be continued without it), or let {VARIABLE} name a file that does not exist yet"
        )
    return key


def _make(path: Path) -> None:
    """Whole or not at all; FileExistsError where another process was first."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(prefix=".audit-", dir=path.parent)  # mkstemp's mode is 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(_SIZE))
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            os.unlink(temporary)
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError(
            f"audit key {path}: cannot be made ({error.strerror or error}); let {VARIABLE} name a file in a folder "
            "that you may write to"
        ) from None
