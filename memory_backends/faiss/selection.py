"""How an index is searched for the rows of a scope alone.

A scope of up to `_EXACT_ROWS` rows is not: queries are compared with each of its rows, which finds
them all and takes no longer: for a decode step of one layer, 262,144 rows, three queries a head,
one core, 1.1 ms for 8,192 rows, where an unscoped search of the index takes 1.4 ms.

A larger scope is selected in the index, which then has to look into more lists: the k nearest rows
of a share f of all rows are spread over the lists as are the k / f nearest of all. 1 / f times as
many lists would compare as many rows as without a scope, but passing over the others takes its time
as well. The square root of that keeps recall where calibration has put it: on 5,533 rows of real
text ("IVF128,SQfp16", 0.948 without a scope), scopes of 10, 30 and 50 % of the rows found 0.989,
0.973 and 0.967, with no more lists 0.967, 0.943 and 0.939.

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
    """

    def __init__(self, rows: Int64Array, ids: Int64Array, num_rows: int) -> None:
        is_wanted = np.zeros(num_rows, dtype=bool)
        is_wanted[rows] = True
        selected = is_wanted[ids]
        self.bitmap = np.packbits(selected, bitorder="little")  # over positions
        is_wanted[ids] = False
        # Rows of the scope that the index does not have: sinks that are not the memory's own.
        self.unindexed = np.flatnonzero(is_wanted)
        self.wider = (len(ids) / len(rows)) ** 0.5  # times the lists of an unscoped search
        self.parameters: dict[tuple[int, int, bool], Any] = {}
