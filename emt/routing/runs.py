"""Stored text in runs of 64 rows, which words and values score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emt.routing.evidence import Window, spaced
from memory_backends import Scope
from memory_backends.layout import Float32Array, Int64Array

LENGTH, STRIDE = 64, 32  # rows; half of a run is in the next one, too


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of rows, none with rows of two documents.

    Attributes:
        starts: (r,) int64, the first row of each run, ascending.
        stops: (r,) int64, one after its last row.
        documents: (r,) int64, the first row of its document.
    """

    starts: Int64Array
    stops: Int64Array
    documents: Int64Array

    @classmethod
    def of(cls, num_rows: Mapping[int, int]) -> Runs:
        """Return the runs of documents: first row -> number of rows, in ascending order."""
        bounds = [first + runs_of(count) for first, count in num_rows.items()]
        starts, stops = np.concatenate([np.zeros((0, 2), dtype=np.int64), *bounds]).T
        firsts = np.array(list(num_rows), dtype=np.int64)
        return cls(starts, stops, np.repeat(firsts, [len(each) for each in bounds]))

    @property
    def middles(self) -> Int64Array:
        """(r,) int64, the row in the middle of each run."""
        return (self.starts + self.stops) // 2

    def among(self, chosen: npt.NDArray[np.bool_]) -> Runs:
        """Return the runs for which a mask (r,) is True."""
        return Runs(self.starts[chosen], self.stops[chosen], self.documents[chosen])

    def windows(
        self,
        scores: Float32Array,
        count: int,
        *,
        min_distance: int,
        scope: Scope | None = None,
    ) -> list[Window]:
        """Return the runs with the largest scores, as `best_windows` those with most evidence.

        Args:
            scores: (r,) float32; a run with 0 is not returned.
            count: of windows, at most.
            min_distance: rows that peaks in one document are apart, at least.
            scope: the rows that a peak may be among; None for all.
        """
        middles = self.middles
        if scope is not None:
            scores = np.where(self.inside(scope), scores, 0)
        found = np.flatnonzero(scores > 0)
        ranked = found[np.argsort(-scores[found], kind="stable")]
        windows = (
            Window(int(middles[i]), float(scores[i]), int(self.documents[i])) for i in ranked
        )
        return spaced(windows, count, min_distance=min_distance)

    def inside(self, scope: Scope) -> npt.NDArray[np.bool_]:
        """Return a mask (r,) of the runs whose middle is in a scope."""
        middles = self.middles
        mask = np.zeros(len(middles), dtype=bool)
        for span in scope.spans:
            mask[slice(*np.searchsorted(middles, span))] = True
        return mask


def num_runs(num_rows: Int64Array) -> Int64Array:
    """Return how many runs documents of so many rows have, (d,) int64."""
    return np.maximum(-(-(num_rows - STRIDE) // STRIDE), 1)


def runs_of(num_rows: int) -> Int64Array:
    """Return the runs of a document: (r, 2) int64, counted from its first row."""
    starts = np.arange(0, max(num_rows - STRIDE, 1), STRIDE)
    return np.stack([starts, np.minimum(starts + LENGTH, num_rows)], axis=1)
