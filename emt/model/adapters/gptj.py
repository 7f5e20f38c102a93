"""GPT-J: RoPE from a table in each layer, multi-head attention.

Source: `GPTJAttention.forward` in transformers' models/gptj/modeling_gptj.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from emt.errors import UnsupportedModelError
from emt.model.hook import AttentionCall, dispatch
from emt.model.rope import PositionEmbeddings, own_rotation

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
    """Compute one layer's attention.

    Args:
        self: the attention module.
        hidden_states: (B, Q, hidden_size).
        layer_past: the cache.
        attention_mask: (B, 1, Q, S), additive.
        position_ids: (B or 1, Q) int64.
        use_cache: ignored, as by the family.
        output_attentions: whether weights are wanted; the family's own are returned anyway.
        **kwargs: ignored, as by the family.
    """
    batch, num_queries, _ = hidden_states.shape
    query, key, value = (
        project(hidden_states).view(batch, num_queries, self.num_attention_heads, self.head_dim)
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    value = value.transpose(1, 2)
    cos, sin = embeddings_at(self, position_ids)
    cos, sin = cos.to(key.dtype), sin.to(key.dtype)
    query, key = (rotated(self, part, cos, sin).transpose(1, 2) for part in (query, key))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    output, weights = dispatch(
        AttentionCall(
            self,
            query,
            key,
            value,
            attention_mask,
            {"scaling": 1 / self.scale_attn, "output_attentions": output_attentions},
            own,
            position_embeddings=(cos, sin),
            rotate=functools.partial(rotate_both, rotation_of(self)),
        )
    )
    return self.resid_dropout(self.out_proj(output.reshape(batch, num_queries, -1))), weights


def own(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute the family's own attention, bit for bit: it has a method for that."""
    output, weights = module._attn(query, key, value, mask)
    return output.transpose(1, 2), weights


def embeddings_at(module: Any, position_ids: Tensor) -> PositionEmbeddings:
    """Return cos and sin, each (B or 1, Q, rotary dims / 2), from the module's table."""
    table = module.embed_positions.to(position_ids.device)
    sin, cos = table[position_ids].chunk(2, dim=-1)
    return cos, sin


def rotated(module: Any, part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys, (B, Q, H, D), as far as the family does."""
    num_rotated = part.shape[-1] if module.rotary_dim is None else module.rotary_dim
    turned: Tensor = rotation_of(module)(part[..., :num_rotated], sin, cos)
    return torch.cat([turned, part[..., num_rotated:]], dim=-1)


def rotation_of(module: nn.Module) -> Callable[..., Tensor]:
    """Return `apply_rotary_pos_emb(tensor, sin, cos)`, tensor (B, Q, H, D), of a module's file."""
    found = own_rotation(module)
    if found is None:
        raise UnsupportedModelError(
            f"expected an apply_rotary_pos_emb beside {type(module).__name__}; found none."
        )
    return found


def rotate_both(
    rotate: Callable[..., Tensor], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, (B, H, Q, D) and (B, Hkv, Q, D)."""
    both = (rotate(part.transpose(1, 2), sin, cos).transpose(1, 2) for part in (query, key))
    return next(both), next(both)
