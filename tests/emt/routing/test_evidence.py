"""Evidence: against dense matrices and all windows, and where there is little of it."""

import numpy as np
import pytest

from emt.routing.evidence import BLOCK, Hits, best_windows


def random_hits(seed, num_rows=900, num_queries=12, k=10):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(num_rows)[:k] for _ in range(num_queries)])
    scores = -np.sort(-rng.normal(size=(num_queries, k)).astype(np.float32), axis=1)
    missing = rng.random((num_queries, k)) < 0.2
    return np.where(missing, -1, ids), np.where(missing, -np.inf, scores).astype(np.float32)


def dense(ids, scores, num_rows):
    """Return each query's excess at each row, (A, num_rows), in loops."""
    excess = np.zeros((len(ids), num_rows))
    for query in range(len(ids)):
        columns = [j for j in range(ids.shape[1]) if ids[query, j] >= 0]
        lowest = min((scores[query, j] for j in columns), default=0.0)
        for j in columns:
            row = ids[query, j]
            excess[query, row] = max(excess[query, row], scores[query, j] - lowest)
    return excess


@pytest.mark.parametrize("seed", range(6))
def test_hits_are_how_far_each_row_stands_above_the_worst(seed):
    ids, scores = random_hits(seed)
    hits, expected = Hits.of_search(ids, scores), dense(ids, scores, 900)
    excess = np.zeros_like(expected)
    excess[hits.queries, hits.rows] = hits.excess
    np.testing.assert_allclose(excess, expected, atol=1e-6)
    assert hits.max_evidence == pytest.approx(expected.max(axis=1).sum(), rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_windows_are_the_best_of_all_windows(seed):
    ids, scores = random_hits(seed)
    excess = dense(ids, scores, 1024)
    scores_of_runs = [
        excess[:, start : start + 4 * BLOCK].max(axis=1).sum() / excess.max(axis=1).sum()
        for start in range(0, 1024, BLOCK)
    ]
    hits = Hits.of_search(ids, scores)
    (best,) = best_windows(hits, 1, min_distance=1)
    assert best.score == pytest.approx(max(scores_of_runs), rel=1e-5)
    assert best.peak in hits.rows
    everything = best_windows(hits, 1000, min_distance=1)
    ranked = [window.score for window in everything]
    assert ranked == sorted(ranked, reverse=True)
    for window in everything:
        near = [b for b in range(64) if b * BLOCK <= window.peak + BLOCK <= (b + 6) * BLOCK]
        assert any(scores_of_runs[b] == pytest.approx(window.score, rel=1e-5) for b in near)
    for min_distance in (30, 100):
        few = best_windows(hits, 5, min_distance=min_distance)
        peaks = sorted(window.peak for window in few)
        assert few[0] == best
        assert min(np.diff(peaks)) >= min_distance
        # Greedy: whatever is better than a chosen one is near one that is better still.
        for other in everything:
            better = [window for window in few if window.score >= other.score]
            is_near = any(abs(other.peak - window.peak) < min_distance for window in better)
            assert is_near or other.score <= few[-1].score


def test_a_query_counts_once_in_a_window():
    ids = np.array([[100, 101, 130, 500], [700, 701, 702, 703]])
    scores = np.array([[0.9, 0.8, 0.7, 0.1], [0.4, 0.3, 0.2, 0.1]], dtype=np.float32)
    first, second = best_windows(Hits.of_search(ids, scores), 2, min_distance=64)
    assert first.peak in (100, 101, 130)
    assert first.score == pytest.approx(0.8 / 1.1, rel=1e-5)
    assert second.score == pytest.approx(0.3 / 1.1, rel=1e-5)


@pytest.mark.parametrize(
    ("ids", "scores"),
    [
        (np.empty((0, 4)), np.empty((0, 4))),
        (np.empty((3, 0)), np.empty((3, 0))),
        (np.full((3, 4), -1), np.full((3, 4), -np.inf)),
        (np.array([[5], [9]]), np.array([[0.3], [0.4]])),  # the best is the worst as well
        (np.array([[5, 6, 7]]), np.array([[0.3, 0.3, 0.3]])),
    ],
)
def test_nothing_stands_out(ids, scores):
    hits = Hits.of_search(ids.astype(np.int64), scores.astype(np.float32))
    assert hits.max_evidence == 0
    assert best_windows(hits, 3, min_distance=10) == []


def test_the_first_of_equal_windows_is_taken():
    ids = np.array([[1000, 3000, 5000], [3001, 1001, 5001]])
    scores = np.array([[0.5, 0.5, 0.1], [0.7, 0.7, 0.2]], dtype=np.float32)
    windows = best_windows(Hits.of_search(ids, scores), 3, min_distance=64)
    assert [(window.peak, window.score) for window in windows] == [(1000, 1.0), (3000, 1.0)]


def test_the_peak_is_a_row_that_was_retrieved():
    """The middle of a block may belong to another document."""
    ids = np.array([[1600, 9000], [1601, 9001]])
    scores = np.array([[0.5, 0.1], [0.5, 0.1]], dtype=np.float32)
    assert best_windows(Hits.of_search(ids, scores), 1, min_distance=1)[0].peak == 1601


def test_evidence_is_of_one_document():
    """Two documents of eight rows side by side: neither has what the other one has."""
    ids = np.array([[100, 9000], [107, 9001], [108, 9002]])
    scores = np.array([[0.9, 0.1], [0.5, 0.1], [0.8, 0.1]], dtype=np.float32)
    together = best_windows(Hits.of_search(ids, scores), 2, min_distance=64)
    assert [window.score for window in together] == [1.0]
    hits = Hits.of_search(ids, scores, np.array([0, 100, 108, 116]))
    assert hits.documents.tolist() == [100, 100, 108]
    apart = best_windows(hits, 2, min_distance=64)
    assert [(window.document, window.peak) for window in apart] == [(100, 107), (108, 108)]
    assert [window.score for window in apart] == pytest.approx([1.2 / 1.9, 0.7 / 1.9])


@pytest.mark.parametrize("seed", range(4))
def test_each_short_document_is_one_window(seed):
    ids, scores = random_hits(seed)
    excess = dense(ids, scores, 900)
    first_rows = np.unique(np.random.default_rng(seed).integers(0, 900, 60))
    first_rows = np.unique(np.append(first_rows, np.arange(0, 900, 60)))
    hits = Hits.of_search(ids, scores, first_rows)
    for window in best_windows(hits, 1000, min_distance=64):
        stop = first_rows[first_rows > window.document].min(initial=900)
        evidence = excess[:, window.document : stop].max(axis=1).sum()
        assert window.score == pytest.approx(evidence / hits.max_evidence, rel=1e-5)
        assert window.document <= window.peak < stop
        assert window.peak in hits.rows
