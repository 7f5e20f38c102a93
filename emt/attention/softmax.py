"""Extended-mind attention as tensor functions: one softmax over retrieved and local keys.

    softmax( Q (K_M ++ K_L)^T * scaling ) (V_M ++ V_L)

Local logits, with the model's own mask, and the logits of each query's own memories are computed
apart and meet in one softmax in float32. So masks, sliding windows and caches stay as they are.

Shapes: **B** batch, **H** query heads, **Hkv** KV heads, **G** = H / Hkv, **Q** query length,
**S** local key length, **M** memory rows, **N** flat queries of one KV head (B * G * Q),
**k** retrieved, **D** and **Dv** head dims of keys and values.

Source: Klett and Ahle, Extended Mind Transformers (arXiv 2406.02332), section 3.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from emt.attention.alibi import HIDDEN


class MemoryAttentionOutput(NamedTuple):
    """What extended-mind attention computes.

    Attributes:
        output: (B, H, Q, Dv), in the query's dtype.
        memory_weights: (B, H, Q, k) float32, each retrieved memory's share of the joint softmax.
        local_weights: (B, H, Q, S) float32, the local keys' shares; None if not asked for.
    """

    output: Tensor
    memory_weights: Tensor
    local_weights: Tensor | None = None


def memory_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    *,
    scaling: float,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    memory_mask: Tensor | None = None,
    memory_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    need_weights: bool = False,
) -> MemoryAttentionOutput:
    """Attend to each query's own memories and to the local context, in one softmax.

    Args:
        query: (B, H, Q, D), as the model compares it with keys: after norms and RoPE.
        key: (B, Hkv, S, D), local keys, KV heads not repeated.
        value: (B, Hkv, S, Dv).
        memory_keys: (B, H, Q, k, D), the memories each query retrieved, not normalised.
        memory_values: (B, H, Q, k, Dv).
        scaling: the model's own factor on logits.
        attention_mask: (B or 1, H or 1, Q, S), bool (True is visible) or added to logits; None if
            every query sees all S keys.
        is_causal: the last query sees all keys, each one before it one less; without a mask only.
        memory_mask: (B, H, Q, k) bool, False for memories that get no weight.
        memory_bias: broadcastable to (B, H, Q, k), added to memory logits in float32; for families
            whose `attention_mask` has linear biases too.
        softcap: logits become softcap * tanh(logits / softcap), local and memory alike.
        sinks: (H,) logits that take part in the softmax and carry no value (GPT-OSS).
        need_weights: return the local keys' weights, too.

    Returns:
        Output and weights. A query that sees nothing at all gets zeros.

    Raises:
        ValueError: the shapes do not fit.

    Source:
        Equation 1 of arXiv 2406.02332.
    """
    _check_shapes(query, key, memory_keys, memory_values)
    num_queries = query.shape[2]
    scaled = query.float() * scaling
    is_bare = softcap is None and sinks is None and memory_bias is None
    if is_causal and is_bare and not need_weights and _has_flash(query, key, value):
        return _over_flash(query, key, value, memory_keys, memory_values, scaling, memory_mask)
    if is_causal:
        num_keys = key.shape[2]
        attention_mask = visible_to(num_keys - num_queries, num_keys, num_keys, key.device)
    local = capped(key_products(scaled, key), softcap)  # (B, H, Q, S)
    remembered = capped((memory_keys.float() @ scaled.unsqueeze(-1)).squeeze(-1), softcap)
    if memory_bias is not None:
        remembered = remembered + memory_bias  # (B, H, Q, k)
    if memory_mask is not None:
        remembered = remembered.masked_fill(~memory_mask, -torch.inf)
    logits = torch.cat([remembered, masked(local, attention_mask)], dim=-1)
    weights = masked_softmax(logits, sinks=sinks, sees_all=attention_mask is None)
    num_memories = remembered.shape[-1]
    memory_weights, local_weights = weights[..., :num_memories], weights[..., num_memories:]
    output = weighted_values(local_weights, value)
    output = output + (memory_weights.unsqueeze(-2) @ memory_values.float()).squeeze(-2)
    return MemoryAttentionOutput(
        output.to(query.dtype), memory_weights, local_weights if need_weights else None
    )


def key_products(query: Tensor, key: Tensor) -> Tensor:
    """Multiply queries (B, H, Q, D) with the keys (B, Hkv, S, D) of their group: (B, H, Q, S)."""
    batch, num_heads, num_queries, dim = query.shape
    grouped = query.float().reshape(batch, key.shape[1], -1, dim)  # (B, Hkv, G * Q, D)
    products = grouped @ key.float().transpose(-1, -2)
    return products.view(batch, num_heads, num_queries, -1)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(logits / softcap); the logits themselves without a cap."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def masked(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hide keys: logits (B, H, Q, S), and a mask that is bool (True is visible) or added."""
    if attention_mask is None:
        return logits
    if attention_mask.dtype == torch.bool:
        return logits.masked_fill(~attention_mask, -torch.inf)
    return logits + attention_mask


