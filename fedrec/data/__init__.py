"""The data room: what users did, in one form, wherever it came from.

Doors: ``load_dataset`` (catalogue, files, synthetic); ``Interactions``, ``UserItems`` and ``Split`` are
what the rooms above work on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedrec.data.interactions import Interactions, UserItems
from fedrec.data.split import Split

if TYPE_CHECKING:
    from fedrec.data.load import load_dataset

__all__ = ["Interactions", "Split", "UserItems", "load_dataset"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: every worker imports this package, and none of them needs the readers' libraries.
    if name == "load_dataset":
        return importlib.import_module("fedrec.data.load").load_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
