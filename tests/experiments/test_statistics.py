import math

import numpy as np
import pytest
from experiments import statistics
from experiments.statistics import RESAMPLES, mean_interval, paired_difference
from scipy import stats


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(5).normal(-2, 1.5, size=40),
        np.random.default_rng(6).exponential(size=25),
        np.random.default_rng(7).random(60) < 0.3,
    ],
    ids=["normal", "exponential", "shares"],
)
def test_intervals_are_scipy_s(values, seed):
    found = mean_interval(values, seed=seed)
    expected = stats.bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(99),
    )
    low, high = expected.confidence_interval
    tolerance = 0.15 * expected.standard_error  # two random sets of resamples
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == pytest.approx(low, abs=tolerance)
    assert found.high == pytest.approx(high, abs=tolerance)
    assert found.count == len(values)


def test_a_large_sample_has_the_normal_interval():
    values = np.random.default_rng(8).normal(3, 2, size=2000)
    found = mean_interval(values)
    error = values.std() / math.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_resamples_are_the_same_however_many_are_made_at_once(monkeypatch):
    values = np.random.default_rng(10).normal(size=37)
    whole = mean_interval(values)
    monkeypatch.setattr(statistics, "_VALUES_AT_ONCE", 1000)
    assert mean_interval(values) == whole


def test_shares_of_two_have_the_binomial_s_quantiles():
    # the mean of two draws from {0, 1} is 0, 1/2 or 1, with chances 1/4, 1/2, 1/4
    found = mean_interval([0, 1])
    assert (found.mean, found.low, found.high) == (0.5, 0, 1)


def test_equal_values_are_certain_and_no_values_unknown():
    assert mean_interval([2.5] * 7) == mean_interval([2.5] * 7, seed=3)
    found = mean_interval([2.5] * 7)
    assert (found.mean, found.low, found.high) == (2.5, 2.5, 2.5)
    nothing = mean_interval([])
    assert nothing.count == 0
    assert all(math.isnan(value) for value in (nothing.mean, nothing.low, nothing.high))


def test_pairs_are_surer_than_their_sides():
    generator = np.random.default_rng(9)
    one = generator.normal(size=50)
    other = one + generator.normal(0.5, 0.1, size=50)
    found = paired_difference(list(other), list(one))
    expected = mean_interval(other - one)
    assert found == expected
    assert 0.4 < found.low < found.mean < found.high < 0.6
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([1, 2], [1])
