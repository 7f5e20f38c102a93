"""Documents read together against the same documents read one by one."""

import itertools

import torch
import numpy as np
import pytest

from emt import MemoryConfig, attach
from emt.ingest import batch as batch_module
from emt.ingest.batch import BATCH_TOKENS, batches, encode_all, encode_batch
from emt.ingest.encode import encode
from emt.ingest.rows import Reader
from memory_backends import Document
from tests.families import FAMILIES, VOCAB_SIZE, build

SLIDING = ["mistral", "gemma2", "gemma3_text", "gpt_oss"]
SETTINGS = {"stride": 16, "max_length": 32}


def reader(model, drop_ids=()):
    attached = attach(model, MemoryConfig(layers=[0]))._attached("test")
    return Reader(attached.decoder(), attached.unrotations, drop_ids)


def documents(lengths):
    torch.manual_seed(5)
    return [
        Document(str(number), torch.randint(3, VOCAB_SIZE, (length,)).int().numpy())
        for number, length in enumerate(lengths)
    ]


def alone(read, document, **settings):
    return list(
        encode(
            read.decoder,
            torch.from_numpy(document.token_ids).long(),
            unrotations=read.unrotations,
            drop_ids=read.drop_ids,
            **settings,
        )
    )


def assert_same(run, expected):
    assert run.tokens.tolist() == expected.tokens.tolist()
    assert run.sinks.tolist() == expected.sinks.tolist()
    for part in ("keys", "values", "queries"):
        mine, theirs = getattr(run, part), getattr(expected, part)
        assert mine.keys() == theirs.keys()
        for idx in theirs:
            torch.testing.assert_close(mine[idx], theirs[idx], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        *((family.model_type, {}) for family in FAMILIES),
        *((model_type, {"sliding_window": 6}) for model_type in SLIDING),
        *((model_type, {"attn_implementation": "eager"}) for model_type in ("llama", "qwen3")),
    ],
    ids=str,
)
def test_padding_changes_no_row(options):
    model_type, changes = options
    read = reader(build(model_type, **changes), {7, 8})
    docs = documents([9, 31, 1, 18])
    together = encode_batch(read, [torch.from_numpy(doc.token_ids).long() for doc in docs])
    for document, run in zip(docs, together, strict=True):
        (expected,) = alone(read, document, **SETTINGS)
        assert_same(run, expected)


@pytest.mark.parametrize("carry_context", [False, True])
def test_documents_come_out_in_order_with_their_own_rows(carry_context):
    read = reader(build("llama"))
    docs = documents([5, 9, 100, 7, 33, 32, 1, 2, 64])
    settings = {**SETTINGS, "carry_context": carry_context}
    found = encode_all(read.decoder, docs, unrotations=read.unrotations, **settings)
    for (document, rows), given in zip(found, docs, strict=True):
        assert document is given
        for run, expected in zip(rows, alone(read, given, **settings), strict=True):
            assert_same(run, expected)


def test_the_stream_is_read_no_further_than_one_batch(monkeypatch):
    monkeypatch.setattr(batch_module, "BATCH_TOKENS", 40)
    read = reader(build("llama"))
    forwards = []
    original = Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda *args, **options: forwards.append(1) or original(*args, **options)
    )
    taken = []

    def stream():
        for document in documents([10] * 20):
            taken.append(document.name)
            yield document

    found = encode_all(read.decoder, stream(), unrotations=read.unrotations, **SETTINGS)
    for number, (document, rows) in enumerate(found):
        assert document.name == str(number)
        assert len(taken) <= 4 * (number // 4) + 5
        list(rows)
    assert (number, len(forwards)) == (19, 5)


def test_what_came_before_an_error_is_handed_out_first():
    read = reader(build("llama"))

    def stream():
        yield from documents([5, 6])
        raise ZeroDivisionError

    found = encode_all(read.decoder, stream(), unrotations=read.unrotations, **SETTINGS)
    assert [document.name for document, _ in itertools.islice(found, 2)] == ["0", "1"]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_batches_have_little_padding():
    lengths = np.random.default_rng(0).integers(1, 400, 60).tolist()
    found = batches(lengths)
    assert sorted(at for batch in found for at in batch) == list(range(60))
    assert len(found) < 20
    for batch in found:
        mine = [lengths[at] for at in batch]
        assert max(mine) * len(mine) <= 1.25 * sum(mine)
    assert batches([7, 7, 7]) == [[0, 1, 2]]
    assert BATCH_TOKENS == 4096


@pytest.mark.parametrize(("kind", "forwards"), [("default", 1), ("dynamic", 2), ("longrope", 2)])
def test_rope_that_depends_on_the_length_reads_one_by_one(monkeypatch, kind, forwards):
    options = {
        "default": {},
        "dynamic": {"factor": 4.0},
        "longrope": {
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 16,
        },
    }[kind]
    rope = {"rope_theta": 10000.0, "rope_type": kind, **options}
    read = reader(build("llama", rope_parameters=rope))
    docs = documents([20, 18])
    seen = []
    original = Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda *args, **options: seen.append(1) or original(*args, **options)
    )
    found = encode_all(read.decoder, docs, unrotations=read.unrotations, **SETTINGS)
    for _, rows in found:
        list(rows)
    assert len(seen) == forwards
