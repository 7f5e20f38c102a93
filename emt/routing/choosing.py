"""From places with evidence to the passages that are recalled: whole sentences, within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emt.passages import passages_of
from emt.recall_rows import Passage
from emt.routing.evidence import Window
from memory_backends import StoredDocument
from memory_backends.layout import Int64Array


def fused(lists: Sequence[Sequence[Window]], *, apart: int) -> list[Window]:
    """Join several rankings of windows into one, best first.

    Windows less than `apart` rows from each other are the same one. Each ranking adds 1 / (2 +
    rank) to a window's score; a window's share is its first ranking's, or 0.

    Source:
        Cormack et al., Reciprocal Rank Fusion (SIGIR 2009), with a smaller constant, for lists are
        short.
    """
    peaks: list[int] = []
    scores: list[float] = []
    shares: list[float] = []
    for number, windows in enumerate(lists):
        for rank, window in enumerate(windows):
            near = [i for i, peak in enumerate(peaks) if abs(peak - window.peak) < apart]
            if not near:
                near = [len(peaks)]
                peaks.append(window.peak)
                scores.append(0.0)
                shares.append(0.0)
            at = min(near, key=lambda i: abs(peaks[i] - window.peak))
            scores[at] += 1 / (2 + rank)
            if number == 0:
                shares[at] = window.share
    order = np.argsort(-np.array(scores), kind="stable")
    return [Window(peaks[i], shares[i]) for i in order]


def passage_around(document: StoredDocument, peak: int, num_rows: int) -> Passage:
    """Return the sentences around a row of a document: at most `num_rows` rows.

    The sentence of the row comes first, then in turn the one after and the one before, while they
    fit; of a sentence that is too long, the rows around the one asked for.

    Args:
        document: the document.
        peak: a row, counted from the document's first.
        num_rows: how many rows the passage may have.
    """
    total = len(document.row_tokens)
    ends = np.searchsorted(document.row_tokens, passages_of(document)[:, 1]).tolist()
    bounds = np.unique([0, *ends, total])  # rows at which sentences begin and end
    index = int(np.searchsorted(bounds, peak, side="right")) - 1
    index = min(max(index, 0), len(bounds) - 2)
    low, high = index, index + 1
    if bounds[high] - bounds[low] > num_rows:
        first = min(max(peak - num_rows // 2, int(bounds[low])), int(bounds[high]) - num_rows)
        return Passage(document.name, first, first + num_rows)
    grows = True
    while grows:
        grows = False
        if high + 1 < len(bounds) and bounds[high + 1] - bounds[low] <= num_rows:
            high, grows = high + 1, True
        if low > 0 and bounds[high] - bounds[low - 1] <= num_rows:
            low, grows = low - 1, True
    return Passage(document.name, int(bounds[low]), int(bounds[high]))


def without_gaps(passage: Passage, first_row: int, peak: int, there: Int64Array) -> Passage | None:
    """Return the part of a passage around a row in which no row was removed.

    Args:
        passage: rows of a document.
        first_row: the id of the document's first row.
        peak: the id of a row in the passage.
        there: (n,) int64, ids of the rows that were not removed, ascending.

    Returns:
        The passage itself if it is whole; None if the row was removed.
    """
    low, at, high = np.searchsorted(
        there, (first_row + passage.first, peak, first_row + passage.stop)
    )
    if at == len(there) or there[at] != peak:
        return None
    if high - low == passage.stop - passage.first:
        return passage
    run = there[low:high] - np.arange(low, high)  # alike where ids follow each other
    mine = np.flatnonzero(run == run[at - low]) + low
    return Passage(
        passage.document, int(there[mine[0]]) - first_row, int(there[mine[-1]]) + 1 - first_row
    )
