"""Searchers by name: the `memory_type` of a backend is a key of this registry."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from memory_backends.errors import MemoryMismatchError
from memory_backends.search.searcher import Searcher

# Imported when they are first asked for: "vector_db" needs FAISS, which takes long to import.
SHARDED = "sharded"
_BUILT_IN = {
    "manual": ("memory_backends.search.manual", "ManualSearcher"),
    "vector_db": ("memory_backends.faiss.searcher", "FaissSearcher"),
    SHARDED: ("memory_backends.sharded.searcher", "ShardedSearcher"),
}
_registered: dict[str, type[Searcher]] = {}


def memory_types() -> list[str]:
    """Return the names of all searchers, those registered by others last."""
    return [*_BUILT_IN, *_registered]


def register_searcher(memory_type: str, searcher: type[Searcher]) -> None:
    """Make a searcher available as a `memory_type`.

    Raises:
        MemoryMismatchError: the name is taken by another searcher.
    """
    if memory_type in _BUILT_IN or _registered.get(memory_type, searcher) is not searcher:
        raise MemoryMismatchError(
            f"memory_type {memory_type!r} is taken. Register {searcher.__name__} by another name."
        )
    _registered[memory_type] = searcher


def searcher_class(memory_type: str) -> type[Searcher]:
    """Return the searcher of that name.

    Raises:
        MemoryMismatchError: there is none.
        ImportError: what it needs is not installed.
    """
    if memory_type in _registered:
        return _registered[memory_type]
    if memory_type not in _BUILT_IN:
        raise MemoryMismatchError(
            f"memory_type must be one of {memory_types()}; got {memory_type!r}. "
            "Correct the name, or register a searcher by it."
        )
    module, name = _BUILT_IN[memory_type]
    searcher: type[Searcher] = getattr(importlib.import_module(module), name)
    return searcher


def option_names(memory_type: str) -> list[str]:
    """Return the names of a searcher's options; errors as `searcher_class`."""
    return [field.name for field in dataclasses.fields(searcher_class(memory_type).options_class)]


def make_options(memory_type: str, options: Mapping[str, Any]) -> Any:
    """Return an instance of a searcher's `options_class`; errors as `searcher_class`."""
    names = option_names(memory_type)
    unknown = [name for name in options if name not in names]
    if unknown:
        raise MemoryMismatchError(
            f"the options of memory_type {memory_type!r} are {names}; got {unknown[0]!r}."
        )
    return searcher_class(memory_type).options_class(**options)
