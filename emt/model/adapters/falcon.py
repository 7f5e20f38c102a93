"""Falcon: ALiBi or RoPE; multi-head, multi-query or grouped-query attention.

Source: `FalconAttention.forward` in transformers' models/falcon/modeling_falcon.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers import Cache

from emt.attention.alibi import Alibi
from emt.model.adapters.common import attend, cached, slopes_of
from emt.model.attention_call import AttentionCall
from emt.model.rope import own_rotation

ATTENTION = "transformers.models.falcon.modeling_falcon.FalconAttention"


def forward(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
    layer_past: Cache | None = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute one layer's attention.

    Args:
        self: the attention module.
        hidden_states: (B, Q, hidden_size).
        alibi: (B, H, 1, S), 0 at the first visible key and rising; None for models with RoPE.
        attention_mask: (B, 1, Q, S) bool or additive; with ALiBi (B, H, Q, S), the biases where
            keys are visible and the dtype's least number elsewhere.
        output_attentions: whether weights are wanted; the family then computes eagerly.
        position_embeddings: cos and sin, each (B or 1, Q, D).
    """
    batch, num_queries, _ = hidden_states.shape
    query, key, value = (
        part.transpose(1, 2).reshape(batch, -1, num_queries, self.head_dim)
        for part in self._split_heads(self.query_key_value(hidden_states))
    )
    rotate = own_rotation(self)
    if alibi is None and rotate is not None and position_embeddings is not None:
        query, key = rotate(query, key, *position_embeddings)
    group = key.shape[1] // self.num_kv_heads  # grouped KV heads come repeated
    if layer_past is not None:
        key, value = _cached_repeated(layer_past, self, key, value, group)
    is_eager = self.config._attn_implementation != "sdpa" or output_attentions
    own: Callable[..., Any] = functools.partial(_own_sdpa, has_dropout=alibi is not None)
    if is_eager:
        own = _own_eager if alibi is None else functools.partial(_own_eager_alibi, alibi=alibi)
    output, weights = attend(
        AttentionCall(
            self,
            query,
            key[:, ::group],
            value[:, ::group],
            attention_mask if alibi is None else _visible(attention_mask),
            {"scaling": self.inv_norm_factor, "output_attentions": output_attentions},
            functools.partial(_own, own, key, value, attention_mask),
            alibi=None if alibi is None else _biases(self, alibi, is_eager),
            position_embeddings=None if alibi is not None else position_embeddings,
        )
    )
    return self.dense(output), weights


def _cached_repeated(
    cache: Cache, module: Any, key: Tensor, value: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    """Update the cache; return all keys and values, with KV heads repeated as `key` has them.

    The family caches repeated KV heads. A cache of carried context has each KV head once.
    """
    layers, layer_idx = cache.layers, module.layer_idx
    cached_keys = getattr(layers[layer_idx], "keys", None) if layer_idx < len(layers) else None
    if cached_keys is None or cached_keys.ndim < 4 or cached_keys.shape[1] == key.shape[1]:
        return cached(cache, module, key, value)
    key, value = cached(cache, module, key[:, ::group], value[:, ::group])
    return key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)


def _visible(attention_mask: Tensor) -> Tensor:
    """Return a (B, 1, Q, S) bool mask from one with biases, which hides by the dtype's minimum."""
    return attention_mask[:, :1] > torch.finfo(attention_mask.dtype).min


def _biases(module: Any, alibi: Tensor, is_eager: bool) -> Alibi:
    """Return the biases that the family adds to scaled logits.

    Eager attention adds them twice: they are in the mask, and are added again.
    """
    scaling = module.inv_norm_factor * (2 if is_eager else 1)
    return Alibi(alibi.float() * scaling, slopes_of(module, alibi).float() * scaling)


def _own(
    own: Callable[..., tuple[Tensor, Tensor | None]],
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    module: Any,
    query: Tensor,
    *_: Any,
    **__: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the family's own attention, bit for bit, from repeated keys and its own mask."""
    output, weights = own(module, query, key, value, mask)
    return output.transpose(1, 2), weights


def _own_sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    has_dropout: bool,
) -> tuple[Tensor, Tensor | None]:
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=module.attention_dropout.p if has_dropout and module.training else 0.0,
        is_causal=module.is_causal and mask is None and query.shape[2] > 1,
    )
    return output, None


def _own_eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    logits = query @ key.transpose(-1, -2) / math.sqrt(module.head_dim)
    logits = logits if mask is None else logits + mask
    weights = softmax(logits, dim=-1, dtype=query.dtype)
    return weights @ value, weights


def _own_eager_alibi(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, alibi: Tensor
) -> tuple[Tensor, Tensor | None]:
    logits = query @ key.transpose(-1, -2)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    logits = (logits + alibi) * module.inv_norm_factor
    weights = softmax(logits + mask, dim=-1, dtype=query.dtype)
    weights = module.attention_dropout(weights)
    return weights @ value, weights
