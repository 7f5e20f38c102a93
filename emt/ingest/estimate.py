"""The cost of encoding a corpus, and errors that it would raise, before anything is written."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import NamedTuple

import torch
import numpy as np

from emt.config import MemoryConfig
from emt.errors import DocumentError
from emt.ingest.corpus import Corpus
from emt.ingest.encoder import Encoder
from emt.ingest.rows import RowReader
from emt.model.devices import input_device
from emt.model.positions import max_positions
from memory_backends import MemoryBackend, content_hash
from memory_backends.faiss.index import bytes_per_key, factory_for

_TIMED_TOKENS = 128


class Estimate(NamedTuple):
    """What writing the documents of a corpus that are new or changed will take.

    Attributes:
        tokens: of these documents, special ones included.
        rows: that they will leave.
        bytes: of rows and index on disk, estimated.
        seconds: estimated from one short timed forward.
    """

    tokens: int
    rows: int
    bytes: int
    seconds: float


def estimate(
    encoder: Encoder, backend: MemoryBackend, layers: Collection[int], corpus: Corpus
) -> Estimate:
    """Tokenize a corpus without encoding it, so that no document stops a run halfway.

    Documents that the store has already cost nothing. `layers` are those that will be indexed.

    Raises:
        MemoryUseError: the encoder has no tokenizer, or its model is not ready.
        DocumentError: a document that `Memory.write` would refuse.
        ConfigError: `max_length` is beyond the model's positions, and a document is as long; or
            it leaves no room for carried context.
        UnsupportedModelError: the model's context cannot be carried.
    """
    reader, windows, catalog = encoder.row_reader(), encoder.windows, backend.catalog
    drop_ids = sorted(encoder.drop_ids)
    tokens = rows = tokens_run = 0
    for source in corpus:
        try:
            document = encoder.document(source.text, source.name, metadata=source.metadata)
            num_rows = int(np.isin(document.token_ids, drop_ids, invert=True).sum())
            if not num_rows:
                raise DocumentError(
                    f"document '{document.name}' has nothing but special tokens. Leave it out."
                )
        except DocumentError as error:
            corpus.leave_out(source, error)
            continue
        if catalog.content_hash(document.name) == content_hash(document):
            continue
        num_tokens = len(document.token_ids)
        tokens, rows = tokens + num_tokens, rows + num_rows
        tokens_run += windows.tokens_run(num_tokens)
    corpus.check()
    if not tokens:
        return Estimate(0, 0, 0, 0.0)
    num_bytes = rows * _bytes_per_row(encoder.config, backend, layers, rows)
    return Estimate(tokens, rows, num_bytes, tokens_run * _seconds_per_token(reader))


def _bytes_per_row(
    config: MemoryConfig, backend: MemoryBackend, layers: Collection[int], num_rows: int
) -> int:
    layout, stored = backend.layout, backend.catalog.bytes_per_row
    if config.memory_type != "vector_db":
        return stored
    factory = factory_for(config.index, num_rows, layout.largest_head_dim)
    return stored + sum(
        layer.num_key_value_heads * bytes_per_key(factory, layer.head_dim)
        for layer in (layout.layers[layer_idx] for layer_idx in layers)
    )


def _seconds_per_token(reader: RowReader) -> float:
    positions = max_positions(reader.decoder.config)
    device, length = input_device(reader.decoder), min(_TIMED_TOKENS, positions or _TIMED_TOKENS)
    token_ids = torch.zeros(1, length, dtype=torch.long)
    reader.forward(token_ids)  # warm up
    started = time.perf_counter()
    reader.forward(token_ids)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / length
