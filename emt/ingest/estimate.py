"""What a corpus will cost, and whether it can be read at all, before anything is written."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import numpy as np
from transformers import PreTrainedModel

from emt.errors import DocumentError, MemoryUseError
from emt.ingest.carry import check_carry
from emt.ingest.corpus import Corpus
from emt.ingest.documents import special_ids, token_ids_of
from emt.ingest.encode import check_max_length, tokens_read
from emt.memory.memory import Memory
from emt.model.devices import input_device
from emt.model.positions import max_positions
from memory_backends import Document, content_hash
from memory_backends.faiss.index import bytes_per_key, factory_for

_TIMED_TOKENS = 128


class Estimate(NamedTuple):
    """What the documents of a corpus that are new or changed will be.

    Attributes:
        tokens: counted, special ones included.
        rows: counted.
        bytes: of rows and index on disk.
        seconds: from one short timed window.
    """

    tokens: int
    rows: int
    bytes: int
    seconds: float


def estimate(model: PreTrainedModel, memory: Memory, corpus: Corpus) -> Estimate:
    """Tokenize the corpus once, without reading it, so that no document stops a run halfway.

    Documents that `Memory.write_all` would skip cost nothing.

    Raises:
        MemoryUseError: the memory has no tokenizer.
        DocumentError: a document that `Memory.write` would refuse.
        ConfigError: `max_length` is beyond the model's positions, and a document is as long; or
            the context cannot be carried.
        UnsupportedModelError: the same, for what the model is.
    """
    tokenizer, config = memory.tokenizer, memory.config
    if tokenizer is None:
        raise MemoryUseError("an estimate needs a tokenizer. Pass one to attach().")
    model_config = model.config.get_text_config()
    if config.carry_context:
        check_carry(model_config, config.stride, config.max_length)
    dropped = sorted(special_ids(config, tokenizer, model_config))
    tokens = rows = read = 0
    for document in corpus:
        ids = token_ids_of(document.text, document.name, tokenizer, model_config.vocab_size)
        present = memory.backend.catalog.content_hash(document.name)
        if present == content_hash(Document(document.name, ids, document.text)):
            continue
        check_max_length(model_config, min(config.max_length, len(ids)))
        kept = int(np.isin(ids, dropped, invert=True).sum())
        if not kept:
            raise DocumentError(
                f"document '{document.name}' has nothing but special tokens. Leave it out."
            )
        tokens, rows = tokens + len(ids), rows + kept
        read += tokens_read(
            len(ids), config.stride, config.max_length, carry_context=config.carry_context
        )
    if not tokens:
        return Estimate(0, 0, 0, 0.0)
    with memory.using(enabled=False):
        seconds = read * _seconds_per_token(model)
    return Estimate(tokens, rows, rows * _bytes_per_row(memory, rows), seconds)


def _bytes_per_row(memory: Memory, num_rows: int) -> int:
    layout, stored = memory.backend.layout, memory.backend.catalog.bytes_per_row
    if memory.config.memory_type == "manual":
        return stored
    indexed = [layout.layers[layer_idx] for layer_idx in memory.layers]
    factory = factory_for(memory.config.index, num_rows, layout.largest_head_dim)
    return stored + sum(
        layer.num_key_value_heads * bytes_per_key(factory, layer.head_dim) for layer in indexed
    )


@torch.no_grad()
def _seconds_per_token(model: PreTrainedModel) -> float:
    positions = max_positions(model.config.get_text_config())
    length = min(_TIMED_TOKENS, positions or _TIMED_TOKENS)
    token_ids = torch.zeros(1, length, dtype=torch.long, device=input_device(model))
    model.base_model(input_ids=token_ids, use_cache=False)  # warm up
    started = time.perf_counter()
    model.base_model(input_ids=token_ids, use_cache=False)
    if token_ids.is_cuda:
        torch.cuda.synchronize(token_ids.device)
    return (time.perf_counter() - started) / length
