"""Documents whose attention sinks are known: a tiny random model has hardly any."""

import contextlib
from unittest import mock

import numpy as np

from emt.ingest.sinks import SinkFinder


@contextlib.contextmanager
def first_rows_are_sinks(count):
    """Mark the first rows of each document of one window that is written in the block."""

    def find(self, keys, queries, scaling):
        return np.arange(next(iter(keys.values())).shape[1]) < count

    with mock.patch.object(SinkFinder, "find", find):
        yield
