"""A search of a scope finds what brute force over the rows of the scope alone finds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest

from memory_backends import (
    LayerLayout,
    MemoryBackend,
    MemoryLayout,
    MemoryMismatchError,
    Rows,
    Scope,
)
from memory_backends.faiss import selection
from memory_backends.search.scope_cache import ScopeCache
from memory_backends.testing.rows import (
    LAYERS,
    keys_of,
    make_document,
    make_queries,
    make_rows,
    nearest,
)

SIZES = (60, 90, 40, 110, 70)  # rows of five documents, the first two of each being sinks
FIRSTS = np.cumsum((0, *SIZES))
SPANS = [(int(a), int(b)) for a, b in itertools.pairwise(FIRSTS)]
RUNS = [make_rows(size, seed=at, sinks=[0, 1]) for at, size in enumerate(SIZES)]
SCOPES = {
    "one": [1],
    "two apart": [1, 3],
    "two that touch": [2, 3],
    "last": [4],
    "all": [0, 1, 2, 3, 4],
}
BACKENDS = ("manual", "manual, few kept", "Flat", "Flat, selected", "IVF", "IVF, selected", "HNSW")


@pytest.fixture(params=BACKENDS)
def MemoryBackend(request: pytest.FixtureRequest, kind) -> str:
    return str(request.param)


@pytest.fixture
def make(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Return a function that makes a memory of the five documents."""
    name, _, how = kind.partition(", ")
    if how == "selected" or name == "HNSW":
        monkeypatch.setattr(selection, "_EXACT_ROWS", 0)
    made: list[MemoryBackend] = []

    def backend(**options: Any) -> MemoryBackend:
        memory: MemoryBackend
        if name == "manual":
            memory = MemoryBackend(MemoryLayout(LAYERS, torch.float32), **options)
            if how:
                monkeypatch.setattr("memory_backends.scope_cache._ROWS_AT_ONCE", 32)
                memory._scopes.num_bytes = 1
        else:
            # Every list is searched, so that what is found does not depend on the training.
            factory = {"IVF": "IVF4,Flat", "HNSW": "HNSW16"}.get(name, name)
            memory = MemoryBackend(
                MemoryLayout(LAYERS, torch.float32),
                path=tmp_path / f"store{len(made)}",
                index=factory,
                recall=1.0,
                **options,
            )
        for at, rows in enumerate(RUNS):
            memory.add(make_document(f"d{at}", len(rows)), [rows])
        made.append(memory)
        return memory

    yield backend
    for memory in made:
        memory.close()


def scope_of(documents: list[int]) -> Scope:
    return Scope.of(SPANS[at] for at in documents)


def rows_of(documents: list[int], *, without: Any = ()) -> list[int]:
    rows = [row for at in documents for row in range(*SPANS[at])]
    return sorted(set(rows) - set(without))


def sinks_of(documents: list[int]) -> list[int]:
    return [SPANS[at][0] + place for at in documents for place in (0, 1)]


def assert_finds(backend: MemoryBackend, scope: Scope, searchable: list[int], k: int = 5) -> None:
    assert backend.num_searchable(scope) == len(searchable)
    for layer_idx in LAYERS:
        queries = make_queries(layer_idx, 6)
        scores, ids = nearest(keys_of(RUNS, layer_idx), queries, k, searchable)
        for _ in range(2):  # the second finds things kept
            found = backend.retrieve(layer_idx, queries, k, scope=scope)
            np.testing.assert_array_equal(found.ids.numpy(), ids)
            np.testing.assert_allclose(found.scores.numpy(), scores, atol=2e-6)
        close = backend.nearest(layer_idx, queries, k, scope=scope)
        if k > len(searchable):
            assert close is None
            continue
        values = torch.cat([run.values[layer_idx] for run in RUNS], 1)
        assert close is not None
        for head in range(len(ids)):
            assert torch.equal(found.values[head], values[head][torch.from_numpy(ids[head])])
            got, expected = (
                {tuple(sorted(map(tuple, rows.tolist()))) for rows in part[head]}
                for part in (close[1], found.values)
            )
            assert got == expected


