"""Passages chosen from windows: within the budget, best first, without removed rows."""

import numpy as np
import pytest

from emt.passage import Passage
from emt.routing.choosing import Budget, choose_passages, without_gaps
from emt.routing.evidence import Window
from tests.emt.routing.worlds import NAMES, build, routing


@pytest.fixture
def backend():
    return routing(build("llama")).backend


def chosen_around(backend, peaks, num_rows=64, num_passages=2, num_needed=None):
    """Return what is chosen around rows of documents, best first."""
    first = {name: backend.catalog.document(name).first_row for name in NAMES}
    windows = [Window(first[name] + row, score) for name, row, score in peaks]
    budget = Budget(num_rows, num_passages)
    chosen = choose_passages(windows, backend, budget, num_needed=num_needed)
    return [(routed.passage, routed.score) for routed in chosen]


def test_a_window_that_was_removed_gives_way_to_the_next(backend):
    backend.remove([40])
    chosen = chosen_around(backend, [("one", 40, 0.5), ("one", 20, 0.2)], num_passages=1)
    assert chosen == [(Passage("one", 0, 40), 0.2)]


def test_removed_rows_between_windows_part_them_and_both_are_recalled(backend):
    peaks = [("two", 20, 0.1), ("two", 50, 0.3)]
    assert chosen_around(backend, peaks) == [(Passage("two", 0, 64), 0.3)]
    start = backend.catalog.document("two").first_row
    backend.remove([start + 40])
    parts = [(Passage("two", 0, 40), 0.1), (Passage("two", 41, 64), 0.3)]
    assert chosen_around(backend, peaks) == parts
    assert chosen_around(backend, peaks, num_passages=1) == parts[:1]


def test_more_windows_where_documents_are_short(backend):
    peaks = [("one", 20, 0.5), ("one", 60, 0.4), ("two", 30, 0.3), ("three", 40, 0.2)]
    one, two = Passage("one", 0, 70), Passage("two", 0, 79)
    # All of the first, which both windows are in, is 70 rows: too little of 160, but not of 80.
    assert chosen_around(backend, peaks, 160) == [(one, 0.5), (two, 0.3)]
    assert chosen_around(backend, peaks, 80) == [(one, 0.5)]


def test_fewer_windows_that_are_needed_have_more_rows_each(backend):
    peaks = [("one", 20, 0.5), ("two", 30, 0.3), ("three", 40, 0.2)]
    one, two, three = Passage("one", 0, 70), Passage("two", 0, 79), Passage("three", 0, 88)
    assert chosen_around(backend, peaks, 160, 3, 2) == [(one, 0.5), (two, 0.3)]
    # What two leave of more than that is for a third, wanted or not.
    assert chosen_around(backend, peaks, 260, 3, 2) == [(one, 0.5), (two, 0.3), (three, 0.2)]


def test_no_windows_give_no_passages(backend):
    assert chosen_around(backend, []) == []


@pytest.mark.parametrize("seed", range(5))
def test_removed_rows_cut_a_passage(seed):
    rng = np.random.default_rng(seed)
    removed = set(rng.choice(60, 8, replace=False).tolist())
    searchable = np.array([row for row in range(200) if row - 100 not in removed])
    for peak in range(20, 40):
        passage = Passage("d", 20, 40)
        whole = without_gaps(passage, 100, 100 + peak, searchable)
        if peak in removed:
            assert whole is None
            continue
        low, high = peak, peak + 1
        while low > 20 and low - 1 not in removed:
            low -= 1
        while high < 40 and high not in removed:
            high += 1
        assert whole == Passage("d", low, high)
