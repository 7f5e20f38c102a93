"""The suite that ships with the package, for every kind of backend."""

from __future__ import annotations

from typing import ClassVar

import pytest

from memory_backends.faiss import selection
from memory_backends.testing import BackendConformance
from memory_backends.testing.scopes import ScopeConformance


class TestInRAM(BackendConformance):
    memory_type = "manual"
    other_type = "vector_db"


class TestInFiles(BackendConformance):
    memory_type = "manual"
    has_path = True


class TestInCodedFiles(BackendConformance):
    memory_type = "manual"
    options: ClassVar = {"row_codec": "int8"}
    has_path = True


class TestFlat(BackendConformance):
    memory_type = "vector_db"
    options: ClassVar = {"index": "Flat"}


class TestFlatOverCodedRows(BackendConformance):
    memory_type = "vector_db"
    options: ClassVar = {"index": "Flat", "row_codec": "int8"}


class TestFlatOverRowsForPassages(BackendConformance):
    memory_type = "vector_db"
    options: ClassVar = {"index": "Flat", "row_codec": "int5.5"}


class TestOneShard(BackendConformance):
    memory_type = "sharded"
    options: ClassVar = {"num_shards": 1, "shard_options": {"index": "Flat"}}


class TestTwoShards(BackendConformance):
    memory_type = "sharded"
    options: ClassVar = {"num_shards": 2, "shard_type": "manual"}
    other_type = "vector_db"
    has_path = True


class TestFiveShards(BackendConformance):
    memory_type = "sharded"
    options: ClassVar = {"num_shards": 5, "shard_options": {"index": "Flat"}}


class TestTwoShardsOfCodedRows(BackendConformance):
    memory_type = "sharded"
    options: ClassVar = {"num_shards": 2, "row_codec": "int8", "shard_type": "manual"}


class Selected(ScopeConformance):
    """Scopes that FAISS selects in the index, of which all lists are searched."""

    memory_type = "vector_db"

    @pytest.fixture(autouse=True)
    def _no_scope_is_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(selection, "_EXACT_ROWS", 0)


class TestFlatSelected(Selected):
    options: ClassVar = {"index": "Flat"}


class TestIVFSelected(Selected):
    options: ClassVar = {"index": "IVF4,Flat", "recall": 1.0}


class TestHNSWSelected(Selected):
    options: ClassVar = {"index": "HNSW16"}
