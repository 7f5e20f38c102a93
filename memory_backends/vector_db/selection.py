"""How an index is searched for the rows of a scope alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from memory_backends.layout import Int64Array
from memory_backends.vector_db.index import AUTO_IVF_ROWS

_EXACT_ROWS = AUTO_IVF_ROWS


def is_small(num_rows: int) -> bool:
    """Tell whether a scope is searched without an index, row by row of it."""
    return num_rows <= _EXACT_ROWS


class Selection:
    """What the searches of one scope that is not small have in common.

    Args:
        rows: the scope's searchable rows, ascending; at least one.
        ids: the row at each position of the index.
        num_rows: all rows of the memory have ids below.

    Attributes:
        bitmap: little-endian over positions, of the scope's rows.
        unindexed: rows of the scope that the index does not have.
        wider: how many times the lists of an unscoped search are looked into.
        parameters: layer -> FAISS search parameters a head.
    """

    def __init__(self, rows: Int64Array, ids: Int64Array, num_rows: int) -> None:
        is_wanted = np.zeros(num_rows, dtype=bool)
        is_wanted[rows] = True
        selected = is_wanted[ids]
        self.bitmap = np.packbits(selected, bitorder="little")
        is_wanted[ids] = False
        self.unindexed = np.flatnonzero(is_wanted)  # attention sinks that are not the memory's own
        self.wider = len(ids) / len(rows)
        self.parameters: dict[int, list[Any]] = {}