@pytest.mark.parametrize("documents", SCOPES.values(), ids=SCOPES)
def test_only_rows_in_scope_are_found(make: Any, documents: list[int]) -> None:
    backend = make()
    assert_finds(backend, scope_of(documents), rows_of(documents))


def test_one_set_of_sinks_is_the_scopes_own(make: Any) -> None:
    backend = make(sinks="one")
    for documents in SCOPES.values():
        left_out = sinks_of(documents[1:])
        assert_finds(backend, scope_of(documents), rows_of(documents, without=left_out))
    # Rows of a document, without its sinks.
    inner = Scope.of([(SPANS[1][0] + 2, SPANS[1][1]), SPANS[2]])
    rows = [*range(SPANS[1][0] + 2, SPANS[1][1]), *range(*SPANS[2])]
    assert_finds(backend, inner, rows)


@pytest.mark.parametrize("sinks", ["all", "one"])
def test_removed_rows_are_not_found_in_a_scope(make: Any, sinks: str) -> None:
    backend = make(sinks=sinks)
    scope = scope_of([1, 3])
    left_out = sinks_of([3]) if sinks == "one" else []
    assert_finds(backend, scope, rows_of([1, 3], without=left_out))
    removed = list(range(SPANS[1][0] + 3, SPANS[1][0] + 60))
    backend.remove(removed)
    assert_finds(backend, scope, rows_of([1, 3], without=[*left_out, *removed]))
    backend.remove_document("d1")
    assert_finds(backend, scope, rows_of([3]))  # whose sinks are the first now
    backend.remove_document("d3")
    assert_finds(backend, scope, [])
    assert_finds(backend, Scope.of([]), [])


def test_a_scope_of_fewer_rows_than_k_is_found_whole(make: Any) -> None:
    scope = Scope.of([(100, 102), (200, 201)])
    assert_finds(make(), scope, [100, 101, 200], k=5)


def test_rows_that_are_not_in_the_files_yet_are_found(make: Any) -> None:
    backend = make()
    if isinstance(backend, MemoryBackend):
        backend.save()
    more = make_rows(50, seed=9)
    backend.add(make_document("more", 50), [more])
    first = int(FIRSTS[-1])
    for layer_idx in LAYERS:
        queries = make_queries(layer_idx, 6)
        keys = keys_of([*RUNS, more], layer_idx)
        searchable = [*range(*SPANS[2]), *range(first, first + 50)]
        scores, ids = nearest(keys, queries, 5, searchable)
        found = backend.search(
            layer_idx, queries, 5, scope=Scope.of([SPANS[2], (first, first + 50)])
        )
        np.testing.assert_array_equal(found.ids.numpy(), ids)
        np.testing.assert_allclose(found.scores.numpy(), scores, atol=2e-6)


