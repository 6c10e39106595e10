"""The federated recommenders: one file each, pure functions on tensors, built against ``base``.

``build(config, problem)`` makes one from its Hydra group; ``_target_`` may name a class of another package.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fedrec.algorithms.base import Problem, Recommender
from fedrec.errors import ConfigError

__all__ = ["Problem", "Recommender", "build"]


def build(config: Mapping[str, Any], problem: Problem) -> Recommender:
    """The algorithm that ``config["_target_"]`` names (a dotted path to a Recommender), with the other keys as
    settings."""
    options = {key: value for key, value in config.items() if key not in ("_target_", "name")}
    target = str(config.get("_target_", ""))
    module_name, _, class_name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"algorithm._target_={target!r}: no such class ({error}); write package.module.Class"
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, Recommender)):
        raise ConfigError(f"algorithm._target_={target!r} is not a fedrec.algorithms.Recommender")
    algorithm = cls.from_config(options, problem)
    _check_decay(algorithm)
    return algorithm


def _check_decay(algorithm: Recommender) -> None:
    """Refuse a step that would multiply a tensor by zero or less: it would erase what it should shrink."""
    for name, spec in {**algorithm.shared, **algorithm.private}.items():
        if spec.learning_rate * spec.weight_decay >= 1.0:
            raise ConfigError(
                f"learning rate {spec.learning_rate:g} times weight decay {spec.weight_decay:g} of tensor {name} "
                f"is {spec.learning_rate * spec.weight_decay:g}, but must stay below 1; lower either"
            )
