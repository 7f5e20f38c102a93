"""CodeGen: GPT-J's attention with one projection, cut for four cores, and a rotation in float32.

Source: `CodeGenAttention.forward` in transformers' models/codegen/modeling_codegen.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from emt.model.adapters.rotary_table import embeddings_at, rotated_attention

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
    """Compute one layer's attention; `attention_mask` is (B, 1, Q, S), additive."""
    batch, num_queries, _ = hidden_states.shape
    mixed = self.qkv_proj(hidden_states).view(batch, num_queries, _CORES, -1)
    query, value, key = (
        part.reshape(batch, num_queries, self.num_attention_heads, self.head_dim)
        for part in mixed.chunk(3, dim=-1)
    )
    return rotated_attention(
        self,
        query,
        key,
        value,
        embeddings_at(self, position_ids),
        layer_past,
        attention_mask,
        cache_dtype=hidden_states.dtype,
        output_attentions=output_attentions,
    )
