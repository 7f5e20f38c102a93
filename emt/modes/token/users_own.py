"""Memories for an attention function that the user registered: as further keys of its own softmax.

What such a function does to logits or to its output is not known, so nothing can stand in for it.
It is called as often as there are chunks of queries, with the memories of a chunk before the local
keys, and a mask that shows each query of each head its own memories only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emt.attention.softmax import visible_to
from emt.model.attention_call import AttentionCall

QUERIES_AT_ONCE = 32  # each brings its memories as keys for all


def attend_with_own_function(
    call: AttentionCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    mask: Tensor | None,
    usable: Tensor,
    *,
    start: int,
    is_causal: bool,
) -> Tensor:
    """Compute the attention of a chunk of queries with the function of a call.

    Args:
        call: the layer's call.
        query: (B, H, q, D), its queries from `start` on.
        key: (B, Hkv, S, D), local keys.
        value: (B, Hkv, S, Dv).
        memory_keys: (B, H, q, k, D), of each query.
        memory_values: (B, H, q, k, Dv).
        mask: (B, 1, q, S) bool or additive, of local keys; None for causal or none, by `is_causal`.
        usable: (B, H, q, k) bool, the memories that a query may see.
        start: the number of the first query.
        is_causal: whether queries see local keys up to their own only, where there is no mask.

    Returns:
        (B, H, q, Dv).
    """
    batch, num_heads, num_queries, _ = query.shape
    num_kv_heads, topk = key.shape[1], usable.shape[3]
    groups = num_heads // num_kv_heads
    keys, values = (
        torch.cat([part.reshape(batch, num_kv_heads, -1, part.shape[-1]).to(local), local], dim=2)
        for part, local in ((memory_keys, key), (memory_values, value))
    )  # (B, Hkv, G * q * k + S, D or Dv)
    own = torch.eye(groups * num_queries, dtype=torch.bool, device=query.device)
    sees = own.view(1, 1, groups, num_queries, -1, 1) & usable.view(
        batch, num_kv_heads, groups, num_queries, 1, topk
    )  # (B, Hkv, G, q, G * q, k)
    sees = sees.reshape(batch, num_heads, num_queries, -1)  # (B, H, q, G * q * k)
    if mask is None:
        stop = start + num_queries
        local = visible_to(start, stop, key.shape[2], key.device) if is_causal else None
        mask = query.new_zeros(1, 1, num_queries, key.shape[2])
        if local is not None:
            mask = mask.masked_fill(~local, torch.finfo(mask.dtype).min)
    if mask.dtype != torch.bool:
        hidden = torch.finfo(mask.dtype).min
        sees = torch.zeros_like(sees, dtype=mask.dtype).masked_fill(~sees, hidden)
    masks = torch.cat([sees, mask.expand(batch, num_heads, -1, -1)], dim=-1)
    output, _ = call.own(call.module, query, keys, values, masks, **call.options)
    return output.transpose(1, 2)
