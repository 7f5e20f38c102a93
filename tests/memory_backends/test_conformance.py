"""The suite that ships with the package, for every kind of backend, and for one of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import numpy as np
import pytest

from memory_backends import Searcher, SearchResult, register_searcher
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


class BruteForce(Searcher):
    """All that a searcher must have."""

    def candidates(
        self, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Sequence[int] | None
    ) -> SearchResult:
        keys = self.unit_keys_of(layer_idx, self.rows.ids, heads).numpy()  # (h, n, D)
        scores = unit_queries.numpy() @ keys.transpose(0, 2, 1)  # (h, N, n)
        order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
        best = np.take_along_axis(scores, order, axis=-1)
        return SearchResult(torch.from_numpy(best), torch.from_numpy(self.rows.ids[order]))


register_searcher("brute force", BruteForce)


class TestBruteForce(BackendConformance):
    memory_type = "brute force"
