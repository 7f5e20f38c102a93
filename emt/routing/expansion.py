"""Expand single rows to passages: the whole sentences around them, within a budget of rows."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from emt.citations.sentences import sentences_of
from emt.passage import Passage
from memory_backends import StoredDocument
from memory_backends.layout import Int64Array


class Candidate(NamedTuple):
    """A row that a passage may be made around, counted from its document's first row."""

    document: StoredDocument
    row: int


class Expanded(NamedTuple):
    """A passage, and the ranks of the candidates in it, best first."""

    ranks: list[int]
    passage: Passage


@dataclass(frozen=True)
class _Sentences:
    """The sentences of one document, near the candidates in it.

    Attributes:
        document: its name.
        bounds: (n + 1,) int64, the row at which each sentence begins, and the number of rows.
        distances: rows that each of the n sentences is away from the candidates.
        ranks: sentence -> the ranks of the candidates in it, best first.
    """

    document: str
    bounds: Int64Array
    distances: list[float]
    ranks: dict[int, list[int]]

    @classmethod
    def near(cls, candidates: Mapping[int, Candidate], num_rows: int, step: float) -> Self:
        """Find the sentences near candidates of the same document: rank -> candidate.

        A candidate is `step` rows farther away than the one ranked before it.
        """
        document = next(iter(candidates.values())).document
        rows = np.array([[candidate.row] for candidate in candidates.values()])
        bounds = _sentence_bounds(document, sorted(rows[:, 0]), num_rows)
        index = np.searchsorted(bounds, rows[:, 0], side="right") - 1
        ranks: dict[int, list[int]] = {}
        for rank, sentence in zip(candidates, index.clip(0, len(bounds) - 2).tolist(), strict=True):
            ranks.setdefault(sentence, []).append(rank)
        farthest = np.maximum(np.abs(bounds[:-1] - rows), np.abs(bounds[1:] - 1 - rows))
        distances = (farthest + np.array(list(candidates))[:, None] * step).min(axis=0)
        return cls(document.name, bounds, distances.tolist(), ranks)

    def rows(self, first: int, last: int) -> tuple[int, int]:
        """Return the first row of a run of sentences, and one after its last row."""
        return int(self.bounds[first]), int(self.bounds[last + 1])

    def runs(self, sentences: Iterable[int]) -> Iterator[Expanded]:
        """Yield the runs of neighbouring sentences."""
        numbers = np.array(sorted(sentences))
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1):
            ranks = [rank for sentence in run.tolist() for rank in self.ranks.get(sentence, ())]
            yield Expanded(sorted(ranks), Passage(self.document, *self.rows(run[0], run[-1])))


def passages_around(candidates: Sequence[Candidate], num_rows: int) -> list[Expanded]:
    """Return the sentences nearest to some candidates: at most `num_rows` rows.

    A sentence's distance is that of its farthest row to the nearest candidate. Each candidate
    counts as a tenth of `num_rows` farther away than the one before it; as less if there are more
    than three, so that the last of n has about 0.4 / n of the rows, and the best 1.6 / n. The
    nearest sentences are taken that fit, and that have a candidate in them or lie beside one that
    was taken: candidates close to each other share a passage. If the sentence of the best candidate
    is too long, only the rows around that candidate are returned.

    Args:
        candidates: at least one, best first.
        num_rows: how many rows all passages together may have.

    Returns:
        Passages that share no rows, in the order of their best candidates.
    """
    step = num_rows / max(10, len(candidates) * (len(candidates) - 1) / 0.6)
    of_document: dict[str, dict[int, Candidate]] = {}
    for rank, candidate in enumerate(candidates):
        of_document.setdefault(candidate.document.name, {})[rank] = candidate
    documents = {name: _Sentences.near(own, num_rows, step) for name, own in of_document.items()}
    best = documents[candidates[0].document.name]
    own_sentence = next(sentence for sentence, ranks in best.ranks.items() if 0 in ranks)
    first, stop = best.rows(own_sentence, own_sentence)
    if stop - first > num_rows:
        first = min(max(candidates[0].row - num_rows // 2, first), stop - num_rows)
        ranks = best.ranks[own_sentence]
        inside = [rank for rank in ranks if 0 <= candidates[rank].row - first < num_rows]
        return [Expanded(inside, Passage(best.document, first, first + num_rows))]
    taken = _nearest_sentences(documents, num_rows)
    passages = [run for name, own in taken.items() for run in documents[name].runs(own)]
    return sorted(passages, key=lambda expanded: expanded.ranks)


def _nearest_sentences(documents: Mapping[str, _Sentences], num_rows: int) -> dict[str, list[int]]:
    """Take the nearest sentences that fit into `num_rows` rows: document -> sentences."""
    # Of two as far away the later sentence; but first of all that of the best candidate.
    reached = [
        (-1.0 if 0 in ranks else near.distances[sentence], -sentence, name)
        for name, near in documents.items()
        for sentence, ranks in near.ranks.items()
    ]
    heapq.heapify(reached)
    seen = {(name, sentence) for name, near in documents.items() for sentence in near.ranks}
    taken: dict[str, list[int]] = {}
    left = num_rows
    while reached and left:
        _, negative, name = heapq.heappop(reached)
        near, sentence = documents[name], -negative
        first, stop = near.rows(sentence, sentence)
        if stop - first > left:
            continue
        taken.setdefault(name, []).append(sentence)
        left -= stop - first
        for beside in (sentence - 1, sentence + 1):
            if 0 <= beside < len(near.distances) and (name, beside) not in seen:
                seen.add((name, beside))
                heapq.heappush(reached, (near.distances[beside], -beside, name))
    return taken


def _sentence_bounds(document: StoredDocument, rows: Sequence[int], num_rows: int) -> Int64Array:
    """Return the rows at which sentences near some rows begin, and the document's number of rows.

    What is farther away than `num_rows` counts as one sentence: a book has ten thousand.
    """
    tokens, total = document.row_tokens, len(document.row_tokens)
    spans: list[tuple[int, int]] = []
    for row in rows:
        low, high = max(row - num_rows, 0), min(row + num_rows + 1, total)
        if spans and low <= spans[-1][1]:
            low = spans.pop()[0]
        spans.append((low, high))
    bounds = [0, total]
    for low, high in spans:
        first, stop = int(tokens[low]), int(tokens[high - 1]) + 1
        ends = sentences_of(document, first, stop)[:, 1]
        bounds += [low, *np.searchsorted(tokens, ends).tolist()]
    return np.unique(bounds)
