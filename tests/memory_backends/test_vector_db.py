"""The persistent store and its FAISS files."""

from __future__ import annotations

import errno
import gc
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import faiss
import numpy as np
import pytest

from memory_backends import (
    IndexFactoryError,
    LayerLayout,
    MemoryBackend,
    MemoryLayout,
    MemoryMismatchError,
    StoreError,
)
from memory_backends.testing.checks import assert_fetches, assert_finds
from memory_backends.testing.rows import (
    LAYOUT,
    keys_of,
    make_document,
    make_queries,
    make_rows,
    nearest,
)

RUNS = [make_rows(10, seed=1), make_rows(7, seed=2)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A saved store with the documents 'a' (rows 0-9) and 'b' (rows 10-16)."""
    path = tmp_path / "store"
    backend = MemoryBackend(LAYOUT, "vector_db", path=path)
    for name, rows in zip("ab", RUNS, strict=True):
        backend.add(make_document(name, len(rows)), [rows])
    backend.save()
    backend.close()
    return path


def _generation(store: Path) -> Path:
    (folder,) = (store / "index").iterdir()
    return folder


def test_faiss_opens_the_files_and_finds_normalised_keys_in_order(store: Path) -> None:
    for layer_idx, head in ((0, 0), (0, 1), (3, 0)):
        file = _generation(store) / f"layer-{layer_idx:03d}-head-{head:03d}.faiss"
        index = faiss.read_index(str(file))
        assert index.metric_type == faiss.METRIC_INNER_PRODUCT
        keys = keys_of(RUNS, layer_idx)[head]
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        np.testing.assert_allclose(index.reconstruct_n(0, index.ntotal), unit, atol=1e-6)
    assert np.fromfile(_generation(store) / "ids.bin", "<i8").tolist() == list(range(17))


def test_saving_drops_removed_rows_from_the_files(store: Path) -> None:
    backend = MemoryBackend.open(store, "vector_db")
    backend.remove([0, 12])
    backend.remove_document("b")
    assert_finds(backend, RUNS, range(1, 10))
    backend.save()
    assert _generation(store).name == "000002"
    assert np.fromfile(_generation(store) / "ids.bin", "<i8").tolist() == list(range(1, 10))
    index = faiss.read_index(str(_generation(store) / "layer-003-head-000.faiss"))
    assert index.ntotal == 9
    for memory in (backend, MemoryBackend.open(store, "vector_db")):
        assert_finds(memory, RUNS, range(1, 10))
        assert_fetches(memory, RUNS)


def test_rows_out_of_order_are_searched_as_they_are(tmp_path: Path) -> None:
    """A sink that another document's removal sets free is indexed after rows with higher ids."""
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "store", sinks="one")
    runs = [
        make_rows(3, seed=1, sinks=[0]),
        make_rows(7, seed=2, sinks=[0]),
        make_rows(1, seed=3),
        make_rows(2, seed=4, sinks=[0]),
    ]
    for name, rows in zip("ab", runs[:2], strict=True):
        backend.add(make_document(name, len(rows)), [rows])
    assert_finds(backend, runs, [0, 1, 2, *range(4, 10)])
    backend.add(make_document("c", 1), [runs[2]])  # row 10
    backend.remove_document("a")  # frees row 3
    backend.add(make_document("d", 2), [runs[3]])  # rows 11, a sink, and 12
    assert_finds(backend, runs, [*range(3, 11), 12])  # the last three added are 10, 3, 12
    backend.save()
    assert_finds(
        MemoryBackend.open(tmp_path / "store", "vector_db", sinks="one"), runs, [*range(3, 11), 12]
    )