def masked_softmax(logits: Tensor, *, sinks: Tensor | None, sees_all: bool = False) -> Tensor:
    """Turn logits (B, H, Q, n) float32, hidden keys below `HIDDEN`, into weights of this shape.

    Sinks are (H,) logits that carry no value. A query that sees nothing at all, such as one of
    padding, gets zeros; `sees_all` says that there is none.
    """
    num_keys = logits.shape[-1]
    if sinks is not None:
        size = (*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(size)], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    if not sees_all:
        weights = weights.masked_fill(logits.amax(dim=-1, keepdim=True) < HIDDEN, 0.0)
    return weights[..., :num_keys]


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """Sum values (B, Hkv, S, Dv) by weights (B, H, Q, S): (B, H, Q, Dv) float32."""
    batch, num_heads, num_queries, num_keys = weights.shape
    grouped = weights.reshape(batch, value.shape[1], -1, num_keys)  # (B, Hkv, G * Q, S)
    return (grouped @ value.float()).view(batch, num_heads, num_queries, -1)


def joint_weights(memory_weights: Tensor, local_weights: Tensor) -> Tensor:
    """Lay out weights (B, H, Q, k) and (B, H, Q, S) of one softmax as (B, H, Q, Q * k + S).

    Column `q * k + j` is the j-th memory of query q, zero for all other queries.

    Source:
        The attention weights that the published implementation returns.
    """
    batch, num_heads, num_queries, k = memory_weights.shape
    own = torch.eye(num_queries, dtype=memory_weights.dtype, device=memory_weights.device)
    spread = memory_weights.unsqueeze(-2) * own.unsqueeze(-1)  # (B, H, Q, Q, k)
    spread = spread.view(batch, num_heads, num_queries, num_queries * k)
    return torch.cat([spread, local_weights], dim=-1)


def _has_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether torch's fused attention gives what is needed here: a prompt, on the CPU."""
    return (
        query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype == torch.float32
        and 1 < query.shape[2] == key.shape[2]
        and key.shape[3] == value.shape[3]
        and not torch.is_grad_enabled()
    )


def _over_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    scaling: float,
    memory_mask: Tensor | None,
) -> MemoryAttentionOutput:
    """Compute local attention with one fused call, and merge by its log-sum-exp."""
    group = query.shape[1] // key.shape[1]
    local, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key.repeat_interleave(group, dim=1),
        value.repeat_interleave(group, dim=1),
        0.0,
        True,
        scale=scaling,
    )  # (B, H, Q, Dv), (B, H, Q)
    remembered = (memory_keys.float() @ query.unsqueeze(-1)).squeeze(-1) * scaling  # (B, H, Q, k)
    if memory_mask is not None:
        remembered = remembered.masked_fill(~memory_mask, -torch.inf)
    total = torch.logaddexp(lse, torch.logsumexp(remembered, dim=-1)).unsqueeze(-1)
    weights = torch.exp(remembered - total)
    output = local * torch.exp(lse.unsqueeze(-1) - total)
    output = output + (weights.unsqueeze(-2) @ memory_values.float()).squeeze(-2)
    return MemoryAttentionOutput(output, weights)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor,
    *,
    scaling: float,
    attention_mask: Tensor | None = None,
    memory_bias: Tensor | None = None,
    has_memories: Tensor | None = None,
) -> Tensor:
    """Compute what `memory_attention` does for one query a sequence, with one fused call.

    The query heads of a group become the queries of their KV head, whose keys are the group's
    memories followed by the local ones; a mask lets each query head see its own memories only. The
    arguments are those of `memory_attention` for Q = 1 and k of at least 1; `memory_bias` is
    (B or 1, H, 1, 1), and `has_memories` (H,) bool is False for query heads that see none of
    theirs. Returns the output (B, H, 1, Dv), in the query's dtype; computed in float32.
    """
    batch, num_heads, _, dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    group, k = num_heads // num_kv_heads, memory_keys.shape[3]
    mask = _own_memories(group, k, num_keys, query.device)  # (G, G * k + S)
    if attention_mask is not None:
        added = masked(mask.new_zeros(1), attention_mask)  # (B or 1, H or 1, 1, S)
        local = _by_kv_head(added, group)  # (B or 1, Hkv or 1, G or 1, S)
        mask = mask.expand(*local.shape[:2], -1, -1).clone()
        mask[..., group * k :] += local.float()
    if memory_bias is not None or has_memories is not None:
        is_memory = torch.arange(mask.shape[-1], device=mask.device) < group * k
        if memory_bias is not None:
            mask = mask + _by_kv_head(memory_bias, group) * is_memory
        if has_memories is not None:
            mask = mask.masked_fill(~has_memories.view(1, -1, group, 1) & is_memory, -torch.inf)
    joined_keys, joined_values = (
        torch.cat([memory.reshape(batch, num_kv_heads, group * k, -1).float(), local.float()], 2)
        for memory, local in ((memory_keys, key), (memory_values, value))
    )
    grouped = query.reshape(batch, num_kv_heads, group, dim).float()
    output = scaled_dot_product_attention(
        grouped, joined_keys, joined_values, attn_mask=mask, scale=scaling
    )
    return output.view(batch, num_heads, 1, value.shape[-1]).to(query.dtype)


