"""Re-rankers for :mod:`unlearning.strategies.retrieval_filter`: a device's candidates, ordered by its retained history.

Doors: ``base`` (the protocol), ``sentences`` (text vectors on the device), ``chat`` (an OpenAI-compatible endpoint),
``retrieval`` (what of a history is shown), ``filtered`` (the scorer that recommends with it), ``texts`` (item texts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedrec.errors import ConfigError
from unlearning.rerankers.base import Reranker, from_settings
from unlearning.rerankers.chat import Chat
from unlearning.rerankers.sentences import Sentences

RERANKERS: Mapping[str, type[Sentences] | type[Chat]] = {"sentences": Sentences, "chat": Chat}


def build(name: str, options: Mapping[str, Mapping[str, Any]], where: str) -> Reranker:
    """The re-ranker ``name``; ``options`` has the settings of each, and those of the others are checked as well.

    Raises:
        ConfigError: no such re-ranker, setting or value; ``where`` is the configuration key that holds them.
    """
    made = {key: from_settings(kind, options.get(key) or {}, f"{where}.{key}") for key, kind in RERANKERS.items()}
    if name not in made:
        raise ConfigError(f"{where}.reranker={name!r} is unknown; write one of {', '.join(made)}")
    return made[name]
