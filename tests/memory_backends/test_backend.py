"""What a backend refuses, whatever searches it, and which backends there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import pytest

from memory_backends import (
    MemoryBackend,
    MemoryMismatchError,
    Searcher,
    SearchResult,
    memory_types,
    option_names,
    register_searcher,
)
from memory_backends.search.manual import ManualSearcher
from memory_backends.testing.rows import LAYOUT, make_document, make_rows


@pytest.fixture
def backend() -> MemoryBackend:
    backend = MemoryBackend(LAYOUT)
    backend.add(make_document("a", 10), [make_rows(10, seed=1)])
    return backend


@pytest.mark.parametrize(
    ("layer_idx", "shape", "k", "heads", "message"),
    [
        (1, (2, 1, 8), 5, None, r"one of \[0, 3\]; got 1"),
        (0, (4, 1, 8), 5, None, r"num_key_value_heads=2, .*; got \(4, 1, 8\)"),
        (0, (2, 1, 4), 5, None, r"head_dim=8\); got \(2, 1, 4\)"),
        (3, (1, 4), 5, None, r"head_dim=4\); got \(1, 4\)"),
        (0, (2, 1, 8), 0, None, "at least 1; got 0"),
        (0, (1, 1, 8), 5, [2], r"KV heads 0 to 1 of layer 0, .* got \[2\]"),
        (0, (1, 1, 8), 5, [-1], r"got \[-1\]"),
        (0, (2, 1, 8), 5, [1, 1], r"each once; got \[1, 1\]"),
        (0, (0, 1, 8), 5, [], r"got \[\]"),
        (0, (1, 1, 8), 5, [0.0], r"got \[0.0\]"),
        (0, (2, 1, 8), 5, [1], r"len\(heads\)=1, .*; got \(2, 1, 8\)"),
    ],
)
def test_search_refuses(
    backend: MemoryBackend,
    layer_idx: int,
    shape: tuple[int, ...],
    k: int,
    heads: list[Any] | None,
    message: str,
) -> None:
    queries = torch.ones(shape)
    with pytest.raises(MemoryMismatchError, match=message):
        backend.search(layer_idx, queries, k, heads=heads)
    for method in (backend.retrieve, backend.nearest) if heads is None else ():
        with pytest.raises(MemoryMismatchError, match=message):
            method(layer_idx, queries, k)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[0], [10]]), "less than 10, .* got 0 to 10"),
        (torch.tensor([[-2], [9]]), "got -2 to 9"),
        (torch.zeros(1, 4, dtype=torch.int64), r"got torch.int64 \(1, 4\)"),
        (torch.zeros(2, 4), r"got torch.float32 \(2, 4\)"),
    ],
)
def test_fetch_refuses(backend: MemoryBackend, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(MemoryMismatchError, match=message):
        backend.fetch(0, ids)


@pytest.mark.parametrize(
    ("memory_type", "options", "message"),
    [
        ("nothing", {}, r"one of \['manual', 'vector_db'.*; got 'nothing'"),
        ("manual", {"index": "Flat"}, r"'manual' are \['device'\]; got 'index'"),
        ("vector_db", {"indexx": "Flat"}, r"\['index', 'recall', .*\]; got 'indexx'"),
        ("manual", {"sinks": "two"}, "'all' or 'one'; got 'two'"),
        ("manual", {"row_codec": "int2"}, "one of .*'int4'.*; got 'int2'"),
        ("manual", {"device": "meta"}, "device of this machine, .* got 'meta'"),
    ],
)
def test_what_there_is_not_is_refused(
    memory_type: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MemoryMismatchError, match=message):
        MemoryBackend(LAYOUT, memory_type, **options)


class Silent(Searcher):
    """Finds nothing."""

    def candidates(
        self, layer_idx: int, unit_queries: torch.Tensor, k: int, heads: Sequence[int] | None
    ) -> SearchResult:
        shape = (*unit_queries.shape[:2], k)
        nothing = torch.full(shape, -1, dtype=torch.int64)
        return SearchResult(torch.full(shape, -torch.inf), nothing)


def test_a_searcher_is_registered_by_a_name_of_its_own() -> None:
    for _ in range(2):  # again, as when a module is imported anew, is no harm
        register_searcher("silent", Silent)
    assert memory_types()[:2] == ["manual", "vector_db"]
    assert "silent" in memory_types()
    assert option_names("silent") == []
    for name in ("manual", "silent"):
        with pytest.raises(MemoryMismatchError, match=f"'{name}' is taken"):
            register_searcher(name, ManualSearcher)


def test_what_only_some_searchers_have_does_nothing_for_others() -> None:
    register_searcher("silent", Silent)
    for memory_type in ("manual", "silent"):
        backend = MemoryBackend(LAYOUT, memory_type)
        backend.index_heads({0: [1]})
        backend.rebuild()
        assert (backend.lacks_files, backend.searches_exactly) == (False, True)
        assert backend.searcher.has_written
