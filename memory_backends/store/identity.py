"""Whether a store belongs to a model: both describe the same model, and have rows of one shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memory_backends.catalog import Catalog
from memory_backends.errors import MemoryMismatchError
from memory_backends.layout import MemoryLayout


def check_identity(catalog: Catalog, identity: Mapping[str, Any]) -> None:
    """Raise a MemoryMismatchError that names every field in which two models differ.

    Fields that only one of the two has, such as a tokenizer, are not compared.
    """
    wrong = [
        f"{key}: the memory has {catalog.identity[key]!r}, this model {identity[key]!r}"
        for key in sorted(catalog.identity.keys() & identity.keys())
        if catalog.identity[key] != identity[key]
    ]
    if wrong:
        raise MemoryMismatchError(
            f"{_named(catalog)} was written by another model; " + "; ".join(wrong) + ". "
            "Load the model that wrote it, or index the documents again with this one."
        )


def check_layout(catalog: Catalog, layout: MemoryLayout) -> None:
    """Raise a MemoryMismatchError if a memory's rows have another shape or dtype than a model's."""
    if catalog.layout != layout:
        raise MemoryMismatchError(
            f"{_named(catalog)} has layout {catalog.layout.to_json()}; "
            f"this model has {layout.to_json()}. Load the model that wrote the store."
        )


def _named(catalog: Catalog) -> str:
    return "memory" if catalog.path is None else f"memory at '{catalog.path.parent}'"
