"""Configuration: Hydra groups and overrides in, plain checked values out."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedrec.errors import ConfigError

Config = dict[str, Any]


@contextmanager
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    # Hydra's resolver warns about recipes that override groups; nothing a user could act on.
    logging.getLogger("hydra").setLevel(logging.ERROR)
    with initialize_config_module("configs", version_base="1.3"):
        yield


def load_config(overrides: Sequence[str]) -> Config:
    """The configuration that ``overrides`` describe (Hydra's grammar). ConfigError with the remedy for anything unknown."""
    try:
        with _hydra():
            composed = compose("config", overrides=list(overrides))
            plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_readable(error)) from None
    assert isinstance(plain, dict)
    config: Config = {str(key): value for key, value in plain.items()}
    return config


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """One list of overrides per run of a sweep: ``seed=0,1`` and ``seed=range(0,3)`` multiply out, as in Hydra's -m."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        axes = [
            [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
            if o.is_sweep_override()
            else [o.input_line]
            for o in parsed
        ]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_readable(error)) from None
    return [[str(part) for part in combination] for combination in itertools.product(*axes)]


def groups() -> Mapping[str, list[str]]:
    """Group name → the choices that ship with fedrec."""
    with _hydra():
        loader = GlobalHydra.instance().config_loader()
        names = [g for g in loader.get_group_options("", None) if g != "config"] if False else _GROUPS
        return {group: sorted(loader.get_group_options(group)) for group in names}


_GROUPS = ("dataset", "algorithm", "protocol", "federation", "runner", "experiment")


def _readable(error: Exception) -> str:
    """Hydra's message in one line, with the remedy it leaves out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    missing = re.search(r"Could not find '([\w-]+)/([^']+)'", str(error))
    if missing:
        group, choice = missing.groups()
        options = ", ".join(groups()[group]) if group in _GROUPS else ""
        return f"{group}={choice}: no such choice; there are {options}"
    unknown = re.search(r"Key '([^']+)' is not in struct", str(error)) or re.search(
        r"Could not override '([^']+)'", str(error)
    )
    if unknown:
        full = re.search(r"full_key: (\S+)", str(error)) or re.search(r"Could not override '([^']+)'", str(error))
        key = full.group(1) if full else unknown.group(1)
        return f"{key}: no such setting; `fedrec run --help` shows the groups, `fedrec run --cfg` every setting and its value"
    group_error = re.search(r"Could not override '([^']+)'.*No match", str(error))
    if group_error:
        return f"{group_error.group(1)}: no such group; there are {', '.join(_GROUPS)}"
    return " ".join(lines[:2]) if lines else text