def _by_kv_head(added: Tensor, group: int) -> Tensor:
    """Split query heads: (B or 1, H or 1, 1, n) to (B or 1, Hkv or 1, G or 1, n)."""
    batch, num_heads, _, num = added.shape
    return added.view(batch, num_heads // group, group, num) if num_heads > 1 else added


@functools.lru_cache(maxsize=8)  # all layers of a step share one
def _own_memories(group: int, k: int, num_keys: int, device: torch.device) -> Tensor:
    """Return what is added to logits so that each of G queries sees its own k of G * k memories."""
    with torch.inference_mode(False):  # a later step may want gradients
        mask = torch.zeros(group, group * k + num_keys, dtype=torch.float32, device=device)
        memories = mask[:, : group * k].view(group, group, k)
        memories[~torch.eye(group, dtype=torch.bool, device=device)] = -torch.inf
        return mask


def _check_shapes(query: Tensor, key: Tensor, memory_keys: Tensor, memory_values: Tensor) -> None:
    batch, num_heads, num_queries, dim = query.shape
    num_kv_heads = key.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"query heads must be a multiple of KV heads; got {num_heads} and {num_kv_heads}."
        )
    expected = (batch, num_heads, num_queries)
    if memory_keys.shape[:3] != expected or memory_keys.shape[4:] != (dim,):
        raise ValueError(
            f"memory_keys must have shape (B={batch}, H={num_heads}, Q={num_queries}, k, D={dim}); "
            f"got {tuple(memory_keys.shape)}. Give each query head its own memories."
        )
    if memory_values.shape[:4] != memory_keys.shape[:4]:
        raise ValueError(
            f"memory_values must have shape {(*memory_keys.shape[:4], 'Dv')}, as memory_keys; "
            f"got {tuple(memory_values.shape)}."
        )


def visible_to(start: int, stop: int, num_keys: int, device: torch.device) -> Tensor:
    """Return which first keys of a prompt its queries `start` to `stop` see, (Q, S) bool."""
    queries = torch.arange(start, stop, device=device)
    return torch.arange(num_keys, device=device) <= queries.unsqueeze(-1)


def group_queries(query: Tensor, num_kv_heads: int) -> Tensor:
    """Stack each KV head's query heads: (B, H, Q, D) to (Hkv, N, D), N in the order (B, G, Q)."""
    batch, _, num_queries, dim = query.shape
    grouped = query.view(batch, num_kv_heads, -1, num_queries, dim)  # (B, Hkv, G, Q, D)
    return grouped.transpose(0, 1).reshape(num_kv_heads, -1, dim)


def ungroup(results: Tensor, batch: int, num_queries: int) -> Tensor:
    """Undo `group_queries` on results for the queries: (Hkv, N, ...) to (B, H, Q, ...)."""
    num_kv_heads, _, *rest = results.shape
    split = results.view(num_kv_heads, batch, -1, num_queries, *rest)  # (Hkv, B, G, Q, ...)
    return split.transpose(0, 1).reshape(batch, -1, num_queries, *rest)
