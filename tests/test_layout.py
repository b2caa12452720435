"""Tests import what is private to their own package alone; no file is too long."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def private_imports(source: str, own: str) -> list[str]:
    """Modules and names of packages but `own` that begin with one underscore."""
    imported = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
    return [name for name in imported if _is_private(name.split("."), own)]


def _is_private(parts: list[str], own: str) -> bool:
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts)
    return hidden and parts[0] == "abliterator" and parts[1] != own


def test_only_the_tests_of_a_package_import_what_is_private_to_it():
    for path in sorted(TESTS.rglob("*.py")):
        file = path.relative_to(TESTS)
        assert private_imports(path.read_text(), own=file.parts[0]) == [], file


@pytest.mark.parametrize(
    ("line", "is_private"),
    [
        ("from abliterator.bake._formula import x", True),
        ("from abliterator.bake import _formula", True),
        ("import abliterator.bake._formula", True),
        ("def f():\n    from abliterator.bake import _formula", True),
        ("from abliterator.judge._rules import x", False),
        ("from abliterator.bake import bake", False),
        ("from abliterator import __version__", False),
    ],
)
def test_a_private_import_is_seen(line, is_private):
    assert bool(private_imports(line, own="judge")) is is_private


def test_no_file_is_longer_than_a_package_should_be():
    """docs/architecture.md's rule: past 400 lines a file becomes a package."""
    files = [*TESTS.rglob("*.py"), *(TESTS.parent / "abliterator").rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {str(path): n for path, n in lengths.items() if n > 400} == {}
