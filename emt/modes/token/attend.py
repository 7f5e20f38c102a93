"""One layer's extended-mind attention: search, fetch, and attend to memories and local context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from emt.attention.softmax import (
    MemoryAttentionOutput,
    decode_attention,
    joint_weights,
    memory_attention,
    visible_to,
)
from emt.config import MemoryConfig
from emt.model.devices import no_autocast
from emt.model.hook import AttentionCall, check_options
from emt.modes.token.search import Searched
from emt.passage import Retrieved
from memory_backends import MemoryBackend, Scope

_CHUNK_BYTES = 64 * 2**20  # what one chunk of queries may take for its logits or its memories


class Attended(NamedTuple):
    """What a layer's attention over memories and local context gives.

    Attributes:
        output: (B, Q, H, Dv), as transformers wants it.
        retrieved: what was retrieved, if asked for.
        weights: (B, H, Q, Q * k + S), as `joint_weights` lays them out, if asked for.
    """

    output: Tensor
    retrieved: Retrieved | None
    weights: Tensor | None


def attend_with_memories(
    call: AttentionCall,
    backend: MemoryBackend,
    config: MemoryConfig,
    *,
    recorded: bool = True,
    weighed: bool = False,
    scope: Scope | Sequence[Scope] | None = None,
) -> Attended:
    """Compute a layer's attention over its local context and each query's own memories.

    Queries are taken in chunks, so that a prompt of Q tokens costs Q * k memories and not more.

    Args:
        call: the layer's attention call.
        backend: where the memories are.
        config: the settings in force.
        recorded: False if nobody asks what was retrieved, which lets a decode step be quicker.
        weighed: return attention weights.
        scope: the rows that may be found, or those of each prompt of the batch; None for all. A
            sequence without any gets the layer's own attention, bit for bit.

    Raises:
        UnsupportedModelError: the call has a feature that cannot be merged with memories.
        MemoryUseError: the batch is not a multiple of the prompts that have scopes.
    """
    check_options(call)
    with no_autocast(call.query.device):
        searched = Searched(backend, config, scope, len(call.query))
        attended = _attend(call, searched, config, recorded=recorded, weighed=weighed)
    plain = searched.without_memories
    if plain:
        attended.output[plain] = call.compute()[0][plain]
    return attended


def with_local_weights(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Compute a layer's own attention, with weights also where it gives none, as fused ones do.

    So that weights and layers do not get out of step where only some layers read memories.

    Returns:
        Output (B, Q, H, Dv), bit for bit the layer's own, and weights (B, H, Q, S).
    """
    output, weights = call.compute()
    if weights is not None:
        return output, weights
    query, num_queries, num_keys = call.query, call.query.shape[2], call.key.shape[2]
    step = chunk_length(call, 0)
    parts = []
    with no_autocast(query.device):
        for start in range(0, num_queries, step):
            stop = min(start + step, num_queries)
            key, value, mask, is_causal = _local_context(call, start, stop)
            nothing = query.new_empty(*query[:, :, start:stop].shape[:3], 0, query.shape[3])
            attended = memory_attention(
                query[:, :, start:stop],
                key,
                value,
                nothing,
                nothing[..., :1].expand(-1, -1, -1, -1, value.shape[3]),
                scaling=scaling_of(call),
                attention_mask=mask,
                is_causal=is_causal,
                softcap=call.options.get("softcap"),
                sinks=call.options.get("s_aux"),
                need_weights=True,
            )
            if attended.local_weights is not None:
                parts.append(_padded(attended.local_weights, num_keys))
    return output, _cat(parts).to(output.dtype)


def _padded(weights: Tensor, num_keys: int) -> Tensor:
    """Append zeros for keys that a chunk of queries cannot see: (B, H, Q, S)."""
    return pad(weights, (0, num_keys - weights.shape[-1]))


def _attend(
    call: AttentionCall,
    searched: Searched,
    config: MemoryConfig,
    *,
    recorded: bool,
    weighed: bool,
) -> Attended:
    num_queries = call.query.shape[2]
    if num_queries == 1 and not (recorded or weighed) and _is_plain(call, config):
        output = _decode(call, searched)
        if output is not None:
            return Attended(output.transpose(1, 2), None, None)  # (B, 1, H, Dv)
    step = chunk_length(call, searched.topk)
    parts = [
        _attend_chunk(call, searched, config, start, min(start + step, num_queries), weighed)
        for start in range(0, num_queries, step)
    ]
    output = _cat([part.output for part, _ in parts])  # (B, H, Q, Dv)
    retrieved = _joined([found for _, found in parts])
    weights = None
    if weighed:
        num_keys = call.key.shape[2]
        local = [
            _padded(part.local_weights, num_keys)
            for part, _ in parts
            if part.local_weights is not None
        ]
        weights = joint_weights(retrieved.weights, _cat(local)).to(output.dtype)
    return Attended(output.transpose(1, 2).contiguous(), retrieved, weights)


