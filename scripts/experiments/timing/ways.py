"""Ways to answer queries on one document: in the prompt, cached, or remembered."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from emt.attach import attach, detach
from emt.config import MemoryConfig
from emt.model.loading import LoadedModel
from experiments.forward import greedy, last_logits

Ask = Callable[[Tensor], list[int]]
"""Answers a query, (Q,) int64, with greedy token ids."""

Way = Callable[[Tensor], AbstractContextManager[Ask]]
"""Takes a document, (N,) int64; entering it is what is done once."""


@contextmanager
def prompt(model: PreTrainedModel, new_tokens: int, document: Tensor) -> Iterator[Ask]:
    """Answer with the document in every prompt."""
    yield lambda query: answer(model, torch.cat([document, query]), new_tokens)


@contextmanager
def cached(model: PreTrainedModel, new_tokens: int, document: Tensor) -> Iterator[Ask]:
    """Answer from the document's keys and values, computed once."""
    cache = _empty_cache(model)
    last_logits(model, document[None], 1, past_key_values=cache, use_cache=True)
    can_crop = all(type(layer) is DynamicLayer for layer in cache.layers)

    def ask(query: Tensor) -> list[int]:
        own_cache = cache if can_crop else copy.deepcopy(cache)
        ids = answer(model, query, new_tokens, own_cache)
        if can_crop:
            cache.crop(len(document) - cache.get_seq_length())  # how many to take away, negative
        return ids

    yield ask


@contextmanager
def remembered(
    loaded: LoadedModel, new_tokens: int, config: MemoryConfig, document: Tensor
) -> Iterator[Ask]:
    """Answer with the document in a memory; a `vector_db` is made on the disk and indexed."""
    model = loaded.model
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if config.memory_type == "vector_db":
            config = config.replace(path=str(Path(folder) / "store"))
        memory = attach(model, config, tokenizer=loaded.tokenizer)
        try:
            memory.write(document, document="document")
            if config.path is not None:
                memory.save()
            answer(model, document[:1], 1)  # loads what the first query would load
            yield lambda query: answer(model, query, new_tokens)
        finally:
            detach(model)
            memory.close()


def answer(
    model: PreTrainedModel, token_ids: Tensor, new_tokens: int, cache: Cache | None = None
) -> list[int]:
    """Return exactly so many greedy tokens after a prompt, end-of-text or not.

    Args:
        model: a causal language model, attached or not.
        token_ids: (Q,) int64.
        new_tokens: number of tokens.
        cache: of what came before the prompt; it grows by the prompt and all new tokens but the
            last.
    """
    cache = _empty_cache(model) if cache is None else cache
    logits = last_logits(model, token_ids[None], 1, past_key_values=cache, use_cache=True)
    return greedy(model, logits[0, -1], cache, new_tokens)


def _empty_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config())
