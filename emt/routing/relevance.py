"""`Relevance`: whether a prompt is about something in a memory, or about something else.

Evidence is a share of all that a prompt's queries retrieve, and every query retrieves something.
How much evidence chance gives depends on the memory, on its size, on the model and on the number of
tokens. So a few prompts about nothing in particular, the probes, are routed in the memory itself,
and a prompt is relevant if its evidence stands far enough above theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Self

import numpy as np

from emt.routing.evidence import Hits
from emt.routing.probes import PROBES

_ENDINGS = ("", "\nAnswer in a few words.")  # of the probes in turn, so that their lengths differ
_MIN_PROBES = 8
_LONGEST_WHOLE = 24  # tokens; few more than the longest probe has
_RUN = 16  # tokens
_MIN_DEVIATION = 0.05


@dataclass(frozen=True)
class Relevance:
    """The scores that probes have in one memory, to compare the score of a prompt with.

    The logarithm of a probe's score is a straight line over the logarithm of its number of tokens,
    and spreads about it.

    Attributes:
        num_rows: of the memory.
        intercept: of the line.
        slope: of the line.
        deviation: the standard deviation of the spread.
    """

    num_rows: int
    intercept: float
    slope: float
    deviation: float

    @classmethod
    def fit(cls, scores: Sequence[float], num_tokens: Sequence[int], num_rows: int) -> Self | None:
        """Fit the line; None if too few probes have any evidence.

        Args:
            scores: of the best window of each probe, 0 to 1; 0 for no evidence.
            num_tokens: of the question in each probe.
            num_rows: as the attribute.
        """
        pairs = [(n, score) for score, n in zip(scores, num_tokens, strict=True) if score > 0]
        if len(pairs) < _MIN_PROBES:
            return None
        x, y = np.log(np.array(pairs, dtype=np.float64)).T
        if np.ptp(x) > 0:
            slope, intercept = np.polyfit(x, y, 1)
        else:
            slope, intercept = 0.0, y.mean()
        deviation = max(float((y - intercept - slope * x).std()), _MIN_DEVIATION)
        return cls(num_rows, float(intercept), float(slope), deviation)

    def of(self, score: float, num_tokens: int) -> float:
        """Return how far a score stands above those of probes, in standard deviations.

        Args:
            score: of a prompt's best window, 0 to 1.
            num_tokens: of the prompt, those that have queries.
        """
        if score <= 0:
            return -math.inf
        expected = self.intercept + self.slope * math.log(num_tokens)
        return (math.log(score) - expected) / self.deviation

    def of_prompt(self, hits: Hits, score: float, num_tokens: int) -> float:
        """Return how far a prompt with some hits stands above probes, as `of`.

        Of a long prompt, the most relevant run of tokens counts.
        """
        runs = token_runs(num_tokens)
        if len(runs) == 1:
            return self.of(score, num_tokens)
        scores = [hits.of_tokens(run, num_tokens).best_score for run in runs]
        return max(map(self.of, scores, map(len, runs))) - expected_maximum(len(runs))

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        values = [float(data[name]) for name in ("num_rows", "intercept", "slope", "deviation")]
        if not all(map(math.isfinite, values)) or values[3] <= 0:
            raise ValueError(f"not a line and a spread about it: {values}")
        return cls(int(values[0]), *values[1:])


def token_runs(num_tokens: int) -> list[range]:
    """Return the runs of tokens by which a prompt is judged: all of them, or runs of a long one.

    The subject may stand among many words that have nothing to do with it, such as instructions,
    whose evidence is everywhere.
    """
    if num_tokens <= _LONGEST_WHOLE:
        return [range(num_tokens)]
    starts = range(0, num_tokens - _RUN // 2, _RUN // 2)
    return [range(start, min(start + _RUN, num_tokens)) for start in starts]


def expected_maximum(count: int) -> float:
    """Return the expected largest of `count` standard normal numbers: how far the best run of a
    prompt stands above the average by chance alone.

    Source:
        Blom, Statistical Estimates and Transformed Beta-Variables (1958).
    """
    if count < 2:
        return 0.0
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25))


def measure_relevance(
    route_probe: Callable[[str], tuple[float, int]], num_rows: int
) -> Relevance | None:
    """Route the probes in a memory, and fit the line to their scores.

    Args:
        route_probe: takes a prompt; returns the score of its best window and its number of tokens.
        num_rows: of the memory.
    """
    results = [route_probe(probe + _ENDINGS[n % len(_ENDINGS)]) for n, probe in enumerate(PROBES)]
    scores, lengths = zip(*results, strict=True)
    return Relevance.fit(scores, lengths, num_rows)
