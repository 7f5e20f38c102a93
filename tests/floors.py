"""Which floor of a package a file stands on, and imports that lead upwards or in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


def violations(package: Path, floors: Sequence[str]) -> list[str]:
    """Return what is wrong with a package's imports, those under `TYPE_CHECKING` included.

    Args:
        package: its folder.
        floors: names of modules and subpackages, the lowest first, relative to the package. Of two
            that contain a file, the longer one counts. "" is the package's `__init__.py`.

    Returns:
        Files on no floor, imports from a floor above the importing file's, and a circle of files.
    """
    imports = {name: set(_imports(path, package)) for name, path in _modules(package).items()}
    wrong = [f"{name} is on no floor" for name in imports if _floor(name, floors) is None]
    for name, imported in imports.items():
        for other in sorted(imported):
            if (_floor(name, floors) or 0) < (_floor(other, floors) or 0):
                wrong.append(f"{name} imports {other}, which is above it")
    try:
        list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        wrong.append("imports in a circle: " + " -> ".join(error.args[1]))
    return wrong


def _modules(package: Path) -> dict[str, Path]:
    """Return the files of a package by dotted name, relative to it."""
    parts = {
        path: path.relative_to(package).with_suffix("").parts for path in package.rglob("*.py")
    }
    return {".".join(name).removesuffix("__init__").rstrip("."): p for p, name in parts.items()}


def _imports(path: Path, package: Path) -> Iterator[str]:
    """Yield the package's own modules that a file imports, wherever in it."""
    modules = _modules(package)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, inner = name.partition(".")
            if top == package.name:  # a module, or a name in the module before the last dot
                yield inner if inner in modules else inner.rpartition(".")[0]


def _floor(module: str, floors: Sequence[str]) -> int | None:
    """Return the number of the floor that a module is on."""
    names = [name for name in floors if module == name or (name and module.startswith(f"{name}."))]
    return floors.index(max(names, key=len)) if names else None
