"""What n queries take, and from which n on one way is cheaper than another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.tables import Record


@dataclass(frozen=True)
class Cost:
    """What a way to answer queries takes, in seconds.

    Attributes:
        once: before the first query.
        each: for each query.
    """

    once: float
    each: float

    @classmethod
    def of(cls, records: Sequence[Record]) -> Cost:
        """Return the medians over rounds, of which `each` is the mean over a round's queries."""
        return cls(
            statistics.median(record["once"] for record in records),
            statistics.median(statistics.mean(record["queries"]) for record in records),
        )

    def mean(self, queries: int) -> float:
        """Return the mean time of a query, if so many share what is done once."""
        return self.once / queries + self.each

    def break_even(self, other: Cost) -> int | None:
        """Return the number of queries from which on this takes no longer than `other`.

        None if there is none: its queries are slower, or as slow, and it is not ahead from the
        start.
        """
        ahead, gain = other.once - self.once, other.each - self.each
        if ahead >= 0 and gain >= 0:
            return 1
        if gain <= 0:
            return None
        return max(math.ceil(-ahead / gain), 1)
