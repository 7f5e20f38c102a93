"""FAISS indexes made from factory strings."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from memory_backends import IndexFactoryError, StoreError
from memory_backends.faiss import index as faiss_index

DIM = 32


def unit_vectors(num: int, seed: int, dim: int = DIM) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((num, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("num_rows", "factory"),
    [
        (0, "Flat"),
        (8_191, "Flat"),
        (8_192, "IVF128,SQfp16"),
        (16_384, "IVF256,SQfp16"),
        (100_000, "IVF512,SQfp16"),
        (1_000_000, "IVF2048,SQfp16"),
        (10_000_000, "IVF8192,SQfp16"),
    ],
)
def test_auto_grows_with_the_rows(num_rows: int, factory: str) -> None:
    assert faiss_index.factory_for("auto", num_rows, 128) == factory
    if factory != "Flat":  # enough rows for each list of FAISS's own minimum
        num_lists = int(factory[3:].partition(",")[0])
        assert num_rows >= faiss_index.POINTS_PER_LIST * num_lists


@pytest.mark.parametrize(
    ("factory", "needed"),
    [
        ("Flat", 0),
        ("HNSW16", 0),
        ("SQfp16", 0),
        ("IVF16,Flat", 16 * 39),
        ("IVF100,SQ8", 100 * 39),
        ("IVF4,SQ8", 1024),
        ("SQ8", 1024),
        pytest.param("IVF4,PQ1", 256 * 39, marks=pytest.mark.slow),  # 3 s of training
        ("IVF4,PQ4x4fs", 16 * 39),
        ("PCA16,Flat", 256),
        ("PCA16,IVF16,Flat", 16 * 39),
    ],
)
def test_an_index_is_flat_until_it_can_be_trained(factory: str, needed: int) -> None:
    faiss_index.check_factory(factory, DIM)
    assert faiss_index.factory_for(factory, needed, DIM) == factory
    if needed:
        assert faiss_index.factory_for(factory, needed - 1, DIM) == "Flat"
        index = faiss_index.new_index(factory, DIM)
        index.train(unit_vectors(needed, seed=1))  # FAISS agrees that it is enough
        assert index.is_trained
        assert faiss_index.training_rows(index) == 0
        assert faiss_index.training_rows(faiss_index.new_index(factory, DIM)) >= needed


@pytest.mark.parametrize(
    ("factory", "recall"),
    [
        ("Flat", 1.0),
        ("HNSW16", 0.95),
        ("SQ8", 0.9),
        ("IVF4,Flat", 0.4),  # looks into one list of four, and random keys have no clusters
        ("IVF4,RaBitQ", 0.1),
        ("IVF4,PQ16x4fs", 0.2),
        ("OPQ2,Flat", 1.0),
        ("PCA32,Flat", 0.8),
    ],
)
@pytest.mark.parametrize("some", [False, True])
def test_every_family_leaves_out_what_it_must(factory: str, recall: float, some: bool) -> None:
    faiss_index.check_factory(factory, DIM)
    keys, queries = unit_vectors(1500, seed=1), unit_vectors(40, seed=2)
    index = faiss_index.new_index(factory, DIM)
    if not index.is_trained:
        index.train(keys)
    index.add(keys)
    allowed = np.arange(1500) % 3 == 0 if some else np.ones(1500, dtype=bool)
    bitmap = np.packbits(allowed, bitorder="little") if some else None
    parameters = faiss_index.search_parameters(index, bitmap)
    scores, positions = faiss_index.search(index, queries, 10, parameters)
    assert np.isneginf(scores[positions < 0]).all()
    assert allowed[positions[positions >= 0]].all()
    assert (np.diff(scores, axis=1) <= 0).all()
    products = np.where(allowed, queries.astype(np.float64) @ keys.T.astype(np.float64), -2)
    best = np.argsort(-products, axis=1)[:, :10]
    share = np.mean([np.isin(b, p).mean() for b, p in zip(best, positions, strict=True)])
    assert share >= recall
    if factory in ("Flat", "HNSW16"):
        at = np.take_along_axis(products, np.maximum(positions, 0), axis=1)
        np.testing.assert_allclose(scores[positions >= 0], at[positions >= 0], atol=2e-6)


def test_more_lists_than_memory_are_refused() -> None:
    with pytest.raises(IndexFactoryError, match="got 'IVF999999999999,Flat'"):
        faiss_index.new_index("IVF999999999999,Flat", 64)


def test_a_file_of_another_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.faiss"
    for index, message in (
        (faiss.IndexFlatIP(DIM), f"must hold 17 vectors of {DIM} components; it holds 3 of {DIM}"),
        (faiss.IndexFlatL2(DIM), "must be of metric 0, inner product; it is of metric 1"),
    ):
        index.add(unit_vectors(3 if index.metric_type == 0 else 17, seed=1))
        faiss_index.write_index(index, path)
        with pytest.raises(StoreError, match=message):
            faiss_index.read_index(path, DIM, 17)
    path.write_bytes(b"pickle")
    with pytest.raises(StoreError, match="is damaged or truncated"):
        faiss_index.read_index(path, DIM, 17)


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    index = faiss.IndexFlatIP(4)
    path = tmp_path / "nowhere" / "x.faiss"
    with pytest.raises(OSError, match=f"FAISS could not write '{path}': .*No such file"):
        faiss_index.write_index(index, path)
