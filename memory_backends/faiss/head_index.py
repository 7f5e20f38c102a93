"""One KV head's FAISS index, and those of the heads that are searched in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from memory_backends.faiss import index as faiss_index
from memory_backends.faiss.calibration import Effort


class HeadIndex(NamedTuple):
    """One (layer, KV head)'s FAISS index, with the rows at the first `num_rows` positions."""

    num_rows: int
    index: Any
    efforts: list[Effort]  # what calibration found; empty if nothing

    @property
    def is_mapped(self) -> bool:
        """Whether the inverted lists are in the store's file."""
        return faiss_index.mapped_lists(self.index) is not None


class LayerIndexes(NamedTuple):
    """The indexes of the KV heads that are searched in one layer, all with the same rows."""

    numbers: Sequence[int]  # which heads they are
    heads: list[Any]
    efforts: list[list[Effort]]
