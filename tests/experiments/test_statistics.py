import math

import numpy as np
import pytest
from experiments.statistics import mean_interval, paired_difference


def test_a_large_sample_has_the_normal_interval():
    values = np.random.default_rng(8).normal(3, 2, size=2000)
    estimate = mean_interval(values)
    error = values.std() / math.sqrt(len(values))
    assert (estimate.mean, estimate.count) == (pytest.approx(values.mean()), 2000)
    assert estimate.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_intervals_are_those_of_results_that_are_there():
    """Published tables were made with these resamples."""
    values = np.arange(7.0)
    random = np.random.default_rng(0)
    means = values[random.integers(7, size=(10_000, 7))].mean(axis=1)
    estimate = mean_interval(values)
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(means, (0.025, 0.975)))


def test_shares_of_two_have_the_binomial_s_quantiles():
    # the mean of two draws from {0, 1} is 0, 1/2 or 1, with chances 1/4, 1/2, 1/4
    estimate = mean_interval([0, 1])
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, 0, 1)


def test_equal_values_and_single_values_are_certain_and_no_values_unknown():
    for values in ([2.5] * 7, [2.5]):
        estimate = mean_interval(values)
        assert (estimate.mean, estimate.low, estimate.high) == (2.5, 2.5, 2.5)
    nothing = mean_interval([])
    assert nothing.count == 0
    assert all(math.isnan(value) for value in (nothing.mean, nothing.low, nothing.high))


def test_pairs_are_surer_than_their_sides():
    generator = np.random.default_rng(9)
    values = generator.normal(size=50)
    others = values + generator.normal(0.5, 0.1, size=50)
    estimate = paired_difference(list(others), list(values))
    assert estimate == mean_interval(others - values)
    assert 0.4 < estimate.low < estimate.mean < estimate.high < 0.6
    assert paired_difference([], []).count == 0
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1, 2], [1])
