"""A file imports from its own floor and from those below; no circle of imports."""

from __future__ import annotations

from pathlib import Path

import pytest

import memory_backends
from tests.floors import violations

FLOORS = [
    "errors",
    "layout",
    "scope",
    "rows.codecs",
    "rows",
    "catalog",
    "store",
    "search",
    "faiss",
    "registry",
    "backend",
    "sharded",
    "",
    "testing",
]


def test_no_file_imports_from_above() -> None:
    assert violations(Path(memory_backends.__file__).parent, FLOORS) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from house import roof", "cellar imports roof, which is above it"),
        ("if False:\n    from house.roof.tiles import red", "cellar imports roof.tiles, which is"),
        ("import house.cellar", "imports in a circle"),
    ],
)
def test_violations_are_named(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "house/roof").mkdir(parents=True)
    for name in ("roof/__init__.py", "roof/tiles.py", "attic.py"):
        (tmp_path / "house" / name).touch()
    (tmp_path / "house/cellar.py").write_text(source)
    wrong = violations(tmp_path / "house", ["cellar", "roof"])
    assert any(each.startswith(message) for each in wrong)
    assert "attic is on no floor" in wrong
