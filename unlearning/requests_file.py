"""Reads a request file: YAML in which every scalar stays the text that was written.

Ids are why: YAML 1.1 would read the user id ``010`` as the number eight and ``12:30`` as 750, and the wrong person
would be forgotten. A key written twice is an error for the same reason; YAML would keep the last one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fedrec.errors import ConfigError
from unlearning.requests_values import shown

INLINE = "unlearning.requests"


class _TextLoader(yaml.SafeLoader):
    """Only null is anything but text. Tags that make Python objects do not exist here."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, Any]]]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} is written twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_entries(source: str | Path | Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]]:
    """What errors call the source, and its entries as they were written: a file's list, or the list itself.

    Raises:
        ConfigError: the file is not there or not readable, is not valid YAML (with line and column), or is no list.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        return path.name, _listed(str(path), _load(path))
    return INLINE, _listed(INLINE, source)


def _load(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_nearest_file(path)}; name a request file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a request file") from None
    try:
        return yaml.load(text, Loader=_TextLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_place(error, text)}: not valid YAML: {_problem(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not a request file: its lists are nested too deeply") from None


def _listed(label: str, document: Any) -> list[Any]:
    if isinstance(document, Mapping):
        inner = next((key for key in document if str(key).startswith("request")), None)
        hint = (
            f"; write the entries without the key {inner} above them" if inner else "; begin every entry with '- id:'"
        )
        raise ConfigError(f"{label}: must be one list of requests, got a mapping{hint}")
    if isinstance(document, str) or not isinstance(document, Sequence):
        got = "nothing" if document is None else shown(document)
        raise ConfigError(f"{label}: must be one list of requests, got {got}; begin every entry with '- id:'")
    if not document:
        raise ConfigError(f"{label}: holds no requests; write at least one entry")
    return list(document)


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    return f"{problem} ({context})" if context else str(problem)


def _place(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f", line {mark.line + 1}, column {mark.column + 1}"
    position = getattr(error, "position", None)  # of a character that YAML forbids
    if position is None:
        return ""
    before = text[:position]
    return f", line {before.count(chr(10)) + 1}, column {position - before.rfind(chr(10))}"


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    beside = [other.name for other in path.parent.iterdir() if other.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {near[0]}?" if near else ""
