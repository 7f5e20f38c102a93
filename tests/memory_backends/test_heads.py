"""FAISS files of some KV heads: written, found, grown, damaged, made anew."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import faiss
import numpy as np
import pytest

from memory_backends import (
    LayerLayout,
    MemoryBackend,
    MemoryLayout,
    MemoryMismatchError,
    Rows,
    StoreError,
    verify,
)
from memory_backends.catalog import Catalog
from memory_backends.faiss.coverage import coverage_of
from memory_backends.testing.rows import make_document, make_rows, nearest

LAYOUT = MemoryLayout({0: LayerLayout(3, 8, 8), 2: LayerLayout(2, 4, 6)}, torch.float32)
EVERY = {0: (0, 1, 2), 2: (0, 1)}
SOME = {0: (1,), 2: (0, 1)}


def rows_with_queries(num_rows: int, seed: int) -> Rows:
    """Return rows with two query heads for each KV head, enough to calibrate IVF indexes."""
    generator = torch.Generator().manual_seed(seed)
    queries = {
        idx: torch.randn(
            2 * layer.num_key_value_heads, num_rows, layer.head_dim, generator=generator
        )
        for idx, layer in LAYOUT.layers.items()
    }
    return dataclasses.replace(make_rows(num_rows, seed, layout=LAYOUT), queries=queries)


def written(path: Path, num_rows: int = 30, **options: Any) -> MemoryBackend:
    """Return a saved memory of one document."""
    backend = MemoryBackend(LAYOUT, "vector_db", path=path, **options)
    backend.add(make_document("a", num_rows), [rows_with_queries(num_rows, 1)])
    backend.save()
    return backend


def files_of(store: Path) -> dict[str, bytes]:
    """Return the FAISS files of a store by name, "layer.head"."""
    (folder,) = (store / "index").iterdir()
    return {
        re.sub(r"layer-0*(\d+)-head-0*(\d+)\.faiss", r"\1.\2", file.name): file.read_bytes()
        for file in folder.glob("*.faiss")
    }


def generation(store: Path) -> str:
    (folder,) = (store / "index").iterdir()
    return folder.name


def setting(store: Path) -> dict[str, Any]:
    with contextlib.closing(Catalog.open(store)) as catalog:
        return dict(catalog.setting("index"))


def change_setting(store: Path, **entries: Any) -> None:
    """Replace entries of the setting "index"; those that are None go."""
    with contextlib.closing(Catalog.open(store)) as catalog:
        changed = {**catalog.setting("index"), **entries}
        catalog.set_setting("index", {k: v for k, v in changed.items() if v is not None})


def names(heads: Mapping[int, Sequence[int]]) -> set[str]:
    return {f"{idx}.{head}" for idx, chosen in heads.items() for head in chosen}


def assert_finds(backend: MemoryBackend, searchable: Sequence[int]) -> None:
    """Compare searches of every head alone, and of all, with brute force over the stored keys."""
    everything = torch.arange(max(searchable) + 1)
    for layer_idx, layer in LAYOUT.layers.items():
        num_heads = layer.num_key_value_heads
        keys = backend.fetch(layer_idx, everything.expand(num_heads, -1))[0].double().numpy()
        generator = torch.Generator().manual_seed(layer_idx)
        queries = torch.randn(num_heads, 4, layer.head_dim, generator=generator)
        scores, ids = nearest(keys, queries, 5, searchable)
        for heads in [*([head] for head in range(num_heads)), list(range(num_heads))[::-1]]:
            hits = backend.search(layer_idx, queries[heads], 5, heads=heads)
            np.testing.assert_array_equal(hits.ids.numpy(), ids[heads])
            np.testing.assert_allclose(hits.scores.numpy(), scores[heads], atol=2e-6)
        whole = backend.search(layer_idx, queries, 5)
        np.testing.assert_array_equal(whole.ids.numpy(), ids)


# -- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [SOME, {2: [1]}, {0: [2, 0]}, {0: [2, 1, 0]}, EVERY])
def test_only_indexed_heads_have_files(tmp_path: Path, heads: dict[int, Any]) -> None:
    store = tmp_path / "store"
    written(store, indexed_heads=heads)
    assert files_of(store).keys() == names(heads)
    assert_finds(MemoryBackend.open(store, "vector_db", indexed_heads=heads), range(30))
    assert_finds(MemoryBackend.open(store, "vector_db"), range(30))
    assert not verify(store)


def test_heads_take_the_place_of_layers(tmp_path: Path) -> None:
    written(tmp_path / "store", indexed_layers=[2], indexed_heads={0: [1]})
    assert files_of(tmp_path / "store").keys() == {"0.1"}


@pytest.mark.parametrize(
    ("factory", "row_codec"),
    [("Flat", "exact"), ("IVF4,SQfp16", "exact"), ("IVF4,SQfp16", "int4"), ("HNSW8", "exact")],
)
def test_the_index_of_a_head_is_the_same_whatever_others_there_are(
    tmp_path: Path, factory: str, row_codec: str
) -> None:
    options = {"index": factory, "row_codec": row_codec}
    every = written(tmp_path / "every", 2200, **options)
    some = written(tmp_path / "some", 2200, indexed_heads=SOME, **options)
    files = files_of(tmp_path / "every")
    assert files_of(tmp_path / "some") == {name: files[name] for name in names(SOME)}
    for layer_idx, layer in LAYOUT.layers.items():
        generator = torch.Generator().manual_seed(3)
        shape = (layer.num_key_value_heads, 5, layer.head_dim)
        queries = torch.randn(shape, generator=generator)
        expected = every.search(layer_idx, queries, 4)
        for head in range(layer.num_key_value_heads):
            hits = some.search(layer_idx, queries[[head]], 4, heads=[head])
            torch.testing.assert_close(hits.scores[0], expected.scores[head])
            assert torch.equal(hits.ids[0], expected.ids[head])
    if factory.startswith("IVF"):  # 2,200 rows have enough sampled queries to calibrate
        assert every.searcher.efforts[2] == some.searcher.efforts[2]
        assert None not in every.searcher.efforts[0]
        assert some.searcher.efforts[0] == [None, every.searcher.efforts[0][1], None]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({1: [0]}, r"of layers \[0, 2\]; got layers \[1\]"),
        ({2: [2]}, r"KV heads 0 to 1 of layer 2, each once; got \[2\]"),
        ({0: []}, r"one or more of the KV heads 0 to 2 of layer 0, each once; got \[\]"),
        ({0: [1, 1]}, r"each once; got \[1, 1\]"),
    ],
)
def test_heads_that_are_not_there_are_refused(
    tmp_path: Path, heads: dict[int, list[int]], message: str
) -> None:
    with pytest.raises(MemoryMismatchError, match=message):
        MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "store", indexed_heads=heads)
    assert not (tmp_path / "store").exists()


# -- what is read -------------------------------------------------------------------------------


def test_only_the_indexes_of_heads_that_are_searched_are_made_or_read(tmp_path: Path) -> None:
    store = tmp_path / "store"
    written(store, indexed_heads={0: [1, 2]})
    backend = MemoryBackend.open(store, "vector_db")
    (folder,) = (store / "index").iterdir()
    file = folder / "layer-000-head-002.faiss"
    file.write_bytes(b"pickle" + file.read_bytes()[6:])
    backend.search(0, torch.ones(1, 2, 8), 3, heads=[1])
    backend.search(2, torch.ones(1, 2, 4), 3, heads=[1])
    assert backend.searcher._indexes.made.keys() == {(0, 1), (2, 1)}
    with pytest.raises(StoreError, match=r"head-002\.faiss' is damaged: its checksum differs"):
        backend.search(0, torch.ones(3, 2, 8), 3)
    (damage,) = verify(store)
    assert damage.file == "index/000001/layer-000-head-002.faiss"


@pytest.mark.parametrize(
    "damage",
    [
        {"heads": {"0": [3]}},
        {"heads": {"1": [0]}},
        {"heads": {"0": []}},
        {"heads": {"0": "12"}},
        {"heads": [0, 1]},
        {"heads": {"zero": [1]}},
        {"heads": None},
        {"files": {}},
        {"files": None},
        {"efforts": {"0": [[], []]}},
    ],
    ids=json.dumps,
)
def test_a_damaged_record_of_heads_is_found(tmp_path: Path, damage: dict[str, Any]) -> None:
    store = tmp_path / "store"
    written(store, indexed_heads=SOME)
    change_setting(store, **damage)
    with pytest.raises(StoreError, match=r"record of the index is damaged: .* Run `emt rebuild`"):
        MemoryBackend.open(store, "vector_db")
    MemoryBackend.open(store, "vector_db", index_files=False, indexed_heads=SOME).rebuild()
    assert files_of(store).keys() == names(SOME)
    assert_finds(MemoryBackend.open(store, "vector_db"), range(30))


# -- what changes -------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [None, 1])  # in RAM, or mapped
@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_a_layer_grows_of_which_some_heads_have_files(
    tmp_path: Path, factory: str, cache_bytes: int | None
) -> None:
    store, options = tmp_path / "store", {"index": factory, "recall": 1.0}
    written(store, 400, indexed_heads=SOME, **options)
    backend = MemoryBackend.open(
        store, "vector_db", indexed_heads=SOME, cache_bytes=cache_bytes, **options
    )
    backend.search(0, torch.ones(1, 2, 8), 3, heads=[2])  # made in RAM
    backend.search(0, torch.ones(1, 2, 8), 3, heads=[1])  # from its file
    backend.add(make_document("b", 20), [rows_with_queries(20, 2)])
    backend.search(0, torch.ones(1, 2, 8), 3, heads=[1])  # has all rows, 0.2 lacks some, 0.0 all
    indexes = backend.searcher._indexes.of_layer(0).heads
    assert [index.ntotal for index in indexes] == [420] * 3
    if factory == "Flat":
        assert_finds(backend, range(420))
        assert_finds(MemoryBackend.open(store, "vector_db"), range(420))
    backend.remove(range(0, 100, 3))
    backend.save()
    assert files_of(store).keys() == names(SOME)
    assert not verify(store)
    left = [row for row in range(420) if row >= 100 or row % 3]
    reopened = MemoryBackend.open(store, "vector_db", **options)
    assert [index.ntotal for index in reopened.searcher._indexes.of_layer(0, [1]).heads] == [
        len(left)
    ]
    if factory == "Flat":
        assert_finds(reopened, left)
        assert_finds(backend, left)
    backend.compact()
    backend.rebuild()
    assert files_of(store).keys() == names(SOME)
    assert len(reopened) == len(left)


def test_saving_writes_what_is_wanted_and_lacking(tmp_path: Path) -> None:
    store = tmp_path / "store"
    written(store, 1200, index="IVF4,SQfp16", indexed_heads={0: [1]})
    before = files_of(store)
    other = MemoryBackend.open(store, "vector_db", index="IVF4,SQfp16", indexed_heads=SOME)
    other.save()
    after = files_of(store)
    assert generation(store) == "000002"
    assert after.keys() == names(SOME)
    assert after["0.1"] == before["0.1"]
    assert setting(store)["num_rows"] == 1200


def test_saving_leaves_files_of_more_heads_until_there_is_something_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    written(store)
    backend = MemoryBackend.open(store, "vector_db", indexed_heads=SOME)
    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", pytest.fail)
        backend.save()
    assert (generation(store), files_of(store).keys()) == ("000001", names(EVERY))
    backend.add(make_document("b", 10), [make_rows(10, 2, layout=LAYOUT)])
    backend.save()
    assert (generation(store), files_of(store).keys()) == ("000002", names(SOME))
    assert_finds(backend, range(40))
    whole = MemoryBackend.open(store, "vector_db")
    whole.save()
    assert (generation(store), files_of(store).keys()) == ("000003", names(EVERY))
    backend.rebuild()
    assert (generation(store), files_of(store).keys()) == ("000004", names(SOME))


def test_a_copy_has_files_of_the_same_heads(tmp_path: Path) -> None:
    written(tmp_path / "store", indexed_heads=SOME).save(tmp_path / "copy")
    assert files_of(tmp_path / "copy") == files_of(tmp_path / "store")
    in_ram = MemoryBackend.open(tmp_path / "copy")
    hits = in_ram.search(0, torch.ones(1, 2, 8), 3, heads=[2])
    searched = MemoryBackend.open(tmp_path / "copy", "vector_db").search(
        0, torch.ones(1, 2, 8), 3, heads=[2]
    )
    assert torch.equal(hits.ids, searched.ids)


def test_threads_search_different_heads_of_a_layer_at_the_same_time(tmp_path: Path) -> None:
    written(tmp_path / "store", 400, indexed_heads=SOME)
    expected = MemoryBackend.open(tmp_path / "store")
    backend = MemoryBackend.open(tmp_path / "store", "vector_db")
    backend.add(make_document("b", 20), [rows_with_queries(20, 2)])
    expected.refresh()
    chosen = [[0], [1], [2], [2, 1], [0, 2], [1, 2, 0]] * 8

    def search(heads: list[int]) -> torch.Tensor:
        return backend.search(0, torch.ones(len(heads), 1, 8), 5, heads=heads).ids

    with ThreadPoolExecutor(4) as pool:
        for heads, hits in zip(chosen, pool.map(search, chosen), strict=True):
            exact = expected.search(0, torch.ones(len(heads), 1, 8), 5, heads=heads).ids
            assert torch.equal(hits, exact)


def test_a_reader_of_single_heads_outlives_their_files(tmp_path: Path) -> None:
    store = tmp_path / "store"
    written(store, indexed_heads=SOME)
    reader = MemoryBackend.open(store, "vector_db")
    reader.search(0, torch.ones(1, 2, 8), 3, heads=[1])
    written_again = MemoryBackend.open(store, "vector_db", indexed_heads={0: [0]})
    written_again.save()
    assert files_of(store).keys() == {"0.0"}
    assert_finds(reader, range(30))


# -- what it saves ------------------------------------------------------------------------------


def test_coverage_tells_the_bytes_and_estimates_those_of_all_heads(tmp_path: Path) -> None:
    every, some = tmp_path / "every", tmp_path / "some"
    written(every, 2000, index="Flat")
    written(some, 2000, index="Flat", indexed_heads=SOME)
    sizes = {name: len(data) for name, data in files_of(every).items()}
    coverage = coverage_of(setting(some), LAYOUT)
    assert coverage.heads == SOME
    assert coverage.num_bytes == sum(sizes[name] for name in names(SOME))
    assert coverage.all_bytes == pytest.approx(sum(sizes.values()), rel=0.01)  # headers apart
    whole = coverage_of(setting(every), LAYOUT)
    assert (whole.num_bytes, whole.all_bytes) == (sum(sizes.values()), sum(sizes.values()))
    shutil.rmtree(some)
    written(some, indexed_heads={})
    assert coverage_of(setting(some), LAYOUT) == ({}, 0, 0)


def test_rows_of_some_heads_are_retrieved_with_the_effort_of_all(tmp_path: Path) -> None:
    """Only `search` looks into more lists for named heads: a decode step has no time for it."""
    with contextlib.closing(
        written(tmp_path / "m", 2000, index="IVF32,SQfp16", recall=0.3)
    ) as backend:
        queries = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(3))
        of_all = backend.retrieve(0, queries, 5)
        hits = backend.retrieve(0, queries[[2, 0]], 5, heads=[2, 0])
        for part, expected in zip(hits, of_all, strict=True):
            assert torch.equal(part, expected[[2, 0]])
        rows = backend.nearest(0, queries[[2, 0]], 5, heads=[2, 0])
        assert rows is not None
        for part, expected in zip(rows, hits[2:], strict=True):
            torch.testing.assert_close(part.sum(dim=2), expected.sum(dim=2))
        thorough = backend.search(0, queries[[2, 0]], 5, heads=[2, 0])
        assert thorough.scores.sum() > hits.scores.sum()
