"""Whether a store belongs to a model: both describe the same model, and have rows of one shape.

A store may be read in another dtype than the one it was written in, if the weights are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memory_backends.catalog import Catalog
from memory_backends.errors import MemoryMismatchError
from memory_backends.layout import DTYPES, MemoryLayout
from memory_backends.store.sketch import Sketch

SKETCH = "sketch"  # an identity's field


def sketch_in(identity: Mapping[str, Any]) -> Sketch | None:
    """Return the sketch of weights that an identity has; None if it has none.

    Raises:
        MemoryMismatchError: it has something else in its place.
    """
    data = identity.get(SKETCH)
    return None if data is None else Sketch.from_json(data)


def check_identity(catalog: Catalog, identity: Mapping[str, Any]) -> None:
    """Raise a MemoryMismatchError that names every field in which two models differ.

    Fields that only one of the two has, such as a tokenizer, are not compared. Neither are the
    dtype and the hash of the weights if sketches tell that these are the same in another dtype.
    """
    wrong = [
        key
        for key in sorted((catalog.identity.keys() & identity.keys()) - {SKETCH})
        if catalog.identity[key] != identity[key]
    ]
    if "dtype" in wrong and _same_weights(catalog.identity, identity):
        wrong = [key for key in wrong if key not in ("dtype", "weights")]
    if wrong:
        differences = "; ".join(
            f"{key}: the memory has {catalog.identity[key]!r}, this model {identity[key]!r}"
            for key in wrong
        )
        raise MemoryMismatchError(
            f"{_named(catalog)} was written by another model; {differences}. "
            "Load the model that wrote it, or index the documents again with this one."
        )


def check_layout(catalog: Catalog, layout: MemoryLayout) -> None:
    """Raise a MemoryMismatchError if a memory's rows have another shape than a model's."""
    if catalog.layout.layers != layout.layers:
        raise MemoryMismatchError(
            f"{_named(catalog)} has layout {catalog.layout.to_json()}; "
            f"this model has {layout.to_json()}. Load the model that wrote the store."
        )


def _same_weights(identity: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two models in different dtypes have the same weights but for rounding."""
    sketch, other_sketch = sketch_in(identity), sketch_in(other)
    dtype, other_dtype = DTYPES.get(identity["dtype"]), DTYPES.get(other["dtype"])
    if sketch is None or other_sketch is None or dtype is None or other_dtype is None:
        return False
    return sketch.is_same(other_sketch, dtype, other_dtype)


def _named(catalog: Catalog) -> str:
    return "memory" if catalog.path is None else f"memory at '{catalog.path.parent}'"
