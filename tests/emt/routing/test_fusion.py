"""Rankings of windows joined into one."""

from emt.routing.evidence import Window
from emt.routing.fusion import fuse_rankings


def fused(*rankings, count=8):
    windows = fuse_rankings(rankings, count, min_distance=100)
    return [(window.peak, window.score) for window in windows]


def test_rankings_are_joined():
    first = [Window(1000, 0.9), Window(2000, 0.5), Window(3000, 0.2)]
    second = [Window(2040, 1.0), Window(5000, 0.7), Window(960, 0.1)]
    expected = [(2000, 1.0), (1000, 0.9), (5000, 0.7), (3000, 0.2)]
    assert fused(first, second) == expected
    assert fused([], second)[0] == (2040, 1.0)
    assert fused([], []) == []


def test_neighbours_in_two_documents_are_two_places():
    first = [Window(1000, 0.9, document=1000), Window(1010, 0.8, document=1010)]
    second = [Window(1012, 0.7, document=1010), Window(1004, 0.7, document=1000)]
    assert fused(first, second) == [(1000, 0.9), (1010, 0.8)]
    assert fused(first[:1], second[:1]) == [(1000, 0.9), (1012, 0.7)]


def test_a_ranking_of_windows_that_are_alike_counts_little():
    alike = [Window(1000, 0.40), Window(2000, 0.39)]  # weight 1 - 0.39 / 0.4
    clear = [Window(3000, 0.8), Window(2000, 0.2)]  # weight 1 - 0.2 / 0.8
    assert fused(alike, clear, count=2) == [(3000, 0.8), (2000, 0.39), (1000, 0.40)]
    # Of five windows the three others would have nothing: weights 0.76 and 0.94.
    assert fused(alike, clear, count=5) == [(2000, 0.39), (3000, 0.8), (1000, 0.40)]
