"""From places with evidence to the passages that are recalled: whole sentences, within a budget."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from emt.citations.sentences import sentences_of
from emt.passage import Passage
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


def passages_around(
    places: Sequence[tuple[StoredDocument, int]], num_rows: int
) -> list[tuple[list[int], Passage]]:
    """Return the sentences nearest to some rows of documents: at most `num_rows` rows.

    A sentence is as far away as its farthest row is from the nearest place, and each place is a
    tenth of `num_rows` farther away than the one before it; or less if they are more than three, so
    that the last of n has about 0.4 / n of the rows, and the best 1.6 / n. The nearest sentences
    are taken that fit, and that have a place in them or lie beside one that was taken: places close
    to each other are joined. Of a first sentence that is too long, the rows around its place are
    taken.

    Args:
        places: documents, and rows counted from their first, best first.
        num_rows: how many rows all passages together may have.

    Returns:
        Passages that share no rows, and the numbers of the places in each, best first.
    """
    step = num_rows / max(10, len(places) * (len(places) - 1) / 0.6)
    by_name: dict[str, list[int]] = {}
    for rank, (document, _) in enumerate(places):
        by_name.setdefault(document.name, []).append(rank)
    bounds: dict[str, Int64Array] = {}
    away: dict[str, list[float]] = {}  # of each sentence
    own: dict[tuple[str, int], list[int]] = {}  # the sentence of each place
    for name, ranks in by_name.items():
        peaks = np.array([[places[rank][1]] for rank in ranks])
        bounds[name] = found = _bounds(places[ranks[0]][0], sorted(peaks[:, 0]), num_rows)
        index = np.searchsorted(found, peaks[:, 0], side="right") - 1
        for rank, sentence in zip(ranks, index.clip(0, len(found) - 2).tolist(), strict=True):
            own.setdefault((name, sentence), []).append(rank)
        farthest = np.maximum(np.abs(found[:-1] - peaks), np.abs(found[1:] - 1 - peaks))
        away[name] = (farthest + np.array(ranks)[:, None] * step).min(axis=0).tolist()
    # Of two as far away the later sentence; but first of all that of the best place.
    reached = [
        (-1.0 if 0 in ranks else away[name][sentence], -sentence, name)
        for (name, sentence), ranks in own.items()
    ]
    heapq.heapify(reached)
    seen = set(own)
    taken: set[tuple[str, int]] = set()
    left = num_rows
    while reached and left:
        _, negative, name = heapq.heappop(reached)
        sentence = -negative
        first, stop = bounds[name][sentence : sentence + 2].tolist()
        if not taken and stop - first > num_rows:
            first = min(max(places[0][1] - num_rows // 2, first), stop - num_rows)
            inside = [
                rank for rank in own[name, sentence] if 0 <= places[rank][1] - first < num_rows
            ]
            return [(inside, Passage(name, first, first + num_rows))]
        if stop - first > left:
            continue
        taken.add((name, sentence))
        left -= stop - first
        for beside in (sentence - 1, sentence + 1):
            if 0 <= beside < len(away[name]) and (name, beside) not in seen:
                seen.add((name, beside))
                heapq.heappush(reached, (away[name][beside], -beside, name))
    return sorted(_runs(taken, own, bounds), key=lambda run: run[0])


def _bounds(document: StoredDocument, peaks: Sequence[int], num_rows: int) -> Int64Array:
    """Return the rows at which sentences begin that are near some rows, and the number of rows.

    What is farther away than `num_rows` counts as one sentence: a book has ten thousand.

    Args:
        document: the document.
        peaks: rows of it, ascending.
        num_rows: how far to look.
    """
    tokens, total = document.row_tokens, len(document.row_tokens)
    spans: list[tuple[int, int]] = []
    for peak in peaks:
        low, high = max(peak - num_rows, 0), min(peak + num_rows + 1, total)
        if spans and low <= spans[-1][1]:
            low = spans.pop()[0]
        spans.append((low, high))
    found = [0, total]
    for low, high in spans:
        first, stop = int(tokens[low]), int(tokens[high - 1]) + 1
        ends = sentences_of(document, first, stop)[:, 1]
        found += [low, *np.searchsorted(tokens, ends).tolist()]
    return np.unique(found)


def _runs(
    taken: Collection[tuple[str, int]],
    own: Mapping[tuple[str, int], Sequence[int]],
    bounds: Mapping[str, Int64Array],
) -> Iterator[tuple[list[int], Passage]]:
    """Yield the runs of sentences side by side, and the places in each."""
    run: list[tuple[str, int]] = []
    for sentence in [*sorted(taken), ("", -1)]:
        if run and sentence != (run[-1][0], run[-1][1] + 1):
            name, ends = run[0][0], bounds[run[0][0]]
            ranks = sorted(rank for one in run for rank in own.get(one, ()))
            yield ranks, Passage(name, int(ends[run[0][1]]), int(ends[run[-1][1] + 1]))
            run = []
        run.append(sentence)


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
