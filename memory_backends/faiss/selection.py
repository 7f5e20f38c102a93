"""How an index is searched for the rows of a scope alone.

A scope of up to `_EXACT_ROWS` rows is not: queries are compared with each of its rows, which finds
them all and takes no longer. Measured for a decode step of one layer, 262,144 rows, three queries a
head, one core: 0.4 ms for 1,024 rows, 1.1 ms for 8,192, 2.0 ms for 16,384, where an unscoped search
of the index takes 1.4 ms. A memory of as many rows has an exact index anyway (`AUTO_IVF_ROWS`), and
the kept keys take no more RAM than that.

A larger scope is selected in the index, which then has to look into more lists: the k nearest rows
of a share f of all rows are spread over the lists as are the k / f nearest of all. 1 / f times as
many lists would compare as many rows as without a scope, but to pass over the others takes its time
as well: 10 ms instead of 0.8 ms for 16,384 rows of the same memory. The square root of that is what
keeps recall where calibration has put it. On 5,533 rows of real text (SmolLM2-135M, four layers,
sampled queries, "IVF128,SQfp16", which finds 0.948 of the ten nearest rows without a scope), scopes
of 10, 30 and 50 % found

    times as many lists      10 %     30 %     50 %
    1                       0.967    0.943    0.939
    sqrt(1 / f)             0.989    0.973    0.967
    1 / f                   0.999    0.992    0.981

Where the lists that were looked into have too few of its rows, the scope is searched exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from memory_backends.faiss.index import AUTO_IVF_ROWS
from memory_backends.layout import Int64Array

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
        parameters: (layer, KV head) -> FAISS search parameters.
    """

    def __init__(self, rows: Int64Array, ids: Int64Array, num_rows: int) -> None:
        is_wanted = np.zeros(num_rows, dtype=bool)
        is_wanted[rows] = True
        selected = is_wanted[ids]
        self.bitmap = np.packbits(selected, bitorder="little")
        is_wanted[ids] = False
        self.unindexed = np.flatnonzero(is_wanted)  # attention sinks that are not the memory's own
        self.wider = (len(ids) / len(rows)) ** 0.5
        self.parameters: dict[tuple[int, int, bool], Any] = {}
