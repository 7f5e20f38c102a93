"""Choose passages: from windows with evidence to the passages that are recalled."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emt.passage import Passage, RoutedPassage, are_among
from emt.routing.evidence import Window
from emt.routing.expansion import Candidate, Expanded, passages_around
from memory_backends import MemoryBackend
from memory_backends.layout import Int64Array


@dataclass(frozen=True)
class Budget:
    """How many rows and passages may be recalled for a prompt; no more passages than rows."""

    num_rows: int
    num_passages: int

    @property
    def min_distance(self) -> int:
        """Rows that two windows are apart, at least: closer ones would make one passage."""
        return max(self.num_rows // self.num_passages * 3 // 4, 1)


def choose_passages(
    windows: Sequence[Window],
    backend: MemoryBackend,
    budget: Budget,
    *,
    num_needed: int | None = None,
) -> list[RoutedPassage]:
    """Turn windows into passages that share no rows, best first, within the budget.

    The passages are made around as many windows as there may be passages; around more if the
    documents are so short that a quarter of the rows is left. Windows are given best first.

    Args:
        windows: best first.
        backend: where their rows are.
        budget: of rows and passages.
        num_needed: how many windows have something of their own to say; fewer than there may be
            passages leave more rows to each. None for as many as there may be.
    """
    num_needed = budget.num_passages if num_needed is None else num_needed
    searchable = backend.store.searchable_rows("all")
    owners = backend.catalog.document_of_rows(window.peak for window in windows)
    windows = [window for window in windows if window.peak in owners]
    peaks = np.array([window.peak for window in windows], dtype=np.int64)
    # without those that were removed meanwhile
    windows = list(itertools.compress(windows, are_among(peaks, searchable)))
    document = functools.cache(backend.catalog.document)
    candidates: list[Candidate] = []
    expanded: list[Expanded] = []
    for window in windows:
        owner = document(owners[window.peak])
        candidates.append(Candidate(owner, window.peak - owner.first_row))
        if len(candidates) < min(num_needed, budget.num_passages, len(windows)):
            continue
        expanded = passages_around(candidates, budget.num_rows)
        num_taken = sum(passage.stop - passage.first for _, passage in expanded)
        if len(expanded) >= budget.num_passages or num_taken > budget.num_rows * 3 // 4:
            break
    ranks_in: dict[Passage, list[int]] = {}
    for ranks, passage in expanded:
        for rank in ranks:
            first_row = candidates[rank].document.first_row
            whole = without_gaps(passage, first_row, windows[rank].peak, searchable)
            if whole is not None:
                ranks_in.setdefault(whole, []).append(rank)
    best_first = sorted(ranks_in.items(), key=lambda item: item[1])[: budget.num_passages]
    return [
        RoutedPassage(passage, round(max(windows[rank].score for rank in ranks), 4))
        for passage, ranks in best_first
    ]


def without_gaps(
    passage: Passage, first_row: int, peak: int, searchable: Int64Array
) -> Passage | None:
    """Return the part of a passage around a row in which no row was removed.

    Args:
        passage: of a document whose first row has the id `first_row`.
        peak: the id of a row in the passage.
        searchable: (n,) int64, ids of the rows that were not removed, ascending.

    Returns:
        The passage itself if it is whole; None if the row at `peak` was removed.
    """
    low, at, high = np.searchsorted(
        searchable, (first_row + passage.first, peak, first_row + passage.stop)
    )
    if at == len(searchable) or searchable[at] != peak:
        return None
    if high - low == passage.stop - passage.first:
        return passage
    run = searchable[low:high] - np.arange(low, high)  # alike where ids follow each other
    around = searchable[low:high][run == run[at - low]]
    first, stop = int(around[0]) - first_row, int(around[-1]) + 1 - first_row
    return Passage(passage.document, first, stop)
