"""Evidence: against dense matrices and all windows, and where there is little of it."""

import numpy as np
import pytest

from emt.routing.evidence import BLOCK, Hits, windows_of


def random_hits(seed, num_rows=900, askers=12, k=10):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(num_rows)[:k] for _ in range(askers)])
    scores = -np.sort(-rng.normal(size=(askers, k)).astype(np.float32), axis=1)
    missing = rng.random((askers, k)) < 0.2
    return np.where(missing, -1, ids), np.where(missing, -np.inf, scores).astype(np.float32)


def dense(ids, scores, num_rows):
    """Return each asker's excess at each row, (A, num_rows), in loops."""
    found = np.zeros((len(ids), num_rows))
    for asker in range(len(ids)):
        there = [j for j in range(ids.shape[1]) if ids[asker, j] >= 0]
        lowest = min((scores[asker, j] for j in there), default=0.0)
        for j in there:
            row = ids[asker, j]
            found[asker, row] = max(found[asker, row], scores[asker, j] - lowest)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_hits_are_how_far_each_row_stands_above_the_worst(seed):
    ids, scores = random_hits(seed)
    hits, expected = Hits.of(ids, scores), dense(ids, scores, 900)
    found = np.zeros_like(expected)
    found[hits.askers, hits.rows] = hits.excess
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert hits.most == pytest.approx(expected.max(axis=1).sum(), rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_windows_are_the_best_of_all_windows(seed):
    ids, scores = random_hits(seed)
    excess = dense(ids, scores, 1024)
    most = excess.max(axis=1).sum()
    shares = []
    for start in range(0, 1024, BLOCK):
        shares.append(excess[:, start : start + 4 * BLOCK].max(axis=1).sum() / most)
    hits = Hits.of(ids, scores)
    (best,) = windows_of(hits, 1, apart=1)
    assert best.share == pytest.approx(max(shares), rel=1e-5)
    assert best.peak in hits.rows
    everything = windows_of(hits, 1000, apart=1)
    found = [window.share for window in everything]
    assert found == sorted(found, reverse=True)
    for window in everything:
        near = [shares[b] for b in range(64) if b * BLOCK <= window.peak + BLOCK <= (b + 6) * BLOCK]
        assert any(share == pytest.approx(window.share, rel=1e-5) for share in near)
    for apart in (30, 100):
        few = windows_of(hits, 5, apart=apart)
        peaks = sorted(window.peak for window in few)
        assert few[0] == best
        assert min(np.diff(peaks)) >= apart
        # Greedy: whatever is better than a chosen one is near one that is better still.
        for other in everything:
            better = [window for window in few if window.share >= other.share]
            is_near = any(abs(other.peak - window.peak) < apart for window in better)
            assert is_near or other.share <= few[-1].share


def test_an_asker_counts_once_in_a_window():
    ids = np.array([[100, 101, 130, 500], [700, 701, 702, 703]])
    scores = np.array([[0.9, 0.8, 0.7, 0.1], [0.4, 0.3, 0.2, 0.1]], dtype=np.float32)
    first, second = windows_of(Hits.of(ids, scores), 2, apart=64)
    assert first.peak in (100, 101, 130)
    assert first.share == pytest.approx(0.8 / 1.1, rel=1e-5)
    assert second.share == pytest.approx(0.3 / 1.1, rel=1e-5)


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
    hits = Hits.of(ids.astype(np.int64), scores.astype(np.float32))
    assert hits.most == 0
    assert windows_of(hits, 3, apart=10) == []


def test_the_first_of_equal_windows_is_taken():
    ids = np.array([[1000, 3000, 5000], [3001, 1001, 5001]])
    scores = np.array([[0.5, 0.5, 0.1], [0.7, 0.7, 0.2]], dtype=np.float32)
    found = windows_of(Hits.of(ids, scores), 3, apart=64)
    assert [window.peak for window in found] == [1000, 3000]
    assert [window.share for window in found] == [1.0, 1.0]


def test_the_peak_is_a_row_that_was_found():
    """The middle of a block may belong to another document."""
    ids = np.array([[1600, 9000], [1601, 9001]])
    scores = np.array([[0.5, 0.1], [0.5, 0.1]], dtype=np.float32)
    assert windows_of(Hits.of(ids, scores), 1, apart=1)[0].peak == 1601
