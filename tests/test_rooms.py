"""The rooms keep to themselves: no room but the algorithms' own names an algorithm, and nothing seeds globally."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("fedrec", "clients", "server", "privacy", "unlearning")
NAMES = sorted(path.stem for path in (ROOT / "fedrec" / "algorithms").glob("fed*.py"))


def modules() -> Iterator[Path]:
    for room in ROOMS:
        yield from (ROOT / room).rglob("*.py")


def code_of(path: Path) -> ast.Module:
    """The module without its docstrings: prose may tell what an algorithm needs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return tree


def said_in(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_there_are_algorithms_to_look_for() -> None:
    assert {"fedmf", "fedrap", "fedease"} <= set(NAMES)


def test_no_room_but_the_algorithms_names_an_algorithm() -> None:
    pattern = re.compile(rf"\b({'|'.join(NAMES)})\b", re.IGNORECASE)
    named = [
        f"{path.relative_to(ROOT)}: {text!r}"
        for path in modules()
        if path.parent != ROOT / "fedrec" / "algorithms" and path != ROOT / "fedrec" / "cli.py"  # its help has examples
        for text in said_in(code_of(path))
        # An address of data, the example of a folder's name, and a remedy that says what to write, name no code.
        if pattern.search(re.sub(r"\balgorithm=\w+", "", text))
        and not text.startswith("https://")
        and "for example outputs/" not in text
    ]
    assert named == []


@pytest.mark.parametrize("call", ["manual_seed", "np.random.seed", "random.seed", "pickle", "torch.load"])
def test_nothing_seeds_globally_or_unpickles(call: str) -> None:
    pattern = re.compile(rf"(?<!Generator\(\)\.)(?<!generator\.)\b{re.escape(call)}\b")
    found = [str(path) for path in modules() if pattern.search(ast.unparse(code_of(path)).replace("allow_pickle", ""))]
    assert found == []


def test_every_room_says_what_it_is_for() -> None:
    for path in modules():
        if path.stat().st_size:
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
