"""A store that was written in one dtype, read and written in another."""

import logging
import shutil

import torch
import numpy as np
import pytest

from memory_backends import MemoryBackend, MemoryLayout, Rows, verify
from memory_backends.errors import MemoryMismatchError
from memory_backends.rows.codecs import CODEC_NAMES
from memory_backends.store.sketch import Sketch
from memory_backends.testing.rows import LAYERS, make_document, make_rows, nearest_by_loop

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(one, other) for one in DTYPES for other in DTYPES if one != other]
BACKENDS = {"manual": {}, "vector_db": {"index": "Flat"}}


def layout(dtype):
    return MemoryLayout(LAYERS, dtype)


def in_dtype(rows, dtype):
    keys, values = (
        {idx: tensor.to(dtype) for idx, tensor in part.items()} for part in (rows.keys, rows.values)
    )
    return Rows(keys, values, rows.tokens, rows.sinks)


def opened(path, dtype, memory_type="manual", **options):
    return MemoryBackend(
        layout(dtype), memory_type, path=path, **BACKENDS[memory_type], **options
    )


def all_rows(backend, layer_idx):
    """Return every row of a layer, (Hkv, n, D) and (Hkv, n, Dv)."""
    heads = LAYERS[layer_idx].num_key_value_heads
    ids = torch.arange(backend.catalog.num_rows).expand(heads, -1)
    return backend.fetch(layer_idx, ids)


@pytest.mark.parametrize("memory_type", BACKENDS)
@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize(("written", "read"), PAIRS)
def test_rows_are_found_as_who_wrote_them_finds_them(tmp_path, written, read, codec, memory_type):
    own = opened(tmp_path / "m", written, memory_type, row_codec=codec)
    own.add(make_document("a", 40), [in_dtype(make_rows(40, seed=1), written)])
    own.add(make_document("b", 25), [in_dtype(make_rows(25, seed=2), written)])
    own.remove([3])
    own.save()
    other = opened(tmp_path / "m", read, memory_type, row_codec="exact")
    for layer_idx, layer in LAYERS.items():
        for expected, got in zip(all_rows(own, layer_idx), all_rows(other, layer_idx), strict=True):
            assert got.dtype == read
            if codec in ("exact", "float16", "bfloat16"):  # decoded to what was stored, then rounded
                assert torch.equal(got, expected.to(read))
            else:
                torch.testing.assert_close(got.float(), expected.float(), rtol=2**-7, atol=1e-4)
        queries = torch.randn(layer.num_key_value_heads, 6, layer.head_dim)
        keys = all_rows(other, layer_idx)[0]
        for heads in (None, [1]):
            asked = queries if heads is None else queries[heads]
            stored = keys if heads is None else keys[heads]
            found = other.search(layer_idx, asked, 5, heads=heads)
            expected = nearest(stored, asked, 5, without=[3])
            assert torch.equal(found.ids, expected)
        kept = other.retrieve(layer_idx, queries, 4)
        assert kept.keys.dtype == kept.values.dtype == read
    assert verify(tmp_path / "m") == []


def nearest(keys, queries, k, without):
    """Return the ids of the k nearest rows by cosine, in float64: (h, N, k)."""
    unit_keys, unit_queries = (
        torch.nn.functional.normalize(part.double(), dim=-1) for part in (keys, queries)
    )
    scores = unit_queries @ unit_keys.transpose(1, 2)
    scores[..., without] = -torch.inf
    return scores.topk(k, dim=-1).indices
