"""How requests are honoured: one file per strategy, built against ``base``.

``build(name, options)`` makes one; ``_target_`` in the options may name a class of another package.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from fedrec.errors import ConfigError
from unlearning.strategies.base import KINDS, Cost, Forgotten, Guarantee, Kind, Setting, StoreNeeds, Strategy, Task

__all__ = [
    "KINDS", "STRATEGIES", "Cost", "Forgotten", "Guarantee", "Kind", "Setting", "StoreNeeds", "Strategy", "Task",
    "build",
]  # fmt: skip

#: Name in the configuration → the class, imported when asked for.
STRATEGIES: dict[str, str] = {
    "retrain": "unlearning.strategies.retrain.Retrain",
    "reverse_bpr": "unlearning.strategies.reverse_bpr.ReverseBPR",
    "federaser": "unlearning.strategies.federaser.FedEraser",
    "fru": "unlearning.strategies.fru.FRU",
    "cfru": "unlearning.strategies.cfru.CFRU",
    "sifu": "unlearning.strategies.sifu.SIFU",
    "gradient_ascent": "unlearning.strategies.gradient_ascent.GradientAscent",
    "finetune": "unlearning.strategies.finetune.Finetune",
    "delete_rows": "unlearning.strategies.delete_rows.DeleteRows",
    "retrieval_filter": "unlearning.strategies.retrieval_filter.RetrievalFilter",
}


def build(name: str, options: Mapping[str, Any]) -> Strategy:
    """The strategy ``name`` (or the class that ``_target_`` names) with ``options``.

    Raises:
        ConfigError: no such strategy (the nearest is named), unknown settings, bad values.
    """
    settings = {key: value for key, value in options.items() if key != "_target_"}
    target = options.get("_target_") or STRATEGIES.get(name)
    if target is None:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(STRATEGIES)}"
        raise ConfigError(f"unlearning.strategies.{name}: no such strategy; {hint} (_target_ names one of your own)")
    module, _, cls = str(target).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"unlearning.strategies.{name}._target_={target!r}: no such class ({error}); write package.module.Class"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ConfigError(f"unlearning.strategies.{name}._target_={target!r} is not a Strategy (unlearning.strategies)")
    return found.from_config(settings)
