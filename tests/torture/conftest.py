"""One process that forks children, for all tests of torture."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

if sys.platform != "linux":  # limits on the size of files, and /proc
    collect_ignore_glob = ["test_*.py"]

from tests.torture.forks import Forks


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Give what runs jobs of made-up rows."""
    forks = Forks(tmp_path_factory.mktemp("jobs"), "tests.torture.flips", "tests.torture.crowd")
    yield forks
    forks.close()
