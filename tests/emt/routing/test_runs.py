"""Runs of rows: where they begin and end, and the best of them."""

import numpy as np
import pytest

from emt.routing.evidence import Window
from emt.routing.runs import Runs, num_runs
from memory_backends import Scope


def bounds(runs):
    return list(
        zip(runs.starts.tolist(), runs.stops.tolist(), runs.documents.tolist(), strict=True)
    )


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [
        (1, [(0, 1)]),
        (64, [(0, 64)]),
        (65, [(0, 64), (32, 65)]),
        (96, [(0, 64), (32, 96)]),
        (97, [(0, 64), (32, 96), (64, 97)]),
    ],
)
def test_every_row_is_in_a_run(num_rows, expected):
    runs = Runs.of({7: num_rows})
    assert bounds(runs) == [(7 + first, 7 + stop, 7) for first, stop in expected]
    assert num_runs(np.array([num_rows])).tolist() == [len(expected)]


def test_runs_end_with_their_document():
    runs = Runs.of({0: 70, 100: 5})  # rows 70 to 99 were removed
    assert bounds(runs) == [(0, 64, 0), (32, 70, 0), (100, 105, 100)]
    assert bounds(Runs.of({})) == []


def test_windows_are_the_best_runs_in_the_scope():
    runs = Runs.of({0: 128, 200: 10})
    scores = np.array([0.5, 0.9, 0.0, 0.7], dtype=np.float32)

    def found(**options):
        return runs.windows(scores, 3, **{"min_distance": 1, **options})

    best = [Window(64, pytest.approx(0.9), 0), Window(205, pytest.approx(0.7), 200)]
    assert found() == [*best, Window(32, pytest.approx(0.5), 0)]
    assert found(min_distance=40) == best
    assert found(scope=Scope.of([(200, 210)])) == best[1:]
    assert found(scope=Scope(())) == []
