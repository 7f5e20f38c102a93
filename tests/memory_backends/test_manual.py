"""Exact search over tensors: what is computed when, and in how many parts."""

from __future__ import annotations

import torch
import pytest

from memory_backends import MemoryBackend
from memory_backends.testing.checks import assert_finds
from memory_backends.testing.rows import LAYOUT, make_document, make_queries, make_rows

RUN = make_rows(10, seed=1)


@pytest.fixture
def backend() -> MemoryBackend:
    backend = MemoryBackend(LAYOUT)
    backend.add(make_document("a", 10), [RUN])
    return backend


def test_many_queries_are_taken_in_parts(
    backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory_backends.search.exact._SCORES_AT_ONCE", 2 * 10 * 4)  # 4 queries
    assert_finds(backend, [RUN], range(10))


def test_a_search_of_some_heads_normalises_only_their_keys(backend: MemoryBackend) -> None:
    searcher, queries = backend.searcher, make_queries(0, 3)
    alone = backend.search(0, queries[1:], 4, heads=[1])
    assert list(searcher._unit_keys) == [(0, 1)]
    every = backend.search(0, queries, 4)
    assert torch.equal(alone.ids[0], every.ids[1])
    backend.search(0, queries[:1], 4, heads=[0])  # from what the search of all has made
    assert list(searcher._unit_keys) == [(0, 1), (0, None)]
