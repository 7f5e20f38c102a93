"""Searching all rows and fetching: results are those of brute force, whatever the searcher."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import numpy as np
import pytest

from memory_backends.errors import MemoryMismatchError
from memory_backends.layout import LayerLayout, MemoryLayout
from memory_backends.search.scores import SearchResult
from memory_backends.testing.base import Make, Suite
from memory_backends.testing.checks import (
    assert_close,
    assert_fetches,
    assert_finds,
    assert_hits,
    stored_keys,
)
from memory_backends.testing.rows import LAYERS, make_document, make_queries, make_rows, nearest


class SearchConformance(Suite):
    """Search, retrieve, nearest and fetch."""

    def test_search_finds_what_brute_force_finds(self, make: Make) -> None:
        """Also after the memory has grown."""
        backend, runs = make(), self.runs
        assert backend.add(make_document("a", 10), [runs[0]]) == range(10)
        assert_finds(backend, runs[:1], range(10))
        assert backend.add(make_document("b", 7), [runs[1]]) == range(10, 17)
        assert_finds(backend, runs, range(17))

    def test_length_of_a_query_does_not_matter(self, make: Make) -> None:
        """Scores are cosines."""
        backend, queries = self.filled(make()), make_queries(0, 4)
        small, large = (backend.search(0, queries * scale, 3) for scale in (1e-3, 1e3))
        assert torch.equal(small.ids, large.ids)
        torch.testing.assert_close(small.scores, large.scores)

    def test_more_asked_than_there_is_ends_in_nothing(self, make: Make) -> None:
        """Results are padded with id -1 and score -inf."""
        backend = self.filled(make())
        assert_finds(backend, self.runs, range(17), k=20)
        hits = backend.search(0, make_queries(0, 2), 20)
        assert bool((hits.ids[..., 17:] == -1).all())
        assert bool(torch.isneginf(hits.scores[..., 17:]).all())

    def test_no_queries_find_nothing(self, make: Make) -> None:
        """Shapes are kept."""
        hits = self.filled(make()).search(3, torch.empty(1, 0, 4), 5)
        assert hits.ids.shape == hits.scores.shape == (1, 0, 5)

    def test_an_empty_memory_finds_nothing(self, make: Make) -> None:
        """Ids of -1 fetch finite numbers."""
        backend = make()
        assert_finds(backend, [make_rows(0, seed=1)], [])
        keys, values = backend.fetch(3, torch.full((1, 2, 5), -1))
        assert (keys.shape, values.shape) == ((1, 2, 5, 4), (1, 2, 5, 6))
        assert bool(torch.isfinite(keys).all() and torch.isfinite(values).all())

    def test_retrieve_and_nearest_give_the_rows_that_search_finds(self, make: Make) -> None:
        """`nearest` in any order, or None if there are too few."""
        backend = self.filled(make())
        backend.remove_document("a")
        for layer_idx in LAYERS:
            queries = make_queries(layer_idx, 4)
            hits = backend.search(layer_idx, queries, 3)
            keys, values = backend.fetch(layer_idx, hits.ids)
            retrieved = backend.retrieve(layer_idx, queries, 3)
            for part, expected in zip(retrieved, (*hits, keys, values), strict=True):
                assert torch.equal(part, expected)
            rows = backend.nearest(layer_idx, queries, 3)
            assert rows is not None
            for part, expected in zip(rows, (keys, values), strict=True):
                torch.testing.assert_close(part.sum(dim=2), expected.sum(dim=2))
            assert backend.nearest(layer_idx, queries, 8) is None  # there are seven

    def test_named_heads_find_and_fetch_what_they_do_among_all(self, make: Make) -> None:
        """Each head has its own rows, in whatever order the heads are named."""
        backend = self.filled(make())
        queries = make_queries(0, 4)
        of_all = backend.retrieve(0, queries, 3)
        for heads in ([1], [1, 0]):
            hits = backend.retrieve(0, queries[heads], 3, heads=heads)
            for part, expected in zip(hits, of_all, strict=True):
                torch.testing.assert_close(part, expected[heads])
            rows = backend.nearest(0, queries[heads], 3, heads=heads)
            assert rows is not None
            for part, expected in zip(rows, of_all[2:], strict=True):
                torch.testing.assert_close(part.sum(dim=2), expected[heads].sum(dim=2))
        with pytest.raises(MemoryMismatchError, match="heads must be one or more"):
            backend.retrieve(0, queries[[1]], 3, heads=[2])

    def test_fetch_gives_each_head_its_own_rows(self, make: Make) -> None:
        """Ids differ by head."""
        backend, rows = make(), self.runs[0]
        backend.add(make_document("a", 10), [rows])
        assert_fetches(backend, [rows])
        ids = torch.tensor([[[3, 0], [9, 3]], [[1, 2], [-1, 4]]])  # (Hkv, N, k)
        keys, values = backend.fetch(0, ids)
        assert keys.shape == values.shape == (2, 2, 2, 8)
        for head, query, at in np.ndindex(2, 2, 2):
            row = int(ids[head, query, at])
            if row >= 0:
                assert_close(backend, keys[head, query, at], rows.keys[0][head, row])
                assert_close(backend, values[head, query, at], rows.values[0][head, row])
        assert bool(torch.isfinite(keys).all())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_rows_keep_their_dtype_bit_for_bit(
        self, make: Make, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        """In the memory and in a copy."""
        layout = MemoryLayout(LAYERS, dtype)
        rows = make_rows(20, seed=3, layout=layout)
        backend = make(layout)
        backend.add(make_document("a", 20), [rows])
        assert backend.fetch(0, torch.zeros(2, 1, dtype=torch.int64))[0].dtype == dtype
        assert_fetches(backend, [rows])
        assert_finds(backend, [rows], range(20))
        backend.save(tmp_path / "copy")
        reopened = self.open(tmp_path / "copy")
        assert reopened.layout == layout
        assert_fetches(reopened, [rows])

    def test_threads_search_at_the_same_time(self, make: Make) -> None:
        """The first searches, too, which may have to build something."""
        backend = self.filled(make())

        def search(seed: int) -> SearchResult:
            layer_idx = seed % 2 * 3
            return backend.search(layer_idx, make_queries(layer_idx, 4, seed), 5)

        with ThreadPoolExecutor(4) as pool:
            for seed, hits in enumerate(pool.map(search, range(40))):
                layer_idx = seed % 2 * 3
                keys = stored_keys(backend, self.runs, layer_idx, range(17))
                queries = make_queries(layer_idx, 4, seed)
                assert_hits(hits, nearest(keys, queries, 5, range(17)))

    @pytest.mark.parametrize("heads", [(0,), (1, 2), (3, 0, 2), (2, 3, 1, 0)])
    def test_a_search_of_some_heads_finds_what_brute_force_finds(
        self, make: Make, heads: tuple[int, ...]
    ) -> None:
        """Before and after rows are added and removed, and searches of all heads."""
        layout = MemoryLayout({1: LayerLayout(4, 8, 6)}, torch.float32)
        backend = make(layout)
        queries = torch.randn(len(heads), 5, 8, generator=torch.Generator().manual_seed(3))

        def assert_finds_by_head(searchable: list[int], k: int) -> None:
            rows = torch.arange(max(searchable) + 1).expand(4, -1)
            keys = backend.fetch(1, rows)[0].double().numpy()[list(heads)]
            hits = backend.search(1, queries, k, heads=heads)
            assert_hits(hits, nearest(keys, queries, k, searchable))

        nothing = backend.search(1, queries, 2, heads=heads)
        assert bool((nothing.ids == -1).all())
        assert nothing.scores.shape == (len(heads), 5, 2)
        backend.add(make_document("a", 10), [make_rows(10, 1, layout=layout)])
        assert_finds_by_head(list(range(10)), k=4)
        backend.add(make_document("b", 7), [make_rows(7, 2, layout=layout)])
        assert_finds_by_head(list(range(17)), k=4)
        backend.remove([2, 11])
        left = [row for row in range(17) if row not in (2, 11)]
        assert_finds_by_head(left, k=4)
        every = backend.search(1, torch.ones(4, 1, 8), 3)
        assert every.ids.shape == (4, 1, 3)
        assert_finds_by_head(left, k=17)  # more than there are
        assert backend.search(1, queries[:, :0], 4, heads=heads).ids.shape == (len(heads), 0, 4)

    def test_near_ties_are_ranked_in_float64(self, make: Make) -> None:
        """In a search of all heads and of some alike."""
        layout = MemoryLayout({0: LayerLayout(3, 8, 8)}, torch.float32)
        backend, rows = make(layout), make_rows(40, 1, layout=layout)
        keys = rows.keys[0]
        keys[:, 5:9] = keys[:, 5:6] * (1 + 2e-7 * torch.arange(4).view(1, 4, 1) * keys[:, 9:10])
        backend.add(make_document("a", 40), [rows])
        stored = backend.fetch(0, torch.arange(40).expand(3, -1))[0]
        queries = 3 * stored[[2, 1], 5:6] + make_queries(0, 1)  # near the four, not in their midst
        hits = backend.search(0, queries, 3, heads=[2, 1])
        scores, ids = nearest(stored.double().numpy()[[2, 1]], queries, 3, range(40))
        whole = torch.stack([stored[0, :1], *reversed(queries)])  # heads 0, 1, 2
        assert torch.equal(backend.search(0, whole, 3).ids[[2, 1]], hits.ids)
        if backend.catalog.row_codec == "exact":  # others may make the four equal
            assert (scores[..., 0] - scores[..., 2] < 1e-6).all()
            np.testing.assert_array_equal(hits.ids.numpy(), ids)
