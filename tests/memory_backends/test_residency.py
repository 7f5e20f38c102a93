"""The bound on resident pages of mapped files."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import torch
import faiss
import numpy as np
import pytest

from memory_backends import MemoryBackend, StoreError, verify
from memory_backends.faiss import index as faiss_index
from memory_backends.faiss.residency import ResidentLimit, file_bytes
from memory_backends.testing.rows import LAYOUT, make_document, make_queries, make_rows

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells and lets go of resident pages"
)

MIB = 2**20


def read_all(view: mmap.mmap) -> int:
    return int(np.frombuffer(view, dtype=np.uint8)[:: mmap.PAGESIZE].sum())


@linux_only
def test_pages_are_let_go_when_there_are_too_many(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\1" * (64 * MIB))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        address = np.frombuffer(view, dtype=np.uint8).ctypes.data
        limit = ResidentLimit(16 * MIB, lambda: [(address, 64 * MIB), (0, 0)])
        before = file_bytes()
        expected = read_all(view)
        assert file_bytes() - before > 48 * MIB
        limit.count(1)  # too few rows to look
        assert file_bytes() - before > 48 * MIB
        limit.count(5000)
        assert file_bytes() - before < 16 * MIB
        assert read_all(view) == expected  # the bytes are still there


FACTORIES = ["IVF4,Flat", "PCA4,IVF4,Flat"]


def written(path: Path, factory: str = "IVF4,Flat") -> MemoryBackend:
    backend = MemoryBackend(LAYOUT, "vector_db", path=path, index=factory, recall=1.0)
    backend.add(make_document("a", 600), [make_rows(600, seed=1)])
    backend.save()
    return backend


def mapped(path: Path, factory: str = "IVF4,Flat", **options: object) -> MemoryBackend:
    return MemoryBackend.open(
        path, "vector_db", index=factory, recall=1.0, cache_bytes=1, **options
    )


@linux_only
def test_a_store_serves_the_same_from_mapped_indexes(tmp_path: Path) -> None:
    in_ram = written(tmp_path / "store")
    backend = mapped(tmp_path / "store")
    for layer_idx in LAYOUT.layers:
        queries = make_queries(layer_idx, 5)
        expected = in_ram.search(layer_idx, queries, 7)
        hits = backend.search(layer_idx, queries, 7)
        torch.testing.assert_close(hits.scores, expected.scores)
        assert torch.equal(hits.ids, expected.ids)
        heads = backend.searcher._indexes.of_layer(layer_idx).heads
        assert all(faiss_index.mapped_lists(index) is not None for index in heads)
    backend.add(make_document("b", 300), [make_rows(300, seed=2)])  # mapped lists cannot grow
    in_ram.refresh()
    for layer_idx in LAYOUT.layers:
        queries = make_queries(layer_idx, 5)
        expected = in_ram.search(layer_idx, queries, 7)
        assert torch.equal(backend.search(layer_idx, queries, 7).ids, expected.ids)


@pytest.mark.parametrize("factory", FACTORIES)
def test_saving_mapped_indexes_writes_whole_files(tmp_path: Path, factory: str) -> None:
    path = tmp_path / "store"
    expected = written(path, factory).search(0, make_queries(0, 5), 7)
    backend = mapped(path, factory, indexed_layers=[0])
    backend.search(0, make_queries(0, 5), 7)
    backend.save()
    assert verify(path) == []
    hits = MemoryBackend.open(path, "vector_db", index=factory, recall=1.0).search(
        0, make_queries(0, 5), 7
    )
    assert torch.equal(hits.ids, expected.ids)


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_mapped_reader_outlives_another_writers_save(tmp_path: Path, factory: str) -> None:
    path = tmp_path / "store"
    writer = written(path, factory)
    reader = mapped(path, factory)
    reader.search(0, make_queries(0, 5), 7)
    writer.add(make_document("b", 300), [make_rows(300, seed=2)])
    writer.save()
    reader.refresh()
    assert len(reader) == 900
    hits = reader.search(0, make_queries(0, 5), 900)
    assert sorted(hits.ids[0, 0].tolist())[-1] == 899


def test_a_faiss_file_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    index = faiss.index_factory(8, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    keys = np.random.default_rng(1).standard_normal((200, 8)).astype(np.float32)
    index.train(keys)
    lists = faiss.OnDiskInvertedLists(4, index.code_size, str(elsewhere))
    index.replace_invlists(lists)
    index.add(keys)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    before = elsewhere.read_bytes()
    for is_mapped in (False, True):
        with pytest.raises(StoreError, match="must have its inverted lists in itself"):
            faiss_index.read_index(tmp_path / "x.faiss", 8, 200, mapped=is_mapped)
    assert elsewhere.read_bytes() == before
