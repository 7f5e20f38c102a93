"""A search of a scope finds what brute force over the rows of the scope alone finds."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
import numpy as np
import pytest

from memory_backends.backend import MemoryBackend
from memory_backends.scope import Scope
from memory_backends.testing.base import Make, Suite
from memory_backends.testing.checks import assert_hits, stored_keys
from memory_backends.testing.rows import LAYERS, make_document, make_queries, make_rows, nearest

SIZES = (60, 90, 40, 110, 70)  # rows of five documents, the first two of each being sinks
SPANS = list(itertools.pairwise(np.cumsum((0, *SIZES)).tolist()))
RUNS = [make_rows(size, seed=at, sinks=[0, 1]) for at, size in enumerate(SIZES)]
SCOPES = ([1], [1, 3], [2, 3], [4], [0, 1, 2, 3, 4])


class ScopeConformance(Suite):
    """Searches that are narrowed to some rows."""

    def made(self, make: Make, sinks: str = "all") -> MemoryBackend:
        """Return a memory of the five documents."""
        backend = make(sinks=sinks)
        for at, rows in enumerate(RUNS):
            backend.add(make_document(f"d{at}", len(rows)), [rows])
        return backend

    @pytest.mark.parametrize("sinks", ["all", "one"])
    def test_only_rows_in_scope_are_found(self, make: Make, sinks: str) -> None:
        """One set of sinks is that of the scope's own first document."""
        backend = self.made(make, sinks)
        for documents in SCOPES:
            left_out = _sinks_of(documents[1:]) if sinks == "one" else []
            _assert_finds(backend, _scope_of(documents), _rows_of(documents, left_out))
        inner = Scope.of([(SPANS[1][0] + 2, SPANS[1][1]), SPANS[2]])  # without the first's sinks
        _assert_finds(backend, inner, [*range(SPANS[1][0] + 2, SPANS[1][1]), *range(*SPANS[2])])
        few = Scope.of([(100, 102), (200, 201)])
        _assert_finds(backend, few, [100, 101, 200])  # of which there are fewer than k

    @pytest.mark.parametrize("sinks", ["all", "one"])
    def test_removed_rows_are_not_found_in_a_scope(self, make: Make, sinks: str) -> None:
        """Single ones, whole documents, and all of them."""
        backend = self.made(make, sinks)
        scope = _scope_of([1, 3])
        left_out = _sinks_of([3]) if sinks == "one" else []
        _assert_finds(backend, scope, _rows_of([1, 3], left_out))
        removed = list(range(SPANS[1][0] + 3, SPANS[1][0] + 60))
        backend.remove(removed)
        _assert_finds(backend, scope, _rows_of([1, 3], [*left_out, *removed]))
        backend.remove_document("d1")
        _assert_finds(backend, scope, _rows_of([3]))  # whose sinks are the first now
        backend.remove_document("d3")
        _assert_finds(backend, scope, [])
        _assert_finds(backend, Scope.of([]), [])

    def test_rows_added_after_saving_are_found_in_a_scope(self, make: Make) -> None:
        """Index files do not have them."""
        backend = self.made(make)
        if backend.path is not None and backend.path.exists():
            backend.rebuild()
        more = make_rows(50, seed=9)
        ids = backend.add(make_document("more", 50), [more])
        scope = Scope.of([SPANS[2], (ids.start, ids.stop)])
        for layer_idx in LAYERS:
            queries, searchable = make_queries(layer_idx, 6), [*range(*SPANS[2]), *ids]
            keys = stored_keys(backend, [*RUNS, more], layer_idx, searchable)
            hits = backend.search(layer_idx, queries, 5, scope=scope)
            assert_hits(hits, nearest(keys, queries, 5, searchable))

    @pytest.mark.parametrize("heads", [[1], [1, 0]])
    def test_some_heads_are_searched_in_a_scope(self, make: Make, heads: list[int]) -> None:
        """Before and after a search of all heads."""
        backend, scope = self.made(make, "one"), _scope_of([1, 3])
        searchable = _rows_of([1, 3], _sinks_of([3]))
        queries = make_queries(0, 6)[heads]
        for _ in range(2):
            keys = stored_keys(backend, RUNS, 0, searchable)[heads]
            hits = backend.search(0, queries, 5, heads=heads, scope=scope)
            assert_hits(hits, nearest(keys, queries, 5, searchable))
            _assert_finds(backend, scope, searchable)

    def test_searches_of_all_rows_are_as_before(self, make: Make) -> None:
        """A search of a scope leaves nothing behind."""
        backend, queries = self.made(make, "one"), make_queries(0, 6)
        before = backend.search(0, queries, 5)
        _assert_finds(backend, _scope_of([2]), _rows_of([2]))
        after = backend.search(0, queries, 5)
        assert torch.equal(before.ids, after.ids)
        assert torch.equal(before.scores, after.scores)

    def test_threads_search_scopes_of_their_own(self, make: Make) -> None:
        """As one thread would."""
        backend, queries = self.made(make), make_queries(0, 6)
        backend.search(0, queries, 1)
        scopes = [_scope_of(documents) for documents in SCOPES] * 8
        with ThreadPoolExecutor(4) as pool:
            hits = list(pool.map(lambda scope: backend.search(0, queries, 5, scope=scope), scopes))
        for parallel, scope in zip(hits, scopes, strict=True):
            alone = backend.search(0, queries, 5, scope=scope)
            assert torch.equal(parallel.ids, alone.ids)
            torch.testing.assert_close(parallel.scores, alone.scores, atol=1e-6, rtol=0)


def _scope_of(documents: Iterable[int]) -> Scope:
    return Scope.of(SPANS[at] for at in documents)


def _rows_of(documents: Iterable[int], left_out: Collection[int] = ()) -> list[int]:
    return sorted({row for at in documents for row in range(*SPANS[at])} - set(left_out))


def _sinks_of(documents: Iterable[int]) -> list[int]:
    return [SPANS[at][0] + place for at in documents for place in (0, 1)]


def _assert_finds(backend: MemoryBackend, scope: Scope, searchable: list[int], k: int = 5) -> None:
    """Compare a search of a scope with brute force; twice, as much may be kept of the first."""
    assert backend.num_searchable(scope) == len(searchable)
    for layer_idx in LAYERS:
        queries = make_queries(layer_idx, 6)
        expected = nearest(
            stored_keys(backend, RUNS, layer_idx, searchable), queries, k, searchable
        )
        for _ in range(2):
            hits = backend.retrieve(layer_idx, queries, k, scope=scope)
            assert_hits(backend.search(layer_idx, queries, k, scope=scope), expected)
            np.testing.assert_array_equal(hits.ids.numpy(), expected[1])
        rows = backend.nearest(layer_idx, queries, k, scope=scope)
        if k > len(searchable):
            assert rows is None
            continue
        fetched_rows = backend.fetch(layer_idx, hits.ids)
        assert rows is not None
        for part, retrieved, fetched in zip(rows, hits[2:], fetched_rows, strict=True):
            assert torch.equal(retrieved, fetched)
            torch.testing.assert_close(part.sum(dim=2), fetched.sum(dim=2))
