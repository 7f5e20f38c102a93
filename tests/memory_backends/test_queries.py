"""The sample of queries: which tokens, kept where, given back how."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import numpy as np
import pytest

from memory_backends import MemoryBackend, MemoryMismatchError, Rows, StoreError
from memory_backends.rows.query_samples import sampled_rows
from memory_backends.testing.rows import LAYERS, LAYOUT, make_document, make_rows

HEADS = {0: 6, 3: 2}  # query heads, of layers with 2 and 1 KV heads


def with_queries(rows: Rows, seed: int, heads: dict[int, int] = HEADS, scale: float = 1.0) -> Rows:
    generator = torch.Generator().manual_seed(1000 + seed)
    queries = {
        idx: torch.randn(count, len(rows), LAYERS[idx].head_dim, generator=generator) * scale
        for idx, count in heads.items()
    }
    return dataclasses.replace(rows, queries=queries)


def grouped(rows: Rows, layer_idx: int, at: list[int]) -> torch.Tensor:
    """Return queries of rows as (Hkv, s, G, D), head by head."""
    queries, num_heads = rows.queries[layer_idx], LAYERS[layer_idx].num_key_value_heads
    groups = len(queries) // num_heads
    return torch.stack(
        [
            torch.stack([queries[h * groups : (h + 1) * groups, row] for row in at])
            for h in range(num_heads)
        ]
    )


def test_samples_get_rarer_with_each_doubling() -> None:
    def stride(row: int) -> int:
        result, end = 64, 16_384
        while row >= end:
            result, end = 2 * result, 2 * end
        return result

    expected = [row for row in range(140_000) if row % stride(row) == 0]
    assert sampled_rows(0, 140_000).tolist() == expected
    assert len(sampled_rows(0, 16_384)) == 256
    assert len(sampled_rows(16_384, 32_768)) == 128
    assert len(sampled_rows(0, 10_000_000)) == 256 + 9 * 128 + 25
    parts = [sampled_rows(first, first + 777) for first in range(0, 139_860, 777)]
    assert np.concatenate(parts).tolist() == [row for row in expected if row < 139_860]
    assert sampled_rows(1, 64).tolist() == sampled_rows(5, 5).tolist() == []


@pytest.fixture(params=["in RAM", "in files"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> MemoryBackend:
    return MemoryBackend(LAYOUT, path=tmp_path / "store" if request.param == "in files" else None)


def test_queries_are_sampled_kept_and_copied(backend: MemoryBackend, tmp_path: Path) -> None:
    assert backend.sampled_queries(0).shape == (2, 0, 1, 8)
    first = with_queries(make_rows(100, seed=1), 1)  # rows 0 to 99: samples 0 and 64
    plain = make_rows(50, seed=2)  # rows 100 to 149: 128 has no query
    runs = [with_queries(make_rows(n, seed=n, first=at), n) for n, at in ((42, 0), (66, 42))]
    backend.add(make_document("a", 100), [first])
    backend.add(make_document("plain", 50), [plain])
    backend.add(make_document("b", 108), runs)  # rows 150 to 257: 192 and 256
    for layer_idx in LAYERS:
        expected = torch.cat(
            [grouped(first, layer_idx, [0, 64]), grouped(runs[1], layer_idx, [0, 64])], dim=1
        )
        assert expected.shape[1:3] == (4, HEADS[layer_idx] // LAYERS[layer_idx].num_key_value_heads)
        if layer_idx == 0:
            backend.save(tmp_path / "copy")
        for memory in (backend, MemoryBackend.open(tmp_path / "copy")):
            samples = memory.sampled_queries(layer_idx)
            assert samples.dtype == torch.float32
            torch.testing.assert_close(samples, expected, atol=2e-3, rtol=1e-3)
            assert torch.equal(samples, backend.sampled_queries(layer_idx))


def test_a_resumed_run_samples_the_same(tmp_path: Path) -> None:
    runs = [with_queries(make_rows(70, seed=n), n) for n in range(4)]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    MemoryBackend(LAYOUT, path=whole).add(make_document("a", 70), runs)
    for name, run in zip("abcd", runs, strict=True):
        MemoryBackend(LAYOUT, path=resumed).add(make_document(name, 70), [run])
    for file in ("layer-000.bin", "layer-003.bin"):
        expected = (whole / "queries" / file).read_bytes()
        assert (resumed / "queries" / file).read_bytes() == expected
    assert MemoryBackend.open(resumed).sampled_queries(3).shape == (1, 5, 2, 4)


def test_samples_of_a_document_that_fails_are_not_kept(backend: MemoryBackend) -> None:
    def failing(heads: dict[int, int]) -> Any:
        yield with_queries(make_rows(100, seed=1), 1, heads)
        raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        backend.add(make_document("a", 100), failing({0: 2, 3: 1}))
    assert backend.sampled_queries(0).shape == (2, 0, 1, 8)
    good = with_queries(make_rows(65, seed=2), 2)
    backend.add(make_document("a", 65), [good])
    with pytest.raises(RuntimeError, match="cut"):
        backend.add(make_document("b", 100), failing(HEADS))
    for layer_idx in LAYERS:
        expected = grouped(good, layer_idx, [0, 64])
        samples = backend.sampled_queries(layer_idx)
        torch.testing.assert_close(samples, expected, atol=2e-3, rtol=1e-3)


def test_a_query_too_long_for_float16_keeps_its_direction(backend: MemoryBackend) -> None:
    rows = with_queries(make_rows(1, seed=1), 1, scale=1e6)
    backend.add(make_document("a", 1), [rows])
    samples, expected = backend.sampled_queries(0), grouped(rows, 0, [0])
    assert torch.isfinite(samples).all()
    cosine = torch.nn.functional.cosine_similarity(samples, expected, dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ({0: torch.ones(3, 2, 8)}, r"\(H=a multiple of 2, N=2, head_dim=8\); got \(3, 2, 8\)"),
        ({0: torch.ones(4, 3, 8)}, r"\(H=a multiple of 2, N=2, .*; got \(4, 3, 8\)"),
        ({1: torch.ones(4, 2, 8)}, r"queries must be of layers \[0, 3\]; got layer 1"),
        ({3: torch.ones(2, 2, 4) / 0}, "queries of layer 3 must be finite"),
    ],
)
def test_queries_that_do_not_fit_are_refused(
    backend: MemoryBackend, queries: dict[int, torch.Tensor], message: str
) -> None:
    rows = dataclasses.replace(make_rows(2, seed=1), queries=queries)
    with pytest.raises(MemoryMismatchError, match=message):
        backend.add(make_document("a", 2), [rows])
    assert len(backend) == 0


def test_other_heads_than_before_are_refused(backend: MemoryBackend) -> None:
    backend.add(make_document("a", 1), [with_queries(make_rows(1, seed=1), 1)])
    with pytest.raises(MemoryMismatchError, match=r"\(H=6, N=1, head_dim=8\); got \(4, 1, 8\)"):
        backend.add(make_document("b", 1), [with_queries(make_rows(1, seed=1), 1, {0: 4})])


def test_damaged_samples_are_refused(tmp_path: Path) -> None:
    backend = MemoryBackend(LAYOUT, "vector_db", path=tmp_path / "store")
    backend.add(make_document("a", 130), [with_queries(make_rows(130, seed=1), seed=2)])
    backend.close()
    file = tmp_path / "store" / "queries" / "layer-000.bin"
    damaged = bytearray(file.read_bytes())
    damaged[0:2] = b"\xff\x7f"  # NaN
    file.write_bytes(damaged)
    with pytest.raises(StoreError, match="query samples of layer 0 must be finite"):
        MemoryBackend.open(tmp_path / "store", "vector_db").sampled_queries(0)
