"""Which rows a search may find: those of some documents, as spans of row ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memory_backends.errors import MemoryMismatchError
from memory_backends.layout import Int64Array


@dataclass(frozen=True)
class Scope:
    """Rows that a search may find; it never looks at others. Immutable and hashable.

    Removed rows may lie in a scope; no search finds them.

    Attributes:
        spans: (first, stop) row ids, ascending; none overlaps or touches the next. `of` makes them
            from any.
    """

    spans: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.spans))  # asked for at every layer and step

    def __hash__(self) -> int:
        kept: int = self.__dict__["_hash"]
        return kept

    @classmethod
    def of(cls, spans: Iterable[tuple[int, int]]) -> Scope:
        """Make a scope of spans in any order; empty ones are left out.

        Raises:
            MemoryMismatchError: a span ends before it begins, or begins below 0.
        """
        ordered = sorted(spans)
        for first, stop in ordered:
            if not 0 <= first <= stop:
                raise MemoryMismatchError(
                    f"a span of a scope must be (first, stop) with 0 <= first <= stop; "
                    f"got ({first}, {stop})."
                )
        return cls(tuple(joined(span for span in ordered if span[0] < span[1])))

    @classmethod
    def of_rows(cls, ids: Int64Array) -> Scope:
        """Make a scope of row ids, ascending, (n,) int64."""
        runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
        return cls(tuple((int(run[0]), int(run[-1]) + 1) for run in runs if len(run)))

    def __len__(self) -> int:
        """Row ids in it, those of removed rows included."""
        return sum(stop - first for first, stop in self.spans)

    def mask(self, num_rows: int) -> npt.NDArray[np.bool_]:
        """Return a mask over the first `num_rows` row ids, (num_rows,)."""
        is_inside = np.zeros(num_rows, dtype=bool)
        for first, stop in self.spans:
            is_inside[first:stop] = True
        return is_inside

    def among(self, ids: Int64Array) -> Int64Array:
        """Return those of `ids` that are in the scope; both ascending, (n,) int64."""
        if not self.spans:
            return ids[:0]
        bounds = np.searchsorted(ids, np.array(self.spans, dtype=np.int64))  # (spans, 2)
        return np.concatenate([ids[first:stop] for first, stop in bounds])


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans (first, stop), ascending, that overlap or touch."""
    runs: list[tuple[int, int]] = []
    for first, stop in spans:
        if runs and first <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], stop))
        else:
            runs.append((first, stop))
    return runs
