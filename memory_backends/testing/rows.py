"""Made-up rows, and what a memory of them must answer: brute force in float64 with numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import numpy as np
import numpy.typing as npt

from memory_backends.layout import Document, LayerLayout, MemoryLayout, Rows

# Layers of different shapes, with a gap, and values wider than keys.
LAYERS = {0: LayerLayout(2, 8, 8), 3: LayerLayout(1, 4, 6)}
LAYOUT = MemoryLayout(LAYERS, torch.float32)
IDENTITY = {"architecture": "tiny", "layers": 4}

Array = npt.NDArray[Any]


def make_document(name: str, num_tokens: int) -> Document:
    """Return a document without a text."""
    return Document(name, np.arange(num_tokens, dtype=np.int32))


def make_rows(
    num_rows: int,
    seed: int,
    *,
    layout: MemoryLayout = LAYOUT,
    sinks: Sequence[int] = (),
    first: int = 0,
) -> Rows:
    """Return seeded rows of tokens `first` and on, those at positions `sinks` being sinks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(heads, num_rows, dim, generator=generator).to(layout.dtype)

    return Rows(
        keys={i: normal(ll.num_key_value_heads, ll.head_dim) for i, ll in layout.layers.items()},
        values={
            i: normal(ll.num_key_value_heads, ll.value_head_dim) for i, ll in layout.layers.items()
        },
        tokens=np.arange(first, first + num_rows, dtype=np.int32),
        sinks=np.isin(np.arange(num_rows), sinks),
    )


def make_queries(layer_idx: int, num_queries: int, seed: int = 100) -> torch.Tensor:
    """Return seeded queries of a layer of `LAYOUT`, (Hkv, N, head_dim)."""
    layer = LAYERS[layer_idx]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layer.num_key_value_heads, num_queries, layer.head_dim, generator=generator)


def keys_of(runs: Iterable[Rows], layer_idx: int) -> Array:
    """Return the keys of runs written one after another, (Hkv, M, D) float64."""
    return np.concatenate([run.keys[layer_idx].double().numpy() for run in runs], axis=1)


def nearest(
    keys: Array, queries: torch.Tensor, k: int, searchable: Iterable[int]
) -> tuple[Array, Array]:
    """Return cosine similarities and ids of the k nearest, (Hkv, N, k), as a search must."""
    rows = np.array(sorted(searchable), dtype=np.int64)
    scores = np.full((*queries.shape[:2], k), -np.inf)
    ids = np.full((*queries.shape[:2], k), -1, dtype=np.int64)
    for head in range(queries.shape[0]):
        for at, query in enumerate(queries[head].double().numpy()):
            candidates = keys[head, rows]
            lengths = np.sqrt((candidates**2).sum(axis=1)) * np.sqrt((query**2).sum())
            cosines = (candidates * query).sum(axis=1) / lengths
            order = np.argsort(-cosines)[:k]
            scores[head, at, : len(order)] = cosines[order]
            ids[head, at, : len(order)] = rows[order]
    return scores, ids
