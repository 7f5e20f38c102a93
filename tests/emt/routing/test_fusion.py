"""Rankings of windows joined into one of places."""

import pytest

from emt.routing.evidence import Window
from emt.routing.fusion import fuse_rankings


def fused(*rankings):
    """Return peaks, best scores and priors of places."""
    places = fuse_rankings(rankings, min_distance=100)
    return [(place.window.peak, place.window.score, pytest.approx(place.prior)) for place in places]


def test_a_place_has_the_sum_of_its_reciprocal_ranks():
    first = [Window(1000, 0.9), Window(2000, 0.5), Window(3000, 0.2)]
    second = [Window(2040, 1.0), Window(5000, 0.7), Window(960, 0.1)]
    third = [Window(3000, 0.3), Window(960, 0.95)]
    assert fused(first, second, third) == [
        (1000, 0.95, 1 / 2 + 1 / 4 + 1 / 3),
        (2000, 1.0, 1 / 3 + 1 / 2),
        (3000, 0.3, 1 / 4 + 1 / 2),
        (5000, 0.7, 1 / 3),
    ]
    assert fused([], second)[0] == (2040, 1.0, 1 / 2)
    assert fused([], []) == fused() == []


def test_equal_places_stand_as_the_rankings_do():
    assert [peak for peak, *_ in fused([Window(1000, 0.1)], [Window(9, 0.9)])] == [1000, 9]


def test_neighbours_in_two_documents_are_two_places():
    first = [Window(1000, 0.9, document=1000), Window(1010, 0.8, document=1010)]
    second = [Window(1012, 0.7, document=1010), Window(1004, 0.7, document=1000)]
    both = 1 / 2 + 1 / 3
    assert fused(first, second) == [(1000, 0.9, both), (1010, 0.8, both)]
    assert fused(first[:1], second[:1]) == [(1000, 0.9, 1 / 2), (1012, 0.7, 1 / 2)]


def test_a_window_counts_for_the_nearest_of_two_places():
    first = [Window(1000, 0.9), Window(1120, 0.8)]
    assert fused(first, [Window(1090, 0.7)]) == [
        (1120, 0.8, 1 / 3 + 1 / 2),
        (1000, 0.9, 1 / 2),
    ]
