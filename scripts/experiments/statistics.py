"""How sure a mean is: 95 % bootstrap intervals over items, and over pairs of items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; all three are NaN if there are no values.

    Attributes:
        mean: of the values.
        low: 2.5 % quantile of the means of bootstrap resamples.
        high: 97.5 % quantile.
        count: number of values.
    """

    mean: float
    low: float
    high: float
    count: int


def mean_interval(values: Sequence[float] | npt.NDArray[np.floating]) -> Estimate:
    """Return a mean with its percentile bootstrap interval; equal values give equal intervals.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean()) if len(sample) else float("nan")
    if len(sample) < 2:
        return Estimate(mean, mean, mean, len(sample))
    result = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(2**22 // len(sample), 1),
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return Estimate(mean, float(low), float(high), len(sample))


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Return the mean of `values - others` with its interval; both are of the same items.

    Raises:
        ValueError: their lengths differ.
    """
    pairs = np.array(list(zip(values, others, strict=True)), dtype=np.float64).reshape(-1, 2)
    return mean_interval(pairs[:, 0] - pairs[:, 1])