def _is_plain(call: AttentionCall, config: MemoryConfig) -> bool:
    """Tell whether a decode step does nothing but attend to all it finds."""
    mask = call.attention_mask
    return (
        call.options.get("softcap") is None
        and call.options.get("s_aux") is None
        and not config.mask_by_sim
        and (mask is None or mask.shape[1] == 1)
        and (call.alibi is None or call.alibi.distance is None)
    )


def _decode(call: AttentionCall, searched: Searched) -> Tensor | None:
    """Compute one token's attention, (B, H, 1, Dv); None if not all memories were found."""
    query, key = call.query, call.key
    found = searched.nearest(call.layer_idx, query, key.shape[1])
    if found is None:
        return None
    memory_keys, memory_values = found
    mask = _mask(call)
    return decode_attention(
        query,
        key,
        call.value,
        memory_keys,
        memory_values,
        scaling=scaling_of(call),
        attention_mask=mask if call.alibi is None else call.alibi.of_keys(mask),
        memory_bias=None if call.alibi is None else call.alibi.of_memories(mask),
    )


def _attend_chunk(
    call: AttentionCall,
    searched: Searched,
    config: MemoryConfig,
    start: int,
    stop: int,
    weighed: bool,
) -> tuple[MemoryAttentionOutput, Retrieved]:
    query = call.query[:, :, start:stop]
    key, value, mask, is_causal = _local_context(call, start, stop)
    found = searched.retrieve(call.layer_idx, query, key.shape[1])
    scores, ids, memory_keys, memory_values = found
    usable = scores > (config.sim_threshold if config.mask_by_sim else -torch.inf)
    attended = memory_attention(
        query,
        key,
        value,
        memory_keys,
        memory_values,
        scaling=scaling_of(call),
        attention_mask=mask,
        is_causal=is_causal,
        memory_mask=usable,
        memory_bias=None
        if call.alibi is None
        else call.alibi.of_memories(call.attention_mask, ids),
        softcap=call.options.get("softcap"),
        sinks=call.options.get("s_aux"),
        need_weights=weighed,
    )
    return attended, Retrieved(call.layer_idx, ids, scores, attended.memory_weights)


def _local_context(
    call: AttentionCall, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Return keys, values and mask of queries `start` to `stop`, and if they see causally."""
    mask = _mask(call)
    if mask is not None:
        mask = mask[:, :, start:stop]
    if call.alibi is not None:
        if mask is None and call.query.shape[2] > 1:
            mask = visible_to(start, stop, call.key.shape[2], call.key.device)[None, None]
        return call.key, call.value, call.alibi.of_keys(mask), False
    if mask is not None:
        return call.key, call.value, mask, False
    if call.query.shape[2] == 1 or not _is_causal(call):
        return call.key, call.value, None, False
    # As in transformers' sdpa, no mask means causal from the first key on: a static cache has not
    # written the later ones yet.
    return call.key[:, :, :stop], call.value[:, :, :stop], None, True


def _mask(call: AttentionCall) -> Tensor | None:
    """Return the mask of the keys that are there; a cache of fixed size may mask more."""
    mask = call.attention_mask
    return None if mask is None else mask[..., : call.key.shape[2]]


def _is_causal(call: AttentionCall) -> bool:
    given = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if given is None else given)


def scaling_of(call: AttentionCall) -> float:
    """Return the factor on a layer's logits."""
    given = call.options.get("scaling")
    return float(call.query.shape[-1] ** -0.5 if given is None else given)


def chunk_length(call: AttentionCall, topk: int) -> int:
    """Return how many queries to attend with at once, each to `topk` memories and its context."""
    batch, num_heads, num_queries, dim = call.query.shape
    local = call.key.shape[2]
    remembered = topk * (dim + call.value.shape[-1])
    per_query = 4 * batch * num_heads * max(local, remembered)
    return max(min(_CHUNK_BYTES // per_query, num_queries), 1)


def _cat(parts: list[Tensor]) -> Tensor:
    """Join chunks of queries, (B, H, Q, ...)."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _joined(parts: list[Retrieved]) -> Retrieved:
    if len(parts) == 1:
        return parts[0]
    ids, scores, weights = (
        _cat([getattr(part, name) for part in parts]) for name in ("ids", "scores", "weights")
    )
    return Retrieved(parts[0].layer_idx, ids, scores, weights)
