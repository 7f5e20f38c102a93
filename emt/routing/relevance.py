"""`Relevance`: whether a prompt is about something in a memory, or about something else.

Evidence is a share of all that a prompt finds, and every prompt finds something. How large a share
chance gives depends on the memory, on its size, on the model and on how many tokens ask. So a few
prompts about nothing in particular are routed in the memory itself, and a prompt is relevant if
its share stands far enough above theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Self

import numpy as np

# Everyday requests of many kinds. That some are about the memory of a cook or of a gardener does
# not matter: the mean and the spread of all count.
PROBES = (
    "How do I remove a red wine stain from a carpet?",
    "What is the square root of 144?",
    "Write a haiku about autumn leaves.",
    "Who discovered penicillin?",
    "What is the fastest land animal?",
    "Explain the rules of chess to a beginner.",
    "Which language has the most native speakers?",
    "How do I tie a bow tie?",
    "What year did the Titanic sink?",
    "Suggest a title for a novel about a lighthouse keeper.",
    "How do airplanes stay in the air?",
    "What is the chemical symbol for gold?",
    "How do I make sourdough bread?",
    "Who was the first person to walk on the moon?",
    "Write a SQL query that counts rows by day.",
    "What is the currency of Thailand?",
    "How can I sleep better at night?",
    "Name a famous jazz trumpet player.",
    "What is the distance between the Earth and the Sun?",
    "How do I train a puppy to sit?",
    "What causes a rainbow?",
    'Translate "thank you very much" into Japanese.',
    "How often should I water a cactus?",
    "What is the plot of Romeo and Juliet?",
    "Who invented the telephone?",
    "How do I sort a list in JavaScript?",
    "What is a good gift for a grandmother?",
    "How many bones are in the human body?",
    "Describe the taste of a mango.",
    "How do I apply for a passport?",
    "Give me a slogan for a bicycle shop.",
    "Write a toast for my brother's wedding.",
)
_ENDINGS = ("", "\nAnswer in a few words.")  # in turn, so that lengths differ
_LEAST_PROBES = 8
_ONE_RUN = 24  # tokens; few more than the longest probe has
_RUN = 16
_LEAST_DEVIATION = 0.05


@dataclass(frozen=True)
class Relevance:
    """What prompts about nothing in particular find in one memory.

    The logarithm of their best share is a straight line over the logarithm of the number of tokens
    that ask, and spread about it.

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
    def fitted(
        cls, shares: Sequence[float], num_asking: Sequence[int], num_rows: int
    ) -> Self | None:
        """Fit the line; None if too few prompts found anything.

        Args:
            shares: the best share of each prompt, 0 to 1; 0 for nothing.
            num_asking: tokens that ask, of each.
            num_rows: of the memory.
        """
        found = [(n, share) for share, n in zip(shares, num_asking, strict=True) if share > 0]
        if len(found) < _LEAST_PROBES:
            return None
        x, y = np.log(np.array(found, dtype=np.float64)).T
        if np.ptp(x) > 0:
            slope, intercept = np.polyfit(x, y, 1)
        else:
            slope, intercept = 0.0, y.mean()
        deviation = max(float((y - intercept - slope * x).std()), _LEAST_DEVIATION)
        return cls(num_rows, float(intercept), float(slope), deviation)

    def of(self, share: float, num_asking: int) -> float:
        """Return how far a prompt stands above the others, in standard deviations.

        Args:
            share: its best share, 0 to 1.
            num_asking: its tokens that ask.
        """
        if share <= 0:
            return -math.inf
        expected = self.intercept + self.slope * math.log(num_asking)
        return (math.log(share) - expected) / self.deviation

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


def runs_of(num_asking: int) -> list[range]:
    """Return the runs of tokens by which a prompt is judged: all of them, or runs of a long one.

    What is asked about may stand among many words that have nothing to do with it, such as
    instructions, whose evidence is everywhere.

    Args:
        num_asking: tokens that ask.
    """
    if num_asking <= _ONE_RUN:
        return [range(num_asking)]
    starts = range(0, num_asking - _RUN // 2, _RUN // 2)
    return [range(start, min(start + _RUN, num_asking)) for start in starts]


def best_by_chance(num_runs: int) -> float:
    """Return how far the best of some runs stands above chance by chance alone, in deviations.

    Source:
        Blom, Statistical Estimates and Transformed Beta-Variables (1958): the expected largest of n
        normal numbers.
    """
    if num_runs < 2:
        return 0.0
    return NormalDist().inv_cdf((num_runs - 0.375) / (num_runs + 0.25))


def measured(ask: Callable[[str], tuple[float, int]], num_rows: int) -> Relevance | None:
    """Ask what has nothing to do with a memory, and see what it finds.

    Args:
        ask: takes a prompt; returns its best share and how many tokens asked.
        num_rows: of the memory.
    """
    found = [ask(probe + _ENDINGS[n % len(_ENDINGS)]) for n, probe in enumerate(PROBES)]
    return Relevance.fitted([share for share, _ in found], [n for _, n in found], num_rows)
