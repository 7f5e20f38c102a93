"""Rankings of windows joined into one."""

import numpy as np
import pytest

from emt.routing.evidence import Hits, Window
from emt.routing.fusion import evidence_of_runs, fuse_rankings, fused_scores
from emt.routing.runs import Runs


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


def test_evidence_of_runs_is_a_sum_of_maxima():
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 200, (6, 9))
    scores = rng.random((6, 9)).astype(np.float32)
    hits = Hits.of_search(ids, scores, np.array([0, 110]))
    runs = Runs.of({0: 110, 110: 90})
    expected = np.zeros(len(runs.starts))
    for i, (start, stop) in enumerate(zip(runs.starts, runs.stops, strict=True)):
        for row_ids, of_query in zip(ids, scores, strict=True):
            inside = (row_ids >= start) & (row_ids < stop)
            expected[i] += max((of_query[inside] - of_query.min()).tolist(), default=0)
    expected /= (scores.max(axis=1) - scores.min(axis=1)).sum()
    np.testing.assert_allclose(evidence_of_runs(hits, runs), expected, rtol=1e-5)


def test_a_voice_that_finds_much_the_same_everywhere_says_little():
    runs = Runs.of(dict.fromkeys(range(0, 400, 10), 10))
    alike = np.linspace(0.80, 0.84, 40, dtype=np.float32)
    clear = np.zeros(40, dtype=np.float32)
    clear[5] = 0.3
    own, scores = fused_scores([(runs, alike), (runs, clear)])
    assert own is runs
    assert scores.argmax() == 5
    assert scores[5] == pytest.approx(0.3)
    assert scores[39] == pytest.approx(alike[39] - alike[7])  # the 33rd best
    later = Runs.of({0: 10, 500: 10})  # documents were removed and written meanwhile
    _, of_two = fused_scores([(later, clear[:2] + 0.1), (runs, clear + 0.2)])
    np.testing.assert_allclose(of_two, [0.1, 0.1])
