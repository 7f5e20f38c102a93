"""Evidence: which places of a memory a prompt's queries point to.

A query is one token of the prompt in one routing head, and it retrieves some rows. How far a row's
similarity stands above that of the worst row retrieved is its *excess*: a query that finds the same
everywhere says little. The evidence of a run of rows of one document is the sum, over queries, of
the largest excess in the run. So a passage must answer to many of the prompt's words, and none
counts twice.

Source: the sum of maxima is that of Khattab and Zaharia, ColBERT (arXiv 2004.12832); the worst
retrieved similarity stands for those not retrieved as in Santhanam et al., PLAID (arXiv
2205.09707).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from memory_backends.layout import Float32Array, Int64Array

Float64Array = npt.NDArray[np.float64]

BLOCK = 16  # rows
BLOCKS_PER_WINDOW = 4
_ONE_DOCUMENT = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class Hits:
    """Rows that the queries of one prompt retrieved.

    Attributes:
        rows: (n,) int64 row ids.
        queries: (n,) int64, the query that retrieved each, 0 to `num_queries` - 1. Queries are
            numbered by heads, and by tokens within a head.
        excess: (n,) float32, above 0.
        num_queries: tokens times heads.
        documents: (n,) int64, the first row of the document that each row is in.
    """

    rows: Int64Array
    queries: Int64Array
    excess: Float32Array
    num_queries: int
    documents: Int64Array

    @classmethod
    def of_search(
        cls, ids: Int64Array, scores: Float32Array, first_rows: Int64Array = _ONE_DOCUMENT
    ) -> Self:
        """Make hits from the results of a search.

        Args:
            ids: (N, k) int64 row ids that each query retrieved, best first; -1 for none.
            scores: (N, k) float32 similarities.
            first_rows: (d,) int64, the first row of each document, ascending.
        """
        is_row = ids >= 0
        lowest = np.where(is_row, scores, np.inf).min(axis=1, initial=np.inf, keepdims=True)
        excess = np.where(is_row, scores - lowest, 0).astype(np.float32)
        queries = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
        kept = is_row & (excess > 0)
        rows = ids[kept]
        documents = first_rows[np.searchsorted(first_rows, rows, side="right") - 1]
        return cls(rows, queries[kept], excess[kept], len(ids), documents)

    def of_tokens(self, tokens: range, num_tokens: int) -> Hits:
        """Return the hits of some of the `num_tokens` tokens that have queries."""
        token = self.queries % num_tokens
        kept = (token >= tokens.start) & (token < tokens.stop)
        return replace(
            self,
            rows=self.rows[kept],
            queries=self.queries[kept],
            excess=self.excess[kept],
            documents=self.documents[kept],
        )

    @property
    def max_evidence(self) -> float:
        """The evidence of a passage that has the best row of every query."""
        best = np.zeros(self.num_queries, dtype=np.float32)
        np.maximum.at(best, self.queries, self.excess)
        return float(best.sum(dtype=np.float64))

    @property
    def best_score(self) -> float:
        """The score of the best window; 0 if there is none."""
        windows = best_windows(self, 1, min_distance=1)
        return windows[0].score if windows else 0.0


@dataclass(frozen=True)
class Window:
    """A run of rows of one document with evidence in it.

    Attributes:
        peak: the retrieved row nearest to the middle of the evidence.
        score: its share of the largest evidence that any passage could have, 0 to 1.
        document: the first row of the document.
    """

    peak: int
    score: float
    document: int = 0

    def is_near(self, other: Window, distance: int) -> bool:
        """Tell whether the peaks are in one document, less than so many rows apart."""
        return self.document == other.document and abs(self.peak - other.peak) < distance


def best_windows(hits: Hits, count: int, *, min_distance: int) -> list[Window]:
    """Find the runs of 64 rows with most evidence: at most `count` windows, best first.

    A document of fewer rows is one run: it is not judged by its neighbours.

    Args:
        hits: the retrieved rows.
        count: of windows.
        min_distance: rows that peaks in one document are apart, at least.
    """
    max_evidence = hits.max_evidence
    if max_evidence <= 0:
        return []
    places = _places(hits)
    blocks, block_of_hit = np.unique(places // BLOCK, return_inverse=True)
    of_block, query, best = _largest_of_pairs(
        block_of_hit, hits.queries, hits.excess, hits.num_queries
    )
    evidence = _evidence_of_windows(blocks, of_block, query, best, hits.num_queries)
    middles = _middles(blocks, _sums(of_block, best, len(blocks)))
    retrieved, hit = np.unique(places, return_index=True)
    peaks = hit[_nearest(retrieved, middles)]
    ranked = np.argsort(-evidence, kind="stable")
    shares = evidence / max_evidence
    windows = (
        Window(int(hits.rows[peaks[i]]), float(shares[i]), int(hits.documents[peaks[i]]))
        for i in ranked
    )
    return spaced(windows, count, min_distance=min_distance)


def spaced(windows: Iterable[Window], count: int, *, min_distance: int) -> list[Window]:
    """Return the first `count` windows, of some best first, that are not near better ones."""
    kept: list[Window] = []
    for window in windows:
        if not any(window.is_near(other, min_distance) for other in kept):
            kept.append(window)
            if len(kept) == count:
                break
    return kept


def _places(hits: Hits) -> Int64Array:
    """Return the hits' rows (n,) with documents moved apart, so that no window has rows of two.

    Each document begins with a block, and a window's length behind the one before it.
    """
    _, number = np.unique(hits.documents, return_inverse=True)
    first_blocks = hits.documents // BLOCK + BLOCKS_PER_WINDOW * number
    places: Int64Array = hits.rows - hits.documents + BLOCK * first_blocks
    return places


def _evidence_of_windows(
    blocks: Int64Array,
    of_block: Int64Array,
    query: Int64Array,
    excess: Float32Array,
    num_queries: int,
) -> Float64Array:
    """Return the evidence of the window that begins with each block, (b,) float64.

    A window that begins with a block without hits has no more than the one that begins later.

    Args:
        blocks: (b,) the blocks that have hits, ascending.
        of_block: (p,) indexes of `blocks`, for each query that has hits in the block.
        query: (p,) the query.
        excess: (p,) float32, the largest of this block and query.
        num_queries: of the prompt.
    """
    first_blocks = blocks[:, None] - np.arange(BLOCKS_PER_WINDOW)
    begins = np.searchsorted(blocks, first_blocks)  # (b, BLOCKS_PER_WINDOW)
    has_hits = blocks[begins] == first_blocks
    pair, step = np.nonzero(has_hits[of_block])  # each pair counts in the windows that it is in
    of_window, _, largest = _largest_of_pairs(
        begins[of_block[pair], step], query[pair], excess[pair], num_queries
    )
    return _sums(of_window, largest, len(blocks))


def _middles(blocks: Int64Array, evidence: Float64Array) -> Float64Array:
    """Return the middle of the evidence in the window that begins with each block, (b,).

    `blocks` (b,) are those that have hits, ascending, and `evidence` (b,) is of each block alone.
    """
    in_window = blocks[:, None] + np.arange(BLOCKS_PER_WINDOW)
    index = np.searchsorted(blocks, in_window).clip(max=len(blocks) - 1)
    weight = np.where(blocks[index] == in_window, evidence[index], 0)  # (b, BLOCKS_PER_WINDOW)
    middles: Float64Array = (weight * (in_window * BLOCK + BLOCK // 2)).sum(axis=1)
    middles /= weight.sum(axis=1)
    return middles


def _sums(index: Int64Array, values: Float32Array, size: int) -> Float64Array:
    """Return the sum of the values at each index, (size,)."""
    return np.bincount(index, values, size).astype(np.float64, copy=False)


def _largest_of_pairs(
    places: Int64Array, queries: Int64Array, values: Float32Array, num_queries: int
) -> tuple[Int64Array, Int64Array, Float32Array]:
    """Return places, queries and the largest value of each pair of them, each (p,), in order."""
    pairs = places * num_queries + queries
    order = np.argsort(pairs, kind="stable")
    pairs = pairs[order]
    firsts = np.flatnonzero(np.diff(pairs, prepend=-1))
    largest: Float32Array = np.maximum.reduceat(values[order], firsts)
    return pairs[firsts] // num_queries, pairs[firsts] % num_queries, largest


def _nearest(places: Int64Array, middles: Float64Array) -> Int64Array:
    """Return which of some places, ascending, is nearest to each middle.

    The middle itself may be a row that no query found, or that was removed.
    """
    after = np.searchsorted(places, middles).clip(max=len(places) - 1)
    before = (after - 1).clip(min=0)
    is_before = np.abs(places[before] - middles) <= np.abs(places[after] - middles)
    return np.where(is_before, before, after)
