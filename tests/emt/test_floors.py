"""A file imports from its own floor and from those below; no circle of imports."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import emt
import memory_backends
from tests.floors import violations

EMT = Path(emt.__file__).parent
BACKENDS = Path(memory_backends.__file__).parent
FLOORS = [
    "errors",
    "user_cache",
    "config",
    "passage",
    "attention",
    "citations",
    "model",
    "calls",
    "turn",
    "ingest",
    "routing",
    "profiles",
    "modes",
    "memory",
    "attach",
    "published",
    "answer",
    "cluster",
    "conversation",
    "serving",
    "cli",
    "integrations",
    "",
    "__main__",
]


def packages_imported_by(path: Path) -> Iterator[str]:
    """Yield the top-level packages that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).partition(".")[0]


def test_no_file_imports_from_above() -> None:
    assert violations(EMT, FLOORS) == []


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [(EMT / "attention", {"torch"}), (BACKENDS, None), (EMT, None)],
    ids=["attention", "memory_backends", "emt"],
)
def test_packages_that_a_folder_imports(folder: Path, allowed: set[str] | None) -> None:
    """Attention is tensors only, a backend knows no model, and scripts are imported by nobody."""
    files = sorted(folder.rglob("*.py"))
    imported = {package for path in files for package in packages_imported_by(path)}
    if allowed is not None:
        assert imported - sys.stdlib_module_names - {"emt"} == allowed
        return
    assert not imported & {"scripts", "experiments", "demo", "tests"}
    if folder == BACKENDS:
        assert not imported & {"emt", "transformers"}
