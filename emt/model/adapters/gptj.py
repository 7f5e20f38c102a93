"""GPT-J: RoPE from a table in each layer, multi-head attention.

Source: `GPTJAttention.forward` in transformers' models/gptj/modeling_gptj.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from emt.model.adapters.rotary_table import embeddings_at, rotated_attention

ATTENTION = "transformers.models.gptj.modeling_gptj.GPTJAttention"


def forward(
    self: Any,
    hidden_states: Tensor,
    layer_past: Cache | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Any = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute one layer's attention; `attention_mask` is (B, 1, Q, S), additive."""
    batch, num_queries, _ = hidden_states.shape
    query, key, value = (
        project(hidden_states).view(batch, num_queries, self.num_attention_heads, self.head_dim)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    cos, sin = embeddings_at(self, position_ids)
    return rotated_attention(
        self,
        query,
        key,
        value,
        (cos.to(key.dtype), sin.to(key.dtype)),
        layer_past,
        attention_mask,
        cache_dtype=key.dtype,
        output_attentions=output_attentions,
    )