@pytest.mark.parametrize(
    "name", ["ids.bin", "layer-000-head-001.faiss", "layer-003-head-000.faiss"]
)
def test_a_damaged_or_missing_file_is_found(store: Path, name: str) -> None:
    file = _generation(store) / name
    whole = file.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(StoreError, match=re.escape(message)):
            assert_finds(MemoryBackend.open(store, "vector_db"), RUNS, range(17))

    file.write_bytes(whole[:-8])
    refused(f"'{file}' has {len(whole) - 8} bytes; expected {len(whole)} bytes")
    file.write_bytes(b"pickle" + whole[6:])
    refused(f"'{file}' is damaged: its checksum differs. Run `emt rebuild`")
    file.unlink()
    refused(f"'{file}' is missing; expected {len(whole)} bytes")
    MemoryBackend.open(store, "vector_db", index_files=False).rebuild()  # as the messages advise
    assert_finds(MemoryBackend.open(store, "vector_db"), RUNS, range(17))


@pytest.mark.parametrize("factory", ["SQfp16", "IVF4,SQfp16"])
def test_half_precision_finds_the_nearest_and_no_removed_row(tmp_path: Path, factory: str) -> None:
    """The path of large memories: scores to 1e-3, `nearest` without scores."""
    run = make_rows(1000, seed=1)
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "store", index=factory, recall=1.0)
    backend.add(make_document("a", 1000), [run])
    backend.remove(range(0, 1000, 3))
    kept = [row for row in range(1000) if row % 3]
    for layer_idx in LAYOUT.layers:
        queries = make_queries(layer_idx, 6)
        scores, _ = nearest(keys_of([run], layer_idx), queries, 5, kept)
        hits = backend.retrieve(layer_idx, queries, 5)
        assert (hits.ids % 3 != 0).all()
        if factory == "SQfp16":  # IVF looks into one list of four at least, not into all
            np.testing.assert_allclose(hits.scores.numpy(), scores, atol=1e-3)
        assert (hits.scores.numpy() <= scores + 1e-3).all()
        keys, values = backend.fetch(layer_idx, hits.ids)
        assert torch.equal(hits.keys, keys)
        assert torch.equal(hits.values, values)
        rows = backend.nearest(layer_idx, queries, 5)
        assert rows is not None
        torch.testing.assert_close(rows[0].sum(dim=2), keys.sum(dim=2))
        torch.testing.assert_close(rows[1].sum(dim=2), values.sum(dim=2))
        assert backend.nearest(layer_idx, queries, 999) is None


def test_a_store_without_its_index_folder_makes_it_anew(store: Path) -> None:
    shutil.rmtree(store / "index")  # as the messages above advise
    backend = MemoryBackend.open(store, "vector_db")
    assert_finds(backend, RUNS, range(17))
    backend.save()
    assert_finds(MemoryBackend.open(store, "vector_db"), RUNS, range(17))


def test_a_reader_outlives_the_files_it_was_going_to_read(store: Path) -> None:
    reader, writer = MemoryBackend.open(store, "vector_db"), MemoryBackend.open(store, "vector_db")
    writer.remove_document("a")
    writer.save()
    hits = reader.search(0, make_queries(0, 6), 5)
    expected = nearest(keys_of(RUNS, 0), make_queries(0, 6), 5, range(17))
    np.testing.assert_array_equal(hits.ids.numpy(), expected[1])