def test_rows_out_of_scope_are_never_read(
    make: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make()
    scope = scope_of([1, 3])
    queries = {idx: make_queries(idx, 6) for idx in LAYERS}
    backend.search(0, queries[0], 1)  # indexes are made of all rows
    backend.search(3, queries[3], 1)
    read: list[int] = []
    storage = type(backend._rows)

    def spied(method: str) -> None:
        real = getattr(storage, method)

        def call(self: Any, layer_idx: int, *where: Any) -> torch.Tensor:
            heads = LAYERS[layer_idx].num_key_value_heads
            if method == "span":
                read.extend(range(*where))
            else:
                ids = where[0] // heads if method == "take" else where[0]
                read.extend(ids.flatten().tolist())
            found: torch.Tensor = real(self, layer_idx, *where)
            return found

        monkeypatch.setattr(storage, method, call)

    if isinstance(backend, MemoryBackend):
        for method in ("gather", "take", "span"):
            spied(method)
        for layer_idx in LAYERS:
            backend.retrieve(layer_idx, queries[layer_idx], 5, scope=scope)
        assert read
        assert set(read) <= set(rows_of([1, 3]))
    else:  # tensors: what is looked at would spoil the scores
        expected = {idx: backend.retrieve(idx, queries[idx], 5, scope=scope).ids for idx in LAYERS}
        backend._scopes.clear()
        for layer_idx in LAYERS:
            rows = backend._rows.layer(layer_idx)
            rows[torch.from_numpy(~scope.mask(len(rows)))] = torch.nan
            found = backend.retrieve(layer_idx, queries[layer_idx], 5, scope=scope)
            assert torch.equal(found.ids, expected[layer_idx])
            assert all(bool(part.isfinite().all()) for part in (found.scores, found.values))


@pytest.mark.parametrize("heads", [[1], [0], [1, 0]])
def test_some_heads_are_searched_in_a_scope(make: Any, heads: list[int]) -> None:
    backend = make(sinks="one")
    documents = [1, 3]
    searchable = rows_of(documents, without=sinks_of([3]))
    queries = make_queries(0, 6)[heads]
    scores, ids = nearest(keys_of(RUNS, 0)[heads], queries, 5, searchable)
    for _ in range(2):
        found = backend.search(0, queries, 5, heads=heads, scope=scope_of(documents))
        np.testing.assert_array_equal(found.ids.numpy(), ids)
        np.testing.assert_allclose(found.scores.numpy(), scores, atol=2e-6)
    assert_finds(backend, scope_of(documents), searchable)  # all heads, after some


def test_searches_of_all_rows_are_as_before(make: Any) -> None:
    backend = make(sinks="one")
    queries = make_queries(0, 6)
    before = backend.search(0, queries, 5)
    assert_finds(backend, scope_of([2]), rows_of([2]))
    after = backend.search(0, queries, 5)
    assert torch.equal(before.ids, after.ids)
    assert torch.equal(before.scores, after.scores)


def test_lists_without_rows_of_the_scope_do_not_leave_it_unfound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clusters, and queries in the one that the scope has no rows of."""
    monkeypatch.setattr(selection, "_EXACT_ROWS", 0)
    layout = MemoryLayout({0: LayerLayout(1, 8, 8)}, torch.float32)
    generator = torch.Generator().manual_seed(0)
    centre = torch.zeros(8)
    centre[0] = 3.0
    near, far = (
        centre * sign + 0.3 * torch.randn(1, 2000, 8, generator=generator) for sign in (1, -1)
    )
    backend = MemoryBackend(layout, "vector_db", path=tmp_path / "store", index="IVF32,Flat")
    for name, keys in (("near", near), ("far", far)):
        backend.add(make_document(name, 2000), [Rows.of({0: keys}, {0: keys})])
    queries = centre + 0.3 * torch.randn(1, 20, 8, generator=generator)
    for rows in (range(2000, 4000), range(2000, 2020), range(2000, 2003)):
        found = backend.search(0, queries, 3, scope=Scope.of([(rows.start, rows.stop)]))
        keys = torch.cat([near, far], 1).double().numpy()
        scores, ids = nearest(keys, queries, 3, rows)
        assert (found.ids >= 2000).all()
        if len(rows) < 2000:  # by so much more lists as there are fewer rows: all of them
            np.testing.assert_array_equal(found.ids.numpy(), ids)
            np.testing.assert_allclose(found.scores.numpy(), scores, atol=2e-6)
    backend.close()


@pytest.mark.parametrize(
    ("factory", "tolerance"),
    [("IVF2,SQfp16", 2e-3), ("SQ8", 2e-6), ("IVF2,SQ8", 2e-6), ("PCA8,Flat", 2e-6)],
)
def test_a_scope_in_an_index_of_codes(
    factory: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_EXACT_ROWS", 0)
    layout = MemoryLayout({0: LayerLayout(2, 8, 8)}, torch.float32)
    runs = [make_rows(500, seed=at, layout=layout, sinks=[0, 1]) for at in range(4)]
    backend = MemoryBackend(
        layout, "vector_db", path=tmp_path / "store", index=factory, sinks="one", overfetch=8
    )
    for at, rows in enumerate(runs):
        backend.add(make_document(f"d{at}", 500), [rows])
    queries = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(5))
    assert backend.search(0, queries, 5).ids.min() >= 0
    assert backend.factory == factory
    searchable = [*range(500, 1000), *range(1502, 2000)]
    found = backend.search(0, queries, 5, scope=Scope.of([(500, 1000), (1500, 2000)]))
    assert set(found.ids.flatten().tolist()) <= set(searchable)
    scores, ids = nearest(keys_of(runs, 0), queries, 5, searchable)
    shared = (found.ids.numpy()[..., None] == ids[..., None, :]).any(-1).mean()
    assert shared >= 0.97
    np.testing.assert_allclose(found.scores[..., 0].numpy(), scores[..., 0], atol=tolerance)
    backend.close()


def test_threads_search_scopes_of_their_own(make: Any) -> None:
    backend = make()
    backend.search(0, make_queries(0, 1), 1)
    queries = make_queries(0, 6)
    scopes = [scope_of(documents) for documents in SCOPES.values()] * 8
    expected = [backend.search(0, queries, 5, scope=scope) for scope in scopes]
    backend._scopes.clear()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda scope: backend.search(0, queries, 5, scope=scope), scopes))
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.ids, other.ids)
        torch.testing.assert_close(mine.scores, other.scores, atol=1e-6, rtol=0)


# -- scopes -------------------------------------------------------------------------------------


def test_spans_are_joined_and_hash_alike() -> None:
    scope = Scope.of([(7, 9), (0, 3), (3, 5), (8, 12), (20, 20)])
    assert scope.spans == ((0, 5), (7, 12))
    assert len(scope) == 10
    assert scope == Scope(((0, 5), (7, 12)))
    assert hash(scope) == hash(Scope(((0, 5), (7, 12))))
    assert scope != Scope.of([(0, 5)])
    assert scope.mask(9).nonzero()[0].tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert scope.among(np.array([1, 4, 5, 6, 7, 11, 12, 30])).tolist() == [1, 4, 7, 11]
    assert Scope.of([]).among(np.arange(4)).tolist() == []


@pytest.mark.parametrize("span", [(3, 2), (-1, 2)])
def test_spans_that_are_none_are_refused(span: tuple[int, int]) -> None:
    with pytest.raises(MemoryMismatchError, match=r"0 <= first <= stop; got \("):
        Scope.of([(0, 5), span])


def test_kept_keys_make_room_for_those_used_last() -> None:
    cache = ScopeCache(num_bytes=3 * 40)
    first, second = Scope.of([(0, 10)]), Scope.of([(10, 20)])
    reads: list[tuple[Scope, int]] = []

    def keys(scope: Scope, layer_idx: int) -> torch.Tensor:
        def read() -> torch.Tensor:
            reads.append((scope, layer_idx))
            return torch.full((10,), float(layer_idx))

        cache.rows(scope, lambda: np.arange(*scope.spans[0]))
        return cache.keys(scope, (layer_idx, None), read)

    for _ in range(2):
        for layer_idx in range(4):
            assert keys(first, layer_idx)[0] == layer_idx
    # Layers 0 to 2 fit and stay; the fourth is read each time.
    assert reads == [(first, 0), (first, 1), (first, 2), (first, 3), (first, 3)]
    reads.clear()
    keys(second, 0)
    keys(second, 0)
    keys(first, 0)
    assert reads == [(second, 0), (first, 0)]
    cache.clear()
    keys(second, 0)
    assert reads == [(second, 0), (first, 0), (second, 0)]
