"""Of two turns about the same the newer comes first; of others the likelier."""

import torch
import numpy as np
import pytest

from emt import attach
from emt.passage import Passage
from emt.routing.recency import newest_of_same, times_of
from tests.families import build

NO_TIME = np.nan


@pytest.mark.parametrize(
    ("posterior", "missed", "times", "expected"),
    [
        ([9.0, 7.0], [0.0, 1.0], [10.0, 20.0], [1, 0]),
        ([9.0, 7.0], [0.0, 1.0], [20.0, 10.0], [0, 1]),  # the best is the newest
        ([9.0, 6.0], [0.0, 1.0], [10.0, 20.0], [0, 1]),  # much less likely
        ([-1.0, -1.1], [0.0, 0.0], [10.0, 20.0], [0, 1]),  # nothing is said of it
        ([9.0, 7.0], [0.0, 2.0], [10.0, 20.0], [0, 1]),  # does not say what the best says
        ([9.0, 8.0, 7.0], [0.0, 0.5, 0.5], [10.0, 20.0, 30.0], [2, 0, 1]),  # corrected twice
        ([9.0, 8.0, 7.0], [0.0, 0.5, 0.5], [10.0, 20.0, 15.0], [1, 0, 2]),
        ([9.0, 7.0], [0.0, 0.0], [NO_TIME, 20.0], [0, 1]),  # a document that was not said
        ([9.0, 7.0], [0.0, 0.0], [10.0, NO_TIME], [0, 1]),
    ],
)
def test_the_newest_of_those_that_say_the_same_is_first(posterior, missed, times, expected):
    order = list(range(len(times)))
    found = newest_of_same(order, np.array(posterior), torch.tensor(missed), np.array(times))
    assert found == expected


def test_times_are_those_of_turns():
    memory = attach(build("llama"))
    abouts = [
        {"conversation": "c", "time": 12.5},
        {"conversation": "c", "time": 7},
        {"conversation": "c", "time": "noon"},
        {"conversation": "c", "time": True},
        {"conversation": "c"},
        {"time": 3.0},
        None,
    ]
    for number, about in enumerate(abouts):
        memory.write([5, 6, 7], document=f"d{number}", metadata=about)
    passages = [Passage(f"d{number}", 0, 3) for number in range(len(abouts))]
    times = times_of([*passages, Passage("gone", 0, 3)], memory.backend)
    np.testing.assert_array_equal(times, [12.5, 7.0, *[NO_TIME] * 6])
