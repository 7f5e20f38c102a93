"""What reading a corpus will cost, before it starts."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emt.corpus import Corpus
from emt.encode import windows
from emt.errors import MemoryUseError
from emt.memory import Memory

_SAMPLE_CHARACTERS = 20_000
_TIMED_TOKENS = 128
_INDEX_BYTES = 4  # a component of a "Flat" index, the largest that `auto` makes


class Estimate(NamedTuple):
    """Expected `tokens`, `bytes` on disk (rows and index) and `seconds`; all approximate."""

    tokens: int
    bytes: int
    seconds: float


def estimate(model: PreTrainedModel, memory: Memory, corpus: Corpus) -> Estimate:
    """Estimate tokens from a sample of the text, and seconds from one short timed window.

    Raises:
        MemoryUseError: the memory has no tokenizer.
    """
    tokenizer = memory.tokenizer
    if tokenizer is None:
        raise MemoryUseError("an estimate needs a tokenizer. Pass one to attach().")
    tokens_per_character = _tokens_per_character(tokenizer, corpus)
    average = round(corpus.num_characters * tokens_per_character / corpus.num_documents)
    tokens = round(corpus.num_characters * tokens_per_character)
    config = memory.config
    read = sum(w.stop - w.start for w in windows(max(average, 1), config.stride, config.max_length))
    layout = memory.backend.layout
    keys = sum(ll.num_key_value_heads * ll.head_dim for ll in layout.layers.values())
    index_bytes = _INDEX_BYTES * keys if config.memory_type == "vector_db" else 0
    return Estimate(
        tokens=tokens,
        bytes=tokens * (layout.bytes_per_row + index_bytes),
        seconds=read * corpus.num_documents * _seconds_per_token(model, memory),
    )


def _tokens_per_character(tokenizer: PreTrainedTokenizerBase, corpus: Corpus) -> float:
    characters = tokens = 0
    for document in corpus:
        sample = document.text[:_SAMPLE_CHARACTERS]
        tokens += len(tokenizer(sample, verbose=False).input_ids)
        characters += len(sample)
        if characters >= _SAMPLE_CHARACTERS:
            break
    return tokens / characters


@torch.no_grad()
def _seconds_per_token(model: PreTrainedModel, memory: Memory) -> float:
    token_ids = torch.zeros(1, _TIMED_TOKENS, dtype=torch.long, device=model.device)
    with memory.using(enabled=False):
        model.base_model(input_ids=token_ids, use_cache=False)  # warm up
        started = time.perf_counter()
        model.base_model(input_ids=token_ids, use_cache=False)
    return (time.perf_counter() - started) / _TIMED_TOKENS
