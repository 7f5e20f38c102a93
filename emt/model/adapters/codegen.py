"""CodeGen: GPT-J's attention with one projection, cut for four cores, and a rotation in float32.

Source: `CodeGenAttention.forward` in transformers' models/codegen/modeling_codegen.py.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers import Cache

from emt.model.adapters.gptj import embeddings_at, own, rotate_both, rotated, rotation_of
from emt.model.hook import AttentionCall, dispatch

ATTENTION = "transformers.models.codegen.modeling_codegen.CodeGenAttention"
_CORES = 4  # the projection's output is cut into as many parts, each with queries, values and keys


def forward(
    self: Any,
    hidden_states: Tensor,
    layer_past: Cache | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Any = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute one layer's attention.

    Args:
        self: the attention module.
        hidden_states: (B, Q, hidden_size).
        layer_past: the cache.
        attention_mask: (B, 1, Q, S), additive.
        position_ids: (B or 1, Q) int64.
        use_cache: ignored, as by the family.
        output_attentions: whether weights are wanted; the family's own are returned anyway.
    """
    batch, num_queries, _ = hidden_states.shape
    mixed = self.qkv_proj(hidden_states).view(batch, num_queries, _CORES, -1)
    query, value, key = (
        part.reshape(batch, num_queries, self.num_attention_heads, self.head_dim)
        for part in mixed.chunk(3, dim=-1)
    )
    value = value.transpose(1, 2)
    cos, sin = embeddings_at(self, position_ids)
    query, key = (rotated(self, part, cos, sin).transpose(1, 2) for part in (query, key))
    if layer_past is not None:
        key, value = layer_past.update(key.to(hidden_states.dtype), value, self.layer_idx)
    output, weights = dispatch(
        AttentionCall(
            self,
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attention_mask,
            {"scaling": 1 / self.scale_attn, "output_attentions": output_attentions},
            functools.partial(_own, query, key),
            position_embeddings=(cos, sin),
            rotate=functools.partial(rotate_both, rotation_of(self)),
        )
    )
    return self.resid_dropout(self.out_proj(output.reshape(batch, num_queries, -1))), weights


def _own(
    query: Tensor,
    key: Tensor,
    module: Any,
    _query: Tensor,
    _key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the family's own attention from queries and keys that are not rounded yet."""
    return own(module, query, key, value, mask)
