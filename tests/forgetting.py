"""The forgetting oracle: a model whose cache has lost a prefix, and that remembers it, is whole.

A model reads a prefix and keeps its cache. Then keys and values are taken out of the cache, and
given to the memory instead, at the positions where they stood. Everything else the cache holds
(how long the text was, states of recurrent layers, of convolutions) stays. What the model says
about the tokens that follow must be what it says about the whole text, for attention to all
memories and the local context in one softmax is attention to the whole.

In contrast to `families.oracle_error`, this needs neither `position_ids` nor a model that has
nothing but attention.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import numpy as np
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from emt.ingest.encoder import encode
from emt.ingest.rows import RowReader
from emt.ingest.windows import Windows
from emt.memory.memory import Memory
from memory_backends import Document

NUM_PREFIX, NUM_REST, NUM_AT_ONCE, NUM_PADDING = 40, 12, 8, 5


class Found(NamedTuple):
    """What the oracle found.

    Attributes:
        error: the largest logit difference between the remembered and the whole text, in standard
            deviations of the logits.
        effect: the same between the forgotten and the whole text: what the memory makes good.
    """

    error: float
    effect: float


@torch.no_grad()
def forget_and_remember(
    model: PreTrainedModel, memory: Memory, *, vocab_size: int, topk: int = NUM_PREFIX
) -> Found:
    """Run the oracle on an attached model with an empty memory; see the module's text.

    Args:
        model: in evaluation mode.
        memory: the model's.
        vocab_size: ids are drawn from 3 to `vocab_size` - 1.
        topk: memories that each query attends to; all, unless the oracle is to fail.

    Raises:
        ValueError: the cache cannot be made to forget.
    """
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(3, vocab_size, (1, NUM_PREFIX), generator=generator)
    rest = torch.randint(3, vocab_size, (2, NUM_REST), generator=generator)
    rest[1, :NUM_PADDING] = 0
    layers = list(memory.backend.layout.layers)
    with memory.using(enabled=False):
        whole = _continued(model, prefix, rest, forgets=False)
        forgotten = _continued(model, prefix, rest)
    decoder = memory._attached("test").decoder()
    reader = RowReader(decoder, dict.fromkeys(layers))
    rows = encode(reader, prefix[0], Windows(NUM_PREFIX, NUM_PREFIX))
    memory.backend.add(Document("prefix", prefix[0].numpy().astype(np.int32)), rows)
    with memory.using(topk=topk, layers=layers, mask_by_sim=False):
        remembered = _continued(model, prefix, rest, memory)
    scale = float(whole.std())
    error, effect = (
        float((found - whole).abs().max()) / scale for found in (remembered, forgotten)
    )
    return Found(error, effect)


def _continued(
    model: PreTrainedModel,
    prefix: Tensor,
    rest: Tensor,
    memory: Memory | None = None,
    *,
    forgets: bool = True,
) -> Tensor:
    """Return the logits of `rest` after a prefix, forgotten or not: (tokens, vocabulary).

    The prefix is the same for both sequences of `rest`, the second of which is padded on the left.
    """
    with contextlib.nullcontext() if memory is None else memory.using(enabled=False):
        cache = _cache_of(model, prefix.expand(len(rest), -1))
    if forgets:
        forget(cache)
    attention_mask = torch.ones(len(rest), NUM_PREFIX + NUM_REST, dtype=torch.long)
    attention_mask[1, NUM_PREFIX : NUM_PREFIX + NUM_PADDING] = 0
    # Some recurrent layers go on from their state with single tokens only.
    num_at_once = 1 if has_states(cache) else NUM_AT_ONCE
    logits = []
    for part in rest.split([num_at_once] + [1] * (NUM_REST - num_at_once), dim=1):
        stop = NUM_PREFIX + sum(done.shape[1] for done in logits) + part.shape[1]
        out = model(
            input_ids=part,
            past_key_values=cache,
            attention_mask=attention_mask[:, :stop],
            use_cache=True,
        )
        logits.append(out.logits)
    first, second = torch.cat(logits, dim=1)
    return torch.cat([first, second[NUM_PADDING:]])


def _cache_of(model: PreTrainedModel, prefix: Tensor) -> Any:
    """Return the cache of a model that has read a prefix."""
    out = model(input_ids=prefix, use_cache=True)
    if hasattr(out, "past_key_values"):
        return out.past_key_values
    cache = DynamicCache(config=model.config)  # some fill it and do not return it
    model(input_ids=prefix, use_cache=True, past_key_values=cache)
    return cache


def forget(cache: Any) -> None:
    """Take keys and values out of a cache that goes on counting.

    Raises:
        ValueError: this is not a cache of transformers.
    """
    for layer in _layers(cache):
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized and layer.keys is not None:
            _forget_layer(layer)


def has_states(cache: Any) -> bool:
    """Tell if a cache has states of recurrent layers."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _layers(cache))


def _layers(cache: Any) -> list[Any]:
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        raise ValueError(f"expected a Cache of transformers; got {type(cache).__name__}")
    return list(cache.layers)


def _forget_layer(layer: Any) -> None:
    num_lost = layer.keys.shape[2]
    layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    if getattr(layer, "indexer_keys", None) is not None:
        layer.indexer_keys = layer.indexer_keys[:, :0]
    layer.get_seq_length = functools.partial(_length, layer, num_lost)
    layer.get_mask_sizes = functools.partial(_mask_sizes, layer, num_lost)


def _length(layer: Any, num_lost: int) -> int:
    return num_lost + int(layer.keys.shape[2])


def _mask_sizes(layer: Any, num_lost: int, query_length: int) -> tuple[int, int]:
    return int(layer.keys.shape[2]) + query_length, num_lost
