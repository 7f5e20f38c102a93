"""What the catalogues of a store say of its index, which each shard of a sharded one has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emt.errors import StoreError
from memory_backends.catalog import Catalog
from memory_backends.faiss.coverage import coverage_of
from memory_backends.layout import MemoryLayout

# The facts of an index, and what is said of several.
_FACTS: dict[str, Callable[[list[Any]], Any]] = {
    "factory": lambda factories: ", ".join(dict.fromkeys(factories)),
    "num_rows": sum,
    "recall": min,
    "attention": min,
    "scanned": max,
}


def index_of(shards: Sequence[Path]) -> dict[str, Any]:
    """Return the facts of the indexes of stores, as of one; {} if there are none."""
    indexes = [index for index, _ in _indexes(shards)]
    facts = {key: [index[key] for index in indexes if key in index] for key in _FACTS}
    return {key: _FACTS[key](values) for key, values in facts.items() if values}


def index_files_of(shards: Sequence[Path]) -> dict[str, Any]:
    """Return which heads have FAISS files, the bytes of these, and about how many that saves.

    It is {} if there are none. The heads are those of the first store that has some.
    """
    indexes = _indexes(shards)
    if not indexes:
        return {}
    covered = [coverage_of(index, layout) for index, layout in indexes]
    heads, layout = covered[0].heads, indexes[0][1]
    num_bytes = sum(each.num_bytes for each in covered)
    all_bytes = sum(each.all_bytes for each in covered)
    return {
        "heads": {str(layer_idx): list(of_layer) for layer_idx, of_layer in heads.items()},
        "num_heads": sum(map(len, heads.values())),
        "all_heads": sum(layer.num_key_value_heads for layer in layout.layers.values()),
        "file_bytes": num_bytes,
        "saved_bytes_estimate": max(all_bytes - num_bytes, 0),
    }


def _indexes(shards: Sequence[Path]) -> list[tuple[dict[str, Any], MemoryLayout]]:
    """Return what the catalogues say of the indexes that are there, and of the rows' shape."""
    indexes = []
    for shard in shards:
        try:
            catalog = Catalog.open(shard)
        except StoreError:  # `emt info` names such a shard, and `emt verify` what is wrong with it
            continue
        with contextlib.closing(catalog):
            setting = catalog.setting("index")
            if setting:
                indexes.append((setting, catalog.layout))
    return indexes
