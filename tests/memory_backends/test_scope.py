"""Scopes, what is kept of them, and that rows out of scope are never read."""

from __future__ import annotations

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
    LAYOUT,
    keys_of,
    make_document,
    make_queries,
    make_rows,
    nearest,
)
from memory_backends.testing.scopes import RUNS, SPANS


@pytest.fixture(params=["manual", "manual, few kept", "Flat", "Flat, selected", "IVF4,Flat"])
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> MemoryBackend:
    """A memory of five documents."""
    name, _, how = request.param.partition(", ")
    if name == "manual":
        backend = MemoryBackend(LAYOUT)
        if how:
            monkeypatch.setattr("memory_backends.search.scope_cache._ROWS_AT_ONCE", 32)
            backend.searcher.rows.scopes.num_bytes = 1
    else:
        if how or name != "Flat":
            monkeypatch.setattr(selection, "_EXACT_ROWS", 0)
        backend = MemoryBackend(
            LAYOUT, "vector_db", path=tmp_path / "store", index=name, recall=1.0
        )
    for at, rows in enumerate(RUNS):
        backend.add(make_document(f"d{at}", len(rows)), [rows])
    return backend


def test_rows_out_of_scope_are_never_read(
    backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope = Scope.of([SPANS[1], SPANS[3]])
    searchable = [*range(*SPANS[1]), *range(*SPANS[3])]
    queries = {idx: make_queries(idx, 6) for idx in LAYERS}
    for layer_idx in LAYERS:
        backend.search(layer_idx, queries[layer_idx], 1)  # indexes are made of all rows
    stored, read = backend.searcher.rows.stored, []

    def spied(method: str) -> None:
        real = getattr(type(stored), method)

        def call(self: Any, layer_idx: int, *where: Any) -> torch.Tensor:
            heads = LAYERS[layer_idx].num_key_value_heads
            if method == "span":
                read.extend(range(*where))
            else:
                ids = where[0] // heads if method == "take" else where[0]
                read.extend(ids.flatten().tolist())
            rows: torch.Tensor = real(self, layer_idx, *where)
            return rows

        monkeypatch.setattr(type(stored), method, call)

    if backend.memory_type == "vector_db":
        for method in ("gather", "take", "span"):
            spied(method)
    else:  # tensors: a row that is looked at spoils the scores
        for layer_idx in LAYERS:
            rows = stored.layer(layer_idx)
            rows[torch.from_numpy(~scope.mask(len(rows)))] = torch.nan
    for layer_idx in LAYERS:
        hits = backend.retrieve(layer_idx, queries[layer_idx], 5, scope=scope)
        expected = nearest(keys_of(RUNS, layer_idx), queries[layer_idx], 5, searchable)
        np.testing.assert_array_equal(hits.ids.numpy(), expected[1])
        assert all(bool(part.isfinite().all()) for part in (hits.scores, hits.values))
    assert set(read) <= set(searchable)
    assert bool(read) == (backend.memory_type == "vector_db")


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
        hits = backend.search(0, queries, 3, scope=Scope.of([(rows.start, rows.stop)]))
        keys = torch.cat([near, far], 1).double().numpy()
        scores, ids = nearest(keys, queries, 3, rows)
        assert (hits.ids >= 2000).all()
        if len(rows) < 2000:  # by so much more lists as there are fewer rows: all of them
            np.testing.assert_array_equal(hits.ids.numpy(), ids)
            np.testing.assert_allclose(hits.scores.numpy(), scores, atol=2e-6)
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
    assert backend.searcher.factory == factory
    searchable = [*range(500, 1000), *range(1502, 2000)]
    hits = backend.search(0, queries, 5, scope=Scope.of([(500, 1000), (1500, 2000)]))
    assert set(hits.ids.flatten().tolist()) <= set(searchable)
    scores, ids = nearest(keys_of(runs, 0), queries, 5, searchable)
    shared = (hits.ids.numpy()[..., None] == ids[..., None, :]).any(-1).mean()
    assert shared >= 0.97
    np.testing.assert_allclose(hits.scores[..., 0].numpy(), scores[..., 0], atol=tolerance)
    backend.close()


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
