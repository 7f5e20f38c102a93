"""One layer's extended-mind attention: search, fetch, and attend to memories and local context."""

from __future__ import annotations

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
from emt.model.attention_call import AttentionCall, check_options, chunk_length
from emt.model.devices import no_autocast
from emt.modes.token.search import MemorySearch
from emt.modes.token.users_own import QUERIES_AT_ONCE, attend_with_own_function
from emt.passage import Retrieved
from emt.turn import Attended


def attend_to_memories(
    call: AttentionCall,
    search: MemorySearch,
    config: MemoryConfig,
    *,
    is_recorded: bool = True,
    needs_weights: bool = False,
) -> Attended:
    """Compute a layer's attention over its local context and each query's own memories.

    Queries are taken in chunks, so that a prompt of Q tokens costs Q * k memories and not more.

    Args:
        call: the layer's attention call.
        search: what its queries search. A sequence that has nothing to find gets the layer's own
            attention, bit for bit.
        config: the settings in force.
        is_recorded: False if nobody asks what was retrieved, which lets a decode step be quicker.
        needs_weights: return attention weights, (B, H, Q, Q * k + S), as `joint_weights` lays them
            out.

    Raises:
        UnsupportedModelError: the call has a feature that cannot be merged with memories.
        MemoryUseError: the batch is not a multiple of the prompts that have scopes.
    """
    check_options(call)
    with no_autocast(call.query.device):
        attended = _attend(call, search, config, is_recorded, needs_weights)
    if search.without_memories:
        plain = search.without_memories
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
                scaling=call.scaling,
                attention_mask=mask,
                is_causal=is_causal,
                softcap=call.softcap,
                sinks=call.sinks,
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
    search: MemorySearch,
    config: MemoryConfig,
    is_recorded: bool,
    needs_weights: bool,
) -> Attended:
    num_queries = call.query.shape[2]
    if num_queries == 1 and not (is_recorded or needs_weights) and _is_plain(call, config):
        decoded = _decode(call, search)
        if decoded is not None:
            return Attended(decoded.transpose(1, 2), None, None)  # (B, 1, H, Dv)
    step = chunk_length(call, search.topk)
    step = min(step, QUERIES_AT_ONCE) if call.is_users_own else step
    parts = [
        _attend_chunk(call, search, config, start, min(start + step, num_queries), needs_weights)
        for start in range(0, num_queries, step)
    ]
    output = _cat([part.output for part, _ in parts])  # (B, H, Q, Dv)
    retrieved = _joined([chunk for _, chunk in parts])
    weights = None
    if needs_weights:
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
        not call.is_users_own
        and call.softcap is None
        and call.sinks is None
        and not config.mask_by_sim
        and (mask is None or mask.shape[1] == 1)
        and (call.alibi is None or call.alibi.distance is None)
    )


def _decode(call: AttentionCall, search: MemorySearch) -> Tensor | None:
    """Compute one token's attention, (B, H, 1, Dv); None if not all memories were found."""
    query, key = call.query, call.key
    nearest = search.nearest(call.layer_idx, query, key.shape[1])
    if nearest is None:
        return None
    memory_keys, memory_values = nearest
    mask = call.mask
    searching = search.query_heads(call.layer_idx, query.shape[1])
    return decode_attention(
        query,
        key,
        call.value,
        memory_keys,
        memory_values,
        scaling=call.scaling,
        attention_mask=mask if call.alibi is None else call.alibi.of_keys(mask),
        memory_bias=None if call.alibi is None else call.alibi.of_memories(mask),
        has_memories=None if searching is None else searching.to(query.device),
    )


def _attend_chunk(
    call: AttentionCall,
    search: MemorySearch,
    config: MemoryConfig,
    start: int,
    stop: int,
    weighed: bool,
) -> tuple[MemoryAttentionOutput, Retrieved]:
    query = call.query[:, :, start:stop]
    key, value, mask, is_causal = _local_context(call, start, stop)
    scores, ids, memory_keys, memory_values = search.retrieve(call.layer_idx, query, key.shape[1])
    usable = scores > (config.sim_threshold if config.mask_by_sim else -torch.inf)
    attended = memory_attention(
        query,
        key,
        value,
        memory_keys,
        memory_values,
        scaling=call.scaling,
        attention_mask=mask,
        is_causal=is_causal,
        memory_mask=usable,
        memory_bias=None
        if call.alibi is None
        else call.alibi.of_memories(call.attention_mask, ids),
        softcap=call.softcap,
        sinks=call.sinks,
        need_weights=weighed,
    )
    if call.is_users_own:
        output = attend_with_own_function(
            call,
            query,
            key,
            value,
            memory_keys,
            memory_values,
            mask,
            usable,
            start=start,
            is_causal=is_causal,
        )
        attended = attended._replace(output=output)
    return attended, Retrieved(call.layer_idx, ids, scores, attended.memory_weights)


def _local_context(
    call: AttentionCall, start: int, stop: int
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Return keys, values and mask of queries `start` to `stop`, and if they see causally."""
    mask = call.mask
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


def _is_causal(call: AttentionCall) -> bool:
    is_causal = call.options.get("is_causal")
    return bool(getattr(call.module, "is_causal", True) if is_causal is None else is_causal)


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
