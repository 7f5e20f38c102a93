"""The same documents in one store and in a sharded one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from memory_backends import MemoryBackend, Scope
from memory_backends.layout import Document
from memory_backends.search.scores import Search, SearchResult
from memory_backends.testing.rows import (
    IDENTITY,
    LAYERS,
    LAYOUT,
    make_document,
    make_queries,
    make_rows,
)

SIZES = {f"d{number}": 5 + number for number in range(12)}


def document(name: str) -> Document:
    """Return a document with a text and metadata."""
    made = make_document(name, SIZES.get(name, 9))
    return dataclasses.replace(made, text=f"the text of {name}", metadata={"name": name})


def filled(backend: MemoryBackend, names: Any = SIZES, *, seed: int = 0) -> MemoryBackend:
    """Write documents, some together and some alone."""
    entries = [
        (document(name), [make_rows(SIZES.get(name, 9), seed + at, sinks=[0])])
        for at, name in enumerate(names)
    ]
    list(backend.add_many(entries[:8], replace=True))
    for entry in entries[8:]:
        backend.add(*entry, replace=True)
    return backend


def sharded(path: Path, num_shards: int, **options: Any) -> MemoryBackend:
    """Return a new memory with shards."""
    given = {"shard_type": "manual", "identity": IDENTITY, **options}
    return MemoryBackend(LAYOUT, "sharded", path=path, num_shards=num_shards, **given)


def searches(scope: Scope | None = None) -> list[Search]:
    """Return searches of all heads of each layer, and of one head."""
    return [
        *(Search(layer_idx, make_queries(layer_idx, 6), 7, None, scope) for layer_idx in LAYERS),
        Search(0, make_queries(0, 6)[1:], 7, [1], scope),
    ]


def assert_same(memory: MemoryBackend, other: MemoryBackend) -> None:
    """Compare what two memories find and have, to the last id."""
    names = memory.catalog.document_names()
    assert other.catalog.document_sizes() == memory.catalog.document_sizes()
    assert other.catalog.all_metadata() == memory.catalog.all_metadata()
    assert len(other) == len(memory)
    for name in names:
        mine, its = memory.catalog.document(name), other.catalog.document(name)
        assert (its.first_row, its.text) == (mine.first_row, mine.text)
        ids = torch.arange(mine.first_row, mine.first_row + len(mine.row_tokens))
        theirs = other.fetch_layers(ids)
        for layer_idx, parts in memory.fetch_layers(ids).items():
            assert all(map(torch.equal, parts, theirs[layer_idx]))
    for scope in (None, memory.catalog.scope(names[::2]), memory.catalog.scope(names[1:2])):
        several = other.search_many(searches(scope))
        for search, hits in zip(searches(scope), several, strict=True):
            expected = found(memory, search)
            assert torch.equal(hits.ids, expected.ids)
            torch.testing.assert_close(hits.scores, expected.scores, rtol=0, atol=2e-6)


def found(memory: MemoryBackend, search: Search) -> SearchResult:
    """Return what a memory finds."""
    return memory.search(
        search.layer_idx, search.queries, search.k, heads=search.heads, scope=search.scope
    )
