"""FAISS's threads beside torch's, in processes that import them in either order."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import {first}
import faiss, torch
from memory_backends.faiss import index
torch.set_num_threads(2)
faiss.omp_set_num_threads(2)
with index._one_team():
    print(index._SHARES_THREADS, faiss.omp_get_max_threads(), torch.get_num_threads(), end=" ")
print(faiss.omp_get_max_threads(), torch.get_num_threads())
"""


@pytest.mark.parametrize("first", ["torch", "faiss"])
def test_torch_keeps_its_threads_and_faiss_gets_one_team(first: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first)],
        capture_output=True,
        text=True,
        check=True,
    )
    shared, in_search, torch_in_search, after, torch_after = done.stdout.split()
    assert (torch_in_search, after, torch_after) == ("2", "2", "2")
    assert in_search == ("2" if shared == "True" else "1")
