"""How sure a mean is: bootstrap intervals, over items and over pairs of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
_VALUES_AT_ONCE = 2**22  # 32 MB of them, however many there are


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        mean: of the values; NaN if there are none.
        low: 2.5 % of bootstrap means are below.
        high: 2.5 % are above.
        count: how many values.
    """

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float] | npt.NDArray[np.floating], *, seed: int = 0) -> Estimate:
    """Return a mean with its 95 % percentile bootstrap interval.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    random = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    step = max(_VALUES_AT_ONCE // len(found), 1)
    for start in range(0, RESAMPLES, step):
        size = (min(step, RESAMPLES - start), len(found))
        means[start : start + step] = found[random.integers(len(found), size=size)].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(found.mean()), float(low), float(high), len(found))


def paired_difference(one: Sequence[float], other: Sequence[float], *, seed: int = 0) -> Estimate:
    """Return the mean of `one - other` over the same items, with its interval.

    Raises:
        ValueError: they are not equally many.
    """
    if len(one) != len(other):
        raise ValueError(f"pairs must be as many on both sides; got {len(one)} and {len(other)}.")
    return mean_interval(np.asarray(one, dtype=np.float64) - np.asarray(other), seed=seed)
