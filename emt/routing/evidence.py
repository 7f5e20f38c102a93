"""From what a question's tokens find to the passages they point to.

Each token of a question and each routing head finds some rows. How far a row's similarity stands
above that of the worst row found is its *excess*: a token that finds the same everywhere says
little. The evidence of a run of rows is the sum, over tokens and heads, of the largest excess in
it, so that a passage must answer to many of the question's words, and none counts twice.

Source: the sum of maxima is that of Khattab and Zaharia, ColBERT (arXiv 2004.12832), and the worst
found similarity stands for those not found as in Santhanam et al., PLAID (arXiv 2205.09707).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memory_backends.layout import Int64Array

Float32Array = npt.NDArray[np.float32]

BLOCK = 16  # rows
_WINDOW = 4  # blocks


@dataclass(frozen=True)
class Hits:
    """Rows that were found.

    Attributes:
        rows: (n,) int64 row ids.
        askers: (n,) int64, which token and head found each: 0 to `num_askers` - 1.
        excess: (n,) float32, 0 or more.
        num_askers: tokens times heads.
    """

    rows: Int64Array
    askers: Int64Array
    excess: Float32Array
    num_askers: int

    @classmethod
    def of(cls, ids: Int64Array, scores: Float32Array) -> Hits:
        """Make hits of a search.

        Args:
            ids: (A, k) int64 row ids that each asker found, best first; -1 for none.
            scores: (A, k) float32 similarities.
        """
        there = ids >= 0
        lowest = np.where(there, scores, np.inf).min(axis=1, initial=np.inf, keepdims=True)
        excess = np.where(there, scores - lowest, 0).astype(np.float32)
        askers = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)
        used = there & (excess > 0)
        return cls(ids[used], askers[used], excess[used], len(ids))

    def of_tokens(self, tokens: range, num_tokens: int) -> Hits:
        """Return what some tokens found.

        Args:
            tokens: which.
            num_tokens: of all; askers are numbered by heads, and by tokens within a head.
        """
        token = self.askers % num_tokens
        mine = (token >= tokens.start) & (token < tokens.stop)
        return Hits(self.rows[mine], self.askers[mine], self.excess[mine], self.num_askers)

    @property
    def most(self) -> float:
        """The evidence of a passage that has the best row of every asker."""
        best = np.zeros(self.num_askers, dtype=np.float32)
        np.maximum.at(best, self.askers, self.excess)
        return float(best.sum(dtype=np.float64))


@dataclass(frozen=True)
class Window:
    """A run of rows with evidence in it.

    Attributes:
        peak: the row that was found nearest to the middle of the evidence.
        share: its evidence as a share of all there could be, 0 to 1.
    """

    peak: int
    share: float


def windows_of(hits: Hits, count: int, *, apart: int) -> list[Window]:
    """Find the runs of 64 rows with most evidence, at least `apart` rows from each other.

    Args:
        hits: what was found.
        count: how many runs at most.
        apart: rows between their peaks.

    Returns:
        Best first.
    """
    most = hits.most
    if most <= 0:
        return []
    blocks, at = np.unique(hits.rows // BLOCK, return_inverse=True)
    of_block, asker, best = _largest(at, hits.askers, hits.excess, hits.num_askers)
    # Runs of blocks that begin with a block that has something: any other run has no more.
    place = blocks[:, None] + np.arange(_WINDOW)
    found = np.searchsorted(blocks, place).clip(max=len(blocks) - 1)
    is_there = blocks[found] == place
    begin = np.searchsorted(blocks, blocks[:, None] - np.arange(_WINDOW))  # (b, _WINDOW)
    is_begin = blocks[begin] == blocks[:, None] - np.arange(_WINDOW)
    pair, step = np.nonzero(is_begin[of_block])  # each pair counts in the runs it is in
    of_run, _, evidence = _largest(
        begin[of_block[pair], step], asker[pair], best[pair], hits.num_askers
    )
    scores = np.bincount(of_run, evidence, len(blocks))
    weight = np.where(is_there, np.bincount(of_block, best, len(blocks))[found], 0)  # (b, _WINDOW)
    middle = (weight * (place * BLOCK + BLOCK // 2)).sum(axis=1) / weight.sum(axis=1)
    peaks = _nearest(np.unique(hits.rows), middle)
    chosen: list[Window] = []
    for index in np.argsort(-scores, kind="stable"):
        peak = int(peaks[index])
        if all(abs(peak - other.peak) >= apart for other in chosen):
            chosen.append(Window(peak, float(scores[index]) / most))
            if len(chosen) == count:
                break
    return chosen


def _largest(
    places: Int64Array, askers: Int64Array, values: Float32Array, num_askers: int
) -> tuple[Int64Array, Int64Array, Float32Array]:
    """Return places, askers and the largest value of each pair of them, each (p,), in order."""
    pairs = places * num_askers + askers
    order = np.argsort(pairs, kind="stable")
    pairs = pairs[order]
    firsts = np.flatnonzero(np.diff(pairs, prepend=-1))
    largest: Float32Array = np.maximum.reduceat(values[order], firsts)
    return pairs[firsts] // num_askers, pairs[firsts] % num_askers, largest


def _nearest(rows: Int64Array, middle: npt.NDArray[np.float64]) -> Int64Array:
    """Return the row nearest to each place, of `rows` ascending.

    The middle itself may be a row of the next document, or a removed one, which were not found.
    """
    after = np.searchsorted(rows, middle).clip(max=len(rows) - 1)
    before = (after - 1).clip(min=0)
    is_before = np.abs(rows[before] - middle) <= np.abs(rows[after] - middle)
    return rows[np.where(is_before, before, after)]