@pytest.mark.parametrize("full", ["memory_backends.faiss.index.faiss.write_index", "os.fsync"])
def test_a_full_disk_while_saving_leaves_the_files_as_they_were(
    store: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    backend = MemoryBackend.open(store, "vector_db")
    backend.remove([3])

    def fail(*_: Any) -> None:
        if "faiss" in full:
            raise RuntimeError("Error in f at x.cpp:12: Error: 'ret == n' failed: disk full")
        raise OSError(errno.ENOSPC, "disk full")

    with monkeypatch.context() as patch:
        patch.setattr(full, fail)
        with pytest.raises(
            StoreError, match=f"'{re.escape(str(store))}' cannot be written: .*disk"
        ):
            backend.save()
    assert _generation(store).name == "000001"
    left = [row for row in range(17) if row != 3]
    assert_finds(backend, RUNS, left)
    assert_finds(MemoryBackend.open(store, "vector_db"), RUNS, left)
    backend.save()
    assert_finds(MemoryBackend.open(store, "vector_db"), RUNS, left)


def test_auto_is_exact_while_small_and_then_ivf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory_backends.faiss.index.AUTO_IVF_ROWS", 700)
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "store")
    runs = [make_rows(699, seed=1), make_rows(1801, seed=2)]
    backend.add(make_document("a", 699), [runs[0]])
    assert backend.searcher.factory == "Flat"
    assert_finds(backend, runs, range(699))
    backend.add(make_document("b", 1801), [runs[1]])
    assert backend.searcher.factory == "IVF64,SQfp16"  # 2 * sqrt(2500) = 100 lists, a power of two
    _assert_finds_itself(backend, runs, 2500, tolerance=2e-3)
    backend.save()
    file = _generation(tmp_path / "store") / "layer-000-head-000.faiss"
    index = faiss.downcast_index(faiss.read_index(str(file)))
    assert isinstance(index, faiss.IndexIVFScalarQuantizer)
    assert (index.nlist, index.ntotal) == (64, 2500)
    reopened = MemoryBackend.open(tmp_path / "store", "vector_db")
    assert reopened.searcher.factory == "IVF64,SQfp16"
    _assert_finds_itself(reopened, runs, 2500, tolerance=2e-3)


@pytest.mark.parametrize(
    ("factory", "tolerance"),
    [
        ("IVF4,Flat", 1e-6),
        ("IVF4,SQ8", 1e-6),
        ("HNSW16", 1e-6),
        ("HNSW16,SQ8", 1e-6),
        ("SQ8", 1e-6),
        ("SQfp16", 2e-3),
        ("L2norm,HNSW16", 1e-6),
    ],
)
def test_a_factory_string_of_the_user(tmp_path: Path, factory: str, tolerance: float) -> None:
    runs = [make_rows(1100, seed=1), make_rows(400, seed=2)]
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "store", index=factory)
    for name, rows in zip("ab", runs, strict=True):
        backend.add(make_document(name, len(rows)), [rows])
        assert backend.searcher.factory == factory
    _assert_finds_itself(backend, runs, 1500, tolerance)
    backend.save()
    backend.remove_document("a")
    reopened = MemoryBackend.open(tmp_path / "store", "vector_db", index=factory)
    for memory in (backend, reopened, MemoryBackend.open(tmp_path / "store", "vector_db")):
        assert memory.searcher.factory == factory
        hits = memory.search(0, make_queries(0, 50), 5).ids
        assert set(hits.unique().tolist()) <= {-1, *range(1100, 1500)}
        _assert_finds_itself(memory, runs, 1500, tolerance, first=1100)


@pytest.mark.parametrize("factory", ["PCA4,Flat", "SQ8", "RaBitQ"])
def test_scores_are_true_cosines_whatever_the_index_keeps(tmp_path: Path, factory: str) -> None:
    rows = make_rows(1100, seed=1)
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "store", index=factory)
    backend.add(make_document("a", 1100), [rows])
    queries = make_queries(0, 8)
    scores, ids = backend.search(0, queries, 5)
    for head in range(len(queries)):
        keys, unit = keys_of([rows], 0)[head], queries[head].double().numpy()
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosines = np.take_along_axis(unit @ keys.T, ids[head].numpy(), axis=1)
        np.testing.assert_allclose(scores[head].numpy(), cosines, atol=1e-6)
        assert (np.diff(scores[head].numpy(), axis=1) <= 0).all()


def test_a_factory_that_needs_training_waits_for_enough_rows(tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "store", index="IVF4,Flat")
    runs = [make_rows(155, seed=1), make_rows(1, seed=2)]
    backend.add(make_document("a", 155), [runs[0]])
    assert backend.searcher.factory == "Flat"  # below 4 lists of 39 points
    assert_finds(backend, runs, range(155))
    backend.add(make_document("b", 1), [runs[1]])
    assert backend.searcher.factory == "IVF4,Flat"
    _assert_finds_itself(backend, runs, 156, tolerance=1e-6)


