"""Rows as tensors, with and without a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import pytest

from memory_backends import MemoryBackend, StoreError
from memory_backends.testing.checks import assert_finds
from memory_backends.testing import BackendConformance
from memory_backends.testing.suite import Make
from memory_backends.testing.rows import LAYOUT, make_document, make_queries, make_rows


class TestInRAM(BackendConformance):
    @pytest.fixture
    def make(self) -> Make:
        return lambda layout=LAYOUT, **options: MemoryBackend(layout, **options)

    def test_saving_without_a_path_is_refused(self, make: Make) -> None:
        with pytest.raises(StoreError, match="this memory has no path"):
            make().save()

    def test_many_queries_are_taken_in_parts(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("memory_backends.exact._SCORES_AT_ONCE", 2 * 10 * 4)  # 4 queries
        backend = make()
        backend.add(make_document("a", 10), [self.runs[0]])
        assert_finds(backend, self.runs, range(10))

    def test_a_search_of_some_heads_normalises_only_their_keys(self) -> None:
        backend = MemoryBackend(LAYOUT)
        backend.add(make_document("a", 10), [self.runs[0]])
        queries = make_queries(0, 3)
        alone = backend.search(0, queries[1:], 4, heads=[1])
        assert list(backend._directions_of_head) == [(0, 1)]
        assert not backend._directions
        every = backend.search(0, queries, 4)
        assert torch.equal(alone.ids[0], every.ids[1])
        backend.search(0, queries[:1], 4, heads=[0])  # from what the search of all has made
        assert list(backend._directions_of_head) == [(0, 1)]


class TestWithAPath(BackendConformance):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        made = iter(range(100))

        def make_one(layout: Any = LAYOUT, **options: Any) -> MemoryBackend:
            return MemoryBackend(layout, path=tmp_path / f"store-{next(made)}", **options)

        return make_one

    def test_what_was_added_is_there_without_saving(self, make: Make) -> None:
        backend = make()
        assert backend.path is not None
        assert not backend.path.exists()
        backend.add(make_document("a", 10), [self.runs[0]])
        assert_finds(MemoryBackend.open(backend.path), self.runs, range(10))

    def test_saving_an_empty_memory_makes_its_store(self, make: Make) -> None:
        backend = make()
        assert backend.path is not None
        backend.save()
        assert_finds(MemoryBackend.open(backend.path), [make_rows(0, seed=1)], [])


class TestCoded(BackendConformance):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Make:
        made = iter(range(100))

        def make_one(layout: Any = LAYOUT, **options: Any) -> MemoryBackend:
            path = tmp_path / f"store-{next(made)}"
            return MemoryBackend(layout, path=path, row_codec="int8", **options)

        return make_one


class TestCodedWhenSaved(BackendConformance):
    @pytest.fixture
    def make(self) -> Make:
        return lambda layout=LAYOUT, **options: MemoryBackend(layout, row_codec="int8", **options)
