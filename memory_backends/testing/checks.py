"""What a backend finds and fetches, compared with brute force over the rows that were written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import numpy as np

from memory_backends.backend import MemoryBackend
from memory_backends.layout import Rows
from memory_backends.search.scores import SearchResult
from memory_backends.testing.rows import Array, keys_of, make_queries, nearest

# Of a row's length; int4 has two bytes of a record of 8 for scales here, so little for the numbers.
CODEC_ERRORS = {
    "exact": 0.0,
    "float16": 1e-3,
    "bfloat16": 8e-3,
    "int8": 0.05,
    "int5.5": 0.9,
    "int4": 1.0,
}


def assert_hits(hits: SearchResult, expected: tuple[Array, Array]) -> None:
    """Compare what a search returned with the scores and ids of `nearest`."""
    assert (hits.ids.dtype, hits.scores.dtype) == (torch.int64, torch.float32)
    np.testing.assert_array_equal(hits.ids.cpu().numpy(), expected[1])
    np.testing.assert_allclose(hits.scores.cpu().numpy(), expected[0], atol=2e-6)


def assert_finds(
    backend: MemoryBackend, runs: Sequence[Rows], searchable: Iterable[int], k: int = 5
) -> None:
    """Compare a search of every layer with brute force over `runs`, ids counted from 0.

    Where a codec has changed the rows a little, brute force has those that the backend fetches.
    """
    searchable = list(searchable)
    assert len(backend) == len(searchable)
    for layer_idx in backend.layout.layers:
        queries = make_queries(layer_idx, 6)
        keys = stored_keys(backend, runs, layer_idx, searchable)
        assert_hits(backend.search(layer_idx, queries, k), nearest(keys, queries, k, searchable))


def stored_keys(
    backend: MemoryBackend, runs: Sequence[Rows], layer_idx: int, searchable: Iterable[int]
) -> Array:
    """Return the keys of `runs`, the searchable ones as the backend's codec has changed them."""
    keys, rows = keys_of(runs, layer_idx), list(searchable)
    if backend.catalog.row_codec != "exact" and rows:
        stored = backend.fetch(layer_idx, torch.tensor(rows).expand(len(keys), -1))[0]
        assert_close(backend, stored, torch.from_numpy(keys[:, rows]))
        keys[:, rows] = stored.double().numpy()
    return keys


def assert_fetches(backend: MemoryBackend, runs: Sequence[Rows]) -> None:
    """Compare every row's keys and values: bit for bit, if the codec is exact."""
    num_rows = sum(map(len, runs))
    for layer_idx, layer in backend.layout.layers.items():
        ids = torch.arange(num_rows).expand(layer.num_key_value_heads, -1)
        keys, values = backend.fetch(layer_idx, ids)
        assert_close(backend, keys, torch.cat([run.keys[layer_idx] for run in runs], dim=1))
        assert_close(backend, values, torch.cat([run.values[layer_idx] for run in runs], dim=1))


def assert_close(backend: MemoryBackend, stored: torch.Tensor, written: torch.Tensor) -> None:
    """Compare rows (..., D), as closely as the backend's codec allows."""
    assert stored.shape == written.shape
    if backend.catalog.row_codec == "exact":
        assert torch.equal(stored, written.to(stored.dtype))
    error = torch.linalg.vector_norm(stored.double() - written.double(), dim=-1)
    length = torch.linalg.vector_norm(written.double(), dim=-1)
    assert bool((error <= CODEC_ERRORS[backend.catalog.row_codec] * length).all())