def test_another_index_than_the_saved_one_is_made_anew(store: Path) -> None:
    backend = MemoryBackend.open(store, "vector_db", index="HNSW16")
    assert backend.searcher.factory == "HNSW16"
    assert_finds(backend, RUNS, range(17))
    backend.save()
    assert MemoryBackend.open(store, "vector_db").searcher.factory == "HNSW16"
    file = _generation(store) / "layer-000-head-000.faiss"
    assert isinstance(faiss.downcast_index(faiss.read_index(str(file))), faiss.IndexHNSW)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "nonsense",
            "for 4-dimensional .* got 'nonsense'. FAISS says: could not parse index string",
        ),
        ("", "such as 'Flat' .* got ''. FAISS says: could not parse"),
        ("IVF16,Nonsense", "'IVF16,Nonsense'. FAISS says: 'index_ivf' failed: could not parse"),
        ("LSH", "got 'LSH'. FAISS says: 'metric == METRIC_L2' failed"),
        ("PQ4", "families Flat, SQ, RaBitQ, IVF and HNSW; got 'PQ4', a FAISS IndexPQ"),
        ("IVF4,Flat,RFlat", "got 'IVF4,Flat,RFlat', a FAISS IndexRefineFlat"),
        ("IDMap,Flat", "got 'IDMap,Flat', a FAISS IndexIDMap"),
        ("NSG16", "got 'NSG16', a FAISS IndexNSGFlat"),
        ("IVF4,RQ2x4", "got 'IVF4,RQ2x4', a FAISS IndexIVFResidualQuantizer"),
        ("PCA6,Flat", "index 'PCA6,Flat' must keep at most the 4 components .* makes 6"),
        ("HNSW16_PQ4", "must search by inner product, metric 0; FAISS makes it with metric 1"),
    ],
)
def test_a_factory_that_cannot_serve_is_refused(tmp_path: Path, factory: str, message: str) -> None:
    layout = MemoryLayout({0: LayerLayout(1, 4, 4)}, torch.float32)
    with pytest.raises(IndexFactoryError, match=message) as caught:
        MemoryBackend(layout, "vector_db", path=tmp_path / "store", index=factory)
    assert ".cpp" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_only_indexed_layers_have_files(tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "store", indexed_layers=[3])
    backend.add(make_document("a", 10), [RUNS[0]])
    backend.save()
    names = {file.name for file in _generation(tmp_path / "store").iterdir()}
    assert names == {"layer-003-head-000.faiss", "ids.bin"}
    assert_finds(MemoryBackend.open(tmp_path / "store", "vector_db"), RUNS, range(10))
    with pytest.raises(MemoryMismatchError, match=r"some of \[0, 3\]; got \[1, 3\]"):
        MemoryBackend(LAYOUT, "vector_db", indexed_layers=[3, 1])


def test_a_memory_without_a_path_leaves_nothing_behind(tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, "vector_db")
    backend.add(make_document("a", 10), [RUNS[0]])
    folder = backend.path
    assert folder is not None
    assert folder.is_dir()
    with pytest.raises(StoreError, match="this memory has no path"):
        backend.save()
    backend.save(tmp_path / "copy")
    backend.close()
    del backend
    gc.collect()
    assert not folder.parent.exists()
    assert_finds(MemoryBackend.open(tmp_path / "copy", "vector_db"), RUNS, range(10))


def _assert_finds_itself(
    backend: MemoryBackend, runs: list[Any], stop: int, tolerance: float, first: int = 0
) -> None:
    """Search with some keys: each must be its own nearest, at cosine 1, in any kind of index."""
    assert len(backend) == stop - first
    rows = np.arange(first, stop, 7)
    queries = torch.from_numpy(keys_of(runs, 0)[:, rows]).float()
    hits = backend.search(0, queries, 1)
    for head in range(2):
        np.testing.assert_array_equal(hits.ids[head, :, 0].numpy(), rows)
    np.testing.assert_allclose(hits.scores.numpy(), 1, atol=tolerance)
