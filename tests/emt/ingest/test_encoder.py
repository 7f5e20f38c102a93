"""Encoded documents against the stock model's cache, and many documents against one by one."""

import torch
import numpy as np
import pytest
from transformers import DynamicCache

from emt import attach
from emt.ingest import batch
from emt.ingest.encoder import encode, encode_all
from emt.ingest.windows import Windows
from memory_backends import Document
from tests.emt.ingest.encoding import (
    assert_same_rows,
    count_forwards,
    in_one_forward,
    joined,
    random_ids,
    row_reader,
)
from tests.emt.ingest.test_windows import marked_windows
from tests.families import build

WINDOWS = Windows(16, 32)


def documents(lengths):
    return [
        Document(str(number), random_ids(length, seed=number).int().numpy())
        for number, length in enumerate(lengths)
    ]


def unrotated(key, theta):
    """Turn each pair of dims of keys (Hkv, n, D) at positions 0.. back by its own angle."""
    _, num_tokens, dim = key.shape
    back = torch.empty_like(key)
    for position in range(num_tokens):
        for pair in range(dim // 2):
            angle = torch.tensor(position * theta ** (-2 * pair / dim))
            x, y = key[:, position, pair], key[:, position, pair + dim // 2]
            back[:, position, pair] = x * angle.cos() + y * angle.sin()
            back[:, position, pair + dim // 2] = y * angle.cos() - x * angle.sin()
    return back


@torch.no_grad()
@pytest.mark.parametrize(("stride", "max_length"), [(4, 10), (5, 5), (40, 40)])
def test_rows_are_the_stock_models_cache_turned_back(stride, max_length):
    stock, reader = build("llama"), row_reader(build("llama"))
    theta = stock.config.rope_parameters["rope_theta"]
    token_ids = random_ids(23)
    runs = list(encode(reader, token_ids, Windows(stride, max_length)))
    assert np.concatenate([run.tokens for run in runs]).tolist() == list(range(23))
    for run, (read, new) in zip(runs, marked_windows(23, stride, max_length), strict=True):
        cache = DynamicCache()
        stock(token_ids[read][None], past_key_values=cache)
        kept = [token - read[0] for token in new]
        assert run.tokens.tolist() == new
        for idx, layer in enumerate(cache.layers):
            expected = unrotated(layer.keys[0], theta)[:, kept]
            torch.testing.assert_close(run.keys[idx], expected, atol=5e-6, rtol=0)
            torch.testing.assert_close(run.values[idx], layer.values[0][:, kept], atol=0, rtol=0)


def test_dropped_ids_leave_no_row_but_were_attended_to():
    model, token_ids = build("llama"), torch.tensor([1, 50, 51, 2, 52, 1])
    kept = row_reader(model, {1, 2})
    everything = type(kept)(kept.decoder, kept.unrotations)
    tokens, tensors = in_one_forward(kept, token_ids)
    assert tokens == [1, 2, 4]
    for name, tensor in in_one_forward(everything, token_ids)[1].items():
        assert torch.equal(tensors[name], tensor[:, [1, 2, 4]])


def test_encoding_ignores_the_memory():
    memory = attach(build("llama"))
    ids = list(range(10, 30))
    first, second = memory.write(ids, document="first"), memory.write(ids, document="second")
    for idx in memory.backend.layout.layers:
        before, after = (
            memory.backend.fetch(idx, torch.tensor([list(rows)] * 2)) for rows in (first, second)
        )
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("carry_context", [False, True])
def test_documents_come_out_in_order_with_their_own_rows(carry_context):
    reader = row_reader(build("llama"))
    windows = Windows(16, 32, carry_context)
    given = documents([5, 9, 100, 7, 33, 32, 1, 2, 64])
    for (document, rows), expected in zip(encode_all(reader, given, windows), given, strict=True):
        assert document is expected
        alone = encode(reader, torch.from_numpy(document.token_ids).long(), windows)
        assert_same_rows(joined(rows), joined(alone))


def test_the_stream_is_read_no_further_than_one_batch(monkeypatch):
    monkeypatch.setattr(batch, "BATCH_TOKENS", 40)
    reader, forwards = row_reader(build("llama")), count_forwards(monkeypatch)
    taken = []

    def stream():
        for document in documents([10] * 20):
            taken.append(document.name)
            yield document

    for number, (document, rows) in enumerate(encode_all(reader, stream(), WINDOWS)):
        assert document.name == str(number)
        assert len(taken) <= 4 * (number // 4) + 5
        list(rows)
    assert (number, forwards) == (19, [40] * 5)


LONGROPE = {
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("kind", "options", "forwards"),
    [
        ("default", {}, [40]),
        ("dynamic", {"factor": 4.0}, [20, 18]),
        ("longrope", LONGROPE, [20, 18]),
    ],
)
def test_rope_that_depends_on_the_length_reads_one_by_one(monkeypatch, kind, options, forwards):
    rope = {"rope_theta": 10000.0, "rope_type": kind, **options}
    reader = row_reader(build("llama", rope_parameters=rope))
    counted = count_forwards(monkeypatch)
    for _, rows in encode_all(reader, documents([20, 18]), WINDOWS):
        list(rows)
    assert counted == forwards
